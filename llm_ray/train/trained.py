"""A run's trained model in a single process: its base with the weights of a checkpoint."""

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
    """Returns the checkpoint with the run's final weights: the best by validation loss if there is one, else the last.
    Raises RunError if there is none."""
    folder = conf.run_dir / "checkpoint"
    if conf.training.best_checkpoint and (folder / BEST / ".metadata").is_file():
        return folder / BEST
    found = list_checkpoints(folder)
    if not found:
        raise RunError(f"run {conf.name} has no checkpoint in {folder}: run its stage train first")
    return found[-1]


class _Named(nn.Module):
    """Gives weights the same names as in training, where the model is the attribute `model` of `SupervisedLoss`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


def load_adapted(conf: FinetuneConf, base: Base, checkpoint: Path, dtype: torch.dtype) -> PeftModel:
    """Loads the base in `dtype`, or quantized as in training, with the checkpoint's adapters in fp32."""
    causal = load_model(base, dtype, conf.model.weights, conf.tuning.lora.modules_to_save)
    model = add_adapters(causal, conf.tuning.lora)
    load_weights(checkpoint, _Named(model))
    untie(causal)
    return model


def merge(adapted: PeftModel, dtype: torch.dtype) -> PreTrainedModel:
    """Returns the model with its adapters merged, in `dtype`; `adapted` must not be used afterwards.

    Quantized layers are dequantized, since the adapters were trained on these weights and not on the original ones. They
    are merged in fp32 one at a time to save memory.
    """
    for name, layer in list(adapted.named_modules()):
        if isinstance(layer, LoraLinear) and isinstance(layer.base_layer, FewBitsLinear):
            layer.base_layer = widened(layer.base_layer, torch.float32)
            layer.merge()
            layer.base_layer.to(dtype)
        elif isinstance(layer, FewBitsLinear) and not name.endswith(".base_layer"):
            adapted.set_submodule(name, widened(layer, dtype))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All adapters are already merged", UserWarning)  # the layers above
        return adapted.merge_and_unload().to(dtype)


def untie(causal: PreTrainedModel) -> bool:
    """Unties input and output embeddings if they share weights and either was trained. Returns whether it did.

    Merging the trained weights of one into the shared tensor would change the other, too.
    """
    embeddings = causal.get_input_embeddings(), causal.get_output_embeddings()
    embedding, head = (
        getattr(module, "base_layer", None) or getattr(module, "original_module", module) for module in embeddings
    )
    trained = any(isinstance(module, (BaseTunerLayer, ModulesToSaveWrapper)) for module in embeddings)
    if not trained or head is None or head.weight is not embedding.weight:
        return False
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    for config in (causal.config, causal.config.get_text_config()):
        config.tie_word_embeddings = False
    causal.all_tied_weights_keys = causal.get_expanded_tied_weights_keys(all_submodels=True)
    return True


def load_trained(conf: FinetuneConf, base: Base, checkpoint: Path | None, dtype: torch.dtype) -> PreTrainedModel:
    """Loads the trained model in `dtype`, with adapters merged; without a checkpoint, the base model."""
    if checkpoint is None:
        return load_model(base, dtype)
    if conf.tuning.method == "lora":
        return merge(load_adapted(conf, base, checkpoint, torch.float32), dtype)
    model = load_model(base, torch.float32)
    load_weights(checkpoint, _Named(model))
    return model.to(dtype)
