"""Training on Ray Train: one training function (`recipe`), and what it is made of."""
