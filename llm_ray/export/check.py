"""Checks before training that the export will work, and after it that the exported model equals the trained one.

``rehearse`` runs the export at the start, without weights, so that errors do not show up only after hours of training.
``Comparison`` tracks the loss on a few sequences from the trained model to the exported folder.
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from llm_ray.conf.finetune import FinetuneConf
from llm_ray.data.prepare import Split, open_split
from llm_ray.errors import ConfError, DataError, ModelError, RunError
from llm_ray.models.limits import positions
from llm_ray.models.load import (
    Base,
    load_empty_model,
    load_generation,
    load_tokenizer,
    mend_generation,
    quietly,
    stored_dtype,
)
from llm_ray.models.openvino import lineage
from llm_ray.models.registry import outdated
from llm_ray.models.tokens import COMPOSED, doubt

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

ROWS, TOKENS = 8, 128
"""Number of sequences for the comparison, and their maximum length."""
MERGING, ROUNDING, SAVING = 1e-3, 5e-2, 1e-3
"""Relative tolerances of the loss: after merging adapters (in fp32), rounding weights to 16 bits, and saving."""
_STATE_BYTES = 12
"""Bytes of a trainable weight in a checkpoint: the weight and AdamW's two moments in fp32."""


def rehearse(conf: FinetuneConf, base: Base) -> list[str]:
    """Tries out the export with the model's layers but without its weights, and checks for enough disk space.

    Returns notes for the user. Raises LlmRayError for problems that would make the export fail.
    """
    with quietly():
        return _rehearse(conf, base)


def _rehearse(conf: FinetuneConf, base: Base) -> list[str]:
    import torch

    from llm_ray.evaluate.generate import end_tokens
    from llm_ray.train.model import add_adapters
    from llm_ray.train.trained import untie

    location, tokenizer = base.location, load_tokenizer(base)
    model = load_empty_model(base, torch.float32)
    if (most := positions(model)) and conf.data.max_length > most:
        raise ConfError(
            f"data.max_length is {conf.data.max_length}, but the model {location} has positions for {most} tokens: "
            f"set it to {most} at most"
        )
    if (pad := tokenizer.pad_token_id) is not None and pad >= (size := model.get_input_embeddings().weight.shape[0]):
        raise ModelError(
            f"the tokenizer of {location} pads with {tokenizer.pad_token!r} (token {pad}), but the model has "
            f"embeddings for {size} tokens: set another pad_token in its tokenizer_config.json, or use the model's "
            "own tokenizer"
        )
    if conf.model.weights:
        from llm_ray.models.fewbits import check_few_bits

        check_few_bits(model, location, conf.model.weights, conf.tuning.lora.modules_to_save)
    notes = _doubts(base)
    if settings := load_generation(base):
        notes += [
            f"{location.name}: generation_config.json: {change}" for change in mend_generation(settings, location)
        ]
        model.generation_config = settings
    model.generation_config.eos_token_id = end_tokens(model, tokenizer)
    with tempfile.TemporaryDirectory(prefix="llm-ray-export-") as folder:
        try:
            model.save_pretrained(folder, state_dict={})
            tokenizer.save_pretrained(folder)
        except Exception as error:  # transformers' own checks of settings and files raise many kinds
            raise ModelError(f"a model finetuned from {location} could not be saved: {error}") from error
        check_saved_tokenizer(tokenizer, Path(folder), conf.model.trust_remote_code)
    if conf.tuning.method == "lora":
        adapted = add_adapters(model, conf.tuning.lora)
        learning = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        if untie(model):
            notes.append(
                "input and output embeddings share their weights but are trained separately: the exported model has "
                "both"
            )
    else:
        learning = sum(p.numel() for p in model.parameters())
    whole = sum(p.numel() for p in model.parameters())
    _check_room(conf, base, whole, learning)
    return notes


def _doubts(base: Base) -> list[str]:
    """Returns warnings about the tokenizer of a base that is a GGUF file, or was converted from one."""
    name, folder = base.location.name, base.location.folder
    if folder is None or base.model.tokenizer:
        return []
    if base.model.gguf_file:
        return [note] if (note := doubt(folder / base.model.gguf_file)) else []
    if outdated(folder):
        return [
            f"{name} was imported by an older llm-ray, which split numbers and blank lines into tokens differently "
            "from how the model was trained: import it again with --force, then finetune it"
        ]
    lineage_note = lineage(folder).get("note")
    return [str(lineage_note)] if lineage_note else []


