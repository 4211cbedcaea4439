"""Perplexity of weights on held-out text: whether speed comes at the cost of quality.

python -m benchmarks.league.quality "openvino bf16" FOLDER tokens.json

Every form computes the probabilities of the same tokens, each given all preceding ones. vLLM's weights are computed by
transformers in the same data type, OpenVINO's by its runtime with our engine's properties. llama.cpp is queried over
HTTP, one token at a time: its server returns no prompt probabilities, only those of the whole vocabulary for the next
token.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import httpx

from llm_ray.errors import ConfError


class Failed(Exception):
    """The perplexity could not be computed."""


def tokens_of(text: Path, model: Path, number: int) -> list[int]:
    """Returns the first `number` tokens of `text` by the tokenizer in the folder `model`. Raises ConfError if it is not
    a text with at least two."""
    from transformers import AutoTokenizer

    try:
        written = text.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfError(f"--text {text}: not a text in UTF-8: name another file") from error
    ids: list[int] = AutoTokenizer.from_pretrained(model)(written, add_special_tokens=False)["input_ids"]
    if len(ids) < 2:
        raise ConfError(f"--text {text}: fewer than two tokens: name a longer text")
    return ids[:number]


def offline(library: str, folder: Path, tokens: Path) -> float:
    """Returns the perplexity computed by a library in its own process. Raises Failed."""
    command = [sys.executable, "-m", "benchmarks.league.quality", library, str(folder), str(tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failed(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit code {done.returncode}")
    return float(done.stdout.strip().splitlines()[-1])


def over_http(url: str, tokens: list[int], vocabulary: int) -> float:
    """Returns the perplexity computed by llama.cpp's server at `url` (its root). Raises Failed."""
    losses = []
    try:
        with httpx.Client(base_url=url, timeout=120, trust_env=False) as client:
            for position in range(1, len(tokens)):
                body = {"prompt": tokens[:position], "n_predict": 1, "n_probs": vocabulary, "temperature": 0}
                answer = client.post("/completion", json=body | {"cache_prompt": True}).raise_for_status().json()
                likely = answer["completion_probabilities"][0]["top_logprobs"]
                losses.append(-next(entry["logprob"] for entry in likely if entry["id"] == tokens[position]))
    except (httpx.HTTPError, KeyError, IndexError, ValueError, StopIteration) as error:
        raise Failed(f"{url}/completion: {error or type(error).__name__}") from error
    return perplexity(losses)


def perplexity(losses: list[float]) -> float:
    """Returns the perplexity for the negative log-likelihoods of tokens."""
    return math.exp(math.fsum(losses) / len(losses))


@click.command()
@click.argument("library")
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("tokens", type=click.Path(path_type=Path))
def main(library: str, folder: Path, tokens: Path) -> None:
    import torch

    ids = torch.tensor([json.loads(tokens.read_text())])
    name, _, precision = library.partition(" ")
    logits = (_torch if name == "torch" else _openvino)(folder, precision, ids)
    losses = torch.nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:], reduction="none")
    print(perplexity(losses.tolist()))


def _torch(folder: Path, precision: Any, ids: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    from llm_ray.hardware import torch_dtype

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch_dtype(precision)).eval()
    with torch.no_grad():
        return model(ids).logits


def _openvino(folder: Path, precision: Any, ids: Any) -> Any:
    import numpy as np
    import openvino as ov
    import torch

    from llm_ray.models.folder import OPENVINO
    from llm_ray.serve.engines.openvino import arithmetic, precision_properties

    model = ov.Core().compile_model(folder / OPENVINO, "CPU", precision_properties(arithmetic(precision)))
    length = ids.shape[1]
    given = {
        "input_ids": ids.numpy(),
        "attention_mask": np.ones((1, length), np.int64),
        "position_ids": np.arange(length, dtype=np.int64)[None],
        "beam_idx": np.zeros(1, np.int32),
    }
    names = {name for port in model.inputs for name in port.names}
    request = model.create_infer_request()
    found = request.infer({name: value for name, value in given.items() if name in names})
    return torch.from_numpy(np.array(found["logits"]))


if __name__ == "__main__":
    main()
