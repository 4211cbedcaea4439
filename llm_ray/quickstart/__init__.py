"""The complete workflow on one machine: finetune a small model on bundled data, deploy it, and test what it has
learned."""