def check_saved_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path, trust_remote_code: bool) -> None:
    """Raises ModelError if the tokenizer saved in `folder`, loaded as engines do, behaves differently from
    `tokenizer`."""
    from transformers import AutoTokenizer

    saved = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if (
        saved(COMPOSED)["input_ids"] != tokenizer(COMPOSED)["input_ids"]
        or saved.chat_template != tokenizer.chat_template
    ):
        raise ModelError(
            f"the tokenizer of {tokenizer.name_or_path} changes when it is saved and loaded again "
            f"({type(saved).__name__}): with the finetuned model it would produce different tokens than in training. Set "
            "model.tokenizer to a folder whose tokenizer does not change"
        )


class Comparison:
    """Tracks the loss on a few sequences from the trained model to the exported one.

    All tokens count, supervised or not, since the question is whether two models are equal, not how good they are.
    """

    def __init__(self, conf: FinetuneConf, tokenizer: PreTrainedTokenizerBase, text: str) -> None:
        """Uses held-out sequences, else training sequences, or `text` if neither is on disk any more."""
        self.rows, self.which = _sequences(conf)
        if not self.rows:
            self.rows, self.which = (
                [tokenizer(text, add_special_tokens=False)["input_ids"][:TOKENS]],
                "sequence(s) of text",
            )
        self.losses: list[float] = []

    def record(self, model: torch.nn.Module, after: str = "", tolerance: float = 0.0) -> None:
        """Records the loss of `model`. Raises ModelError if it differs from the previous one by more than `tolerance`
        (relative). `after` names the step in between, and is empty for the first model."""
        import torch
        import torch.nn.functional as F

        summed, tokens = 0.0, 0
        model.eval()
        with torch.inference_mode():
            for row in self.rows:
                ids = torch.tensor([row])
                logits = model(input_ids=ids).logits[0, :-1].float()
                summed += F.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
                tokens += len(row) - 1
        self.losses.append(summed / tokens)
        if not after:
            return
        before, now = self.losses[-2:]
        if not abs(now - before) <= tolerance * max(abs(before), 1.0):
            raise ModelError(
                f"the exported model differs from the trained one: on {len(self.rows)} {self.which} its loss is "
                f"{now:.4f} after {after}, but was {before:.4f} before. Nothing was written to output/, and the "
                "checkpoint is unchanged: please report this, with the model's name and the conf's section tuning"
            )

    def __str__(self) -> str:
        return f"checked: on {len(self.rows)} {self.which} the exported model's loss is {self.losses[-1]:.4f}, the trained one's {self.losses[0]:.4f}"


def _sequences(conf: FinetuneConf) -> tuple[list[list[int]], str]:
    splits: tuple[tuple[Split, str], ...] = (("validation", "held-out sequences"), ("train", "training sequences"))
    for split, which in splits:
        with contextlib.suppress(DataError):
            data = open_split(conf.run_dir / "prepared", split)
            first = (row["input_ids"][:TOKENS] for row in itertools.islice(data, ROWS))
            if rows := [row for row in first if len(row) > 1]:
                return rows, which
    return [], ""


def _check_room(conf: FinetuneConf, base: Base, parameters: int, learning: int) -> None:
    """Raises RunError if the disk of the runs has no room for the exported model and the checkpoints. `parameters`,
    `learning`: numbers of all and of trainable weights."""
    from llm_ray.models.convert import size_on_disk

    run = conf.run_dir
    checkpoints = learning * (_STATE_BYTES * conf.checkpoint.keep + _STATE_BYTES // 3)  # and the best weights
    existing = sum(path.stat().st_size for path in (run / "checkpoint").rglob("*") if path.is_file())
    needed = max(0, checkpoints - existing)
    if "export" in conf.stages:
        needed += parameters * stored_dtype(base).itemsize
    if "convert" in conf.stages:
        needed += size_on_disk(parameters, conf.convert.weights)
    free = shutil.disk_usage(next(path for path in (run, *run.parents) if path.is_dir())).free
    if needed > free:
        raise RunError(
            f"{run} needs about {needed / 2**30:.1f} GiB for checkpoints and the exported model, but "
            f"{free / 2**30:.1f} GiB are free there: free some space, or set paths.runs to another disk"
        )
