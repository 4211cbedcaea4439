"""What a conf's model means, and loading it: whole, or with an error that says what is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llm_ray.conf.finetune import Model
from llm_ray.conf.section import Paths
from llm_ray.errors import ModelError
from llm_ray.models.load import (
    check_model,
    find_base,
    identity,
    load_empty_model,
    load_model,
    load_tokenizer,
    resolve,
    stored_dtype,
)


def test_resolve(tiny: Path, paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(tiny, paths.models / "small")
    shutil.copytree(tiny, paths.runs / "support-bot" / "output")
    (paths.runs / "unfinished").mkdir()
    monkeypatch.chdir(tiny.parent)
    assert resolve(str(tiny), paths).folder == tiny
    assert resolve("tiny", paths).folder == tiny
    assert resolve("./tiny", paths).folder == tiny
    assert resolve("small", paths).folder == paths.models / "small"
    assert resolve("support-bot", paths).folder == paths.runs / "support-bot" / "output"
    assert resolve("organisation/model", paths).folder is None
    assert str(resolve("organisation/model", paths)) == "organisation/model"
    for base, words in {
        "smal": "no such model .* Did you mean small.*llm-ray model import",
        "unfinished": "run without a model: its stage export has not run",
        "./gone": "no such folder",
        "/gone/too": "no such folder",
        "a/b/c": "no such model",
        "something else": r"There are: small, support-bot\. To add",  # and not those that nothing can be loaded from
    }.items():
        with pytest.raises(ModelError, match=words):
            resolve(base, paths)


def test_folder_named_like_a_model(tiny: Path, paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that happens to be in the current one, and is no model, does not hide the registry's."""
    shutil.copytree(tiny, paths.models / "small")
    (tiny.parent / "small").mkdir()
    monkeypatch.chdir(tiny.parent)
    assert resolve("small", paths).folder == paths.models / "small"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_load(tiny: Path, paths: Paths, dtype: torch.dtype) -> None:
    model = load_model(find_base(Model(base=str(tiny)), paths), dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model.config._attn_implementation == "sdpa"
    assert load_empty_model(find_base(Model(base=str(tiny)), paths), dtype).device.type == "meta"


def test_real_model_answers(smollm2: Path, paths: Paths) -> None:
    """The folder made of the GGUF, as transformers alone loads it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(smollm2), AutoModelForCausalLM.from_pretrained(smollm2)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, do_sample=False, max_new_tokens=12)
    assert tokenizer.decode(output[0][inputs["input_ids"].shape[1] :]) == "The capital of France is Paris.<|im_end|>"
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_gguf_beside_conf(tmp_path: Path, paths: Paths, write_gguf: Callable[[Path], Path]) -> None:
    file = write_gguf(tmp_path / "ggufs" / "small.gguf")
    conf = Model(base=str(file.parent), gguf_file=file.name)
    assert load_tokenizer(find_base(conf, paths)).eos_token_id == 0
    model = load_model(find_base(conf, paths), torch.float32)
    model.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    assert stored_dtype(find_base(conf, paths)) == torch.float32
    with pytest.raises(ModelError, match=r"model.gguf_file: .* has no other.gguf; its GGUF files: small.gguf"):
        load_model(find_base(Model(base=str(file.parent), gguf_file="other.gguf"), paths), torch.float32)


def test_stored_dtype(tiny: Path, paths: Paths) -> None:
    load_model(find_base(Model(base=str(tiny)), paths), torch.bfloat16).save_pretrained(tiny)
    assert stored_dtype(find_base(Model(base=str(tiny)), paths)) == torch.bfloat16


def test_tokenizer(tiny: Path, paths: Paths, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(find_base(Model(base=str(tiny)), paths))
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    template = tmp_path / "plain.jinja"
    template.write_text("{% for message in messages %}{{ message['content'] }}\n{% endfor %}")
    tokenizer = load_tokenizer(find_base(Model(base=str(tiny), chat_template=template), paths))
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "Hi\n"
    tokenizer.save_pretrained(tmp_path / "saved")
    assert (
        "im_start"
        not in load_tokenizer(find_base(Model(base=str(tiny), tokenizer=str(tmp_path / "saved")), paths)).chat_template
    )


def test_pad_token_leaves_eos(tiny: Path, paths: Paths) -> None:
    config = json.loads((tiny / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (tiny / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(find_base(Model(base=str(tiny)), paths))
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")


def test_model_without_tokenizer(tiny: Path, paths: Paths, smollm2: Path) -> None:
    for file in tiny.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError, match=r"has no tokenizer .*model\.tokenizer"):
        load_tokenizer(find_base(Model(base=str(tiny)), paths))
    conf = Model(base=str(tiny), tokenizer=str(smollm2))
    assert load_tokenizer(find_base(conf, paths)).eos_token_id == 2
    assert load_model(find_base(conf, paths), torch.float32).config.model_type == "llama"


def test_unreadable_template(tiny: Path, paths: Paths, tmp_path: Path) -> None:
    (tmp_path / "latin.jinja").write_bytes(b"\xe4{{ messages }}")
    for name, words in {"gone.jinja": "No such file", "latin.jinja": "not UTF-8"}.items():
        with pytest.raises(ModelError, match=rf"model.chat_template: .*{name} cannot be read: .*{words}"):
            load_tokenizer(find_base(Model(base=str(tiny), chat_template=tmp_path / name), paths))


def test_missing_weights(tiny: Path, paths: Paths) -> None:
    """transformers fills them with random numbers and goes on; that is no model to train."""
    from safetensors.torch import load_file, save_file

    weights = load_file(tiny / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tiny / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"lacks 1 weights of a LlamaForCausalLM, such as model\.layers\.1\.mlp\.up_proj\.weight"
    ):
        load_model(find_base(Model(base=str(tiny)), paths), torch.float32)


def test_other_size(tiny: Path, paths: Paths) -> None:
    config = json.loads((tiny / "config.json").read_text())
    (tiny / "config.json").write_text(json.dumps(config | {"hidden_size": 32}))
    with pytest.raises(ModelError, match=r"weights differ in size from its config\.json"):
        load_model(find_base(Model(base=str(tiny)), paths), torch.float32)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "llama9"}, "transformers does not support models of type llama9"),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "type t5 does not generate text"),
        ({"model_type": "vit", "architectures": ["ViTModel"]}, "type vit does not generate text"),
        ({"hidden_size": "wide"}, "hidden_size.*wide"),
        ({"num_attention_heads": 0}, "cannot be loaded"),
        ({"hidden_act": "nosuch"}, "nosuch"),
        (
            {"auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}, "model_type": "own"},
            "its own Python code.*trusted",
        ),
    ],
)
def test_broken_config(tiny: Path, paths: Paths, change: dict[str, object], words: str) -> None:
    config = json.loads((tiny / "config.json").read_text())
    (tiny / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ModelError, match=words) as caught:
        load_model(find_base(Model(base=str(tiny)), paths), torch.float32)
    assert str(tiny) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text"), [("tokenizer.json", "{"), ("tokenizer.json", "{}"), ("tokenizer_config.json", "[")]
)
def test_damaged_tokenizer(tiny: Path, paths: Paths, name: str, text: str) -> None:
    (tiny / name).write_text(text)
    with pytest.raises(
        ModelError,
        match=r"the tokenizer .* cannot be loaded|tokenizer.*\.json cannot be read|does not contain a JSON object",
    ):
        load_tokenizer(find_base(Model(base=str(tiny)), paths))


def test_hub_offline(paths: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="not in the local cache, while HF_HUB_OFFLINE disables"):
        load_model(find_base(Model(base="organisation/not-there"), paths), torch.float32)
    with pytest.raises(ModelError, match="the tokenizer organisation/not-there cannot be loaded"):
        load_tokenizer(find_base(Model(base="organisation/not-there"), paths))


def test_pickle_is_refused(tiny: Path, paths: Paths) -> None:
    from safetensors.torch import load_file

    torch.save(load_file(tiny / "model.safetensors"), tiny / "pytorch_model.bin")
    (tiny / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="pickle"):
        load_model(find_base(Model(base=str(tiny)), paths), torch.float32)


def test_identity(tiny: Path, paths: Paths, tmp_path: Path) -> None:
    first = identity(find_base(Model(base=str(tiny)), paths))
    (tiny / "README.md").write_text("# Words about the model do not change it")
    copy = shutil.copytree(tiny, tmp_path / "copy")
    assert identity(find_base(Model(base=str(tiny)), paths)) == first
    assert identity(find_base(Model(base=str(copy)), paths))["fingerprint"] == first["fingerprint"]
    with (copy / "model.safetensors").open("rb+") as file:
        file.seek(-4, 2)
        file.write(b"\x00\x01\x02\x03")
    assert identity(find_base(Model(base=str(copy)), paths))["fingerprint"] != first["fingerprint"]
    assert identity(find_base(Model(base="organisation/model", revision="v1"), paths)) == {
        "base": "organisation/model",
        "revision": "v1",
        "gguf_file": None,
    }


def test_check(tiny: Path, paths: Paths) -> None:
    """What is asked before a run's first stage."""
    check_model(found := find_base(Model(base=str(tiny)), paths))
    assert found.location.folder == found.tokenizer.folder == tiny
    check_model(found := find_base(Model(base="organisation/model"), paths))
    assert found.location.folder is None
    (tiny / "tokenizer.json").unlink()
    check_model(found := find_base(Model(base=str(tiny), tokenizer="organisation/other"), paths))
    assert (found.location.folder, found.tokenizer.folder) == (tiny, None)
    with pytest.raises(ModelError, match="has no tokenizer"):
        check_model(find_base(Model(base=str(tiny)), paths))
