"""What the screens Ask and Deploy make of answers, fields and addresses."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator

import pytest

from llm_ray.app.ask import Key, Prompt, Settings, parse
from llm_ray.errors import ConfError
from llm_ray.ui import talk
from llm_ray.ui.fields import decimal, whole
from llm_ray.ui.figures import table
from llm_ray.ui.screens.deploy import snippets
from llm_ray.ui.talk import Generation, Said, Turn, parts, row, shown
from tests.unit.client.server import KEY, Server, client_server
from tests.waiting import until

TALK = [
    Turn("Hi", (Said("Hello", "5 tokens", whole=True), None)),
    Turn("And?", (Said("", "nothing listens"), Said("Yes", "", whole=True))),
]


def test_thoughts_and_tool_calls_are_pieces_of_their_own() -> None:
    assert parts("a<think>\nb\n</think>c") == [("", "a"), ("Thoughts", "b"), ("", "c")]
    assert parts("<think>still") == [("Thoughts", "still")]
    assert parts('<tool_call>{"name": "x"}</tool_call>') == [("Tool call", '```json\n{"name": "x"}\n```')]
    assert parts("x < y and <b>") == [("", "x < y and <b>")]


def test_a_talk_as_a_row_has_the_turns_that_were_answered() -> None:
    assert json.loads(row(TALK, 0, "Be brief")) == {
        "messages": [
            {"role": "system", "content": "Be brief"},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello"},
        ]
    }
    assert row([], 0, None) == ""


def test_each_side_shows_its_own_turns() -> None:
    assert [message["content"] for message in shown(TALK, 0)] == [
        "Hi",
        "Hello",
        "*5 tokens*",
        "And?",
        "nothing listens",
    ]
    assert [message["content"] for message in shown(TALK, 1)] == ["And?", "Yes"]


def test_numbers_that_may_be_empty() -> None:
    assert (whole("", "Port"), whole(None, "Port"), whole(" 8 ", "Port"), decimal("0.5", "Top p", most=1)) == (
        None,
        None,
        8,
        0.5,
    )
    for text in ("x", "0", "1.5", "nan", "inf"):
        with pytest.raises(ConfError, match="Port: "):
            whole(text, "Port")


@pytest.mark.parametrize("key", [True, False])
@pytest.mark.parametrize("task", ["chat", "completions", "embeddings"])
def test_snippets_are_programs(task: str, key: bool) -> None:
    curl, python, sdk = snippets("http://127.0.0.1:8000/v1", "quickstart", key, task)
    assert ("LLM_RAY_API_KEY" in curl, "LLM_RAY_API_KEY" in python, "LLM_RAY_API_KEY" in sdk) == (key, key, key)
    compile(python, "python", "exec")
    compile(sdk, "sdk", "exec")


def test_what_is_in_a_table_is_escaped() -> None:
    assert "<b>" not in table("<b>", ["<b>"], [["<b>"]])


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with client_server() as running:
        yield running


def generation(server: Server, model: str, key: str | None = None) -> tuple[Generation, threading.Event]:
    made = Generation(
        parse(f"{server.base}/v1", Key(key, "a test") if key else None), model, Prompt("how are you"), Settings()
    )
    changed = threading.Event()
    made.begin(changed)
    return made, changed


def ended(made: Generation) -> Said:
    until(lambda: made.done, "the answer")
    return made.said()


def test_an_answer_is_told_by_words_and_at_last_with_its_figures(server: Server) -> None:
    made, changed = generation(server, "echo")
    assert changed.wait(60)
    said = ended(made)
    assert said.text == "how are you" and said.whole
    assert "first token after" in said.note


def test_each_answer_is_asked_for_with_its_own_key(server: Server) -> None:
    """Over connections that all share."""
    server.keys = True
    try:
        right, wrong, none = (generation(server, "echo", key)[0] for key in (KEY, "sk-wrong", None))
        assert ended(right).text == "how are you"
        assert [ended(made).note.partition(":")[0][:31] for made in (wrong, none)] == [
            "The endpoint requires an API ke"
        ] * 2
    finally:
        server.keys = False


def test_a_stopped_answer_ends_at_the_endpoint(server: Server) -> None:
    server.gone.clear()
    server.requests.clear()
    made, _ = generation(server, "slow")
    until(lambda: server.requests, "the question", 60)
    made.stop()
    assert ended(made) == Said("", "Stopped.")
    assert server.gone.wait(60)


def test_an_answer_that_nobody_takes_ends(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(talk, "_GONE", 0.5)
    server.gone.clear()
    made, _ = generation(server, "slow")
    assert server.gone.wait(60)
    assert ended(made).note == "Stopped."


def test_what_an_endpoint_refuses_is_told(server: Server) -> None:
    made, _ = generation(server, "down")
    assert "503" in ended(made).note
