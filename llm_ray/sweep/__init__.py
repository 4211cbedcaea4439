"""Sweeps: trials of a finetune on Ray Tune, each an ordinary run, and their report."""
