"""One suite for all engines: the real model in each, asked in OpenAI's form, at fp32 against transformers itself.

    pytest tests/integration/test_engines.py -k openvino

What an engine cannot do stands in CANNOT, and is refused with 400; docs/reference/engines.md tells the same to users.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, LogitsProcessorList

from llm_ray.cluster import local_ray
from llm_ray.conf.engines import EngineName
from llm_ray.progress import Silent
from llm_ray.serve.models import ServedModel
from tests.integration import tiny

ENGINES: tuple[EngineName, ...] = ("vllm", "openvino", "transformers")
QUESTIONS = (
    "What is the capital of France?",
    "Explain gravity in two sentences.",
    "How do I boil an egg?",
    "Name three colours.",
)
# Longest prompt and answer, and room in the cache for little more: sixteen requests at once have to wait for it, or
# give it back.
LENGTH = 512
CACHED_TOKENS = {"vllm": 900}  # its blocks are of 128 tokens, and one is not used
TOKEN_BYTES = 46080

# Parameters of a request that not every engine has, and what shows in the answer that they were heeded.
_SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "people": {"type": "integer", "minimum": 1, "maximum": 99},
    },
    "required": ["city", "people"],
    "additionalProperties": False,
}
SOMETIMES: dict[str, tuple[dict[str, Any], Callable[[Any], bool]]] = {
    "logit_bias": ({"logit_bias": {"2683": 100.0}, "max_tokens": 2}, lambda choice: len(choice.message.content) > 0),
    "top_logprobs": (
        {"logprobs": True, "top_logprobs": 3},
        lambda choice: len(choice.logprobs.content[0].top_logprobs) == 3,
    ),
    "prompt_logprobs": ({"prompt_logprobs": 1}, lambda choice: True),
    "allowed_token_ids": ({"allowed_token_ids": [28]}, lambda choice: set(choice.message.content) == {","}),
    "bad_words": ({"bad_words": ["Paris"]}, lambda choice: "Paris" not in choice.message.content),
    "response_format": (
        {
            "response_format": {"type": "json_schema", "json_schema": {"name": "city", "schema": _SCHEMA}},
            "max_tokens": 60,
        },
        lambda choice: set(json.loads(choice.message.content)) == {"city", "people"},
    ),
    "json_object": (
        {
            "response_format": {"type": "json_object"},
            "max_tokens": 100,
            "temperature": 0.0,
            "stop": ["}"],
            "include_stop_str_in_output": True,
        },
        lambda choice: choice.message.content.lstrip().startswith("{"),
    ),
    "choice": (
        {"structured_outputs": {"choice": ["Rome", "Oslo"]}},
        lambda choice: choice.message.content in ("Rome", "Oslo"),
    ),
    "regex": ({"structured_outputs": {"regex": "[a-c]{3}-[0-9]{2}"}}, lambda choice: choice.message.content[3] == "-"),
    "grammar": (
        {"structured_outputs": {"grammar": 'root ::= "no" | "never"'}},
        lambda choice: choice.message.content in ("no", "never"),
    ),
}
CANNOT: dict[str, set[str]] = {
    "vllm": set(),
    "openvino": {"logit_bias", "top_logprobs", "prompt_logprobs", "allowed_token_ids", "bad_words"},
    "transformers": {"prompt_logprobs"},
}


class Refused(Exception):
    """OpenAI's error, with its status."""


@dataclass
class Served:
    """A model's server in this process, and the event loop it lives in."""

    engine: str
    server: Any
    run: Callable[[Coroutine[Any, Any, Any]], Any]

    async def chat(self, question: str = QUESTIONS[0], **asked: Any) -> Any:
        """The answer, whole or as a list of pieces. Raises Refused."""
        from llm_ray.serve.gateway.requests import Chat

        asked = {"temperature": 0.0, "max_tokens": 32} | asked
        request = Chat.model_validate({"model": "m", "messages": [{"role": "user", "content": question}]} | asked)
        return await _answer(await self.server.chat(request))

    def ask(self, question: str = QUESTIONS[0], **asked: Any) -> Any:
        return self.run(self.chat(question, **asked))

    def text(self, question: str = QUESTIONS[0], **asked: Any) -> str:
        return str(self.ask(question, **asked).choices[0].message.content)

    def known(self) -> set[str]:
        """Requests that the front end waits for."""
        return set(self.server.engine._engine_client.output_processor.request_states)

    def busy(self) -> bool:
        client = self.server.engine._engine_client.engine_core
        return bool(self.run(client._do(lambda core: core.has_work())))


