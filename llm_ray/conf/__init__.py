"""Confs: from a Jinja template to YAML to a validated conf of a finetune, an endpoint or a sweep."""
