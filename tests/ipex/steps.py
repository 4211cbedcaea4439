"""A few training steps and an answer in the environment that runs it, without Ray: what test_ipex.py compares. Prints
one line of JSON.

.venv-ipex/bin/python -m tests.ipex.steps train MODEL FOLDER ipex fp32 6      # losses, gradient norms, tokens/s
.venv-ipex/bin/python -m tests.ipex.steps answer MODEL fp32 48                # tokens and their log-probabilities,
tokens/s
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

QUESTION = "What is the capital of France? Answer in one sentence."


def train(model: str, folder: str, accelerator: str, precision: str, steps: str) -> dict[str, Any]:
    """As llm_ray.train.recipe does a step, on one worker."""
    import torch
    from torch import nn

    from llm_ray.conf.finetune import FinetuneConf
    from llm_ray.data.prepare import lengths_of, open_split, prepare
    from llm_ray.models.load import find_base, load_tokenizer
    from llm_ray.quickstart import __file__ as quickstart
    from llm_ray.train.batches import plan_steps, steps_of
    from llm_ray.train.optimizer import learning_rate
    from llm_ray.train.recipe import set_up

    conf = FinetuneConf.model_validate({
        "name": f"{accelerator}-{precision}",
        "paths": {"runs": folder},
        "model": {"base": model},
        "data": {"train": str(Path(quickstart).parent / "data/train.jsonl"), "validation": None, "max_length": 192},
        "tuning": {"lora": {"r": 16}},
        "training": {
            "max_steps": int(steps), "global_batch_size": 12, "learning_rate": 1.5e-3, "precision": precision, "accelerator": accelerator,
        },
    })  # fmt: skip
    base = find_base(conf.model, conf.paths)
    prepare(conf, load_tokenizer(base), conf.run_dir / "prepared", lambda line: None)
    setup = set_up(conf, base, torch.get_num_threads(), 0, 1)
    data = open_split(conf.run_dir / "prepared", "train")
    schedule, total = plan_steps(conf, lengths_of(data), setup.packed)
    losses, norms, tokens, seconds = [], [], 0, 0.0
    for step, batches in enumerate(steps_of(data, schedule, 0, 1, 0, total)):
        began = time.perf_counter()
        setup.optimizer.set_rate(learning_rate(conf, step, total))
        (batch,) = batches
        with setup.autocast():
            loss = setup.module(batch)
        loss.backward()
        supervised = len(batch.targets)
        gradients = [p.grad for p in setup.module.parameters() if p.grad is not None]
        torch._foreach_mul_(gradients, 1 / supervised)
        norm = float(nn.utils.get_total_norm(gradients))
        torch._foreach_mul_(gradients, min(1.0, 1.0 / (norm + 1e-6)))
        setup.optimizer.step()
        setup.optimizer.zero_grad()
        losses.append(loss.item() / supervised)
        norms.append(norm)
        if step:  # the first has the kernels' set-up in it
            tokens, seconds = tokens + int(batch.tokens), seconds + time.perf_counter() - began
    moved = sum("lora" in name and p.requires_grad for name, p in setup.module.named_parameters())
    layers = sorted({type(module).__name__ for module in setup.module.modules() if "Linear" in type(module).__name__})
    return {
        "losses": losses,
        "norms": norms,
        "tokens_per_second": tokens / max(seconds, 1e-9),
        "adapters": moved,
        "layers": layers,
    }


def answer(model: str, precision: str, length: str) -> dict[str, Any]:
    """From the core of engine transformers, greedily."""
    from transformers import AutoTokenizer
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine import EngineCoreRequest

    from llm_ray.serve.engines.transformers import TransformersCore
    from llm_ray.serve.models import ServedModel

    options = {"max_model_len": 512, "max_num_seqs": 4, "kv_cache_memory_bytes": 2**20, "enforce_eager": True}
    overrides = {"architectures": ["TransformersForCausalLM"]}
    config = AsyncEngineArgs(model=model, hf_overrides=overrides, **options).create_engine_config()
    core = TransformersCore(
        ServedModel("m", Path(model), "transformers", precision=precision, max_model_len=512), config
    )
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_dict=False
    )
    params = SamplingParams(temperature=0.0, max_tokens=int(length), ignore_eos=True, logprobs=0)
    params.update_from_generation_config({}, tokenizer.eos_token_id)
    core.add(EngineCoreRequest(
        request_id="r", prompt_token_ids=list(prompt), mm_features=None, sampling_params=params, pooling_params=None, arrival_time=0.0,
        lora_request=None, cache_salt=None, data_parallel_rank=None,
    ))  # fmt: skip
    tokens: list[int] = []
    logprobs: list[float] = []
    began = 0.0
    while core.has_work():
        for output in core.step().outputs:
            began = began or time.perf_counter()  # at the first token
            tokens += output.new_token_ids
            logprobs.append(float(output.new_logprobs.logprobs[0, 0]))
    seconds = time.perf_counter() - began
    layers = sorted({type(module).__name__ for module in core._model.modules() if "Linear" in type(module).__name__})
    return {
        "text": tokenizer.decode(tokens), "tokens": tokens, "logprobs": logprobs, "layers": layers,
        "tokens_per_second": (len(tokens) - 1) / seconds,
    }  # fmt: skip


if __name__ == "__main__":
    done = {"train": train, "answer": answer}[sys.argv[1]](*sys.argv[2:])
    print(json.dumps(done))