async def _answer(generator: Any) -> Any:
    pieces: list[Any] = []
    async for part in generator:
        pieces += part if isinstance(part, list) else [part]
    if error := getattr(pieces[0], "error", None):
        raise Refused(f"{error.code} {error.message}")
    if isinstance(pieces[0], str):
        return [
            json.loads(data)
            for line in "".join(pieces).split("\n\n")
            if (data := line.removeprefix("data: ")) not in ("", "[DONE]")
        ]
    return pieces[0]


@pytest.fixture(scope="module")
def folders(smollm2: Path) -> Callable[[str], Path]:
    from llm_ray.models.convert import openvino_folder

    return lambda engine: (
        openvino_folder(smollm2, "fp32", smollm2.parent, Silent()) if engine == "openvino" else smollm2
    )


@pytest.fixture(scope="module")
def ray() -> Iterator[None]:
    with local_ray(2):
        yield


@pytest.fixture(scope="module", params=ENGINES)
def served(request: pytest.FixtureRequest, ray: None, folders: Callable[[str], Path]) -> Iterator[Served]:
    from llm_ray.serve.replica.server import ModelServer

    engine = request.param
    cache = CACHED_TOKENS.get(engine, 600) * TOKEN_BYTES
    model = ServedModel(
        "m", folders(engine), engine=engine, max_model_len=LENGTH, kv_cache_bytes=cache, max_batch=16, threads=1
    )
    with asyncio.Runner() as runner:
        server = ModelServer(model)
        runner.run(server.start())
        yield Served(engine, server, runner.run)
        server.engine._engine_client.shutdown()


class Reference:
    """transformers, alone and greedy."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.known: dict[tuple[str, int], tuple[str, list[float]]] = {}

    def prompt(self, question: str = QUESTIONS[0]) -> list[int]:
        messages = [{"role": "user", "content": question}]
        return list(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))

    def answer(self, question: str = QUESTIONS[0], tokens: int = 32, **options: Any) -> tuple[str, list[float]]:
        """Text, and the logarithm of each token's probability before any penalty."""
        if not options and (question, tokens) in self.known:
            return self.known[question, tokens]
        prompt = torch.tensor([self.prompt(question)])
        done = self.model.generate(
            prompt, max_new_tokens=tokens, do_sample=False, return_dict_in_generate=True, output_logits=True, **options
        )
        new = done.sequences[0, prompt.shape[1] :]
        rows = torch.log_softmax(torch.cat(done.logits), dim=-1)
        answer = self.tokenizer.decode(new, skip_special_tokens=True), rows[torch.arange(len(new)), new].tolist()
        if not options:
            self.known[question, tokens] = answer
        return answer


@pytest.fixture(scope="module")
def reference(smollm2: Path) -> Reference:
    return Reference(smollm2)


@pytest.mark.parametrize("question", QUESTIONS)
def test_greedy_text_is_that_of_transformers(served: Served, reference: Reference, question: str) -> None:
    assert served.text(question) == reference.answer(question)[0]


def test_logprobs_are_those_of_transformers(served: Served, reference: Reference) -> None:
    text, logprobs = reference.answer(tokens=12)
    choice = served.ask(max_tokens=12, logprobs=True, top_logprobs=0).choices[0]
    assert choice.message.content == text
    assert [token.logprob for token in choice.logprobs.content] == pytest.approx(
        logprobs[: len(choice.logprobs.content)], abs=1e-3
    )
    assert "".join(token.token for token in choice.logprobs.content).startswith(text)


class Penalties(LogitsProcessor):
    """Presence and frequency penalties, which count the answer's tokens alone."""

    def __init__(self, start: int, presence: float, frequency: float) -> None:
        self.start, self.presence, self.frequency = start, presence, frequency

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        counts = torch.bincount(ids[0, self.start :], minlength=scores.shape[1])
        return scores - self.presence * (counts > 0) - self.frequency * counts


