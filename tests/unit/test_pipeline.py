"""What a stage's inputs are: everything that decides its outcome, by content."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from llm_ray.app.finetune import stage_inputs
from llm_ray.conf.load import load_finetune
from llm_ray.data import processors
from llm_ray.data.processors import code_of, load_processor
from tests.runs import base_of

FILES = {
    "conf.yaml": "name: x\nmodel: {base: ./base, tokenizer: ./words, chat_template: chat.jinja}\n"
    "data: {train: rows.jsonl, processor: './own.py:Own', processor_args: {glossary: GLOSSARY, other: [router]}}\n",
    "rows.jsonl": '{"prompt": "Hi", "completion": "Hello"}\n',
    "chat.jinja": "{{ messages }}",
    "own.py": "from helper import words\nimport pieces.cut\n\n\nclass Own:\n    def __init__(self, glossary=None, "
    "other=()): ...\n\n"
    "    def __call__(self, rows):\n        from late import later\n        yield from rows\n",
    "helper.py": "import deeper\n\nwords = 1\n",
    "deeper.py": "",
    "late.py": "later = 1\n",
    "pieces/__init__.py": "from . import knife\n",
    "pieces/cut.py": "from .knife import edge\n",
    "pieces/knife.py": "edge = 1\n",
    "pieces/unused.py": "",
    "unused.py": "",
    "glossary.txt": "tope: a fish\n",
    "README.md": "about",
    "words/additional_chat_templates/tool_use.jinja": "{{ tools }}",
}


@pytest.fixture
def folder(tmp_path: Path, smollm2: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text.replace("GLOSSARY", str(tmp_path / "glossary.txt")))
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(smollm2 / name, tmp_path / "words")
    return tmp_path


@pytest.fixture
def prepared(folder: Path) -> Callable[[], str]:
    def hash_of_inputs() -> str:
        conf = load_finetune(str(folder / "conf.yaml"))
        return stage_inputs(conf, base_of(conf))["prepare"]

    return hash_of_inputs


@pytest.mark.parametrize(
    "name",
    [
        *("rows.jsonl", "chat.jinja", "own.py", "helper.py", "deeper.py", "late.py", "glossary.txt"),
        *("pieces/__init__.py", "pieces/cut.py", "pieces/knife.py"),
        *(
            "words/tokenizer.json",
            "words/tokenizer_config.json",
            "words/additional_chat_templates/tool_use.jinja",
            "base/config.json",
        ),
    ],
)
def test_rows_are_prepared_again_when_what_decides_the_outcome_has_changed(
    folder: Path, prepared: Callable[[], str], name: str
) -> None:
    before = prepared()
    assert prepared() == before
    with (folder / name).open("r+") as file:  # in the middle, and as long as before
        text = file.read()
        file.seek(0)
        file.write(text[: len(text) // 2] + text[len(text) // 2 :].swapcase() + " ")
    assert prepared() != before


@pytest.mark.parametrize("name", ["unused.py", "pieces/unused.py", "README.md"])
def test_other_files_beside_them_do_not_count(folder: Path, prepared: Callable[[], str], name: str) -> None:
    before = prepared()
    (folder / name).write_text("something else")
    assert prepared() == before


def test_a_processor_imports_what_lies_beside_it(folder: Path) -> None:
    assert len(list(load_processor(f"{folder}/own.py:Own", {})(iter([{}, {}])))) == 2


def test_the_code_of_modules(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(folder)
    assert [f.name for f in code_of("pieces.cut:Own")] == ["__init__.py", "cut.py", "knife.py"]
    assert code_of("wikitext") == [Path(processors.__file__).with_name("wikitext.py")]
    assert code_of("no.such:Thing") == code_of("wikitexts") == []


def test_what_preferences_are_learnt_by_decides_no_other_training(folder: Path) -> None:
    def trained(*settings: str) -> str:
        conf = load_finetune(str(folder / "conf.yaml"), settings)
        return stage_inputs(conf, base_of(conf))["train"]

    assert trained("tuning.dpo.beta=0.5") == trained()
    dpo = "tuning.objective=dpo"
    assert trained(dpo, "tuning.dpo.beta=0.5") != trained(dpo) != trained()
    assert trained(dpo, "tuning.orpo.beta=0.5") == trained(dpo)
    orpo = "tuning.objective=orpo"
    assert trained(orpo, "tuning.orpo.beta=0.5") != trained(orpo) == trained(orpo, "tuning.dpo.beta=0.5")
    kto = "tuning.objective=kto"
    assert trained(kto, "tuning.kto.beta=0.5") != trained(kto) == trained(kto, "tuning.dpo.beta=0.5")
