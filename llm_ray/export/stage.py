"""Export: the trained weights as a Hugging Face model that any tool loads, with its tokenizer and chat template, the adapter beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llm_ray.cluster import Cluster, check_resources, node_selector
from llm_ray.conf.schema import FinetuneConf
from llm_ray.console import Reporter
from llm_ray.files import replace_folder, write_text


def export(conf: FinetuneConf, cluster: Cluster, checkpoint: Path, card: str, reporter: Reporter) -> Path:
    """Write `output/` of the run, whole or not at all; returns it. `card` is the model card's text."""
    import ray

    cpus = check_resources(conf.runtime, cluster)
    with reporter.bar("exporting", 1) as bar:
        ray.get(
            ray.remote(num_cpus=cpus, max_retries=conf.runtime.max_failures, label_selector=node_selector(conf.runtime, cluster))(
                _export
            ).remote(conf.model_dump(mode="json"), str(checkpoint), card)
        )
        bar.update(1, 1)
    return conf.run_dir / "output"


def _export(conf_json: dict[str, Any], checkpoint: str, card: str) -> None:
    import torch

    from llm_ray.evaluate.generate import end_tokens
    from llm_ray.models.load import load_tokenizer, stored_dtype
    from llm_ray.train.trained import load_adapted, load_trained

    conf = FinetuneConf.model_validate(conf_json)
    tokenizer = load_tokenizer(conf.model, conf.paths)
    with replace_folder(conf.run_dir / "output") as folder:
        if conf.tuning.method == "lora":
            adapted = load_adapted(conf, Path(checkpoint), torch.float32)
            adapted.peft_config["default"].base_model_name_or_path = conf.model.base
            adapted.save_pretrained(folder / "adapter", save_embedding_layers=bool(conf.tuning.lora.modules_to_save))
            write_text(folder / "adapter" / "README.md", card)  # in place of peft's empty one
            model = adapted.merge_and_unload()
        else:
            model = load_trained(conf, Path(checkpoint), torch.float32)
        model = model.to(stored_dtype(conf.model, conf.paths))
        model.config.use_cache = True
        model.generation_config.eos_token_id = end_tokens(model, tokenizer)  # what training taught to end with has to end generation
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_text(folder / "README.md", card)
