"""Golden tests of the supervised tokens with the templates of several model families."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers
from transformers import PreTrainedTokenizerBase

from llm_ray.app.data import spans
from llm_ray.cli.data import marked
from llm_ray.data.encode import IGNORED, ChatEncoder, Encoded, SpecialTokens, TextEncoder, end_of_turn
from llm_ray.data.formats import Conversation, Text
from llm_ray.errors import DataError, ModelError

Make = Callable[..., PreTrainedTokenizerBase]

WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "Tells it.", "parameters": {"type": "object", "properties": {}}},
}
CALL = {"id": "call00000", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}


def turns(*contents: str, system: str | None = None) -> Conversation:
    """A conversation with alternating turns of user and assistant."""
    messages: list[dict[str, Any]] = [
        {"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)
    ]
    return Conversation([{"role": "system", "content": system}, *messages] if system else messages)


def shown(tokenizer: PreTrainedTokenizerBase, conversation: Conversation, max_length: int = 4096) -> list[str]:
    return [marked(spans(tokenizer, s), color=False) for s in encoded(tokenizer, conversation, max_length).sequences]


def encoded(tokenizer: PreTrainedTokenizerBase, conversation: Conversation, max_length: int = 4096) -> Encoded:
    (result,) = ChatEncoder(tokenizer, max_length).encode([conversation])
    assert isinstance(result, Encoded)
    for sequence in result.sequences:
        assert len(sequence.input_ids) == len(sequence.labels) <= max_length
        assert sequence.labels[0] == IGNORED
        assert all(label in (IGNORED, token) for token, label in zip(sequence.input_ids, sequence.labels, strict=True))
    return result


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, conversation: Conversation, number: int) -> list[int]:
    """The prompt tokens that a server sends to get message `number`."""
    return tokenizer.apply_chat_template(
        conversation.messages[:number],
        tools=conversation.tools,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=False,
    )


def assert_served_prompts_are_prefixes(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> None:
    encoder = ChatEncoder(tokenizer, 4096)
    sequences = encoded(tokenizer, conversation).sequences
    adapted = encoder.adapt(conversation)
    for number, message in enumerate(adapted.messages):
        if message["role"] != "assistant" or not message["content"].strip():
            continue
        prompt = prompt_tokens(tokenizer, adapted, number)
        # Exactly one sequence supervises this answer; others may contain it as history.
        learning = [s for s in sequences if s.input_ids[: len(prompt)] == prompt and s.labels[len(prompt)] != IGNORED]
        assert len(learning) == 1
        assert learning[0].labels[len(prompt) - 1] == IGNORED


# Which tokens ---------------------------------------------------------------------------------------------------------


def test_smollm2_one_turn(tokenizer: PreTrainedTokenizerBase) -> None:
    assert shown(tokenizer, turns("Who are you?", "The router's help desk.")) == [
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n⟦The router's help desk.<|im_end|>⟧"
    ]


def test_smollm2_several_turns_and_a_system_message(tokenizer: PreTrainedTokenizerBase) -> None:
    assert shown(tokenizer, turns("Hi", "Hello.", "Bye", "See you.", system="Be brief.")) == [
        "<|im_start|>system\nBe "
        "brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello.<|im_end|>⟧\n"
        "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n⟦See you.<|im_end|>⟧"
    ]


@pytest.fixture(scope="module")
def llama3(with_template: Make) -> PreTrainedTokenizerBase:
    """Llama 3's template, special tokens and splitting into words, over SmolLM2's vocabulary."""
    specials = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>")
    tokenizer = with_template("llama3", *specials, eos="<|end_of_text|>")
    tokenizer.bos_token = specials[0]
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


def test_llama3_learns_eot_though_eos_is_another(llama3: PreTrainedTokenizerBase) -> None:
    assert shown(llama3, turns("Hi", "  Hello. ", "Bye", "See you.")) == [
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        "⟦Hello.<|eot_id|>⟧<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        "⟦See you.<|eot_id|>⟧"
    ]
    assert end_of_turn(llama3) == llama3.convert_tokens_to_ids("<|eot_id|>")
    assert_served_prompts_are_prefixes(llama3, turns("Hi", "Hello.", "Bye", "See you."))


def test_token_across_the_end_of_the_prompt(with_template: Make) -> None:
    """SmolLM2 encodes the prompt's last two line breaks as one token, but as two if an answer follows. Serving uses the
    one."""
    tokenizer = with_template("llama3", "<|eot_id|>")
    conversation = turns("Hi", "Hello.", "Bye", "See you.")
    first, second = encoded(tokenizer, conversation).sequences
    assert first.input_ids[: (n := len(prompt_tokens(tokenizer, conversation, 1)))] == prompt_tokens(
        tokenizer, conversation, 1
    )
    assert (
        tokenizer.decode([i for i in first.labels if i != IGNORED])
        == "Hello.<|eot_id|>"
        == tokenizer.decode(first.input_ids[n:])
    )
    assert second.input_ids[: len(prompt_tokens(tokenizer, conversation, 3))] == prompt_tokens(
        tokenizer, conversation, 3
    )
    assert tokenizer.decode([i for i in second.labels if i != IGNORED]) == "See you.<|eot_id|>"


def test_mistral_sentencepiece(mistral: PreTrainedTokenizerBase) -> None:
    (sequence,) = encoded(mistral, turns("Hi", "Hello.", "Bye", "See you.")).sequences
    assert mistral.convert_ids_to_tokens([i for i in sequence.labels if i != IGNORED]) == [
        "▁Hello",
        ".",
        "</s>",
        "▁See",
        "▁you",
        ".",
        "</s>",
    ]
    assert mistral.convert_ids_to_tokens(sequence.input_ids[:6]) == ["<s>", "[", "INST", "]", "▁Hi", "▁["]


def test_marks_of_a_template_agree(with_template: Make) -> None:
    tokenizer = with_template("marked")
    conversation = turns("Hi", "Hello.", "Bye", "See you.", system="Be brief.")
    (sequence,) = encoded(tokenizer, conversation).sequences
    theirs = tokenizer.apply_chat_template(conversation.messages, return_assistant_tokens_mask=True, return_dict=True)
    mask = [label != IGNORED for label in sequence.labels]
    assert theirs["assistant_masks"][: len(mask)] == mask
    assert theirs["input_ids"][: len(mask)] == sequence.input_ids  # except for the line break after the last turn


def test_template_without_an_end_gets_eos(with_template: Make) -> None:
    plain = with_template("plain")
    # In serving the history has no EOS between turns, so the second answer needs a separate sequence.
    assert shown(plain, turns("Hi", "Hello.", "Bye", "See you.")) == [
        "### user:\nHi\n\n### assistant:\n⟦Hello.<|im_end|>⟧",
        "### user:\nHi\n\n### assistant:\nHello.\n\n### user:\nBye\n\n### assistant:\n⟦See you.<|im_end|>⟧",
    ]


def test_phi3_stops_at_its_own_end_not_at_the_end_of_text_after_it(with_template: Make) -> None:
    phi3 = with_template("phi3", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>", eos="<|endoftext|>")
    assert shown(phi3, turns("Hi", "Hello.", "Bye", "See you.")) == [
        "<|user|>\nHi<|end|>\n<|assistant|>\n⟦Hello.<|end|>⟧\n<|user|>\nBye<|end|>\n<|assistant|>\n⟦See you.<|end|>⟧"
    ]


def test_qwen3_rewrites_earlier_answers_so_each_is_learnt_in_its_own_sequence(with_template: Make) -> None:
    qwen3 = with_template("qwen3")
    assert shown(qwen3, turns("2+2?", "<think>\neasy\n</think>\n\n4", "Sure?", "Yes.")) == [
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n⟦<think>\neasy\n</think>\n\n4<|im_end|>⟧",
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n"
        "⟦<think>\n\n</think>\n\nYes.<|im_end|>⟧",
    ]


def test_empty_answers_and_answers_to_nothing_are_not_learnt(tokenizer: PreTrainedTokenizerBase) -> None:
    assert not encoded(tokenizer, turns("Hi", " ")).sequences
    assert not encoded(tokenizer, turns("Hi")).sequences
    greeting = Conversation([{"role": "assistant", "content": "Welcome."}, *turns("Hi", "Hello.").messages])
    (text,) = shown(tokenizer, greeting)
    assert "Welcome.<|im_end|>\n<|im_start|>user" in text
    assert text.count("⟦") == 1
    (text,) = shown(tokenizer, turns("Hi", "Hello.", "Bye"))
    assert text.endswith("⟦Hello.<|im_end|>⟧")  # a final question without an answer is left out


def test_an_answer_of_weight_0_is_history_only(tokenizer: PreTrainedTokenizerBase, with_template: Make) -> None:
    conversation = turns("Open?", "WRONG", "Sure?", "No.")
    conversation.messages[1]["weight"] = 0
    (text,) = shown(tokenizer, conversation)
    assert "<|im_start|>assistant\nWRONG<|im_end|>\n<|im_start|>user\nSure?" in text and text.endswith(
        "⟦No.<|im_end|>⟧"
    )
    assert text.count("⟦") == 1
    (text,) = shown(with_template("qwen3"), conversation)
    assert text.count("⟦") == 1 and "WRONG⟧" not in text


def test_reasoning_that_the_template_does_not_write_is_not_passed_over(
    tokenizer: PreTrainedTokenizerBase, with_template: Make
) -> None:
    conversation = turns("2+2?", "4")
    conversation.messages[1]["reasoning_content"] = "easy"
    (refused,) = ChatEncoder(tokenizer, 64).encode([conversation])
    assert isinstance(refused, DataError) and "turn 2: the chat template ignores 'reasoning_content'" in str(refused)
    assert "⟦<think>easy</think>4<|im_end|>⟧" in shown(with_template("calls"), conversation)[0]


# Tools ----------------------------------------------------------------------------------------------------------------

TOOL_CONVERSATION = Conversation(
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather in Oslo?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": '{"degrees": 3}', "tool_call_id": "call00000", "name": "weather"},
        {"role": "assistant", "content": "3 degrees."},
    ],
    [WEATHER],
)


def test_tools_under_a_template_that_knows_none(tokenizer: PreTrainedTokenizerBase) -> None:
    (text,) = shown(tokenizer, TOOL_CONVERSATION)
    assert text.startswith("<|im_start|>system\nBe brief.\n\n# Tools\n")
    assert '<tools>\n{"type": "function", "function": {"name": "weather"' in text
    assert text.endswith(
        "<|im_start|>user\nWeather in Oslo?<|im_end|>\n<|im_start|>assistant\n"
        '⟦<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>⟧\n'
        '<|im_start|>user\n<tool_response>\n{"degrees": 3}\n</tool_response><|im_end|>\n<|im_start|>assistant\n⟦3 '
        "degrees.<|im_end|>⟧"
    )


def test_tools_under_a_template_that_knows_them(with_template: Make) -> None:
    first, second = shown(with_template("qwen3"), TOOL_CONVERSATION)
    assert first.endswith(
        '⟦<think>\n\n</think>\n\n<tool_call>\n{"name": "weather", "arguments": {"city": '
        '"Oslo"}}\n</tool_call><|im_end|>⟧'
    )
    assert second.endswith(
        '<tool_response>\n{"degrees": 3}\n</tool_response><|im_end|>\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\n3 '
        "degrees.<|im_end|>⟧"
    )
    assert "<tools>" in first and "<tools>" in second


def test_words_before_a_call_and_two_results(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "I look.", "tool_calls": [CALL, {**CALL, "id": "call00001"}]},
        {"role": "tool", "content": "3", "tool_call_id": "call00000"},
        {"role": "tool", "content": "4", "tool_call_id": "call00001"},
        {"role": "assistant", "content": "3 and 4."},
    ]
    (text,) = shown(tokenizer, Conversation(messages))
    assert "⟦I look.\n<tool_call>\n" in text and text.count("<tool_call>") == 2
    assert (
        "<|im_start|>user\n<tool_response>\n3\n</tool_response>\n<tool_response>\n4\n</tool_response><|im_end|>" in text
    )


# The served prompt is the prefix --------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [None, "llama3", "qwen3", "marked", "plain", "phi3"])
def test_served_prompt_is_exact_prefix(
    tokenizer: PreTrainedTokenizerBase, with_template: Make, template: str | None
) -> None:
    made = with_template(template, "<|eot_id|>", "<|end|>") if template else tokenizer
    for conversation in (turns("Hi", "Hello.", "A list?", "\n\n- one\n- two", "ok", " fine  "), TOOL_CONVERSATION):
        assert_served_prompts_are_prefixes(made, conversation)


def test_served_prompt_is_exact_prefix_for_sentencepiece(mistral: PreTrainedTokenizerBase) -> None:
    assert_served_prompts_are_prefixes(mistral, turns("Hi", "Hello.", "A list?", "\n\n- one\n- two", "ok", " fine  "))


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(contents=st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=30), min_size=2, max_size=6))
def test_served_prompt_is_exact_prefix_whatever_the_text(
    tokenizer: PreTrainedTokenizerBase, contents: list[str]
) -> None:
    assert_served_prompts_are_prefixes(tokenizer, turns(*contents))


# What does not fit ----------------------------------------------------------------------------------------------------


def test_truncation_on_turn_boundaries(tokenizer: PreTrainedTokenizerBase) -> None:
    conversation = turns("Hi", "Hello.", "Bye", "See you.", "Again", "Yes, again.", system="Be brief.")
    whole = encoded(tokenizer, conversation)
    two = encoded(tokenizer, turns("Hi", "Hello.", "Bye", "See you.", system="Be brief."))
    assert not whole.truncated
    cut = encoded(tokenizer, conversation, max_length=len(whole.sequences[0].input_ids) - 1)
    assert cut.truncated
    assert cut.sequences == two.sequences  # the last turn is removed completely, with its question
    assert cut.longest == whole.longest == len(whole.sequences[0].input_ids)
    exact = encoded(tokenizer, conversation, max_length=whole.longest)
    assert exact.sequences == whole.sequences and not exact.truncated


def test_first_answer_that_does_not_fit_leaves_nothing(tokenizer: PreTrainedTokenizerBase) -> None:
    cut = encoded(tokenizer, turns("Hi", "word " * 100), max_length=64)
    assert cut.truncated and not cut.sequences and cut.longest > 100


# Errors ---------------------------------------------------------------------------------------------------------------


def test_no_chat_template(tokenizer: PreTrainedTokenizerBase, with_template: Make) -> None:
    base = with_template("plain")
    base.chat_template = None
    with pytest.raises(ModelError, match=r"has no chat template.*set model\.chat_template"):
        ChatEncoder(base, 64)


def test_no_end_anywhere(with_template: Make) -> None:
    plain = with_template("plain")
    plain.eos_token = None
    with pytest.raises(ModelError, match="has a token that ends a turn"):
        ChatEncoder(plain, 64)
    with pytest.raises(ModelError, match="has no end-of-text token"):
        TextEncoder(plain, 64)


def test_an_error_names_the_file_that_the_template_is_from(with_template: Make) -> None:
    broken = with_template("thinking")
    with pytest.raises(ModelError, match=r"the chat template of .* cannot be trained on"):
        ChatEncoder(broken, 64)
    with pytest.raises(ModelError, match=r"the chat template /confs/own\.jinja cannot be trained on"):
        ChatEncoder(broken, 64, Path("/confs/own.jinja"))


def test_template_whose_prompt_is_no_prefix(with_template: Make) -> None:
    with pytest.raises(ModelError, match=r"(?s)cannot be trained on: .*<think>.*set model\.chat_template"):
        ChatEncoder(with_template("thinking"), 64)


def test_template_that_refuses_a_row_spares_the_others(mistral: PreTrainedTokenizerBase) -> None:
    good, bad = turns("Hi", "Hello."), turns("Hi", "Hello.", system="Be brief.")
    first, second, third = ChatEncoder(mistral, 64).encode([good, bad, good])
    assert first == third and isinstance(first, Encoded)
    assert isinstance(second, DataError) and "roles must alternate" in str(second)


# Text -----------------------------------------------------------------------------------------------------------------


def test_text_is_learnt_whole_with_its_end(tokenizer: PreTrainedTokenizerBase) -> None:
    (result,) = TextEncoder(tokenizer, 64).encode([Text("Water boils at 100 degrees.")])
    assert isinstance(result, Encoded)
    (sequence,) = result.sequences
    assert tokenizer.decode(sequence.input_ids) == "Water boils at 100 degrees.<|im_end|>"
    assert sequence.labels == [IGNORED, *sequence.input_ids[1:]]


def test_text_with_bos(mistral: PreTrainedTokenizerBase) -> None:
    (result,) = TextEncoder(mistral, 64).encode([Text("Water boils.")])
    assert isinstance(result, Encoded)
    ids = result.sequences[0].input_ids
    assert (ids[0], ids[-1], ids.count(mistral.eos_token_id)) == (mistral.bos_token_id, mistral.eos_token_id, 1)


def test_text_that_has_its_beginning_and_end_already(mistral: PreTrainedTokenizerBase) -> None:
    plain, marked = TextEncoder(mistral, 64).encode([Text("Water boils."), Text("<s>Water boils.</s>")])
    assert isinstance(plain, Encoded) and isinstance(marked, Encoded)
    ids = marked.sequences[0].input_ids
    assert (ids.count(mistral.bos_token_id), ids.count(mistral.eos_token_id)) == (1, 1)
    assert (
        mistral.decode(ids, skip_special_tokens=True).strip()
        == mistral.decode(plain.sequences[0].input_ids, skip_special_tokens=True).strip()
    )


@pytest.mark.parametrize("words", range(1, 40))
def test_long_text_is_split_and_nothing_lost(tokenizer: PreTrainedTokenizerBase, words: int) -> None:
    text = " ".join(["water"] * words)
    (whole,) = TextEncoder(tokenizer, 1000).encode([Text(text)])
    (split,) = TextEncoder(tokenizer, 8).encode([Text(text)])
    assert isinstance(whole, Encoded) and isinstance(split, Encoded)
    assert [i for s in split.sequences for i in s.input_ids] == whole.sequences[0].input_ids
    assert all(2 <= len(s.input_ids) <= 8 for s in split.sequences)
    assert split.longest == words + 1


def test_empty_text_is_nothing(mistral: PreTrainedTokenizerBase) -> None:
    assert TextEncoder(mistral, 64).encode([Text(" \n")]) == [Encoded()]


# Special tokens in texts ----------------------------------------------------------------------------------------------

INJECTED = "What does <|im_end|> mean?"


def test_special_tokens_in_texts_are_found(
    tokenizer: PreTrainedTokenizerBase, mistral: PreTrainedTokenizerBase
) -> None:
    special = SpecialTokens(tokenizer, escape=False)
    assert special.found(turns("Hi", "Hello.")) == ""
    assert special.found(turns(INJECTED, "An end.")) == special.found(turns("Hi", INJECTED)) == "<|im_end|>"
    call = {"type": "function", "function": {"name": "say", "arguments": {"words": ["<|im_start|>"]}}}
    assert special.found(Conversation([{"role": "assistant", "content": "", "tool_calls": [call]}])) == "<|im_start|>"
    special = SpecialTokens(mistral, escape=False)
    assert special.found(Text("<s>Water boils.</s>")) == "" and special.found(Text("Water</s> boils.")) == "</s>"


@pytest.mark.parametrize("text", [INJECTED, "<|im_end|>", "a<|im_start|><|im_end|>b", "Ends in <|im_end|>"])
def test_escaped_special_tokens_are_ordinary_text(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    encoder, special = ChatEncoder(tokenizer, 256), SpecialTokens(tokenizer, escape=True)
    taken, escaped, plain = encoder.encode([turns(text, text), special.escaped(turns(text, text)), turns("A", "B")])
    assert isinstance(taken, Encoded) and isinstance(escaped, Encoded) and isinstance(plain, Encoded)
    (taken_ids, ids, plain_ids) = (result.sequences[0].input_ids for result in (taken, escaped, plain))
    ends = [tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|im_end|>")]
    assert [i for i in ids if i in ends] == [i for i in plain_ids if i in ends] != [i for i in taken_ids if i in ends]
    assert tokenizer.decode(ids) == tokenizer.decode(plain_ids).replace("A<", f"{text}<").replace("B<", f"{text}<")
    learnt = [i for i, label in zip(ids, escaped.sequences[0].labels, strict=True) if label != IGNORED]
    assert tokenizer.decode(learnt) == f"{text}<|im_end|>"


def test_escaped_special_tokens_in_plain_text(mistral: PreTrainedTokenizerBase) -> None:
    special = SpecialTokens(mistral, escape=True)
    content = special.escaped(Text("<s>Struck <s>out</s> here.</s>"))
    assert isinstance(content, Text)
    (result,) = TextEncoder(mistral, 64).encode([content])
    assert isinstance(result, Encoded)
    ids = result.sequences[0].input_ids
    assert (ids.count(mistral.bos_token_id), ids.count(mistral.eos_token_id)) == (1, 1)
    assert mistral.decode(ids[1:-1]).strip() == "Struck <s>out</s> here."
