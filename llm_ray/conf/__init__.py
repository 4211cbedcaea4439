"""Confs: Jinja template to YAML to a validated :class:`llm_ray.conf.finetune.FinetuneConf`."""
