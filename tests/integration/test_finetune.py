"""The command `llm-ray finetune` from a conf to a model: every stage, each objective and method, skipping what is
done."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_ray.progress import Silent
from llm_ray.runs.metrics import read_metrics
from tests.integration.serving import Home
from tests.integration.tiny import llama

LLM_RAY = str(Path(sys.executable).with_name("llm-ray"))
# Of the libraries beneath, which users do not know.
RAW = re.compile(r"Traceback|\w*Warning\b.*|.*site-packages.*|Loading weights.*|Writing model shards.*")
CONF = """
name: {{ name | default("codes") }}
model: {base: {{ model }}}
data: {train: rows.jsonl, validation: 0.25, max_length: 96}
tuning: {lora: {r: 4}}
training: {max_steps: 4, global_batch_size: 4, learning_rate: 3e-2, precision: fp32}
evaluation: {samples: 3, max_new_tokens: 8}
"""


@pytest.fixture(scope="module")
def tiny(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is trained, evaluated and exported at once."""
    return llama(tmp_path_factory.mktemp("model") / "tiny", smollm2, initializer_range=0.02, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("finetune")
    rows = [
        {"prompt": f"What is code {n}?", "completion": f"Code {n} is a worn {part}."}
        for n, part in enumerate(["belt", "seal", "fan"] * 4)
    ]
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (home / "text.txt").write_text("\n".join(f"Line {n} of the handbook of pumps." for n in range(24)))
    (home / "codes.yaml.j2").write_text(CONF)
    return home


def llm_ray(home: Path, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    import os

    done = subprocess.run(
        [LLM_RAY, *arguments],
        cwd=home,
        env={**os.environ, "LLM_RAY_HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert RAW.findall(done.stderr) == []
    return done


@pytest.fixture(scope="module")
def codes(home: Path, tiny: Path) -> subprocess.CompletedProcess[str]:
    return llm_ray(home, "finetune", "--config", "codes.yaml.j2", "--set", f"model={tiny}")


def test_a_run_has_what_the_reference_promises(home: Path, codes: subprocess.CompletedProcess[str]) -> None:
    run = home / "runs" / "codes"
    assert codes.stdout.strip() == str(run)
    for name in (
        "conf.yaml",
        "run.json",
        "params.json",
        "result.json",
        "metrics.jsonl",
        "evaluation.md",
        "answers.jsonl",
        "output/adapter/adapter_model.safetensors",
    ):
        assert (run / name).is_file(), name
    result: dict[str, Any] = json.loads((run / "result.json").read_text())
    assert result["training"]["status"] == "done"
    for which in ("base", "finetuned"):
        assert {"validation_loss", "perplexity", "exact_match", "token_f1"} <= result["evaluation"][which].keys()
    assert result["evaluation"]["finetuned"]["validation_loss"] < result["evaluation"]["base"]["validation_loss"]
    best = min(row["validation_loss"] for row in read_metrics(run / "metrics.jsonl") if "validation_loss" in row)
    assert result["evaluation"]["finetuned"]["validation_loss"] == pytest.approx(best, rel=1e-3), (
        "evaluated is what was trained"
    )
    card = (run / "output" / "README.md").read_text()
    assert "codes" in card
    assert card.startswith("---\n")


def test_the_merged_model_is_the_base_with_its_adapter(
    home: Path, codes: subprocess.CompletedProcess[str], tiny: Path
) -> None:
    output = home / "runs" / "codes" / "output"
    tokenizer = AutoTokenizer.from_pretrained(output)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is code 3?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    merged = AutoModelForCausalLM.from_pretrained(output)
    base = AutoModelForCausalLM.from_pretrained(tiny)
    with torch.no_grad():
        untrained = base(**ids).logits
        adapted = PeftModel.from_pretrained(base, output / "adapter")(**ids).logits
        given = merged(**ids).logits
    torch.testing.assert_close(given, adapted, rtol=1e-3, atol=1e-3)
    assert (given - untrained).abs().max() > 0.05


def test_the_adapter_of_a_run_is_served_beside_its_base(
    home: Path, codes: subprocess.CompletedProcess[str], tiny: Path
) -> None:
    """Each name answers with its own weights: the first token is as likely as transformers and PEFT say."""
    ids = AutoTokenizer.from_pretrained(tiny)("Code 3 is a", return_tensors="pt")
    base = AutoModelForCausalLM.from_pretrained(tiny)
    with torch.no_grad():
        untrained = float(base(**ids).logits[0, -1].log_softmax(-1).max())
        adapted = PeftModel.from_pretrained(base, home / "runs" / "codes" / "output" / "adapter")
        trained = float(adapted(**ids).logits[0, -1].log_softmax(-1).max())
    assert abs(trained - untrained) > 0.01
    served = Home(home, tiny)
    deployed = served.deploy("small", "--adapter", "codes=codes", "--max-model-len", "256")
    try:
        assert deployed.returncode == 0, deployed.stderr
        for name, expected in (("small", untrained), ("codes", trained)):
            answer = served.ask(name, prompt="Code 3 is a", max_tokens=1, logprobs=1).json()
            assert answer["choices"][0]["logprobs"]["token_logprobs"] == [pytest.approx(expected, abs=1e-3)], name
    finally:
        served.run("serve", "stop", "--all")


def test_the_same_again_is_skipped_and_another_conf_refused(
    home: Path, codes: subprocess.CompletedProcess[str], tiny: Path
) -> None:
    command = ("finetune", "--config", "codes.yaml.j2", "--set", f"model={tiny}")
    again = llm_ray(home, *command)
    assert again.stderr.count("already done with the same inputs, skipped") == 4
    refused = llm_ray(home, *command, "--set", "training.max_steps=5", code=1)
    assert "training.max_steps" in refused.stderr
    assert "--force" in refused.stderr


def test_the_stage_convert_alone_after_the_others(
    home: Path, codes: subprocess.CompletedProcess[str], tiny: Path, smollm2: Path
) -> None:
    from llm_ray.models.convert import openvino_folder

    command = ("finetune", "--config", "codes.yaml.j2", "--set", f"model={tiny}", "--stage", "convert")
    large = ("--set", f"model={smollm2}", "--set", "name=large")
    assert "about 0.13 GiB with int8 weights" in llm_ray(home, *command, *large, "--dry-run").stdout
    done = llm_ray(home, *command)
    assert "serve deploy --model codes --engine openvino" in done.stderr
    run = home / "runs" / "codes"
    assert (run / "openvino-int8" / "tokenizer.json").read_bytes() == (run / "output" / "tokenizer.json").read_bytes()
    assert {"export", "convert"} <= json.loads((run / "run.json").read_text())["stages"].keys()
    assert "convert: already done" in llm_ray(home, *command).stderr
    assert openvino_folder(run / "output", None, home / "models", Silent()) == run / "openvino-int8", "serving finds it"
    refused = llm_ray(home, *command, "--set", "name=none", code=1)
    assert "stage convert of none needs stage export" in refused.stderr


@pytest.mark.long
def test_what_learns_of_tied_embeddings_is_told_in_our_words(home: Path, tiny: Path) -> None:
    """peft warns of them when adapters are made, merged and saved."""
    settings = [
        "name=tied",
        "tuning.lora.target_modules=[q_proj, lm_head]",
        "tuning.lora.modules_to_save=[embed_tokens]",
    ]
    options = [part for setting in (f"model={tiny}", *settings) for part in ("--set", setting)]
    for more in (["--dry-run"], []):
        done = llm_ray(home, "finetune", "--config", "codes.yaml.j2", *options, *more)
        assert "embeddings share their weights but are trained separately" in done.stdout + done.stderr


def test_a_dry_run_starts_nothing_and_says_what_would_be(home: Path, smollm2: Path) -> None:
    done = llm_ray(
        home,
        "finetune",
        "--config",
        "codes.yaml.j2",
        "--set",
        f"model={smollm2}",
        "--set",
        "name=dry",
        "--dry-run",
        "--json",
    )
    report = json.loads(done.stdout)
    assert report["data"]["train"]["rows"] == 9
    assert report["estimate"]["steps"] == 4
    assert report["estimate"]["parameters"] == 134_515_008
    assert 1e9 < report["estimate"]["memory_per_worker"] < 20e9
    assert not (home / "runs" / "dry").exists()


@pytest.mark.long  # another run through all stages
def test_full_pretraining_on_text(home: Path, tiny: Path) -> None:
    settings = [
        "data.train=text.txt",
        "tuning.objective=pretrain",
        "tuning.method=full",
        "training.max_steps=2",
        "training.learning_rate=1e-2",
    ]
    llm_ray(
        home,
        "finetune",
        "--config",
        "codes.yaml.j2",
        "--set",
        f"model={tiny}",
        "--set",
        "name=text",
        *(a for s in settings for a in ("--set", s)),
    )
    run = home / "runs" / "text"
    evaluation = json.loads((run / "result.json").read_text())["evaluation"]
    assert evaluation["finetuned"]["validation_loss"] < evaluation["base"]["validation_loss"]
    assert not (run / "output" / "adapter").exists()
    AutoModelForCausalLM.from_pretrained(run / "output")
