"""Throw-away hosts, and site.yml and the workflows against them. Root: `make test-lab`."""
