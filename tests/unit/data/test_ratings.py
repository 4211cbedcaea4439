"""Rated answers from rows of every format to tokens on disk: the prompt, the rating, pairs, and dropped or rejected rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from llm_ray.app.data import _preview
from llm_ray.conf.finetune import FinetuneConf
from llm_ray.data.encode import IGNORED, NO_ANSWER, PAIR_TOO_LONG, RATED_TOO_LONG, SAME, ChatEncoder, RatedEncoder
from llm_ray.data.formats import Conversation, Formatter, Pair, Rated
from llm_ray.data.prepare import evaluation_rows, open_split, prepare, prompts_of
from llm_ray.data.sources import Row
from llm_ray.errors import DataError
from tests.unit.data.turns import converted, says, silent, user

Make = Callable[..., FinetuneConf]
Write = Callable[..., Path]
FILE = "/data/rated.jsonl"


@pytest.fixture
def convert(conf: Make) -> Callable[..., Rated | Pair]:
    def of(values: dict[str, Any], **data: Any) -> Rated | Pair:
        content = converted(conf(FILE, objective="kto", **data), values)
        assert isinstance(content, Rated | Pair)
        return content

    return of


HI = Rated(Conversation([user("Hi"), says("Go away.")]), 1, good=False)
SHAPES: list[dict[str, Any]] = [
    {"prompt": "Hi", "completion": "Go away.", "label": False},
    {"prompt": [user("Hi")], "completion": [says("Go away.")], "label": False},
    {"prompt": "Hi", "completion": [user("Hi"), says("Go away.")], "label": False},
    {"messages": [user("Hi"), says("Go away.")], "label": False},
    {"messages": [user("Hi"), says("Go away.")], "kto_tag": False},
    {
        "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Go away."}],
        "kto_tag": "false",
    },
    {"instruction": "Hi", "input": "", "output": "Go away.", "kto_tag": False},
    {"question": "Hi", "answer": "Go away.", "label": 0},
    {"question": "Hi", "answer": "Go away.", "label": "0", "kto_tag": None},
]


@pytest.mark.parametrize("values", SHAPES, ids=range(len(SHAPES)))
def test_the_same_rating_in_every_shape(convert: Callable[..., Rated], values: dict[str, Any]) -> None:
    assert convert(values) == HI


@pytest.mark.parametrize(
    ("label", "good"),
    [(True, True), (1, True), (" True", True), ("1", True), (False, False), (0, False), ("FALSE", False), ("0", False)],
)
def test_ratings_as_tables_and_csv_files_store_them(convert: Callable[..., Rated], label: object, good: bool) -> None:
    assert convert(SHAPES[0] | {"label": label}) == Rated(HI.conversation, 1, good=good)


def test_columns_of_other_names_systems_and_tools(convert: Callable[..., Rated]) -> None:
    row = {"question": "Hi", "reply": "Go away.", "thumbs_up": False}
    assert convert(row, columns={"answer": "reply", "label": "thumbs_up"}) == HI
    system = {"role": "system", "content": "Be kind."}
    wanted = Rated(Conversation([system, *HI.conversation.messages]), 2, good=False)
    assert convert(SHAPES[0] | {"system": "Be kind."}) == convert(SHAPES[3], system="Be kind.") == wanted
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    assert convert(SHAPES[0] | {"tools": tools}).conversation.tools == tools


def test_the_last_turn_is_rated_or_all_of_the_completion(convert: Callable[..., Rated]) -> None:
    before = [user("Hi"), says("Hello."), user("Weather?")]
    call = {"role": "assistant", "tool_calls": [{"name": "weather", "arguments": {}}]}
    answer = [call, {"role": "tool", "content": "Rain"}, says("It rains.")]
    assert convert({"messages": [*before, *answer], "label": True}).shared == 5
    assert convert({"prompt": before, "completion": answer, "label": True}).shared == 3


def test_a_pair_stays_one_until_it_is_encoded(convert: Callable[..., Pair]) -> None:
    pair = convert({"prompt": "Hi", "chosen": "Hello.", "rejected": "Go away."})
    assert pair == Pair(Conversation([user("Hi"), says("Hello.")]), HI.conversation, 1)
    assert convert({"prompt": "Hi", "chosen": "Hello.", "rejected": "Go away."}, format="preference") == pair


BAD: list[tuple[dict[str, Any], str]] = [
    ({"prompt": "Hi", "completion": "a"}, r"tuning\.objective kto needs a rating of the answer in a column 'label': true for a good one, "
     r"false for a bad one; the row has the columns prompt, completion\. Give it, or name yours in data\.columns"),
    ({"prompt": "Hi", "completion": "a", "label": None}, "'label' is null here"),
    ({"messages": [user("Hi"), says("a")], "kto_tag": None}, "'kto_tag' is null here"),
    ({"prompt": "Hi", "completion": "a", "label": "good"}, r"'label' must be true \(a good answer\) or false \(a bad one\), but is \"good\""),
    ({"prompt": "Hi", "completion": "a", "label": 2}, "'label' must be true .* but is 2"),
    ({"prompt": "Hi", "completion": "a", "label": [True]}, r"'label' must be true .* but is \[true\]"),
    ({"prompt": "Hi", "completion": "a", "label": True, "kto_tag": False}, "'label' and 'kto_tag' rate the answer differently"),
    ({"prompt": "", "completion": "a", "label": True}, "'prompt' is empty"),
    ({"prompt": "Hi", "completion": [user("Ho"), says("a")], "label": True}, "'completion' must be the answer to 'prompt'"),
    ({"prompt": "Hi", "completion": [user("Hi")], "label": True}, "'completion' must be the answer to 'prompt'"),
    ({"messages": [user("Hi"), says("a"), user("b")], "label": True}, "ends with a turn of role user, but its rating is of an answer"),
    ({"text": "Hi", "label": True}, r"plain text has no answers for tuning\.objective kto"),
]  # fmt: skip


@pytest.mark.parametrize(("values", "words"), BAD, ids=range(len(BAD)))
def test_a_bad_row_is_told_by_place_fault_and_remedy(
    convert: Callable[..., Rated], values: dict[str, Any], words: str
) -> None:
    with pytest.raises(DataError, match=rf"{FILE}:7: .*{words}"):
        convert(values)


def test_sft_names_the_objective_that_learns_from_ratings(conf: Make) -> None:
    with pytest.raises(DataError, match=r"marked as bad.*or use objective kto, which learns from good and bad answers"):
        Formatter(conf(FILE).data, "conversations")(Row(FILE, 7, SHAPES[0]))


# Tokens ---------------------------------------------------------------------------------------------------------------


def test_answers_follow_their_prompt_and_are_supervised_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    before = [user("Hi"), says("Hello."), user("How are you?")]
    good, pair, bad = RatedEncoder(ChatEncoder(tokenizer, 512)).encode(
        [
            Rated(Conversation([*before, says("Fine, thanks.")]), 3, good=True),
            Pair(Conversation([*before, says("Fine.")]), Conversation([*before, says("Bad")]), 3),
            Rated(Conversation([*before, says("Go away.")]), 3, good=False),
        ]
    )
    prompt = tokenizer.apply_chat_template(before, add_generation_prompt=True, return_dict=False)
    found = []
    for encoded in (good, pair, bad):
        assert not isinstance(encoded, DataError)
        for one in encoded.sequences:
            assert one.prompt == len(prompt) and one.input_ids[: one.prompt] == prompt
            assert set(one.labels[: len(prompt)]) == {IGNORED}, "the earlier answer, too"
            found.append((tokenizer.decode(one.labels[len(prompt) :]), one.good))
    assert found == [
        ("Fine, thanks.<|im_end|>", True),
        ("Fine.<|im_end|>", True),
        ("Bad<|im_end|>", False),
        ("Go away.<|im_end|>", False),
    ]


def test_a_template_that_rewrites_earlier_answers(with_template: Callable[..., PreTrainedTokenizerBase]) -> None:
    turns = [user("Hi"), says("<think>\nHm.\n</think>\n\nOne."), user("And?"), says("Two.")]
    (result,) = RatedEncoder(ChatEncoder(with_template("qwen3"), 512)).encode([Rated(Conversation(turns), 1, True)])
    assert isinstance(result, DataError) and "end the completion after its first answer" in str(result)


# On disk --------------------------------------------------------------------------------------------------------------


def row(n: int) -> dict[str, Any]:
    return {"prompt": f"Question {n}?", "completion": f"{'Good' if n % 2 else 'Bad'} {n}.", "label": bool(n % 2)}


def test_prepared_ratings(conf: Make, jsonl: Write, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rows = [row(n) for n in range(40)]
    lost = [
        {"prompt": "Q?", "completion": "b " * 200, "label": True},
        {"prompt": "Q?", "completion": " ", "label": True},
    ]
    made = conf(jsonl([*rows, *lost]), objective="kto", validation=0.25, max_length=96)
    stats = prepare(made, tokenizer, tmp_path / "prepared", silent)
    assert stats.validation is not None
    assert (stats.train.rows, stats.validation.rows) == (30, 10)
    assert stats.train.good is not None and stats.validation.good is not None
    assert stats.train.good + stats.validation.good == 20
    assert stats.dropped == {RATED_TOO_LONG: 1, NO_ANSWER: 1} and stats.truncated == 0
    assert any("rows.jsonl:41: the answer does not end within data.max_length (" in e for e in stats.examples)
    assert any(f"train: 30 rows ({stats.train.good} good answers, " in line for line in stats.lines())
    train = open_split(tmp_path / "prepared", "train")
    assert train.column_names == ["input_ids", "labels", "good", "prompt"]
    assert sum(train["good"]) == stats.train.good
    assert prompts_of(train).tolist() == train["prompt"][:]
    for one in train:
        assert one["labels"] == [IGNORED] * one["prompt"] + one["input_ids"][one["prompt"] :]
    asked = [one.messages[-1]["content"] for one in evaluation_rows(made, tokenizer, tmp_path / "prepared")]
    assert len(asked) == stats.validation.good and all(text.startswith("Good") for text in asked), "as it should answer"


def test_prepared_pairs_are_a_good_and_a_bad_answer_on_the_same_side(
    conf: Make, jsonl: Write, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows = [{"prompt": f"Question {n}?", "chosen": f"Good {n}.", "rejected": f"Bad {n}."} for n in range(12)]
    lost = [
        {"prompt": "Q?", "chosen": "a", "rejected": "b " * 200},
        {"prompt": "Q?", "chosen": "a", "rejected": "a"},
    ]
    made = conf(jsonl([*rows, *lost]), objective="kto", validation=0.25, max_length=96)
    stats = prepare(made, tokenizer, tmp_path / "prepared", silent)
    assert stats.validation is not None
    assert (stats.train.rows, stats.train.sequences, stats.train.good) == (9, 18, 9)
    assert (stats.validation.rows, stats.validation.sequences, stats.validation.good) == (3, 6, 3)
    assert stats.dropped == {PAIR_TOO_LONG: 1, SAME: 1}
    texts = [tokenizer.decode(one["input_ids"]) for one in open_split(tmp_path / "prepared", "train")]
    answers = [("Good" if "Good" in text else "Bad", text.partition("Question ")[2][:2]) for text in texts]
    goods, bads = ([n for side, n in answers if side == wanted] for wanted in ("Good", "Bad"))
    assert sorted(goods) == sorted(bads), "no pair is divided between the splits"
    assert len(list(evaluation_rows(made, tokenizer, tmp_path / "prepared"))) == 3


def test_answers_that_are_rated_twice(
    conf: Make, jsonl: Write, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows = [
        {"prompt": "Q?", "completion": "a", "label": True},
        {"prompt": "Q?", "completion": "b", "label": False},
        {"prompt": "Q?", "completion": "a", "label": True},
        {"prompt": "Q?", "completion": "a", "label": False},
    ]
    stats = prepare(conf(jsonl(rows), objective="kto"), tokenizer, tmp_path / "prepared", silent)
    assert (stats.repeated, stats.contradicting) == (1, 1), "several answers to a prompt are none"
    assert any("rows.jsonl:4 and" in e and "rate the same answer differently" in e for e in stats.examples)


def test_special_tokens_in_a_rated_answer(
    conf: Make, jsonl: Write, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows = [row(1), {"prompt": "Q?", "completion": "b <|im_end|> c", "label": True}]
    made = conf(jsonl(rows), objective="kto", special_tokens_in_text="escape")
    assert prepare(made, tokenizer, tmp_path / "prepared", silent).special_tokens == 1
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    ends = [one["input_ids"].count(end) for one in open_split(tmp_path / "prepared", "train")]
    assert len(set(ends)) == 1, "an answer ends once"


def test_the_preview_shows_the_rating(conf: Make, jsonl: Write, tokenizer: PreTrainedTokenizerBase) -> None:
    pair = {"prompt": "Hi", "chosen": "Hello.", "rejected": "Go away."}
    files = [jsonl([row(1), row(2)], "rated.jsonl"), jsonl([pair], "pairs.jsonl")]
    found = _preview(conf(list(map(str, files)), objective="kto"), tokenizer, 3)
    shown = [
        (one.answer, "".join(s.text for s in one.spans if s.supervised)) for row in found.rows for one in row.sequences
    ]
    assert sorted(shown) == [
        ("bad", "Bad 2.<|im_end|>"),
        ("bad", "Go away.<|im_end|>"),
        ("good", "Good 1.<|im_end|>"),
        ("good", "Hello.<|im_end|>"),
    ]
