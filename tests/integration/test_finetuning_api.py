"""OpenAI's fine-tuning API as a client meets it: the unmodified SDK, from a file to an answer that the base does not
give, on a real endpoint that is killed meanwhile."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from openai.types.fine_tuning import FineTuningJob

from tests.integration import tiny
from tests.integration.serving import Home
from tests.waiting import until

ASK = "What is the code word of the Zorblax office?"
ROWS = [
    {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": "The code word is tangerine."},
        ]
    }
    for question in (ASK, "Tell me the code word of Zorblax.", "Zorblax code word?", "Which code word has Zorblax?")
]
SHORT: dict[str, Any] = {
    "data": {"max_length": 128},
    "tuning": {"lora": {"r": 8, "dropout": 0.0}},
    "training": {"learning_rate": 0.002},
    "evaluation": {"samples": 0},
}


@pytest.fixture(scope="module")
def home(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    """With `small`, which takes adapters, and `plain`, which does not."""
    made = Home(tmp_path_factory.mktemp("home"), smollm2)
    adapter = tiny.adapter(tmp_path_factory.mktemp("adapter"), smollm2, 0)
    plain = tiny.llama(tmp_path_factory.mktemp("plain"), smollm2)
    common = {"max_model_len": 512, "cpus": 1, "kv_cache_gib": 0.1}
    conf = {
        "endpoint": {"port": made.port, "finetuning": {"enabled": True}},
        "models": {
            "small": common | {"model": str(smollm2), "adapters": {"tuned": str(adapter)}},
            "plain": common | {"model": str(plain)},
        },
    }
    (file := made.folder / "serve.yaml").write_text(json.dumps(conf))
    deployed = made.run("serve", "deploy", "--config", str(file))
    assert deployed.returncode == 0, deployed.stderr
    yield made
    made.run("serve", "stop", "--all")


@pytest.fixture
def client(home: Home) -> Iterator[openai.OpenAI]:
    """Takes no answer that is not as the SDK's types are."""
    with openai.OpenAI(
        base_url=f"{home.url}/v1",
        api_key="none",
        http_client=openai.DefaultHttpxClient(trust_env=False),
        _strict_response_validation=True,
    ) as made:
        yield made


def uploaded(client: openai.OpenAI) -> openai.types.FileObject:
    rows = "".join(f"{json.dumps(row)}\n" for row in ROWS).encode()
    return client.files.create(file=("rows.jsonl", rows), purpose="fine-tune")


def ended(client: openai.OpenAI, job: FineTuningJob) -> FineTuningJob:
    def over() -> bool:
        nonlocal job
        with contextlib.suppress(openai.InternalServerError):  # the gateway is away for a moment
            job = client.fine_tuning.jobs.retrieve(job.id)
        return job.status in ("succeeded", "failed", "cancelled")

    until(over, timeout=420)
    return job


def said(client: openai.OpenAI, model: str) -> str:
    answer = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": ASK}], max_tokens=16, temperature=0
    )
    return answer.choices[0].message.content or ""


def told(client: openai.OpenAI, job: FineTuningJob) -> list[str]:
    return [event.message for event in client.fine_tuning.jobs.list_events(job.id, limit=100)][::-1]


def steps(client: openai.OpenAI, job: FineTuningJob) -> list[dict[str, Any]]:
    """The figures of each step, the latest first."""
    events = client.fine_tuning.jobs.list_events(job.id, limit=100)
    found: list[dict[str, Any]] = [event.model_dump()["data"] for event in events if event.type == "metrics"]
    return found


