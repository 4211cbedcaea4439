"""Deployments: what to serve, whether there is room for it, and deploying and removing it on Ray Serve."""
