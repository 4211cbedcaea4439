"""Thousands of requests with settings of every kind, in each engine, beside a client whose answers must not change.

    make test-full TESTS=tests/full/test_fuzz.py
    LLM_RAY_FUZZ=20000 LLM_RAY_FUZZ_SEED=7 make test-full TESTS='tests/full/test_fuzz.py -k openvino'

A request is answered or refused with 400. Any other end, or an answer of the steady client that has changed, shows the
settings that did it.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from llm_ray.cluster import local_ray
from llm_ray.progress import Silent
from llm_ray.serve.models import ServedModel
from tests.integration import tiny
from tests.integration.test_engines import ENGINES, SETTINGS, Refused, Served
from tests.schemas import OBEYED, REFUSED

REQUESTS = int(os.environ.get("LLM_RAY_FUZZ", "3000"))
SEED = int(os.environ.get("LLM_RAY_FUZZ_SEED") or random.SystemRandom().randrange(2**32))
AT_ONCE = 12
SCHEMAS = [case[0] for case in [*OBEYED.values(), *REFUSED.values()]]
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": schema, "strict": strict}}
    for name, schema, strict in (
        ("a", OBEYED["properties"].schema, True),
        ("b", {"type": "object"}, None),
        ("c", REFUSED["not"][0], False),
    )
]
NUMBERS = st.sampled_from(
    [-1e308, -2.0, -1e-45, -0.0, 0.0, 1e-320, 1e-45, 1e-8, 0.5, 0.999999, 1.0, 1.0000001, 2.0, 100.0]
)
IDS = st.sampled_from([-1, 0, 1, 2, 28, 260, 5345, 49151, 49152, 2**31 - 1, 2**31])
MORE: dict[str, st.SearchStrategy[Any]] = {
    "temperature": NUMBERS,
    "top_p": NUMBERS,
    "min_p": NUMBERS,
    "repetition_penalty": NUMBERS,
    "presence_penalty": NUMBERS,
    "top_k": IDS,
    "n": st.integers(0, 4),
    "max_tokens": st.one_of(st.none(), st.integers(0, 8)),
    "seed": st.integers(-(2**63) - 1, 2**63),
    "stop": st.lists(st.text(max_size=4), max_size=5),
    "stop_token_ids": st.lists(IDS, max_size=3),
    "allowed_token_ids": st.lists(IDS, max_size=3),
    "logprob_token_ids": st.lists(IDS, max_size=3),
    "bad_words": st.lists(st.text(max_size=5), max_size=3),
    "logit_bias": st.dictionaries(IDS.map(str), NUMBERS, max_size=3),
    "logprobs": st.booleans(),
    "top_logprobs": st.integers(-1, 21),
    "prompt_logprobs": st.integers(0, 3),
    "truncate_prompt_tokens": st.sampled_from([-1, 0, 1, 5, 10_000]),
    "skip_special_tokens": st.booleans(),
    "include_stop_str_in_output": st.booleans(),
    "return_token_ids": st.booleans(),
    "structured_outputs": st.one_of(
        st.fixed_dictionaries({"json": st.sampled_from(SCHEMAS)}),
        st.fixed_dictionaries(
            {"regex": st.sampled_from(["", "a*", "[a-c]{2,}x?", "(?=a)b", "a{1000}", "\\d+\\.\\d+"])}
        ),
        st.fixed_dictionaries(
            {"grammar": st.sampled_from(['root ::= "no"', "root ::= x", "start: /a+/", "", 'root ::= "a" root | "b"'])}
        ),
        st.fixed_dictionaries({"choice": st.lists(st.text(max_size=6), max_size=4)}),
        SETTINGS["structured_outputs"],
    ),
    "tools": st.lists(st.sampled_from(TOOLS), max_size=3, unique_by=lambda tool: tool["function"]["name"]),
    "tool_choice": st.sampled_from(["auto", "none", "required", {"type": "function", "function": {"name": "a"}}]),
    "parallel_tool_calls": st.booleans(),
    "stream": st.booleans(),
}
KINDS = {
    name: st.one_of(*(kinds[name] for kinds in (SETTINGS, MORE) if name in kinds)) for name in sorted(SETTINGS | MORE)
}
ASKED = st.lists(st.sampled_from([*KINDS]), max_size=7, unique=True).flatmap(
    lambda names: st.fixed_dictionaries({name: KINDS[name] for name in names})
)


@pytest.fixture(scope="module")
def ray() -> Iterator[None]:
    with local_ray(2):
        yield


@pytest.fixture(scope="module", params=ENGINES)
def served(
    request: pytest.FixtureRequest, ray: None, smollm2: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    from llm_ray.models.convert import openvino_folder
    from llm_ray.serve.replica.server import ModelServer

    folder = tiny.llama(tmp_path_factory.mktemp("models") / "llama", smollm2)
    path = openvino_folder(folder, "fp32", folder.parent, Silent()) if request.param == "openvino" else folder
    model = ServedModel(
        "m",
        path,
        engine=request.param,
        max_model_len=512,
        kv_cache_bytes=2**25,
        max_batch=16,
        threads=1,
        tool_parser="hermes",
    )
    with asyncio.Runner() as runner:
        server = ModelServer(model)
        runner.run(server.start())
        yield Served(request.param, server, runner.run)
        server.engine._engine_client.shutdown()


@pytest.mark.timeout(3600)
def test_settings_of_every_kind_end_their_own_request_alone(served: Served) -> None:
    print(f"LLM_RAY_FUZZ_SEED={SEED}")
    steady = {"question": "Explain gravity in two sentences.", "max_tokens": 24, "ignore_eos": True}
    expected = served.text(**steady)
    ends = {"answered": 0, "refused": 0}

    @seed(SEED)
    @given(asked=st.lists(ASKED, min_size=AT_ONCE, max_size=AT_ONCE))
    @settings(
        max_examples=-(-REQUESTS // AT_ONCE),
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    def ask(asked: list[dict[str, Any]]) -> None:
        async def together() -> list[Any]:
            others = (served.chat(**{"max_tokens": 4, "temperature": 1.0} | one) for one in asked)
            return await asyncio.gather(served.chat(**steady), *others, return_exceptions=True)

        first, *others = served.run(together())
        for one, answer in zip(asked, others, strict=True):
            refused = isinstance(answer, ValidationError) or (
                isinstance(answer, Refused) and str(answer).startswith("400 ")
            )
            if isinstance(answer, list) and "error" in answer[-1]:
                refused = answer[-1]["error"]["code"] == 400
                assert refused, (one, answer[-1])
            assert refused or not isinstance(answer, BaseException), (one, repr(answer))
            ends["refused" if refused else "answered"] += 1
        assert not isinstance(first, BaseException), (asked, repr(first))
        assert first.choices[0].message.content == expected, asked

    ask()
    assert served.known() == set()
    assert min(ends.values()) > REQUESTS // 10, ends