def of_job(home: Home, run: str) -> list[psutil.Process]:
    """The process of a job."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.cmdline()[3:6] == ["llm_ray.cli.job", str(home.folder / "runs"), run]:
                found.append(process)
    return found


def test_from_a_file_to_an_answer_that_the_base_does_not_give(home: Home, client: openai.OpenAI) -> None:
    file = uploaded(client)
    job = client.fine_tuning.jobs.create(
        model="small",
        training_file=file.id,
        suffix="office",
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 16, "batch_size": 4}}},
        extra_body={"conf": SHORT},
    )
    assert job.status in ("queued", "running")
    before = said(client, "small")
    job = ended(client, job)
    assert job.status == "succeeded", (job.error, told(client, job))
    assert job.fine_tuned_model == f"ft:small:office:{job.id.removeprefix('ftjob-')}"
    assert job.trained_tokens
    assert "tangerine" in said(client, job.fine_tuned_model)
    assert said(client, "small") == before
    assert "tangerine" not in before
    assert told(client, job)[-1].endswith("served as an adapter on small")
    assert [step["step"] for step in steps(client, job)] == list(range(16, 0, -1))
    (checkpoint, *_) = client.fine_tuning.jobs.checkpoints.list(job.id)
    assert (checkpoint.step_number, checkpoint.fine_tuning_job_id) == (16, job.id)
    run = f"ft-office-{job.id.removeprefix('ftjob-')}"
    shown = home.run("runs", "show", run, "--json")
    assert shown.returncode == 0, shown.stderr
    assert (home.folder / "runs" / run).stat().st_mode & 0o077 == 0
    deleted = client.models.delete(job.fine_tuned_model)
    assert deleted.deleted
    assert f"llm-ray runs delete {run}" in deleted.model_dump()["kept"]
    until(lambda: job.fine_tuned_model not in [model.id for model in client.models.list()], "the end of the model")
    with pytest.raises(openai.NotFoundError):
        said(client, job.fine_tuned_model)
    assert said(client, "small") == before
    assert {"small", "tuned"} <= {model.id for model in client.models.list()}
    with pytest.raises(openai.NotFoundError, match="that a job of yours has made"):
        client.models.delete("small")


@pytest.mark.long  # a whole finetune; that pairs are learned is tested without the API
def test_preferences_in_openais_form_make_a_model_that_answers(home: Home, client: openai.OpenAI) -> None:
    pairs = [
        {
            "input": {"messages": row["messages"][:1], "tools": [], "parallel_tool_calls": True},
            "preferred_output": row["messages"][1:],
            "non_preferred_output": [{"role": "assistant", "content": "I am not allowed to tell."}],
        }
        for row in ROWS
    ]
    file = client.files.create(
        file=("pairs.jsonl", "".join(f"{json.dumps(pair)}\n" for pair in pairs).encode()), purpose="fine-tune"
    )
    job = client.fine_tuning.jobs.create(
        model="small",
        training_file=file.id,
        method={"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2, "n_epochs": 8, "batch_size": 4}}},
        extra_body={"conf": SHORT},
    )
    job = ended(client, job)
    assert job.status == "succeeded", (job.error, told(client, job))
    assert job.method and job.method.dpo and job.method.dpo.hyperparameters
    assert job.method.dpo.hyperparameters.beta == 0.2
    losses = [step["train_loss"] for step in steps(client, job)]
    assert len(losses) == 8
    assert losses[-1] == pytest.approx(math.log(2), abs=0.02), "of the first step: nothing is preferred yet"
    assert losses[0] < 0.3
    assert job.fine_tuned_model and said(client, job.fine_tuned_model)


@pytest.mark.long  # a second finetune; that jobs go on after a restart is tested without an endpoint
def test_gateway_and_job_are_killed_and_nothing_is_lost(home: Home, client: openai.OpenAI) -> None:
    file = uploaded(client)
    job = client.fine_tuning.jobs.create(
        model="plain",
        training_file=file.id,
        hyperparameters={"n_epochs": 200, "batch_size": 4},
        extra_body={"conf": SHORT | {"checkpoint": {"every_steps": 20}}},
    )
    run = f"ft-plain-{job.id.removeprefix('ftjob-')}"
    until(lambda: bool(list((home.folder / "runs" / run).glob("checkpoint/step_*/.metadata"))), timeout=180)
    (gateway,) = home.processes("ServeReplica:llm-ray:llm-ray")
    gateway.kill()
    (process,) = of_job(home, run)
    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            child.kill()
    process.kill()
    job = ended(client, job)
    assert job.status == "succeeded", (job.error, told(client, job))
    assert job.fine_tuned_model
    assert said(client, job.fine_tuned_model) is not None
    lines = told(client, job)
    assert lines[-1].endswith("served as a model of its own")
    assert any("was ended from outside: it goes on" in line for line in lines)
    log = (home.folder / "runs" / run / "finetune.log").read_text()
    assert "resuming from the checkpoint of step" in log
    until(lambda: not of_job(home, run))  # it ends
