"""Base models: where they lie, whether they are whole, and how they are loaded."""
