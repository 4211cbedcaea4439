"""The export: the written model equals the trained one, and problems are reported before training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, GenerationConfig

from llm_ray.app.finetune import look_ahead
from llm_ray.errors import ConfError, DataError, ModelError, RunError
from llm_ray.export.check import rehearse
from llm_ray.export.stage import export_here
from llm_ray.models.load import load_model
from llm_ray.progress import Silent
from tests.runs import base_of
from tests.unit.export.conftest import Run, trained, write

IDS = torch.tensor([list(range(200, 240))])


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS).logits.log_softmax(-1)


# The same model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tuning", "apart"),
    [
        ({"lora": {"r": 4}}, False),
        ({"lora": {"r": 4, "dora": True}}, False),
        ({"lora": {"r": 4, "rslora": True, "rank_pattern": {"q_proj": 2, "up_proj": 8}}}, False),
        ({"lora": {"r": 4, "target_modules": ["q_proj", "lm_head"]}}, True),
        ({"lora": {"r": 4, "target_modules": ["q_proj", "embed_tokens"]}}, True),
        ({"lora": {"r": 4, "target_modules": ["embed_tokens", "lm_head"]}}, True),
        ({"lora": {"r": 4, "modules_to_save": ["embed_tokens"]}}, True),
        ({"lora": {"r": 4, "modules_to_save": ["lm_head"]}}, True),
        ({"lora": {"r": 4, "modules_to_save": ["embed_tokens", "lm_head"]}}, True),
        ({"lora": {"r": 4, "target_modules": ["lm_head"], "modules_to_save": ["embed_tokens"]}}, True),
        ({"method": "full"}, False),
    ],
    ids=lambda value: str(value) if isinstance(value, bool) else str(value.get("lora", value)),
)
def test_the_exported_model_is_the_trained_one(run: Run, tuning: dict[str, object], apart: bool) -> None:
    conf = run(tuning=tuning)
    model, checkpoint = trained(conf)
    expected = logits(model)
    checked = export_here(conf.model_dump(mode="json"), base_of(conf), str(checkpoint), "# card")
    assert checked.startswith("checked: on 2 held-out sequences the exported model's loss is ")
    output = conf.run_dir / "output"
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(output)), expected, rtol=1e-4, atol=1e-4)
    assert json.loads((output / "config.json").read_text())["tie_word_embeddings"] is not apart
    told = [note for note in rehearse(conf, base_of(conf)) if "embeddings" in note]
    assert bool(told) == apart, "said before training, too"
    if conf.tuning.method == "lora":
        beside = PeftModel.from_pretrained(load_model(base_of(conf), torch.float32), output / "adapter")
        torch.testing.assert_close(logits(beside), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize(
    "lora",
    [
        {"r": 4},
        {"r": 4, "dora": True},
        {"r": 4, "target_modules": ["q_proj"]},
        {"r": 4, "target_modules": ["q_proj", "lm_head"]},
        {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["down_proj"]},
    ],
    ids=str,
)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_of_a_base_in_few_bits_the_weights_that_were_trained_on_are_exported(
    run: Run, base: Path, weights: str, lora: dict[str, object], stored: torch.dtype
) -> None:
    AutoModelForCausalLM.from_pretrained(base).to(stored).save_pretrained(base)
    conf = run(model={"base": str(base), "weights": weights}, tuning={"lora": lora})
    model, checkpoint = trained(conf)
    expected = logits(model)
    export_here(conf.model_dump(mode="json"), base_of(conf), str(checkpoint), "# card")
    exported = AutoModelForCausalLM.from_pretrained(conf.run_dir / "output")
    assert exported.dtype == stored and not hasattr(exported.config, "quantization_config")
    off = {"rtol": 1e-4, "atol": 1e-4} if stored == torch.float32 else {"rtol": 0.1, "atol": 0.3}
    torch.testing.assert_close(logits(exported.float()), expected, **off)
    assert (logits(load_model(base_of(conf), torch.float32)) - expected).abs().max() > 1, "it has learned"


def test_an_export_that_is_another_model_is_refused_and_replaces_nothing(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    conf = run(tuning={"lora": {"r": 4, "target_modules": ["lm_head"]}})
    _, checkpoint = trained(conf)
    (conf.run_dir / "output").mkdir()
    (conf.run_dir / "output" / "before").touch()
    monkeypatch.setattr(
        "llm_ray.train.trained.untie", lambda causal: False
    )  # merging into tied weights would change the model
    with pytest.raises(
        ModelError,
        match=r"differs from the trained one: on 2 held-out sequences its loss is [\d.]+ after merging the adapters",
    ):
        export_here(conf.model_dump(mode="json"), base_of(conf), str(checkpoint), "# card")
    assert [path.name for path in (conf.run_dir / "output").iterdir()] == ["before"]
    assert (checkpoint / ".metadata").is_file()


def test_weights_are_stored_as_the_base_stores_them(run: Run, base: Path) -> None:
    AutoModelForCausalLM.from_pretrained(base).to(torch.bfloat16).save_pretrained(base)
    conf = run()
    _, checkpoint = trained(conf)
    assert "held-out" in export_here(conf.model_dump(mode="json"), base_of(conf), str(checkpoint), "# card")
    assert AutoModelForCausalLM.from_pretrained(conf.run_dir / "output").dtype == torch.bfloat16


def test_without_prepared_data_a_text_is_compared(run: Run) -> None:
    conf = run(tuning={"method": "full"})
    _, checkpoint = trained(conf)
    shutil.rmtree(conf.run_dir / "prepared")
    assert "on 1 sequence(s) of text" in export_here(
        conf.model_dump(mode="json"), base_of(conf), str(checkpoint), "# card of a model"
    )


# What cannot be saved -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "kept", "told"),
    [
        (
            {"temperature": 0.6},
            {"temperature": 0.6, "do_sample": True},
            "do_sample true is added, because temperature require",
        ),
        (
            {"top_p": 0.9, "top_k": 20},
            {"top_p": 0.9, "top_k": 20, "do_sample": True},
            "do_sample true is added, because top_p, top_k require",
        ),
        (
            {"temperature": 0.6, "do_sample": False},
            {"temperature": None, "do_sample": False},
            "temperature 0.6 is removed",
        ),
        (
            {"early_stopping": True, "length_penalty": 2.0},
            {"early_stopping": None, "length_penalty": None},
            "early_stopping True is removed",
        ),
        (
            {"use_cache": False, "cache_implementation": "static"},
            {"cache_implementation": None},
            "cache_implementation static is removed",
        ),
        ({"output_scores": True}, {"output_scores": None}, "output_scores True is removed"),
        (
            {"pad_token_id": -1, "repetition_penalty": 1.1},
            {"pad_token_id": None, "repetition_penalty": 1.1},
            "pad_token_id -1 is removed",
        ),
        ({"temperature": 0.6, "do_sample": True}, {"temperature": 0.6, "do_sample": True}, ""),
    ],
)
def test_generation_settings_that_transformers_does_not_save_are_mended(
    run: Run, base: Path, settings: dict[str, object], kept: dict[str, object], told: str
) -> None:
    write(base, **settings)
    conf = run(tuning={"method": "full"})
    assert told in "".join(rehearse(conf, base_of(conf)))
    assert bool(rehearse(conf, base_of(conf))) == bool(told)
    _, checkpoint = trained(conf)
    export_here(conf.model_dump(mode="json"), base_of(conf), str(checkpoint), "# card")
    saved = GenerationConfig.from_pretrained(conf.run_dir / "output")
    assert {name: getattr(saved, name) for name in kept} == kept
    assert saved.eos_token_id == [0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "`max_new_tokens` must be greater than 0"),
        ({"cache_implementation": "none such"}, "Invalid `cache_implementation`"),
        ({"num_return_sequences": 4}, "do not support `num_return_sequences`"),
    ],
)
def test_generation_settings_that_nobody_can_mend_are_refused_before_training(
    run: Run, base: Path, settings: dict[str, object], message: str
) -> None:
    write(base, **settings)
    with pytest.raises(ModelError, match=r"tiny.*") as refused:
        rehearse(conf := run(), base_of(conf))
    assert "generation_config.json" in str(refused.value)
    assert message in str(refused.value)


def test_too_little_disk_is_told_before_training(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(
        RunError, match=r"needs about .* GiB for checkpoints and the exported model, but 0\.0 GiB are free"
    ):
        rehearse(conf := run(), base_of(conf))


def test_a_tokenizer_that_would_come_back_as_another_is_told_before_training(run: Run, base: Path) -> None:
    """For some model types transformers always uses its own tokenizer class, whatever the folder says."""
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(
        json.dumps(config | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]})
    )
    with pytest.raises(
        ModelError, match=r"changes when it is saved and loaded again \(Qwen2Tokenizer\): .*model\.tokenizer"
    ):
        rehearse(conf := run(), base_of(conf))


def test_plain_text_asks_nothing_of_the_chat_template(run: Run, base: Path) -> None:
    (base / "chat_template.jinja").write_text("{{ raise_exception('no chat') }}")
    conf = run(tuning={"method": "full", "objective": "pretrain"})
    assert rehearse(conf, base_of(conf)) == []
    _, checkpoint = trained(conf)
    assert export_here(conf.model_dump(mode="json"), base_of(conf), str(checkpoint), "# card")


def test_layers_that_are_not_there_are_told_before_training(run: Run) -> None:
    with pytest.raises(ConfError, match="gone"):
        rehearse(conf := run(tuning={"lora": {"target_modules": ["gone"]}}), base_of(conf))


@pytest.mark.parametrize(
    ("rows", "template", "message"),
    [
        (
            [{"prompt": "What?", "completion": ""}],
            None,
            "contains no conversation that ends with an assistant's answer",
        ),
        (
            [{"prompt": "What?", "completion": "That."}],
            "{{ raise_exception('only of pumps') if 'What?' in messages[0].content }}",
            "only of pumps",
        ),
    ],
)
def test_questions_that_cannot_be_asked_are_told_before_training(
    run: Run, base: Path, tmp_path: Path, rows: list[dict[str, str]], template: str | None, message: str
) -> None:
    (tmp_path / "exam.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if template:
        (base / "chat_template.jinja").write_text(template + (base / "chat_template.jinja").read_text())
    conf = run(evaluation={"data": str(tmp_path / "exam.jsonl")})
    with pytest.raises(DataError, match=rf"evaluation\.data \(.*exam\.jsonl\).*{message}"):
        look_ahead(conf, base_of(conf), ["evaluate"], Silent())