def test_penalties_are_those_of_transformers(served: Served, reference: Reference) -> None:
    question = QUESTIONS[2]
    assert served.text(question, repetition_penalty=1.3) == reference.answer(question, repetition_penalty=1.3)[0]
    penalties = LogitsProcessorList([Penalties(len(reference.prompt(question)), 0.8, 0.6)])
    expected = reference.answer(question, logits_processor=penalties)[0]
    assert served.text(question, presence_penalty=0.8, frequency_penalty=0.6) == expected


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 0.011}])
def test_sampling_from_one_token_is_greedy(served: Served, narrow: dict[str, Any]) -> None:
    assert served.text(max_tokens=8, **({"temperature": 1.0, "seed": 1} | narrow)) == served.text(max_tokens=8)


def test_a_seed_repeats_an_answer_and_none_does_not(served: Served) -> None:
    def text(seed: int | None) -> str:
        return served.text(QUESTIONS[1], temperature=1.2, max_tokens=12, seed=seed)

    assert text(7) == text(7)
    assert len({text(8), text(-9), text(2**40)}) == 3
    assert len({text(None) for _ in range(4)}) > 1


def test_several_answers_differ_and_are_counted_together(served: Served, reference: Reference) -> None:
    answer = served.ask(QUESTIONS[1], n=3, seed=5, temperature=1.2, max_tokens=24, ignore_eos=True)
    assert len({choice.message.content for choice in answer.choices}) == 3
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(reference.prompt(QUESTIONS[1])), 72)


def test_several_answers_of_the_likeliest_tokens_are_the_same(served: Served) -> None:
    for narrowest in ({"temperature": 0.0}, {"temperature": 1.0, "top_p": 0.0}):
        choices = served.ask(QUESTIONS[1], n=3, max_tokens=8, **narrowest).choices
        assert {choice.message.content for choice in choices} == {served.text(QUESTIONS[1], max_tokens=8)}
        assert [choice.index for choice in choices] == [0, 1, 2]


def test_the_pieces_of_a_stream_join_to_the_whole(served: Served) -> None:
    whole = served.ask(QUESTIONS[2])
    most = 0
    for _ in range(5):  # on a busy machine tokens that were computed meanwhile come together
        *pieces, last = served.ask(QUESTIONS[2], stream=True, stream_options={"include_usage": True})
        texts = [piece["choices"][0]["delta"].get("content") or "" for piece in pieces]
        assert "".join(texts) == whole.choices[0].message.content
        assert pieces[-1]["choices"][0]["finish_reason"] == "length"
        assert last["usage"]["completion_tokens"] == whole.usage.completion_tokens == 32
        most = max(most, sum(map(bool, texts)))
        if most > 20:
            break
    assert most > 20, "a token at a time"


def test_the_end_is_told_and_counted(served: Served, reference: Reference) -> None:
    cut, whole = served.ask(max_tokens=3), served.ask()
    assert (cut.choices[0].finish_reason, cut.usage.completion_tokens) == ("length", 3)
    text = reference.answer()[0]
    assert (whole.choices[0].finish_reason, whole.choices[0].message.content) == ("stop", text)
    assert whole.usage.prompt_tokens == len(reference.prompt())
    assert whole.usage.completion_tokens == len(reference.tokenizer(text)["input_ids"]) + 1, (
        "with the token that ended it"
    )


def test_stop_strings_and_tokens_end_an_answer(served: Served, reference: Reference) -> None:
    text = reference.answer()[0]
    choice = served.ask(stop=["of Fr"]).choices[0]
    assert (choice.message.content, choice.finish_reason, choice.stop_reason) == (
        text[: text.index("of Fr")],
        "stop",
        "of Fr",
    )
    stop = reference.tokenizer(" France")["input_ids"][0]
    choice = served.ask(stop_token_ids=[stop]).choices[0]
    assert (choice.finish_reason, choice.stop_reason) == ("stop", stop)
    assert text.startswith(choice.message.content) and "Paris" not in choice.message.content


def test_an_answer_goes_on_past_its_end_when_asked(served: Served) -> None:
    short = served.ask().usage.completion_tokens
    assert served.ask(min_tokens=short + 4).usage.completion_tokens >= short + 4
    assert served.ask(ignore_eos=True).usage.completion_tokens == 32
    stopped = served.ask(ignore_eos=True, stop_token_ids=[2]).choices[
        0
    ]  # 2 is the end: asked for by its number, it counts
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", 2)


