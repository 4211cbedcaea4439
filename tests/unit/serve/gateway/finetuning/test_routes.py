"""The fine-tuning API on a real server, asked by OpenAI's own client, which takes no answer that is not as its types
are; the use cases behind it are real, too."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import socket
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import httpx
import openai
import pytest

from llm_ray.app import jobs as queue
from llm_ray.app.api_service import open_service
from llm_ray.conf.serve import Endpoint, FinetuningApi
from llm_ray.serve.gateway.api import Api
from llm_ray.serve.gateway.protect import Protection, protect
from llm_ray.serve.gateway.protect.keys import keys_file, set_scopes
from llm_ray.serve.gateway.protect.limits import Limiter
from tests.server import serving
from tests.unit.serve.gateway.finetuning.conftest import ROWS, Alone, Site
from tests.waiting import until


def told(answer: httpx.Response) -> tuple[int, str, str | None]:
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return answer.status_code, error["code"], error["param"]


def test_files(site: Site) -> None:
    alice, bob = site.client("alice"), site.client("bob")
    sent = [alice.files.create(file=(f"../{n}.jsonl", ROWS.encode()), purpose="fine-tune") for n in range(3)]
    assert [(file.filename, file.status, file.bytes) for file in sent[:1]] == [("../0.jsonl", "processed", len(ROWS))]
    ids = {file.id for file in sent}
    assert {file.id for file in alice.files.list(limit=2)} == ids, "the client goes from page to page"
    page = alice.files.list(limit=2, order="asc")
    assert (len(page.data), page.has_more) == (2, True)
    assert alice.files.retrieve(sent[0].id) == sent[0]
    assert alice.files.content(sent[0].id).text == ROWS
    assert alice.files.wait_for_processing(sent[0].id).id == sent[0].id
    assert bob.files.list().data == []
    for foreign in (sent[0].id, "file-x", "..%2f..%2fx"):
        for ask in (bob.files.retrieve, bob.files.content, bob.files.delete):
            with pytest.raises(openai.NotFoundError):
                ask(foreign)
    assert alice.files.delete(sent[0].id).deleted
    with pytest.raises(openai.NotFoundError):
        alice.files.retrieve(sent[0].id)
    for file in sent[1:]:
        alice.files.delete(file.id)


def test_a_file_of_rows_that_are_wrong(site: Site) -> None:
    alice = site.client("alice")
    with pytest.raises(openai.BadRequestError, match=r"a.jsonl:4: broken JSON") as caught:
        alice.files.create(file=("a.jsonl", io.BytesIO(ROWS.encode() + b"{x")), purpose="fine-tune")
    assert caught.value.code == "invalid_file"
    assert str(site.home) not in str(caught.value)
    assert alice.files.list().data == []
    with pytest.raises(openai.BadRequestError, match="purpose: `assistants` is not supported"):
        alice.files.create(file=b"x", purpose="assistants")
    with pytest.raises(openai.BadRequestError, match="files do not expire"):
        alice.files.create(
            file=ROWS.encode(), purpose="fine-tune", expires_after={"anchor": "created_at", "seconds": 3600}
        )


def test_uploads_that_are_no_forms_too_large_or_do_not_come(site: Site) -> None:
    with site.http() as alice:
        purpose = {"purpose": "fine-tune"}
        assert told(alice.post("/v1/files", json={})) == (415, "unsupported_media_type", None)
        assert told(alice.post("/v1/files", data=purpose, files={"other": b"x"})) == (400, "invalid_request", "file")
        headers = {"content-type": "multipart/form-data; boundary=b"}
        assert told(alice.post("/v1/files", headers=headers, content=b"--b\r\nbroken"))[:2] == (400, "invalid_request")
        cut_off = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\nrows'
        assert told(alice.post("/v1/files", headers=headers, content=cut_off))[:2] == (400, "invalid_request")
        large = b"x" * 120_000
        assert told(alice.post("/v1/files", data=purpose, files={"file": large}))[:2] == (413, "file_too_large")
        assert told(alice.post("/v1/files", data=purpose, files={"file": large * 3}))[:2] == (413, "body_too_large")
        in_pieces = (piece for piece in [cut_off, *[large] * 20])
        with contextlib.suppress(httpx.WriteError, httpx.RemoteProtocolError):  # it closes while more is sent
            assert alice.post("/v1/files", headers=headers, content=in_pieces).status_code == 413
        assert alice.get("/v1/files").json()["data"] == []
        folder = site.home / "finetuning"
        until = time.monotonic() + 30  # a connection that breaks off is cleaned up after
        while left := [path.name for path in folder.glob("*/files/.arriving*")]:
            assert time.monotonic() < until, left
            time.sleep(0.05)
    with socket.create_connection(("127.0.0.1", int(site.url.rpartition(":")[2]))) as slow:
        head = f"POST /v1/files HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {site.secrets['alice']}\r\n"
        slow.sendall(f"{head}Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 999\r\n\r\n--b".encode())
        slow.settimeout(60)
        assert slow.recv(100).startswith(b"HTTP/1.1 408")
    assert httpx.post(f"{site.url}/v1/files", trust_env=False).status_code == 401


def test_jobs(site: Site) -> None:
    alice, bob = site.client("alice"), site.client("bob")
    file = alice.files.create(file=("rows.jsonl", ROWS.encode()), purpose="fine-tune")
    job = alice.fine_tuning.jobs.create(
        model="base",
        training_file=file.id,
        suffix="bot",
        seed=7,
        metadata={"team": "support"},
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": "auto"}}},
        extra_body={"conf": {"tuning": {"lora": {"r": 4}}}},
    )
    assert (job.status, job.model, job.seed, job.training_file) == ("queued", "base", 7, file.id)
    assert (job.hyperparameters.n_epochs, job.hyperparameters.batch_size) == (2, "auto")
    assert job.fine_tuned_model is job.finished_at is job.error is None
    assert alice.fine_tuning.jobs.retrieve(job.id) == job
    second = alice.fine_tuning.jobs.create(model="base", training_file=file.id, hyperparameters={"n_epochs": 1})
    assert [found.id for found in alice.fine_tuning.jobs.list(limit=1)] == [second.id, job.id]
    assert [found.id for found in alice.fine_tuning.jobs.list(metadata={"team": "support"})] == [job.id]
    assert bob.fine_tuning.jobs.list().data == []
    with pytest.raises(openai.RateLimitError, match="2 jobs that wait or run"):
        alice.fine_tuning.jobs.create(model="base", training_file=file.id)
    (event,) = alice.fine_tuning.jobs.list_events(job.id)
    assert (event.level, event.type, event.message) == ("info", "message", f"Created fine-tuning job: {job.id}")
    assert alice.fine_tuning.jobs.checkpoints.list(job.id).data == []
    for ask in (
        bob.fine_tuning.jobs.retrieve,
        bob.fine_tuning.jobs.cancel,
        bob.fine_tuning.jobs.pause,
        bob.fine_tuning.jobs.resume,
        bob.fine_tuning.jobs.list_events,
        bob.fine_tuning.jobs.checkpoints.list,
    ):
        with pytest.raises(openai.NotFoundError):
            ask(job.id)
    with pytest.raises(openai.BadRequestError, match="learns from the file"):
        alice.files.delete(file.id)
    assert alice.fine_tuning.jobs.pause(job.id).status == "queued"
    assert alice.fine_tuning.jobs.cancel(second.id).status == "cancelled"
    with site.http() as http, http.stream("GET", f"/v1/fine_tuning/jobs/{second.id}/events?stream=true") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in stream.iter_lines() if line]
    assert [json.loads(line)["message"] for line in lines[:-1]][-1] == "The job was cancelled"
    assert lines[-1] == "[DONE]"
    end = time.monotonic() + 60
    while True:
        try:
            assert alice.fine_tuning.jobs.resume(job.id).status == "queued"
            break
        except openai.APIStatusError as error:  # its process has not ended yet
            assert error.status_code == 503 and time.monotonic() < end
            time.sleep(0.2)
    assert alice.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    assert alice.files.delete(file.id).deleted


def test_a_job_that_learns_preferences(site: Site) -> None:
    alice = site.client("alice")
    turns = [{"role": "user", "content": "Hi"}]
    pair = {
        "input": {"messages": turns, "tools": [], "parallel_tool_calls": True},
        "preferred_output": [{"role": "assistant", "content": "Hello."}],
        "non_preferred_output": [{"role": "assistant", "content": "Go away."}],
    }
    ours = {"prompt": "Hi", "chosen": "Hello.", "rejected": "Go away."}
    pairs = [
        alice.files.create(file=("pairs.jsonl", (json.dumps(row) + "\n").encode() * 5), purpose="fine-tune")
        for row in (pair, ours)
    ]
    with site.http() as http:
        held = {http.get(f"/v1/files/{file.id}").json()["format"] for file in pairs}
    assert held == {"openai_preference", "preference"}
    with pytest.raises(openai.BadRequestError, match="preference pairs, which the method dpo learns from") as caught:
        alice.fine_tuning.jobs.create(model="base", training_file=pairs[0].id)
    assert caught.value.param == "training_file"
    job = alice.fine_tuning.jobs.create(
        model="base",
        training_file=pairs[0].id,
        validation_file=pairs[1].id,
        method={"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.3, "n_epochs": 2, "batch_size": "auto"}}},
    )
    assert job.method is not None and job.method.type == "dpo"
    assert job.method.supervised is None and job.method.dpo is not None
    given = job.method.dpo.hyperparameters
    assert given is not None and (given.beta, given.n_epochs, given.batch_size) == (0.3, 2, "auto")
    assert alice.fine_tuning.jobs.retrieve(job.id) == job
    rows = alice.files.create(file=("rows.jsonl", ROWS.encode()), purpose="fine-tune")
    with pytest.raises(openai.BadRequestError, match="validation_file: its rows have the format messages, but dpo"):
        alice.fine_tuning.jobs.create(
            model="base", training_file=pairs[0].id, validation_file=rows.id, method={"type": "dpo"}
        )
    assert alice.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    for file in (*pairs, rows):
        alice.files.delete(file.id)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"method": {"type": "reinforcement", "reinforcement": {}}}, "method.type"),
        ({"method": {"type": "supervised", "dpo": {}}}, "method.dpo"),
        ({"method": {"type": "dpo", "supervised": {}}}, "method.supervised"),
        ({"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0}}}}, "method.dpo.hyperparameters.beta"),
        ({"method": {"type": "dpo", "dpo": {}}}, "training_file"),
        ({"method": {"type": "supervised", "reinforcement": {}}}, "method.reinforcement"),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "x"}}]}, "integrations"),
        ({"suffix": "../../x"}, "suffix"),
        ({"suffix": "a:b"}, "suffix"),
        ({"suffix": "x" * 65}, "suffix"),
        ({"seed": -1}, "seed"),
        ({"seed": True}, "seed"),
        ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"n_epochs": "many"}}, "hyperparameters.n_epochs"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"conf": {"model": {"trust_remote_code": True}}}, "conf.model.trust_remote_code"),
        ({"conf": {"data.processor": "os:system"}}, "conf.data.processor"),
        ({"nonsense": 1}, "nonsense"),
        ({"training_file": "../../x"}, "training_file"),
        ({"model": "../../x"}, "model"),
        ({"model": ""}, "model"),
    ],
)
def test_what_a_job_cannot_have(site: Site, change: dict[str, Any], param: str) -> None:
    with site.http() as alice:
        form = {"data": {"purpose": "fine-tune"}, "files": {"file": ("a.jsonl", ROWS.encode())}}
        file = alice.post("/v1/files", **form).json()["id"]
        answer = alice.post("/v1/fine_tuning/jobs", json={"model": "base", "training_file": file} | change)
        assert answer.status_code in (400, 404)
        assert told(answer)[2] == param
        assert alice.delete(f"/v1/files/{file}").status_code == 200


def test_queries_that_are_wrong(site: Site) -> None:
    with site.http() as alice:
        for path in ("/v1/files", "/v1/fine_tuning/jobs"):
            assert told(alice.get(path, params={"limit": 0})) == (400, "invalid_request", "limit")
            assert told(alice.get(path, params={"after": "x"})) == (400, "invalid_request", "after")
        assert told(alice.get("/v1/files", params={"order": "up"})) == (400, "invalid_request", "order")
        assert alice.get("/v1/files", params={"purpose": "assistants"}).json()["data"] == []


def test_a_key_for_some_models_trains_no_others(site: Site) -> None:
    narrow = site.client("narrow")
    file = narrow.files.create(file=("rows.jsonl", ROWS.encode()), purpose="fine-tune")
    with pytest.raises(openai.NotFoundError, match="there is no `base` here"):
        narrow.fine_tuning.jobs.create(model="base", training_file=file.id)


def test_a_key_may_do_what_its_scopes_are(site: Site) -> None:
    """And as they change, from the next request on."""
    chat: Any = {"model": "base", "messages": [{"role": "user", "content": "Who?"}]}
    with pytest.raises(openai.PermissionDeniedError, match=r"may not train: its scopes are ask.*scopes .* ask train"):
        site.client("ask").files.list()
    with pytest.raises(openai.PermissionDeniedError) as caught:
        site.client("train").chat.completions.create(**chat)
    assert caught.value.code == "insufficient_scope"
    for http in (site.http("train"), site.http("ask")):
        with http:
            assert http.get("/v1/models").status_code == 200
    for name in ("train", "admin"):
        assert site.client(name).files.list().data == []
    for name in ("ask", "admin"):
        with pytest.raises(openai.NotFoundError):  # there is no such model here
            site.client(name).chat.completions.create(**chat)
    set_scopes(keys_file(site.home), "ask", ("train",))
    try:
        assert site.client("ask").files.list().data == []
        with pytest.raises(openai.PermissionDeniedError):
            site.client("ask").chat.completions.create(**chat)
    finally:
        set_scopes(keys_file(site.home), "ask", ("ask",))


def test_an_admins_job_goes_before_others(site: Site) -> None:
    jobs = []
    for name in ("alice", "admin"):
        client = site.client(name)
        file = client.files.create(file=ROWS.encode(), purpose="fine-tune")
        jobs.append((client, client.fine_tuning.jobs.create(model="base", training_file=file.id)))
    by = [job.by for job in queue.queue(site.home / "runs")]
    assert by == ["admin (API)", "alice (API)"]
    for client, job in jobs:
        client.fine_tuning.jobs.cancel(job.id)
    until(lambda: queue.queue(site.home / "runs") == [], "the end of the jobs")
    for client, _ in jobs:
        for file in client.files.list():
            client.files.delete(file.id)


def test_the_asynchronous_client_does_the_same(site: Site) -> None:
    async def all_of_it() -> list[str]:
        async with openai.AsyncOpenAI(
            base_url=f"{site.url}/v1",
            api_key=site.secrets["bob"],
            max_retries=0,
            http_client=openai.DefaultAsyncHttpxClient(trust_env=False),
            _strict_response_validation=True,
        ) as bob:
            files = await asyncio.gather(
                *(bob.files.create(file=(f"{n}.jsonl", ROWS.encode()), purpose="fine-tune") for n in range(3))
            )
            job = await bob.fine_tuning.jobs.create(model="base", training_file=files[0].id)
            assert (await bob.fine_tuning.jobs.retrieve(job.id)).status == "queued"
            assert job.id in {each.id async for each in bob.fine_tuning.jobs.list(limit=1)}
            assert (await bob.fine_tuning.jobs.cancel(job.id)).status == "cancelled"
            for file in files:
                assert (await bob.files.delete(file.id)).deleted
            return [event.message async for event in bob.fine_tuning.jobs.list_events(job.id, limit=1)]

    assert asyncio.run(all_of_it()) == ["The job was cancelled", ANY]


def test_where_it_is_off_there_is_nothing(tmp_path: Path) -> None:
    api = Alone()
    endpoint = Endpoint()
    api.offer(open_service(tmp_path, endpoint.finetuning), endpoint.finetuning.enabled)
    with serving(protect(api.app, Protection.of(endpoint, tmp_path), Limiter())) as url:
        for method, path in (("POST", "/v1/files"), ("GET", "/v1/files"), ("POST", "/v1/fine_tuning/jobs")):
            assert httpx.request(method, f"{url}{path}", trust_env=False).status_code == 404
    assert not any("fine_tuning" in path for path in api.app.openapi()["paths"])
    assert list(tmp_path.iterdir()) == []


def test_models_of_jobs_are_their_owners(tmp_path: Path) -> None:
    from llm_ray.serve.gateway.protect.keys import Key

    service = open_service(tmp_path, FinetuningApi())
    (tmp_path / "finetuning" / service.owner_of("alice") / "jobs" / "ftjob-0123456789ab").mkdir(parents=True)
    api = Api()
    api.offer(service, False)
    alice, bob = Key("1", "alice", "", 0.0), Key("2", "bob", "", 0.0)
    model = "ft:base:bot:0123456789ab"
    assert api._may_ask(model, alice)
    assert not api._may_ask(model, bob)
    assert not api._may_ask(model, None)
    assert api._may_ask(model, replace(alice, models=("base",))), "beside those that it was made for"
    assert api._may_ask("ft:base:bot:ffffffffffff", bob), "deployed by hand"
    assert not api._may_ask("ft:base:bot:ffffffffffff", replace(bob, models=("base",)))
