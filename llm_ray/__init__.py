"""Finetune and serve large language models on Ray, on Xeon clusters without GPUs."""

__version__ = "0.2.0"
