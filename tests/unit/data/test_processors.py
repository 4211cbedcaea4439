"""Processors: the built-in ones, one in a user's file, and errors if one cannot be loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from llm_ray.conf.finetune import FinetuneConf
from llm_ray.data.prepare import statistics
from llm_ray.data.processors import load_processor, process
from llm_ray.data.processors.wikitext import detokenize
from llm_ray.data.sources import Row
from llm_ray.errors import ConfError, DataError

OWN = '''
from dataclasses import dataclass


@dataclass
class TicketProcessor:
    """Takes the tickets of one product."""

    product: str

    def __call__(self, rows):
        for row in rows:
            if row["product"] == self.product:
                yield {"prompt": row["question"], "completion": row["reply"]}


class Broken:
    def __call__(self, rows):
        for row in rows:
            yield row["nothing"]


class OneRow:
    def __call__(self, row):
        return row["question"]


class Words:
    def __call__(self, rows):
        return ["a", "b"]


class Uncallable:
    pass
'''
TICKETS = [
    {"product": ("router", "phone")[i % 2], "question": f"Question {i}?", "reply": f"Reply {i}."} for i in range(10)
]


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "tickets.py"
    path.write_text(OWN)
    return path


def run(name: str, rows: list[dict[str, Any]], **arguments: object) -> list[dict[str, Any]]:
    return [
        r.values
        for r in process(load_processor(name, arguments), [Row("/d.jsonl", i, v) for i, v in enumerate(rows, 1)])
    ]


def test_users_own_file(
    own: Path, conf: Callable[..., FinetuneConf], jsonl: Callable[..., Path], tokenizer: PreTrainedTokenizerBase
) -> None:
    made = conf(
        jsonl(TICKETS), processor=f"{own}:TicketProcessor", processor_args={"product": "router"}, validation=None
    )
    stats = statistics(made, tokenizer)
    assert stats.read == stats.train.rows == 5
    assert stats.formats == ["prompt_completion"]


def test_place_is_that_of_the_row_read(own: Path) -> None:
    rows = list(
        process(
            load_processor(f"{own}:TicketProcessor", {"product": "phone"}),
            [Row("/d.jsonl", i, v) for i, v in enumerate(TICKETS, 1)],
        )
    )
    assert [r.line for r in rows] == [2, 4, 6, 8, 10]


def test_module_and_class(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(own.parent))
    assert len(run("tickets:TicketProcessor", TICKETS, product="phone")) == 5


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("wikitxt", {}, r"no processor 'wikitxt'; built in are wikitext, .*\(did you mean wikitext\?\)"),
        ("{file}", {}, "no processor"),
        ("{folder}/ticket.py:TicketProcessor", {}, r"ticket\.py: no such file; that folder has tickets\.py"),
        ("{file}:Tickets", {}, "has no class 'Tickets'; it has Broken, OneRow, TicketProcessor, Uncallable, Words"),
        ("{file}:Uncallable", {}, r"Uncallable of .* has no method __call__\(self, rows\)"),
        (
            "{file}:TicketProcessor",
            {},
            r"processor_args: TicketProcessor.* does not take \{\}: missing a required argument: 'product'",
        ),
        ("wikitext", {"lines": 3}, r"Wikitext\(\) does not take \{'lines': 3\}"),
        (
            "no_such_package.data:Class",
            {},
            "cannot be imported: ModuleNotFoundError: No module named 'no_such_package'",
        ),
    ],
)
def test_processor_that_cannot_be_had(own: Path, name: str, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfError, match=message):
        load_processor(name.format(file=own, folder=own.parent), arguments)


def test_file_that_does_not_import(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("def broken(:")
    with pytest.raises(ConfError, match=r"own\.py cannot be imported: SyntaxError"):
        load_processor(f"{tmp_path / 'own.py'}:Class", {})


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        ("Broken", r"/d\.jsonl:1: data\.processor Broken failed: KeyError: 'nothing' \(.*tickets\.py:20\)"),
        ("OneRow", r"data\.processor OneRow failed: TypeError: 'generator' object is not subscriptable"),
        (
            "Words",
            r"Words failed: TypeError: __call__\(self, rows\) takes an iterator of rows and must yield rows \(dict\), but yielded a str",
        ),
    ],
)
def test_processor_that_fails(own: Path, cls: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        run(f"{own}:{cls}", TICKETS)


WIKITEXT = """
 = Valkyria = 
 
 The game cost 1 @,@ 200 yen ( about $ 12 @.@ 50 ) , a role @-@ playing game ; it did n't sell " well " at first . 
 The player 's units moved 3 – 4 times , he said : " Yes ! " 
 
 = = Gameplay = = 
 
 As with earlier games . 
 = Second = 
 
 Text of it . 
