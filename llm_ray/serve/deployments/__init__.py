"""Deployments: plans what to serve and where it fits, and deploys and removes models on Ray Serve."""
