"""Every architecture that can be made small: packed where that is chosen, padded, and a block at a time, rows have the
loss of each alone.

make test-full                                    # minutes on one core; CI does not run it
python -m tests.full.test_architectures           # writes the table of docs/reference/architectures.md
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import datasets
import pytest
import torch

from llm_ray.errors import ModelError
from llm_ray.train.attention import switch_to_packed, why_not_packed
from llm_ray.train.batches import collate
from llm_ray.train.loss import SupervisedLoss
from tests.full.architectures import KINDS, small

PAGE = Path(__file__).parents[2] / "docs/reference/architectures.md"
ROWS = [
    [(7 * i + 3) % 90 for i in range(31)],
    [(5 * i + 11) % 90 for i in range(9)],
    [(3 * i + 1) % 90 for i in range(17)],
]
LARGE = {"blt", "gemma3", "gemma4_unified_assistant", "git", "got_ocr2", "phi4_multimodal"}
"""Of parts that are no language model, and have no small sizes."""
OTHERS = {
    "gemma3n",
    "musicgen",
    "musicgen_melody",
    "gemma4_assistant",
    "dbrx",
    "cohere_compass_text",
    "qwen4_exp",
    "qwen4_exp_text",
}
"""Not made from their configuration's own values by this release of transformers, or only with more packages."""
PADDING = {"cpmant", "hy_v4", "prophetnet"}
"""Rows beside longer ones, padded, are not what they are alone."""


@dataclass(frozen=True)
class Found:
    """Losses of the rows each alone, padded, padded and by the chosen way to compute the loss, and packed where that is
    chosen."""

    why_not: str
    blockwise: bool
    alone: float
    padded: float
    chosen: float
    packed: float | None

    def line(self, kind: str) -> str:
        note = "; next to longer rows its logits differ even when padded" if kind in PADDING else ""
        return f"| {kind} | {'packed' if not self.why_not else f'padded: {self.why_not}{note}'} | {'blockwise' if self.blockwise else 'its own'} |"


@functools.cache
def look(kind: str) -> Found:
    """Compute the rows in every way with a small model of architecture `kind`."""
    data = datasets.Dataset.from_dict({"input_ids": ROWS, "labels": ROWS})
    model = small(kind)
    why_not = why_not_packed(model)
    with torch.no_grad():
        loss = SupervisedLoss(model, model, packed=False)
        alone = sum(loss(collate(data, [row], packed=False)).item() for row in range(len(ROWS)))
        padded = loss(collate(data, [0, 1, 2], packed=False)).item()
        blockwise = loss.choose_blockwise()
        chosen = loss(collate(data, [0, 1, 2], packed=False)).item()
        packed = None
        if not why_not:
            switch_to_packed(model)
            loss.packed = True
            packed = loss(collate(data, [0, 1, 2], packed=True)).item()
    return Found(why_not, blockwise, alone, padded, chosen, packed)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in LARGE | OTHERS])
def test_losses_are_those_of_each_row_alone(kind: str) -> None:
    found = look(kind)
    assert (found.padded == pytest.approx(found.alone, rel=1e-4)) == (kind not in PADDING)
    assert found.chosen == pytest.approx(found.padded, rel=1e-4)
    assert found.packed is None or found.packed == pytest.approx(found.alone, rel=1e-4)
    assert found.line(kind) in PAGE.read_text(encoding="utf-8").splitlines(), "write the table anew"


@pytest.mark.parametrize("kind", sorted(LARGE | OTHERS))
def test_what_is_left_out_cannot_be_made_small(kind: str) -> None:
    with pytest.raises((ValueError, TypeError, AttributeError, ImportError, RuntimeError, ModelError)):
        look(kind)


def write() -> None:
    """Write the table into its page."""
    kinds = [kind for kind in KINDS if kind not in LARGE | OTHERS]
    head = PAGE.read_text(encoding="utf-8").partition("| architecture |")[0]
    lines = [
        "| architecture | rows of a batch | loss |",
        "| --- | --- | --- |",
        *(look(kind).line(kind) for kind in kinds),
    ]
    left = ", ".join(sorted(LARGE | OTHERS))
    PAGE.write_text(
        head + "\n".join(lines) + f"\n\nNot checked, because no small model of them can be made: {left}.\n",
        encoding="utf-8",
    )


if __name__ == "__main__":
    write()
