"""Base models: locating, checking and loading them."""
