"""A LoRA adapter under a name of its own, beside its base model."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from safetensors.torch import load_file, save_file

PROMPT = "The capital of France is"
ASK: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0, "extra_body": {"ignore_eos": True}}


def text(client: openai.OpenAI, model: str, **change: Any) -> str:
    answer = client.completions.create(model=model, **ASK | change)
    assert answer.model == model
    return answer.choices[0].text


def replicas(run: Any) -> set[str]:
    """The processes that have served `small`."""
    return set(re.findall(r"pid=(\d+)", run("serve", "logs", "small", "-n", "10000").stdout))


def test_it_answers_as_peft_does(client: openai.OpenAI, smollm2: Path, adapter: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    plain = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    settings: dict[str, Any] = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    length = inputs["input_ids"].shape[1]
    said = tokenizer.decode(plain.generate(**inputs, **settings)[0, length:])
    tuned = tokenizer.decode(PeftModel.from_pretrained(plain, adapter).generate(**inputs, **settings)[0, length:])
    assert said != tuned
    assert text(client, "small") == said
    assert text(client, "tuned") == tuned
    assert text(client, "small") == said
    streamed = client.completions.create(model="tuned", **ASK, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == tuned


def test_it_is_listed_beside_its_base(client: openai.OpenAI, http: httpx.Client) -> None:
    assert [model.id for model in client.models.list()] == ["small", "team/other", "tuned"]
    card = http.get("/v1/models/tuned").json()
    assert (card["root"], card["parent"], card["metadata"]["ready"]) == ("small", "small", True)
    assert http.post("/tuned", json={"text": "Hi", "config": {"max_new_tokens": 2}}).status_code == 200


def test_its_requests_are_told_beside_those_of_its_base(run: Any, client: openai.OpenAI) -> None:
    def counted() -> dict[str, Any]:
        told: dict[str, Any] = json.loads(run("serve", "status", "--json").stdout)["models"]["small"]
        return told

    before = counted()
    text(client, "tuned")
    after = counted()
    assert after["adapters"]["tuned"]["generated_tokens"] == before["adapters"]["tuned"]["generated_tokens"] + 12
    assert after["generated_tokens"] == before["generated_tokens"]


def test_an_adapter_of_another_model_is_refused(
    run: Any, conf: Path, adapter: Path, client: openai.OpenAI, tmp_path: Path
) -> None:
    """It would answer nonsense, or as the base does."""
    foreign = shutil.copytree(adapter, tmp_path / "foreign")
    weights = load_file(foreign / "adapter_model.safetensors")
    save_file(
        {name: tensor[..., : len(tensor) // 2].contiguous() for name, tensor in weights.items()},
        foreign / "adapter_model.safetensors",
    )
    asked = json.loads(conf.read_text())
    asked["models"]["small"]["adapters"]["foreign"] = str(foreign)
    (tmp_path / "foreign.yaml").write_text(json.dumps(asked))
    refused = run("serve", "deploy", "--config", str(tmp_path / "foreign.yaml"), "--only", "small")
    assert (refused.returncode, "does not belong to the model" in refused.stderr) == (1, True), refused.stderr
    with pytest.raises(openai.NotFoundError):
        text(client, "foreign")


def test_adapters_come_and_go_without_a_restart(
    run: Any, conf: Path, adapter: Path, client: openai.OpenAI, base: str, tmp_path: Path
) -> None:
    before = replicas(run)
    asked = json.loads(conf.read_text())
    asked["models"]["small"]["adapters"]["later"] = str(shutil.copytree(adapter, tmp_path / "other"))
    (tmp_path / "more.yaml").write_text(json.dumps(asked))
    for file, there in ((tmp_path / "more.yaml", True), (conf, False)):
        deployed = run("serve", "deploy", "--config", str(file), "--only", "small")
        assert deployed.returncode == 0, deployed.stderr
        if there:
            assert text(client, "later") == text(client, "tuned") != text(client, "small")
        else:
            with pytest.raises(openai.NotFoundError, match="later"):  # never the base in its place
                text(client, "later")
    assert text(client, "tuned") != text(client, "small")
    assert replicas(run) == before
    assert len(before) == 1


@pytest.mark.long  # a minute of load
def test_a_changed_adapter_answers_with_its_new_weights_while_its_base_is_asked(
    run: Any, conf: Path, adapter: Path, client: openai.OpenAI, tmp_path: Path
) -> None:
    """What was computed of a prompt with its old weights is not used again."""
    folder = shutil.copytree(adapter, tmp_path / "changing")
    asked = json.loads(conf.read_text())
    asked["models"]["small"]["adapters"]["changing"] = str(folder)
    (tmp_path / "more.yaml").write_text(json.dumps(asked))

    def deploy(file: Path) -> None:
        deployed = run("serve", "deploy", "--config", str(file), "--only", "small")
        assert deployed.returncode == 0, deployed.stderr

    notes = "".join(f"Note {n}: the stone of house {n * 7} is grey. " for n in range(20))  # several blocks of the cache
    long = {"prompt": f"{notes}{PROMPT}"}
    deploy(tmp_path / "more.yaml")
    assert text(client, "changing", **long) != text(client, "small", **long)
    weights = load_file(folder / "adapter_model.safetensors")
    save_file(
        {name: tensor * ("lora_B" not in name) for name, tensor in weights.items()},
        folder / "adapter_model.safetensors",
    )
    with client.completions.create(model="small", **ASK | {"max_tokens": 500}, stream=True) as stream:
        assert next(iter(stream)).choices
        deploy(tmp_path / "more.yaml")
        assert text(client, "changing", **long) == text(client, "small", **long)
    deploy(conf)
