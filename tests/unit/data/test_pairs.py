"""Preference pairs from rows of every format to tokens on disk: the shared prompt, comparisons, and dropped or rejected
rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from llm_ray.app.data import _preview
from llm_ray.conf.finetune import FinetuneConf
from llm_ray.data.encode import IGNORED, NO_ANSWER, PAIR_TOO_LONG, SAME, ChatEncoder, Encoded, PairEncoder
from llm_ray.data.formats import Conversation, Formatter, Pair
from llm_ray.data.prepare import evaluation_rows, lengths_of, open_split, prepare
from llm_ray.data.sources import Row
from llm_ray.errors import DataError
from tests.unit.data.turns import converted, says, silent, user

Make = Callable[..., FinetuneConf]
Write = Callable[..., Path]
FILE = "/data/pairs.jsonl"


@pytest.fixture
def convert(conf: Make) -> Callable[..., Pair]:
    def of(values: dict[str, Any], **data: Any) -> Pair:
        pair = converted(conf(FILE, objective="dpo", **data), values)
        assert isinstance(pair, Pair)
        return pair

    return of


HI = Pair(Conversation([user("Hi"), says("Hello.")]), Conversation([user("Hi"), says("Go away.")]), 1)
SHAPES: list[dict[str, Any]] = [
    {"prompt": "Hi", "chosen": "Hello.", "rejected": "Go away."},
    {"prompt": [user("Hi")], "chosen": [says("Hello.")], "rejected": [says("Go away.")]},
    {"prompt": [user("Hi")], "chosen": says("Hello."), "rejected": says("Go away.")},
    {"chosen": [user("Hi"), says("Hello.")], "rejected": [user("Hi"), says("Go away.")]},
    {"prompt": "Hi", "chosen": [user("Hi"), says("Hello.")], "rejected": [user("Hi"), says("Go away.")]},
    {"prompt": "Hi", "chosen": [user("Hi"), says("Hello.")], "rejected": "Go away."},
    {
        "conversations": [{"from": "human", "value": "Hi"}],
        "chosen": {"from": "gpt", "value": "Hello."},
        "rejected": {"from": "gpt", "value": "Go away."},
    },
    {
        "prompt": json.dumps([user("Hi")]),
        "chosen": json.dumps([says("Hello.")]),
        "rejected": json.dumps([says("Go away.")]),
    },
]
OPENAI: dict[str, Any] = {
    "input": {"messages": [user("Hi")], "tools": [], "parallel_tool_calls": True},
    "preferred_output": [says("Hello.")],
    "non_preferred_output": [says("Go away.")],
}


@pytest.mark.parametrize("values", SHAPES, ids=range(len(SHAPES)))
def test_the_same_pair_in_every_shape(convert: Callable[..., Pair], values: dict[str, Any]) -> None:
    assert convert(values) == HI
    assert convert(values, format="preference") == HI


def test_a_pair_in_openais_form(convert: Callable[..., Pair], conf: Make) -> None:
    assert convert(OPENAI) == HI
    assert convert(OPENAI, format="openai_preference") == HI
    assert convert(OPENAI | {"input": json.dumps(OPENAI["input"])}) == HI, "as in a CSV"
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    pair = convert(OPENAI | {"input": {"messages": [user("Hi")], "tools": tools}})
    assert pair.chosen.tools == pair.rejected.tools == tools
    made = conf(FILE, objective="dpo")
    formatter = Formatter(made.data, "pairs")
    formatter(Row(FILE, 7, OPENAI))
    assert formatter.left_out == {"input.parallel_tool_calls": 1}


def test_columns_of_other_names_and_systems(convert: Callable[..., Pair]) -> None:
    names = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    row = {"question": "Hi", "good": "Hello.", "bad": "Go away."}
    assert convert(row, columns=names) == HI
    for pair in (
        convert(SHAPES[0] | {"system": "Be kind."}),
        convert(SHAPES[3] | {"system": "Be kind."}),
        convert(SHAPES[0], system="Be kind."),
    ):
        system = {"role": "system", "content": "Be kind."}
        assert pair == Pair(
            Conversation([system, *HI.chosen.messages]), Conversation([system, *HI.rejected.messages]), 2
        )


def test_several_turns_and_tools(convert: Callable[..., Pair]) -> None:
    def call(city: str) -> dict[str, Any]:
        return {"role": "assistant", "tool_calls": [{"name": "weather", "arguments": {"city": city}}]}

    result = {"role": "tool", "content": "Rain"}
    before = [user("Hi"), says("Hello."), user("Weather in Oslo?")]
    pair = convert(
        {
            "chosen": [*before, call("Oslo"), result, says("It rains.")],
            "rejected": [*before, call("Rome"), result, says("No idea.")],
            "tools": [{"name": "weather", "parameters": {}}],
        }
    )
    assert pair.shared == 3
    assert [m["role"] for m in pair.chosen.messages] == [
        "user",
        "assistant",
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    assert pair.chosen.tools == pair.rejected.tools != None  # noqa: E711
    later = convert(
        {"chosen": [*before, call("Oslo"), result, says("a")], "rejected": [*before, call("Oslo"), result, says("b")]}
    )
    assert later.shared == 5, "the call is a part of the prompt"
    own = convert({"prompt": before, "chosen": [call("Oslo"), result, says("a")], "rejected": "b"})
    assert own.shared == 3
    assert own.chosen.messages[4]["tool_call_id"] == own.chosen.messages[3]["tool_calls"][0]["id"]


BAD: list[tuple[dict[str, Any], str]] = [
    ({"prompt": "Hi", "chosen": "a"}, r"tuning\.objective dpo or orpo needs the columns 'chosen' and 'rejected', the row has the columns prompt, chosen"),
    ({"prompt": "Hi", "completion": "a"}, "or use objective sft with rows of one answer each"),
    ({"prompt": "Hi", "chosen": "a", "rejected": None}, "needs 'rejected', which is null here; .*: give it, or leave the row out"),
    ({"chosen": "a", "rejected": "b"}, r"the answers have no prompt: give it in a column 'prompt'"),
    ({"chosen": [says("a")], "rejected": [says("b")]}, "the answers have no prompt"),
    ({"prompt": [user("Hi"), says("a")], "chosen": "a", "rejected": "b"}, "'prompt' ends with a turn of role assistant"),
    (
        {"chosen": [user("Hi"), says("a")], "rejected": [user("Ho"), says("b")]},
        "chosen and rejected first differ in turn 1, which is not the assistant's in both",
    ),
    (
        {"chosen": [user("Hi"), says("a")], "rejected": [user("Hi"), says("a"), user("c"), says("d")]},
        "first differ in turn 3",
    ),
    (
        {"prompt": "Ho", "chosen": [user("Hi"), says("a")], "rejected": [user("Hi"), says("b")]},
        "'prompt' differs from the turns before the answers",
    ),
    ({"prompt": "Hi", "chosen": 3, "rejected": "b"}, "turn 1 of 'chosen' must be an object, but is 3"),
    (OPENAI | {"input": [user("Hi")]}, "'input' must be an object with the prompt in 'messages', but is "),
    (OPENAI | {"input": {"messages": [user("Hi"), says("a")]}}, "'input.messages' ends with a turn of role assistant"),
    (OPENAI | {"preferred_output": 3}, "turn 1 of 'preferred_output' must be an object, but is 3"),
    ({"prompt": "<image> Hi", "chosen": "a", "rejected": "b", "images": ["x.png"]}, "only text can be trained on"),
]  # fmt: skip


@pytest.mark.parametrize(("values", "words"), BAD, ids=range(len(BAD)))
def test_a_bad_row_is_told_by_place_fault_and_remedy(
    convert: Callable[..., Pair], values: dict[str, Any], words: str
) -> None:
    with pytest.raises(DataError, match=rf"{FILE}:7: .*{words}"):
        convert(values)


def test_sft_names_the_objective_that_learns_from_pairs(conf: Make) -> None:
    with pytest.raises(DataError, match=r"pairs\.jsonl:7: .* which tuning\.objective dpo or orpo learns from"):
        Formatter(conf(FILE).data, "conversations")(Row(FILE, 7, SHAPES[0]))
    with pytest.raises(DataError, match=r"preference pairs \(input, preferred_output, non_preferred_output\), which"):
        Formatter(conf(FILE).data, "conversations")(Row(FILE, 7, OPENAI))


def test_formats_and_objectives_that_do_not_fit(conf: Make) -> None:
    with pytest.raises(ValueError, match=r"objective dpo learns from pairs of answers, but data\.format is alpaca"):
        conf(FILE, objective="dpo", format="alpaca")
    with pytest.raises(ValueError, match=r"objective sft learns from one answer a row, but data\.format is preference"):
        conf(FILE, format="preference")
    with pytest.raises(ValueError, match=r"objective pretrain learns plain text, but data\.format is preference"):
        conf(FILE, objective="pretrain", format="preference")


# Tokens ---------------------------------------------------------------------------------------------------------------


def encoded(tokenizer: PreTrainedTokenizerBase, pair: Pair, max_length: int = 512) -> Encoded:
    (result,) = PairEncoder(ChatEncoder(tokenizer, max_length)).encode([pair])
    assert isinstance(result, Encoded)
    return result


def test_both_answers_follow_the_same_tokens_and_are_compared_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    before = [user("Hi"), says("Hello."), user("How are you?")]
    pair = Pair(Conversation([*before, says("Fine, thanks.")]), Conversation([*before, says("Bad")]), 3)
    (sequence,) = encoded(tokenizer, pair).sequences
    chosen, rejected = sequence.rows()
    prompt = tokenizer.apply_chat_template(before, add_generation_prompt=True, return_dict=False)
    for row, text in ((chosen, "Fine, thanks."), (rejected, "Bad")):
        assert row.input_ids[: len(prompt)] == prompt
        assert set(row.labels[: len(prompt)]) == {IGNORED}, "the earlier answer, too"
        assert tokenizer.decode(row.labels[len(prompt) :]) == f"{text}<|im_end|>"
    assert sequence.input_ids == chosen.input_ids + rejected.input_ids


def test_answers_of_several_turns_are_compared_in_the_assistants_words(tokenizer: PreTrainedTokenizerBase) -> None:
    pair = Pair(
        Conversation([user("Hi"), says("One."), user("And?"), says("Two.")]),
        Conversation([user("Hi"), says("Three.")]),
        1,
    )
    (sequence,) = encoded(tokenizer, pair).sequences
    compared = [tokenizer.decode([t for t in row.labels if t >= 0]) for row in sequence.rows()]
    assert compared == ["One.<|im_end|>Two.<|im_end|>", "Three.<|im_end|>"]


@pytest.mark.parametrize(
    ("chosen", "rejected", "max_length", "why"),
    [
        ("Hello.", "Hello.", 512, SAME),
        ("Hello.", "Hello " * 90, 64, PAIR_TOO_LONG),
        ("Hello " * 90, "Hello.", 64, PAIR_TOO_LONG),
        ("Hello.", " ", 512, NO_ANSWER),
    ],
)
def test_pairs_that_are_lost(
    tokenizer: PreTrainedTokenizerBase, chosen: str, rejected: str, max_length: int, why: str
) -> None:
    pair = Pair(Conversation([user("Hi"), says(chosen)]), Conversation([user("Hi"), says(rejected)]), 1)
    result = encoded(tokenizer, pair, max_length)
    assert (result.sequences, result.lost) == ([], why)


def test_a_template_that_rewrites_earlier_answers(with_template: Callable[..., PreTrainedTokenizerBase]) -> None:
    thinking = "<think>\nHm.\n</think>\n\nOne."
    pair = Pair(
        Conversation([user("Hi"), says(thinking), user("And?"), says("Two.")]),
        Conversation([user("Hi"), says("Three.")]),
        1,
    )
    (result,) = PairEncoder(ChatEncoder(with_template("qwen3"), 512)).encode([pair])
    assert isinstance(result, DataError) and "chosen: the chat template renders its turns differently" in str(result)


# On disk --------------------------------------------------------------------------------------------------------------


def row(n: int, chosen: str = "Good", rejected: str = "Bad") -> dict[str, str]:
    return {"prompt": f"Question {n}?", "chosen": f"{chosen} {n}.", "rejected": f"{rejected} {n} {'very ' * (n % 7)}."}


def test_prepared_pairs(conf: Make, jsonl: Write, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rows = [row(n) for n in range(40)]
    lost = [
        {"prompt": "Q?", "chosen": "Same.", "rejected": "Same."},
        {"prompt": "Q?", "chosen": "a", "rejected": "b " * 200},
    ]
    made = conf(jsonl([*rows, *lost]), objective="dpo", validation=0.25, max_length=96)
    stats = prepare(made, tokenizer, tmp_path / "prepared", silent)
    assert (stats.train.rows, stats.validation.rows if stats.validation else 0) == (30, 10)
    assert stats.dropped == {SAME: 1, PAIR_TOO_LONG: 1} and stats.formats == ["preference"]
    assert any("rows.jsonl:42: an answer of the pair does not end" in example for example in stats.examples)
    train = open_split(tmp_path / "prepared", "train")
    for one in train:
        assert 0 < one["chosen"] < len(one["input_ids"])
        assert one["labels"][0] == one["labels"][one["chosen"]] == IGNORED, "nothing is predicted across rows"
    lengths = lengths_of(train)
    assert lengths.tolist() == [len(one["input_ids"]) for one in train]
    longer = [2 * max(one["chosen"], len(one["input_ids"]) - one["chosen"]) for one in train]
    assert lengths_of(train, padded=True).tolist() == longer != lengths.tolist()
    asked = list(evaluation_rows(made, tokenizer, tmp_path / "prepared"))
    assert len(asked) == 10
    assert asked[0].messages[-1]["content"].startswith("Good"), "the chosen answer is what it should give"


def test_pairs_that_repeat_or_contradict_others(
    conf: Make, jsonl: Write, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows = [
        {"prompt": "Q?", "chosen": "a", "rejected": "b"},
        {"prompt": "Q?", "chosen": "a", "rejected": "c"},
        {"prompt": "Q?", "chosen": "a", "rejected": "b"},
        {"prompt": "Q?", "chosen": "c", "rejected": "a"},
    ]
    stats = prepare(conf(jsonl(rows), objective="dpo"), tokenizer, tmp_path / "prepared", silent)
    assert (stats.repeated, stats.contradicting) == (1, 1), "several pairs to a prompt are none"
    assert any("rows.jsonl:4 and" in e and "prefer opposite answers of the same two" in e for e in stats.examples)


def test_special_tokens_in_either_answer(
    conf: Make, jsonl: Write, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows = [row(1), {"prompt": "Q?", "chosen": "a", "rejected": "b <|im_end|> c"}]
    made = conf(jsonl(rows), objective="dpo", special_tokens_in_text="escape")
    stats = prepare(made, tokenizer, tmp_path / "prepared", silent)
    assert stats.special_tokens == 1
    ends = [
        one["input_ids"].count(tokenizer.convert_tokens_to_ids("<|im_end|>"))
        for one in open_split(tmp_path / "prepared", "train")
    ]
    assert len(set(ends)) == 1, "an answer ends once"


def test_the_preview_shows_both_answers_and_what_is_compared(
    conf: Make, jsonl: Write, tokenizer: PreTrainedTokenizerBase
) -> None:
    found = _preview(conf(jsonl([row(1)]), objective="dpo"), tokenizer, 1)
    (shown,) = found.rows
    assert [one.answer for one in shown.sequences] == ["chosen", "rejected"]
    assert ["".join(s.text for s in one.spans if s.supervised) for one in shown.sequences] == [
        "Good 1.<|im_end|>",
        "Bad 1 very .<|im_end|>",
    ]