def test_the_longest_answer_ends_with_the_context(served: Served, reference: Reference) -> None:
    question = "word " * 470
    room = LENGTH - len(reference.prompt(question))
    answer = served.ask(question, max_tokens=None, ignore_eos=True)
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", room)
    for words in (600, LENGTH - len(reference.prompt("word ")) + 1):
        for limit in (None, 8):
            with pytest.raises(Refused, match=r"400 .*maximum context length"):
                served.ask("word " * words, max_tokens=limit)


def test_sixteen_at_once_are_answered_as_alone(served: Served) -> None:
    questions = [f"Tell me about the number {number}." for number in range(16)]

    async def together() -> list[Any]:
        return await asyncio.gather(*(served.chat(question, max_tokens=8, ignore_eos=True) for question in questions))

    texts = [answer.choices[0].message.content for answer in served.run(together())]
    assert texts == [served.text(question, max_tokens=8, ignore_eos=True) for question in questions]


def test_who_goes_away_is_computed_no_longer(served: Served) -> None:
    async def leave() -> None:
        asking = [
            asyncio.create_task(served.chat(f"Count to {number}.", max_tokens=400, ignore_eos=True))
            for number in range(8)
        ]
        await asyncio.sleep(0.5)
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)

    served.run(leave())
    left = time.monotonic()
    while served.busy():
        assert time.monotonic() - left < 5
    assert served.known() == set()
    assert served.text(max_tokens=4)


@pytest.mark.parametrize("parameter", SOMETIMES)
def test_a_parameter_is_heeded_or_refused(served: Served, parameter: str) -> None:
    asked, heeded = SOMETIMES[parameter]
    if parameter in CANNOT[served.engine]:
        with pytest.raises(Refused, match=f"400 engine {served.engine} cannot .*{parameter}"):
            served.ask(**asked)
    else:
        assert heeded(served.ask(**asked).choices[0])


def test_a_word_is_forbidden_wherever_it_stands(served: Served) -> None:
    """After a blank "Oslo" is another token, and one fewer, than at the beginning of an answer."""
    question = "What is the capital of Norway?"
    assert " Oslo" in served.text(question)
    if "bad_words" in CANNOT[served.engine]:
        with pytest.raises(Refused, match=r"400 .*bad_words"):
            served.ask(question, bad_words=["Oslo"])
        return
    assert "Oslo" not in served.text(question, bad_words=["Oslo"])
    assert served.text(bad_words=[f"word {i}" for i in range(128)]) == served.text(), "as many as a request may have"
    with pytest.raises(Refused, match=r"400 .*only spaces"):
        served.ask(bad_words=["Oslo", "  "])


def test_a_schema_that_the_engine_cannot_read_harms_no_other_request(served: Served, reference: Reference) -> None:
    unreadable = {"json": {"type": "string", "pattern": "a++"}}

    async def together() -> tuple[Any, ...]:
        return await asyncio.gather(
            served.chat(QUESTIONS[1]),
            served.chat(structured_outputs=unreadable),
            served.chat(QUESTIONS[2]),
            return_exceptions=True,
        )

    first, _, last = served.run(together())
    assert first.choices[0].message.content == reference.answer(QUESTIONS[1])[0]
    assert last.choices[0].message.content == reference.answer(QUESTIONS[2])[0]
    if served.engine == "openvino":  # which has loaded the model anew for it, once
        with pytest.raises(Refused, match=r"400 .*cannot read this schema"):
            served.ask(structured_outputs=unreadable)
    assert served.known() == set()


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_leaves_no_token_is_told_so_and_harms_no_other(
    served: Served, reference: Reference, stream: bool
) -> None:
    """What remains of the vocabulary shows as the answer grows: at once for the first two, after a token for the
    third."""
    end, twice = 2, reference.tokenizer("ParisParis")["input_ids"]
    assert len(twice) == 2
    contradictions = (
        {"allowed_token_ids": [end], "min_tokens": 3},
        {"allowed_token_ids": [twice[0]], "bad_words": ["Paris"]},
        {"allowed_token_ids": [twice[0]], "bad_words": ["ParisParis"]},
    )

    async def together(temperature: float) -> list[Any]:
        asked = ({**one, "temperature": temperature, "stream": stream, "n": 2} for one in contradictions)
        return await asyncio.gather(
            served.chat(QUESTIONS[1]), *(served.chat(QUESTIONS[0], **one) for one in asked), return_exceptions=True
        )

    for temperature in (0.0, 1.0):
        steady, *others = served.run(together(temperature))
        assert steady.choices[0].message.content == reference.answer(QUESTIONS[1])[0]
        for answer in others:
            told = str(answer) if isinstance(answer, Refused) else json.dumps(answer[-1]["error"])
            assert "400" in told and ("leaves no token" in told or f"engine {served.engine} cannot" in told)
    assert served.known() == set()


