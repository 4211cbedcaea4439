"""Side-by-side benchmarks: each figure and its baseline, measured in one run on one machine, with their ratio."""
