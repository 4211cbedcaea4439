"""The export stage: a run's Hugging Face model."""
