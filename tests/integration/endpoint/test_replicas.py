"""Several replicas: adapters on all of them, requests for all names at once, and replicas that come and go with the
load."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.integration import tiny
from tests.integration.endpoint.conftest import ADAPTERS, Guarded
from tests.integration.serving import Clients
from tests.waiting import until

NAMES = ("team/pair", *ADAPTERS)
PROMPTS = [f"Note {number}: the stone is" for number in range(4)]


def text(home: Guarded, name: str, prompt: str = PROMPTS[0]) -> str:
    answer = home.ask(name, prompt=prompt, max_tokens=24)
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == name
    return str(answer.json()["choices"][0]["text"])


def together(home: Guarded, asked: list[tuple[str, str]]) -> list[str]:
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(lambda pair: text(home, *pair), asked))


def answered(home: Guarded) -> dict[str, int]:
    """By replica, how many requests it has answered."""
    logs = home.run("serve", "logs", "team/pair", "-n", "100000").stdout
    parts = re.split(r"^--- (\S+) on .*$", logs, flags=re.MULTILINE)
    return {
        file: len(re.findall(r"-- CALL \S+ OK", said))
        for file, said in zip(parts[1::2], parts[2::2], strict=True)
        if "replica_" in file
    }


def replicas(home: Guarded) -> int:
    with home.http(home.key) as client:
        families = text_string_to_metric_families(client.get("/metrics").text)
    samples = [sample for family in families for sample in family.samples if sample.name == "llm_ray_model_replicas"]
    return int(next(sample.value for sample in samples if sample.labels["model"] == "team/pair"))


def processes(home: Guarded) -> set[psutil.Process]:
    return set(home.processes("ServeReplica:model:team--pair"))


def expected(llama: Path, adapter: Path) -> str:
    """What transformers goes on with, with PEFT's adapter."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(llama)
    model: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), adapter)
    inputs = tokenizer(PROMPTS[0], return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=24, min_new_tokens=24, do_sample=False)
    return str(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :]))


def test_a_replica_comes_with_the_load(home: Guarded) -> None:
    assert home.run("serve", "stop", "vectors").returncode == 0  # it has the core that the second replica is to get
    (first,) = processes(home)
    home.conf["models"]["team/pair"]["autoscale"] = {"min": 1, "max": 2, "target": 1, "idle_s": 300}
    home.apply(only="team/pair")
    with Clients(home, "red") as clients:
        until(lambda: replicas(home) == 2)
    assert set(clients.statuses) == {200}
    assert (len(processes(home)), first in processes(home)) == (2, True)


def test_replicas_share_the_requests_for_one_adapter(home: Guarded) -> None:
    before = answered(home)
    together(home, [("red", prompt) for prompt in PROMPTS * 8])
    shares = [number - before.get(replica, 0) for replica, number in answered(home).items()]
    assert (len(shares), sum(shares)) == (2, 32)
    assert min(shares) > 4, shares


def test_each_of_sixteen_at_once_is_answered_by_the_name_it_asked(home: Guarded) -> None:
    alone = {(name, prompt): text(home, name, prompt) for name in NAMES for prompt in PROMPTS}
    assert len(set(alone.values())) == len(alone), "names that answer alike would hide a mistake"
    asked = [*alone] * 3
    assert together(home, asked) == [alone[pair] for pair in asked]


@pytest.mark.long  # a minute of load; that adapters come and go is tested with one replica
def test_an_adapter_comes_and_goes_while_both_replicas_answer(home: Guarded, llama: Path) -> None:
    """Its answers in progress are whole, even where its folder is gone before it is taken away; then it is not there,
    never its base."""
    folder = tiny.adapter(home.folder / "passing", llama, 7)
    before = processes(home)
    home.conf["models"]["team/pair"]["adapters"]["passing"] = str(folder)
    with Clients(home, "team/pair") as base, Clients(home, "red") as red:
        home.apply(only="team/pair")
        assert set(together(home, [("passing", PROMPTS[0])] * 16)) == {expected(llama, folder)}
    assert (set(base.statuses), set(red.statuses)) == ({200}, {200})
    body = {"model": "passing", "prompt": PROMPTS[0], "max_tokens": 1000, "temperature": 0, "ignore_eos": True}
    alone = home.ask("passing", prompt=PROMPTS[0], max_tokens=1000).json()["choices"][0]["text"]
    del home.conf["models"]["team/pair"]["adapters"]["passing"]
    with contextlib.ExitStack() as asking:
        clients = [asking.enter_context(home.http(home.key)) for _ in range(4)]
        answers = [
            asking.enter_context(client.stream("POST", "/v1/completions", json=body | {"stream": True}))
            for client in clients
        ]
        streams = [answer.iter_lines() for answer in answers]
        said = [[next(stream)] for stream in streams]
        shutil.rmtree(folder)
        home.apply(only="team/pair")
        refused = home.ask("passing")
        assert (refused.status_code, "passing" in refused.json()["error"]["message"]) == (404, True)
        assert refused.elapsed.total_seconds() < 10
        for lines, rest in zip(said, streams, strict=True):
            events = [line.removeprefix("data: ") for line in [*lines, *rest] if line]
            assert events[-1] == "[DONE]"
            assert "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1]) == alone
    assert processes(home) == before


def test_a_replica_goes_when_it_has_nothing_to_do(home: Guarded) -> None:
    before = processes(home)
    home.conf["models"]["team/pair"]["autoscale"]["idle_s"] = 1
    home.apply(only="team/pair")
    statuses = set()

    def gone() -> bool:
        statuses.add(home.ask("red", max_tokens=4).status_code)
        return replicas(home) == 1

    until(gone)
    until(lambda: len(processes(home)) == 1)
    assert processes(home) < before
    assert statuses | {home.ask("red").status_code} == {200}
