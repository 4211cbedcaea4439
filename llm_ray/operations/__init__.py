"""What the playbooks ask of a running cluster, from its head: its state, whether it works, and to drain a node."""
