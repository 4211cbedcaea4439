"""Facts of a host and the rules that judge them, shared by `llm-ray doctor` and Ansible's preflight."""
