"""What `llm-ray doctor` checks. Each check is a function of facts that returns what it found; `collect` reads the facts
and calls them. Rules that preflight has as well are in llm_ray/host/rules.py."""
