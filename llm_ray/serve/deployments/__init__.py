"""Deployments: what is to be served, whether there is room for it, and bringing it onto Ray Serve and off it."""
