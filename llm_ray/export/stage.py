"""Exports the trained weights as a standard Hugging Face model with tokenizer and chat template, and the adapter beside
it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_ray.cluster import Workers, node_selector, results
from llm_ray.conf.finetune import FinetuneConf
from llm_ray.errors import RunError
from llm_ray.files import replace_folder, write_text
from llm_ray.models.load import Base, load_tokenizer, stored_dtype
from llm_ray.progress import Reporter

if TYPE_CHECKING:
    from peft import PeftModel


def export(conf: FinetuneConf, base: Base, workers: Workers, checkpoint: Path, card: str, reporter: Reporter) -> Path:
    """Writes the run's `output/` atomically, in a Ray task, and returns its path. `card`: the model card's text. Raises
    ModelError, TrainError, RunError."""
    import ray

    with reporter.bar("exporting", 1) as bar:
        checked = results(
            ray.remote(
                num_cpus=workers.cpus,
                max_retries=conf.runtime.max_failures,
                label_selector=node_selector(conf.runtime, workers.cluster),
            )(export_here).remote(conf.model_dump(mode="json"), base, str(checkpoint), card)
        )
        bar.update(1, 1)
    reporter.line(f"  {checked}")
    return conf.run_dir / "output"


def export_here(conf_json: dict[str, Any], base: Base, checkpoint: str, card: str) -> str:
    """Writes `output/` in this process, and returns the result of its check as a line for the user. Raises ModelError,
    TrainError, RunError."""
    from safetensors import SafetensorError

    conf = FinetuneConf.model_validate(conf_json)
    try:
        return _write(conf, base, Path(checkpoint), card)
    except (OSError, SafetensorError) as error:
        free = f"{shutil.disk_usage(conf.run_dir).free / 2**30:.1f} GiB are free there"
        raise RunError(
            f"{conf.run_dir / 'output'} cannot be written: {error}. {free}; checkpoints are complete: free some "
            "space, then run the same command again"
        ) from error


def _write(conf: FinetuneConf, base: Base, checkpoint: Path, card: str) -> str:
    import torch
    from transformers import AutoModelForCausalLM

    from llm_ray.evaluate.generate import end_tokens
    from llm_ray.export.check import MERGING, ROUNDING, SAVING, Comparison, check_saved_tokenizer
    from llm_ray.train.trained import load_adapted, load_trained, merge

    tokenizer = load_tokenizer(base)
    comparison = Comparison(conf, tokenizer, card)
    dtype = stored_dtype(base)
    with replace_folder(conf.run_dir / "output") as folder:
        if conf.tuning.method == "lora":
            adapted = load_adapted(conf, base, checkpoint, torch.float32)
            save_adapter(adapted, folder / "adapter", conf.model.base)
            write_text(folder / "adapter" / "README.md", card)  # replaces peft's empty template
            comparison.record(adapted)
            # A quantized base means that memory is short, so never hold all of it in fp32.
            model = merge(adapted, dtype if conf.model.weights else torch.float32)
            del adapted
            comparison.record(model, "merging the adapters", MERGING if model.dtype == torch.float32 else ROUNDING)
        else:
            model = load_trained(conf, base, checkpoint, torch.float32)
            comparison.record(model)
        if model.dtype != dtype:
            model = model.to(dtype)
            comparison.record(model, f"rounding to {str(dtype).removeprefix('torch.')}", ROUNDING)
        model.config.use_cache = True
        # Generation must stop at the token that the model was trained to end with.
        model.generation_config.eos_token_id = end_tokens(model, tokenizer)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_text(folder / "README.md", card)
        del model  # memory may suffice for only one
        saved = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, trust_remote_code=conf.model.trust_remote_code
        )
        comparison.record(saved, "saving and reloading", SAVING)
        check_saved_tokenizer(tokenizer, folder, conf.model.trust_remote_code)
    return str(comparison)


def save_adapter(adapted: PeftModel, folder: Path, base: str) -> None:
    """Writes the adapter in PEFT's format, with `base` as its base model: all trained weights, including fully trained
    layers, but no frozen ones."""
    adapted.peft_config["default"].base_model_name_or_path = base
    adapted.save_pretrained(folder, save_embedding_layers=False)