TOKEN = st.sampled_from([0, 2, 28, 30, 260, 5345, 9042, 49151])
SETTINGS: dict[str, st.SearchStrategy[Any]] = {
    "temperature": st.sampled_from([0.0, 1e-320, 0.01, 1.0, 2.0]),
    "top_p": st.sampled_from([0.0, 1e-320, 1e-6, 0.5, 1.0]),
    "top_k": st.sampled_from([-1, 0, 1, 3, 49152, 2**31 - 1]),
    "min_p": st.sampled_from([0.0, 0.2, 1.0]),
    "frequency_penalty": st.sampled_from([-2.0, 0.3, 2.0]),
    "presence_penalty": st.sampled_from([-2.0, 0.3, 2.0]),
    "repetition_penalty": st.sampled_from([0.01, 0.9, 10.0]),
    "seed": st.sampled_from([-(2**63), 0, 7, 2**63 - 1]),
    "n": st.integers(1, 2),
    "max_tokens": st.integers(1, 6),
    "min_tokens": st.integers(0, 6),
    "ignore_eos": st.booleans(),
    "stop": st.sampled_from([" ", "e", "zzz"]),
    "stop_token_ids": st.lists(TOKEN, max_size=2),
    "allowed_token_ids": st.lists(TOKEN, min_size=1, max_size=3),
    "bad_words": st.lists(st.sampled_from(["The", ",", "Paris", "<|im_end|>", "."]), max_size=3),
    "logit_bias": st.dictionaries(TOKEN.map(str), st.sampled_from([-100.0, 1.0, 100.0]), max_size=3),
    "structured_outputs": st.sampled_from([{"choice": ["Rome"]}, {"regex": "[a-c]{2}"}, {"json_object": True}]),
    "logprobs": st.booleans(),
    "stream": st.booleans(),
}
SAMPLING = st.lists(st.sampled_from(sorted(SETTINGS)), max_size=6, unique=True).flatmap(
    lambda names: st.fixed_dictionaries({name: SETTINGS[name] for name in names})
)


