"""A run's trained model in one process: its base with a checkpoint's weights."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from llm_ray.conf.finetune import FinetuneConf
from llm_ray.errors import RunError
from llm_ray.models.fewbits import FewBitsLinear, widened
from llm_ray.models.load import Base, load_model
from llm_ray.train.checkpoint import BEST, list_checkpoints, load_weights
from llm_ray.train.model import add_adapters


def final_checkpoint(conf: FinetuneConf) -> Path:
    """The checkpoint whose weights are the run's result: the best by validation loss where there is one, else the last.
    Raises RunError without any."""
    folder = conf.run_dir / "checkpoint"
    if conf.training.best_checkpoint and (folder / BEST / ".metadata").is_file():
        return folder / BEST
    found = list_checkpoints(folder)
    if not found:
        raise RunError(f"run {conf.name} has no checkpoint in {folder}: run its stage train first")
    return found[-1]


class _Named(nn.Module):
    """Gives weights the names that training gave them: there the model is the attribute `model` of the module with the
    loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


def load_adapted(conf: FinetuneConf, base: Base, checkpoint: Path, dtype: torch.dtype) -> PeftModel:
    """The base in `dtype`, or in the few bits it was trained in, with the checkpoint's adapters (fp32) beside it."""
    causal = load_model(base, dtype, conf.model.weights, conf.tuning.lora.modules_to_save)
    model = add_adapters(causal, conf.tuning.lora)
    load_weights(checkpoint, _Named(model))
    untie(causal)
    return model


def merge(adapted: PeftModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model with its adapters merged, in `dtype`; of `adapted` nothing is left.

    Layers in few bits get the weights that the adapters were trained on, not those that they were quantized from: with
    these it would be another model. They are merged in fp32 one at a time, so that no more than one of them is.
    """
    for name, layer in list(adapted.named_modules()):
        if isinstance(layer, LoraLinear) and isinstance(layer.base_layer, FewBitsLinear):
            layer.base_layer = widened(layer.base_layer, torch.float32)
            layer.merge()
            layer.base_layer.to(dtype)
        elif isinstance(layer, FewBitsLinear) and not name.endswith(".base_layer"):
            adapted.set_submodule(name, widened(layer, dtype))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All adapters are already merged", UserWarning)  # of the layers above
        return adapted.merge_and_unload().to(dtype)


def untie(causal: PreTrainedModel) -> bool:
    """Part the input and output embeddings of a model with adapters, where they share weights and either has learnt;
    whether it did so.

    Merged into weights that are shared, what one has learnt would change the other, too.
    """
    ends = causal.get_input_embeddings(), causal.get_output_embeddings()
    embedding, head = (getattr(end, "base_layer", None) or getattr(end, "original_module", end) for end in ends)
    learnt = any(isinstance(end, (BaseTunerLayer, ModulesToSaveWrapper)) for end in ends)
    if not learnt or head is None or head.weight is not embedding.weight:
        return False
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    for config in (causal.config, causal.config.get_text_config()):
        config.tie_word_embeddings = False
    causal.all_tied_weights_keys = causal.get_expanded_tied_weights_keys(all_submodels=True)
    return True


def load_trained(conf: FinetuneConf, base: Base, checkpoint: Path | None, dtype: torch.dtype) -> PreTrainedModel:
    """The base model (without a checkpoint), or the trained one with its adapters merged, in `dtype`."""
    if checkpoint is None:
        return load_model(base, dtype)
    if conf.tuning.method == "lora":
        return merge(load_adapted(conf, base, checkpoint, torch.float32), dtype)
    model = load_model(base, torch.float32)
    load_weights(checkpoint, _Named(model))
    return model.to(dtype)