"""  # noqa: W291, W293


def test_wikitext() -> None:
    articles = run("wikitext", [{"text": line} for line in WIKITEXT.splitlines()])
    assert [a["text"] for a in articles] == [
        '# Valkyria\n\nThe game cost 1,200 yen (about $12.50), a role-playing game; it didn\'t sell "well" at '
        "first.\n\n"
        'The player\'s units moved 3–4 times, he said: "Yes!"\n\n## Gameplay\n\nAs with earlier games.',
        "# Second\n\nText of it.",
    ]


def test_detokenize_leaves_ordinary_text_alone() -> None:
    for text in ("The units' 1,200 men (all of them) didn't move.", 'He said: "Yes!" and left.', "a = b + c"):
        assert detokenize(text) == text


def test_deduplicate() -> None:
    rows = [{"q": "Hi", "n": 1}, {"q": "hi ", "n": 2}, {"q": "Bye", "n": 3}, {"q": "Hi", "n": 1}]
    assert [r["n"] for r in run("deduplicate", rows)] == [1, 2, 3]
    assert [r["n"] for r in run("deduplicate", rows, columns=["q"])] == [1, 3]


def test_join() -> None:
    lines = ["", "one", "two", "", "three", "four", "", "five"]
    assert [r["text"] for r in run("join", [{"text": t} for t in lines], characters=8)] == [
        "one\ntwo",
        "three\nfour",
        "five",
    ]
    assert [r["text"] for r in run("join", [{"text": "x" * 5}] * 5, characters=5)] == [
        "xxxxx\nxxxxx",
        "xxxxx\nxxxxx",
        "xxxxx",
    ]


def test_text_that_is_no_unicode_is_the_processors(tmp_path: Path) -> None:
    def halves(rows: Any) -> Any:
        for row in rows:
            yield {"prompt": row["text"].encode("utf-16", "surrogatepass")[:4].decode("utf-16", "surrogatepass")}

    with pytest.raises(
        DataError, match=r"rows.jsonl:1: data.processor function failed: UnicodeEncodeError: .*surrogates not allowed"
    ):
        list(process(halves, [Row("rows.jsonl", 1, {"text": "🙂"})]))


RANKED = {"prompt": "Who?", "answers": ["best", "good", "bad"]}
SCORED = {
    "prompt": "Who?",
    "completions": [{"response": name, "score": score} for name, score in (("b", 3), ("a", 5.5), ("c", 3), ("d", 1))],
}


@pytest.mark.parametrize(
    ("row", "arguments", "pairs"),
    [
        (RANKED, {}, ["best>bad"]),
        (RANKED, {"pairs": "neighbours"}, ["best>good", "good>bad"]),
        (RANKED, {"pairs": "all"}, ["best>good", "best>bad", "good>bad"]),
        (SCORED, {"answers": "completions", "text": "response", "score": "score"}, ["a>d"]),
        (SCORED, {"answers": "completions", "text": "response", "rank": "score"}, ["d>a"]),
        (
            SCORED,
            {"answers": "completions", "text": "response", "score": "score", "pairs": "all"},
            ["a>b", "a>c", "a>d", "b>d", "c>d"],  # b and c are equally good
        ),
        ({"prompt": "Who?", "answers": ["alone"]}, {}, []),
        ({"prompt": "Who?", "answers": []}, {"pairs": "all"}, []),
    ],
)
def test_ranked_answers_make_pairs(row: dict[str, Any], arguments: dict[str, Any], pairs: list[str]) -> None:
    found = run("ranked", [row], **arguments)
    assert [f"{pair['chosen']}>{pair['rejected']}" for pair in found] == pairs
    assert all(pair == {"prompt": "Who?", "chosen": pair["chosen"], "rejected": pair["rejected"]} for pair in found)


@pytest.mark.parametrize(
    ("row", "arguments", "words"),
    [
        ({"prompt": "Who?"}, {}, "'answers' must be a list of answers; the row has the columns prompt"),
        (RANKED, {"score": "score"}, "answer 1 of 'answers' has no number 'score'"),
        (RANKED, {"text": "text"}, "an answer of 'answers' has no 'text'"),
    ],
)
def test_answers_without_a_rank_are_told_by_line(row: dict[str, Any], arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=rf"rows\.jsonl:1: data\.processor Ranked failed: ValueError: {words}"):
        list(process(load_processor("ranked", arguments), [Row("rows.jsonl", 1, row)]))


def test_arguments_that_a_processor_refuses_are_told() -> None:
    with pytest.raises(ConfError, match=r"data\.processor_args: Ranked: ValueError: pairs is 'some': use extremes"):
        load_processor("ranked", {"pairs": "some"})