@pytest.mark.long
def test_settings_of_any_kind_change_nothing_for_a_steady_client(served: Served, reference: Reference) -> None:
    """A few; tests/full/test_fuzz.py asks more."""

    @given(asked=st.lists(SAMPLING, min_size=12, max_size=12))
    @settings(
        max_examples=3,
        derandomize=True,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    def ask(asked: list[dict[str, Any]]) -> None:
        async def together() -> list[Any]:
            others = (served.chat(QUESTIONS[0], **{"max_tokens": 4} | one) for one in asked)
            return await asyncio.gather(served.chat(QUESTIONS[1], max_tokens=16), *others, return_exceptions=True)

        steady, *others = served.run(together())
        assert steady.choices[0].message.content == reference.answer(QUESTIONS[1], 16)[0]
        for one, answer in zip(asked, others, strict=True):
            if isinstance(answer, ValidationError):  # the gateway's 400
                continue
            if isinstance(answer, Exception):
                assert str(answer).startswith("400 "), (one, answer)
            elif isinstance(answer, list) and "error" in answer[-1]:
                assert answer[-1]["error"]["code"] == 400, (one, answer[-1])

    ask()
    assert served.known() == set()


def test_a_request_that_the_core_does_not_take_is_forgotten(served: Served) -> None:
    """vLLM itself would keep it, and what belongs to it, for ever."""
    from vllm.exceptions import VLLMValidationError

    client = served.server.engine._engine_client

    async def refused(*_: Any) -> None:
        raise VLLMValidationError("not this one")

    with patch.object(client.engine_core, "add_request_async", refused), pytest.raises(Refused, match="not this one"):
        served.ask()
    assert served.known() == set()


def test_embeddings_are_refused(served: Served) -> None:
    from ray.llm._internal.serve.core.configs.openai_api_models import EmbeddingCompletionRequest

    async def embed() -> Any:
        return await _answer(await served.server.embeddings(EmbeddingCompletionRequest(model="m", input="text")))

    with pytest.raises(Refused, match=r"400 .*embed"):
        served.run(embed())


def test_text_is_tokenized(served: Served, reference: Reference) -> None:
    from ray.llm._internal.serve.core.configs.openai_api_models import TokenizeCompletionRequest

    async def tokenize() -> Any:
        return await _answer(
            await served.server.tokenize(TokenizeCompletionRequest(model="m", prompt="A tale of two cities, 双城记"))
        )

    assert served.run(tokenize()).tokens == reference.tokenizer("A tale of two cities, 双城记")["input_ids"]


def weights_as_stored(folder: Path, model: Any) -> None:
    """Give a model of transformers the weights that its conversion in the folder has, int8 and all, as the numbers that
    they stand for."""
    import openvino as ov

    core, wanted = ov.Core(), model.state_dict()
    stored = (ov.Type.u8, ov.Type.i8)
    found = set()
    for constant in core.read_model(folder / "openvino_model.xml").get_ordered_ops():
        name = next((name for name in wanted if constant.get_friendly_name().startswith(f"self.{name}")), None)
        if constant.get_type_name() != "Constant" or constant.get_output_element_type(0) not in stored or name is None:
            continue
        end = constant.output(0)
        while decoding := [
            user.get_node()
            for user in end.get_target_inputs()
            if user.get_node().get_type_name() in ("Convert", "Subtract", "Multiply", "Reshape")
        ]:
            (node,) = decoding
            end = node.output(0)
        decoded = core.compile_model(ov.Model([end], []), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})({})[0]
        wanted[name].copy_(torch.from_numpy(decoded.reshape(wanted[name].shape)))
        found.add(name)
    assert len(found) == 211, "seven a layer, and the tokens'"


@pytest.mark.long
def test_int8_weights_compute_in_fp32_where_that_is_asked_for(ray: None, smollm2: Path) -> None:
    """OpenVINO of itself rounds to 8 bits what it multiplies them with, and so comes to other words."""
    from llm_ray.models.convert import openvino_folder
    from llm_ray.serve.replica.server import ModelServer

    folder = openvino_folder(smollm2, "int8", smollm2.parent, Silent())
    rounded = Reference(smollm2)
    weights_as_stored(folder, rounded.model)
    with asyncio.Runner() as runner:
        server = ModelServer(
            ServedModel("m", folder, engine="openvino", max_model_len=LENGTH, kv_cache_bytes=2**26, threads=1)
        )
        runner.run(server.start())
        served = Served("openvino", server, runner.run)
        for question in QUESTIONS:
            choice = served.ask(question, logprobs=True).choices[0]
            text, logprobs = rounded.answer(question)
            assert choice.message.content == text
            assert [token.logprob for token in choice.logprobs.content] == pytest.approx(logprobs, abs=1e-3)
        server.engine._engine_client.shutdown()


