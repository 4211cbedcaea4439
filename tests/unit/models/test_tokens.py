"""Tokens: a tokenizer that was read from a GGUF splits text by the rule that the file names, and one of a folder as its
tokenizer.json."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer

from llm_ray.conf.finetune import Model
from llm_ray.conf.section import Paths
from llm_ray.errors import ModelError
from llm_ray.models.load import find_base, load_tokenizer
from llm_ray.models.pretokenizers import RULES, set_rule
from llm_ray.models.registry import import_model, outdated
from llm_ray.models.tokens import FILE, PROBE, SETTINGS, check_alike, open_tokenizer, read_alike

TEXTS = (
    "1. Mix 250 g of flour.\n\n2. Bake for 45 minutes at 180 degrees.\n\n\n12 servings",
    "In 2026 the 3rd pump ran 1,204.5 hours.\n\n  - 17 stops\n  - 9 starts\n\n",
    "x = [1, 22, 333]\n\nprint(x[0])\n \n\t\n",
)


def words(name: str, text: str) -> list[str]:
    """The pieces that the rule of this name splits `text` into."""
    tokenizer = Tokenizer(models.BPE())
    assert set_rule(tokenizer, name)
    assert tokenizer.pre_tokenizer
    return [text[start:end] for _, (start, end) in tokenizer.pre_tokenizer.pre_tokenize_str(text)]


# Rules ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt-2", ["I", "'ll", " take", " 1234", " pumps", "\n", "\n", "OK", "."]),
        ("smollm", ["I", "'ll", " take", " ", "1", "2", "3", "4", " pumps", "\n", "\n", "OK", "."]),
        ("llama-bpe", ["I", "'ll", " take", " ", "123", "4", " pumps", "\n\n", "OK", "."]),
        ("qwen2", ["I", "'ll", " take", " ", "1", "2", "3", "4", " pumps", "\n\n", "OK", "."]),
        ("tekken", ["I", "'ll", " take", " ", "1", "2", "3", "4", " pumps", "\n\n", "OK", "."]),
        ("gpt-4o", ["I'll", " take", " ", "123", "4", " pumps", "\n\n", "OK", "."]),
        ("deepseek-v3", ["I", "'ll", " take", " ", "123", "4", " pumps", "\n\n", "OK", "."]),
        ("falcon", ["I", "'", "ll", " take", " ", "123", "4", " pumps", "\n", "\n", "OK", "."]),
        ("bloom", ["I'll", " take", " 1234", " pumps", "\n\n", "OK", "."]),
        ("superbpe", ["I'll take ", "1", "234", " pumps\n\nOK."]),
    ],
)
def test_rules(name: str, expected: list[str]) -> None:
    assert words(name, "I'll take 1234 pumps\n\nOK.") == expected


@pytest.mark.parametrize("name", RULES)
def test_no_rule_loses_text(name: str) -> None:
    text = normalizers.NFC().normalize_str(PROBE)
    assert "".join(words(name, text)) == text


def test_an_unknown_rule_changes_nothing() -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    assert not set_rule(tokenizer, "none-such")
    assert isinstance(tokenizer.pre_tokenizer, pre_tokenizers.Whitespace)


# A GGUF ---------------------------------------------------------------------------------------------------------------


def test_the_quickstarts_model_splits_text_as_it_was_trained_on(smollm2: Path) -> None:
    """SmolLM2's own tokenizer: single digits, then GPT-2's splitting of the rest."""
    own = Tokenizer.from_file(str(smollm2 / FILE))
    own.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    for text in (*TEXTS, PROBE):
        assert tokenizer(text)["input_ids"] == own.encode(text).ids, text
    assert tokenizer("Add 12\n\n\n3.")["input_ids"] == [7684, 216, 33, 34, 16506, 35, 30], (
        "the ids that llama.cpp gives"
    )


@pytest.mark.parametrize("imported", [True, False])
def test_the_rule_of_a_gguf_is_heeded(
    tmp_path: Path, paths: Paths, write_gguf: Callable[..., Path], imported: bool
) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", rule="llama-bpe", merges=("Ġ 1", "1 2", "12 3", "123 4", "Ċ Ċ"))
    if imported:
        import_model(str(file), "small", paths.models)
        tokenizer = load_tokenizer(find_base(Model(base="small"), paths))
    else:
        tokenizer = load_tokenizer(find_base(Model(base=str(tmp_path), gguf_file="tiny.gguf"), paths))
    assert tokenizer.tokenize("1 1234\n\n") == ["1", "Ġ", "123", "4", "ĊĊ"]


def test_a_rule_that_is_not_known_is_told(tmp_path: Path, write_gguf: Callable[..., Path]) -> None:
    for rule, words_told in (
        ("none-such", "an unknown rule for splitting text, 'none-such'"),
        ("", "does not name its rule"),
        ("smollm", None),
    ):
        target = import_model(
            str(write_gguf(tmp_path / "tiny.gguf", rule=rule)), f"small{len(rule)}", tmp_path / "models"
        )
        note = json.loads((target / "llm-ray.json").read_text())["note"]
        assert words_told in note if words_told else note is None, rule
        assert not outdated(target)


def test_an_import_from_before_is_known(tmp_path: Path, write_gguf: Callable[..., Path], tiny: Path) -> None:
    target = import_model(str(write_gguf(tmp_path / "tiny.gguf")), "small", tmp_path / "models")
    lineage = json.loads((target / "llm-ray.json").read_text())
    del lineage["note"]
    (target / "llm-ray.json").write_text(json.dumps(lineage))
    assert outdated(target)
    (tiny / "llm-ray.json").write_text(json.dumps(lineage | {"gguf_file": None}))
    assert not outdated(tiny), "no GGUF"


# A folder -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def misread(tiny: Path) -> Path:
    """A folder whose configuration names a class that leaves out steps of its tokenizer.json."""
    settings = json.loads((tiny / SETTINGS).read_text())
    (tiny / SETTINGS).write_text(json.dumps(settings | {"tokenizer_class": "GPT2Tokenizer"}))
    return tiny


def test_a_tokenizer_is_what_its_file_says(misread: Path, paths: Paths) -> None:
    file = Tokenizer.from_file(str(misread / FILE))
    assert AutoTokenizer.from_pretrained(misread)(TEXTS[0])["input_ids"] != file.encode(TEXTS[0]).ids, (
        "what transformers makes of it"
    )
    tokenizer = load_tokenizer(find_base(Model(base=str(misread)), paths))
    for text in (*TEXTS, PROBE):
        assert tokenizer(text)["input_ids"] == file.encode(text).ids
    assert tokenizer.eos_token == "<|im_end|>"  # noqa: S105 (it is no password)
    assert tokenizer.chat_template
    tokenizer.save_pretrained(misread)
    assert read_alike(misread), "as engines read what was saved"


def test_a_folder_is_mended_when_it_is_imported(misread: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"reads the tokenizer differently from its tokenizer\.json.*llm-ray model import"
    ):
        check_alike(misread)
    target = import_model(str(misread), "small", tmp_path / "models")
    check_alike(target)
    assert "engines would use other tokens" in json.loads((target / "llm-ray.json").read_text())["note"]
    assert json.loads((misread / SETTINGS).read_text())["tokenizer_class"] == "GPT2Tokenizer", (
        "the original is the user's"
    )


def test_what_no_class_mends_is_refused(misread: Path, tmp_path: Path) -> None:
    """For some types of model transformers takes a class of its own, whatever the folder names."""
    config = json.loads((misread / "config.json").read_text())
    (misread / "config.json").write_text(
        json.dumps(config | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]})
    )
    with pytest.raises(ModelError, match="reads the tokenizer differently"):
        import_model(str(misread), "small", tmp_path / "models")
    assert not (tmp_path / "models" / "small").exists()


def test_a_folder_without_tokenizer_json_is_left_to_transformers(tiny: Path, tmp_path: Path) -> None:
    vocabulary = tmp_path / "vocabulary"
    shutil.copytree(tiny, vocabulary)
    data = json.loads((vocabulary / FILE).read_text())["model"]
    (vocabulary / FILE).unlink()
    (vocabulary / "vocab.json").write_text(json.dumps(data["vocab"]))
    (vocabulary / "merges.txt").write_text("\n".join(" ".join(merge) for merge in data["merges"]))
    (vocabulary / SETTINGS).write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|im_end|>"}))
    assert read_alike(vocabulary)
    assert open_tokenizer(str(vocabulary))("pump")["input_ids"]
