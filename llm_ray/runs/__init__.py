"""A run's folder: lineage, stage marks, metrics, listing, comparison, model card."""