def test_a_model_that_an_engine_cannot_compute_is_refused_when_it_is_loaded(
    ray: None, smollm2: Path, tmp_path: Path
) -> None:
    """vLLM's attention for CPUs knows certain sizes of heads, and finds out at the first request."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from llm_ray.errors import ModelError
    from llm_ray.serve.replica.server import ModelServer

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=49152, **sizes)).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(smollm2).save_pretrained(tmp_path)
    server = ModelServer(ServedModel("m", tmp_path, max_model_len=64, kv_cache_bytes=2**24, max_batch=2, threads=2))
    with pytest.raises(ModelError, match=r"engine vllm cannot compute it: .*16"):
        asyncio.run(server.start())


@pytest.mark.parametrize("asked", ["model", "openai"])
def test_what_a_model_sets_of_sampling_is_taken_unless_left_out(
    ray: None, smollm2: Path, tmp_path: Path, asked: Any
) -> None:

    from llm_ray.conf.serve import ModelServing, ServeConf
    from llm_ray.serve.deployments.plan import plan
    from llm_ray.serve.replica.server import ModelServer

    folder = tiny.llama(tmp_path / "llama", smollm2)
    ends = {"eos_token_id": [2, 0], "pad_token_id": 2}
    (folder / "generation_config.json").write_text(
        json.dumps({"top_k": 1, "max_new_tokens": 6, "do_sample": True, **ends})
    )
    serving = ModelServing(model=str(folder), engine="transformers", max_model_len=64, sampling_defaults=asked)
    (model,) = plan(ServeConf(models={"m": serving}), Silent())
    assert model.sampling == ({"top_k": 1, "max_new_tokens": 6} if asked == "model" else {})
    with asyncio.Runner() as runner:
        server = ModelServer(model)
        runner.run(server.start())
        served = Served("transformers", server, runner.run)
        answers = [served.ask(temperature=None, max_tokens=None, ignore_eos=True) for _ in range(3)]
        assert {answer.usage.completion_tokens == 6 for answer in answers} == {asked == "model"}
        assert (len({answer.choices[0].message.content for answer in answers}) == 1) == (asked == "model")
        server.engine._engine_client.shutdown()


def test_a_model_that_makes_vectors_makes_the_same_as_transformers(ray: None, tmp_path: Path) -> None:
    from ray.llm._internal.serve.core.configs.openai_api_models import ChatCompletionRequest, EmbeddingCompletionRequest

    from llm_ray.serve.models import writes
    from llm_ray.serve.replica.server import ModelServer

    tiny.bert(tmp_path, tmp_path)
    assert not writes(tmp_path, {})

    async def embed(text: str) -> Any:
        server = ModelServer(
            ServedModel(
                "m", tmp_path, max_model_len=64, kv_cache_bytes=2**24, max_batch=2, threads=2, task="embeddings"
            )
        )
        await server.start()
        answer = await _answer(await server.embeddings(EmbeddingCompletionRequest(model="m", input=text)))
        asked = ChatCompletionRequest(model="m", messages=[{"role": "user", "content": text}])
        with pytest.raises(Refused, match=r"400 .*generate"):
            await _answer(await server.chat(asked))
        return answer.data[0].embedding

    text = "the cat sleeps"
    assert asyncio.run(embed(text)) == pytest.approx(tiny.embedded(tmp_path, tmp_path, text), abs=1e-5)


def test_an_adapter_that_is_taken_away_ends_no_answer_in_progress(ray: None, smollm2: Path, tmp_path: Path) -> None:
    """vLLM would load it once more for them, and end where its folder is gone."""
    from ray.llm._internal.serve.core.configs.openai_api_models import CompletionRequest

    from llm_ray.serve.models import Adapter
    from llm_ray.serve.replica.server import ModelServer

    llama = tiny.llama(tmp_path / "llama", smollm2)
    folder = tiny.adapter(tmp_path / "adapter", llama, 0)
    model = ServedModel(
        "m",
        llama,
        max_model_len=512,
        kv_cache_bytes=2**26,
        max_batch=4,
        threads=2,
        adapters={"a": Adapter(str(folder), "1")},
        lora_rank=8,
    )

    async def texts() -> list[str]:
        server = ModelServer(model)
        await server.start()

        async def ask(name: str, stream: bool) -> Any:
            asked = {"max_tokens": 400, "temperature": 0, "ignore_eos": True, "stream": stream}
            return await server.completions(CompletionRequest(model=name, prompt="Once", **asked))

        alone = await _answer(await ask("a", False))
        stream = await ask("a", True)
        events = [*await anext(stream)]
        shutil.rmtree(folder)
        await server.set_adapters({})
        async for more in stream:
            events += more
        base = await _answer(await ask("m", False))
        server.engine._engine_client.shutdown()
        pieces = [
            json.loads(data)
            for event in "".join(events).split("\n\n")
            if (data := event.removeprefix("data: ")) not in ("", "[DONE]")
        ]
        assert len(pieces) > 2
        return ["".join(piece["choices"][0]["text"] for piece in pieces), alone.choices[0].text, base.choices[0].text]

    streamed, alone, base = asyncio.run(texts())
    assert streamed == alone != base
