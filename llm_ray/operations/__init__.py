"""Operations that the playbooks run on a cluster's head: its state, checks, and draining a node."""
