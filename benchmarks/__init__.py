"""Side-by-side measurements: each figure against its floor, in one run on one machine, as a ratio."""
