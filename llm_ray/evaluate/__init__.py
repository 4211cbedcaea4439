"""The evaluation stage: losses and generated answers of the model before and after training."""
