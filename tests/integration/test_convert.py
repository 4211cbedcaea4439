"""`llm-ray model convert` with optimum-intel and the real model; what it makes answers in OpenVINO GenAI as the
original does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy
import openvino
import openvino_genai as genai
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ErnieConfig,
    ErnieForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from llm_ray.conf.engines import WeightForm
from llm_ray.models.openvino import openvino_weights
from llm_ray.serve.deployments.deploy import free_port
from llm_ray.serve.engines.openvino import arithmetic

LLM_RAY = str(Path(sys.executable).with_name("llm-ray"))
QUESTIONS = ("What is the capital of France?", "Explain gravity in two sentences.", "Write a haiku about the sea.")
LONGEST = 32


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


def llm_ray(home: Path, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LLM_RAY_HOME": str(home)}
    done = subprocess.run([LLM_RAY, *arguments], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def convert(home: Path, source: Path, weights: WeightForm) -> Path:
    """The conversion that the command makes, or has made before."""
    done = llm_ray(home, "model", "convert", str(source), "--to", "openvino", "--weights", weights)
    assert "converting 4/4" in done.stderr or "already converted" in done.stderr
    return Path(done.stdout.strip())


def ids_of(folder: Path, question: str) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids: list[int] = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
    )
    return ids


def answers(folder: Path, precision: str = "f32") -> list[str]:
    """Greedy answers of OpenVINO GenAI's continuous batching, which engine openvino is made of."""
    scheduler, config = genai.SchedulerConfig(), genai.GenerationConfig()
    scheduler.cache_size = 1
    config.max_new_tokens, config.stop_token_ids = LONGEST, {2}
    properties = {"INFERENCE_PRECISION_HINT": precision, "KV_CACHE_PRECISION": precision}
    pipeline = genai.ContinuousBatchingPipeline(folder, scheduler, "CPU", properties)
    prompts = [openvino.Tensor(numpy.array([ids_of(folder, question)])) for question in QUESTIONS]
    results = pipeline.generate(prompts, [config] * len(prompts))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [tokenizer.decode(result.m_generation_ids[0], skip_special_tokens=True) for result in results]


def original_answers(folder: Path) -> list[str]:
    tokenizer, model = (
        AutoTokenizer.from_pretrained(folder),
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
    )
    found = []
    for question in QUESTIONS:
        prompt = torch.tensor([ids_of(folder, question)])
        output = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=LONGEST, do_sample=False)
        found.append(tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True))
    return found


def test_fp32_answers_as_the_original(home: Path, smollm2: Path) -> None:
    folder = convert(home, smollm2, "fp32")
    assert folder == home / "models" / "smollm2-135m-instruct-openvino-fp32"
    assert answers(folder) == original_answers(smollm2)
    for file in (
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
        "config.json",
    ):
        assert (folder / file).read_bytes() == (smollm2 / file).read_bytes()
    shutil.rmtree(folder)  # half a GB


def test_int8(home: Path, smollm2: Path) -> None:
    folder = convert(home, smollm2, "int8")
    assert answers(folder)[0] == "The capital of France is Paris."
    assert openvino_weights(folder).parameters == 134_515_008
    assert (folder / "openvino_model.bin").stat().st_size < 140e6
    record = json.loads((folder / "llm-ray.json").read_text())
    assert (record["source"], record["weights"]) == (str(smollm2), "int8")
    assert record["versions"].keys() == {"optimum-intel", "openvino", "nncf", "transformers", "torch"}
    before = (folder / "openvino_model.bin").stat().st_mtime_ns
    assert convert(home, smollm2, "int8") == folder
    assert (folder / "openvino_model.bin").stat().st_mtime_ns == before
    (info,) = json.loads(llm_ray(home, "model", "list", "--json").stdout)
    assert (info["name"], info["dtype"], info["problem"]) == ("smollm2-135m-instruct-openvino-int8", "int8", None)


def test_a_model_is_deployed_with_the_fastest_engine_unless_told_otherwise(home: Path, smollm2: Path) -> None:
    """After the test before: with the weights that it has converted."""
    try:
        deployed = llm_ray(home, "serve", "deploy", "--model", str(smollm2), "--port", str(free_port()))
        assert "engine openvino (auto: the fastest on CPUs, and the model is converted)" in deployed.stderr
        served = json.loads(llm_ray(home, "serve", "status", "--json").stdout)
        assert served["models"]["smollm2-135m-instruct"]["model"]["engine"] == "openvino"
        # Not the question of France: with int8 weights and bf16 arithmetic two first words are as good as equal.
        question = "What is the capital of Germany?"
        asked = llm_ray(home, "infer", "--model_endpoint", served["url"], "--prompt", question, "--temperature", "0")
        assert "Berlin" in asked.stdout
    finally:
        llm_ray(home, "serve", "stop", "--all")


@pytest.mark.long  # a form of weights like the others
def test_bf16_answers_in_bf16(home: Path, smollm2: Path) -> None:
    folder = convert(home, smollm2, "bf16")
    assert openvino_weights(folder).dtype == "bf16"
    assert answers(folder, arithmetic("bf16"))[0] == "The capital of France is Paris."


@pytest.fixture(scope="module")
def odd(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in bf16, some of whose rows no group size divides."""
    folder = tmp_path_factory.mktemp("odd") / "odd"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=40,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy2(smollm2 / name, folder)
    return folder


def test_int4_where_rows_can_be_divided_and_int8_elsewhere(home: Path, odd: Path) -> None:
    folder = convert(home, odd, "int4")
    graph = (folder / "openvino_model.xml").read_text()
    assert 'element_type="u4"' in graph
    assert 'element_type="u8" shape="96, 40"' in graph
    assert len(answers(folder)) == len(QUESTIONS)


def test_what_optimum_does_not_know_is_refused_by_its_type(home: Path, odd: Path, tmp_path: Path) -> None:
    config = ErnieConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, is_decoder=True
    )
    ErnieForCausalLM(config).save_pretrained(tmp_path / "ernie")
    future = Path(shutil.copytree(odd, tmp_path / "future"))
    (future / "config.json").write_text((future / "config.json").read_text().replace('"llama"', '"llama9"'))
    for folder, kind in ((tmp_path / "ernie", "ernie"), (future, "llama9")):
        done = llm_ray(home, "model", "convert", str(folder), "--to", "openvino", code=1)
        assert f"optimum-intel does not export text models of type {kind}" in done.stderr
        assert not list((home / "models").glob(f"*{folder.name}-openvino-int8*[!k]"))
