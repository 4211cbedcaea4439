"""Training on Ray Train: one training function (`recipe`), and its parts."""
