"""A host's facts, and the rules that judge them: one of each for `llm-ray doctor` and for Ansible's preflight."""
