"""Keys, limits, sizes, time-outs and origins at the endpoint as it is deployed, and what is open without a key."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from tests.integration.endpoint.conftest import Guarded
from tests.waiting import until

TEXT = "/v1/completions"
PAGE = {"Origin": "https://chat.example.org"}
PREFLIGHT = PAGE | {
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type",
}


def body(**change: Any) -> dict[str, Any]:
    return {"model": "team/pair", "prompt": "Once", "max_tokens": 2, "temperature": 0} | change


def told(answer: httpx.Response) -> tuple[int, str]:
    """Status and code of an error in OpenAI's form."""
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return answer.status_code, error["code"]


def test_health_and_readiness_alone_are_open(home: Guarded) -> None:
    with home.http() as stranger, home.http(home.key) as known:
        assert stranger.get("/health").json() == {"status": "ok"}
        assert stranger.get("/ready").json()["ready"] is True
        for method, path in (
            ("POST", TEXT),
            ("POST", "/team/pair"),
            ("POST", "/health"),
            ("POST", "/tokenize"),
            ("GET", "/v1/models"),
            ("GET", "/metrics"),
            ("GET", "/openapi.json"),
            ("OPTIONS", TEXT),
            ("GET", "/nothing"),
        ):
            answer = stranger.request(method, path, json=body() if method == "POST" else None)
            assert (*told(answer), answer.headers["www-authenticate"]) == (401, "invalid_api_key", "Bearer"), path
        assert "llm_ray_requests_total" in known.get("/metrics").text
        assert known.get("/openapi.json").json()["components"]["securitySchemes"]


def test_a_key_is_made_and_taken_away_while_it_runs(home: Guarded) -> None:
    secret = home.add_key("alice")
    with openai.OpenAI(
        base_url=f"{home.url}/v1", api_key=secret, max_retries=0, http_client=openai.DefaultHttpxClient(trust_env=False)
    ) as alice:
        assert alice.completions.create(**body()).choices[0].text
        listed = {key["name"]: key for key in json.loads(home.run("serve", "keys", "list", "--json").stdout)}
        assert {"everybody", "alice"} <= set(listed)
        assert secret not in json.dumps(listed)
        long = body(max_tokens=1000, ignore_eos=True, stream=True)
        with home.http(secret) as streaming, streaming.stream("POST", TEXT, json=long) as stream:
            lines = stream.iter_lines()
            next(lines)
            assert home.run("serve", "keys", "revoke", "alice").returncode == 0
            with pytest.raises(openai.AuthenticationError, match="not valid"):
                alice.completions.create(**body())
            assert [line for line in lines if line][-1] == "data: [DONE]", "what a revoked key has begun is answered"
    assert "alice" not in home.run("serve", "keys", "list").stdout
    assert home.ask("team/pair").status_code == 200


def test_a_key_has_limits_of_its_own(home: Guarded) -> None:
    with home.http(home.add_key("few", "--requests-per-minute", "2", "--max-tokens", "4")) as few:
        assert told(few.post(TEXT, json=body(max_tokens=5))) == (400, "max_tokens_exceeded")
        second = few.post(TEXT, json=body(max_tokens=None, ignore_eos=True))
        assert second.json()["usage"]["completion_tokens"] == 4
        assert second.headers["x-ratelimit-remaining-requests"] == "0"
        third = few.post(TEXT, json=body())
        assert told(third) == (429, "rate_limit_exceeded")
        assert 0 < int(third.headers["retry-after"]) <= 60
        assert few.get("/v1/models").status_code == 200, "to look costs nothing"
    with home.http(home.add_key("one", "--concurrent", "1", "--model", "red")) as one:
        with one.stream("POST", TEXT, json=body(model="red", max_tokens=1000, ignore_eos=True, stream=True)) as stream:
            lines = stream.iter_lines()  # kept, or the connection would be closed
            assert next(lines)
            refused = one.post(TEXT, json=body(model="red"))
            assert (*told(refused), refused.headers["retry-after"]) == (429, "rate_limit_exceeded", "1")
        until(
            lambda: one.post(TEXT, json=body(model="red")).status_code == 200, timeout=10
        )  # its client was gone, and so is its place
        assert told(one.post(TEXT, json=body())) == (404, "model_not_found")
        assert [model["id"] for model in one.get("/v1/models").json()["data"]] == ["red"]
    assert home.ask("team/pair").status_code == 200


def test_no_page_may_ask_unless_it_is_named(home: Guarded) -> None:
    with home.http(home.key) as client:
        assert "access-control-allow-origin" not in client.get("/v1/models", headers=PAGE).headers
        assert "access-control-allow-origin" not in client.options(TEXT, headers=PREFLIGHT).headers


@pytest.fixture(scope="module")
def narrow(home: Guarded) -> Iterator[Guarded]:
    """The same endpoint with a conf that allows little, taken over while it runs."""
    before = home.conf["endpoint"]
    home.conf["endpoint"] = before | {
        "cors_origins": ["https://chat.example.org"],
        "max_body_mib": 0.01,
        "body_timeout_s": 2,
        "limits": {"concurrent": 2},
    }
    home.apply()
    yield home
    home.conf["endpoint"] = before | {"cors_origins": [], "max_body_mib": 8, "body_timeout_s": 30, "limits": {}}
    home.apply()
    assert "access-control-allow-origin" not in httpx.get(f"{home.url}/health", headers=PAGE, trust_env=False).headers


def test_a_page_that_is_named_may_ask(narrow: Guarded) -> None:
    with narrow.http() as page:
        allowed = page.options(TEXT, headers=PREFLIGHT)
        assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, PAGE["Origin"])
        refused = page.post(TEXT, json=body(), headers=PAGE)
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, PAGE["Origin"]), (
            "the page can read why"
        )
        other = page.options(TEXT, headers=PREFLIGHT | {"Origin": "https://elsewhere.example.org"})
        assert (other.status_code, "access-control-allow-origin" in other.headers) == (400, False)


def test_bodies_that_are_too_large_or_do_not_come(narrow: Guarded) -> None:
    with narrow.http(narrow.key) as client:
        assert told(client.post(TEXT, json=body(prompt="word " * 2100))) == (413, "body_too_large")
        in_pieces = (piece for piece in [b'{"model": "team/pair", "prompt": "', *[b"word " * 1000] * 3, b'"}'])
        assert told(client.post(TEXT, content=in_pieces, headers={"Content-Type": "application/json"})) == (
            413,
            "body_too_large",
        )
    with socket.create_connection(("127.0.0.1", narrow.port)) as slow:
        slow.sendall(
            f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {narrow.key}\r\nContent-Length: "
            f"99\r\n\r\n{{".encode()
        )
        assert slow.recv(100).startswith(b"HTTP/1.1 408")


@pytest.fixture
def hasty(narrow: Guarded) -> Iterator[Guarded]:
    """It takes back an answer after three seconds: for this test alone, others' answers may take longer on a busy
    machine."""
    narrow.conf["endpoint"]["request_timeout_s"] = 3
    narrow.apply()
    yield narrow
    narrow.conf["endpoint"]["request_timeout_s"] = 600
    narrow.apply()


def test_an_answer_that_takes_too_long_is_ended(hasty: Guarded) -> None:
    # As many answers as are computed at a time, and the longest: far more than three seconds.
    long = body(n=32, max_tokens=1000, temperature=1, ignore_eos=True)
    with hasty.http(hasty.key) as client:
        late = client.post(TEXT, json=long)
        assert (*told(late), late.headers["x-should-retry"]) == (504, "request_timeout", "false")
        with client.stream("POST", TEXT, json=long | {"stream": True}) as stream:
            last = [line for line in stream.iter_lines() if line][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "request_timeout"
        until(lambda: client.post(TEXT, json=body()).status_code == 200)


def test_the_limits_of_the_endpoint_hold_for_every_key(narrow: Guarded) -> None:
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: narrow.ask("team/pair", max_tokens=100), range(6)))
    assert {answer.status_code for answer in answers} == {200, 429}
    assert all(answer.headers["retry-after"] == "1" for answer in answers if answer.status_code == 429)


def test_keys_are_in_no_log(home: Guarded) -> None:
    """Nor is a wrong one, which may be a right one with a slip."""
    wrong = home.key[:-1]
    with home.http(wrong) as client:
        assert client.post(TEXT, json=body(prompt="Twice upon a time")).status_code == 401
    gateway = home.run("serve", "logs", "gateway", "-n", "100000").stdout
    assert f"of key {home.key.split('-')[1]}" in gateway
    assert "an API key that is not valid" in gateway
    logs = [
        path for path in home.folder.rglob("*") if path.is_file() and path.suffix in (".log", ".out", ".err", ".json")
    ]
    assert any("serve" in str(path) and path.stat().st_size for path in logs)
    texts = [path.read_text(errors="replace") for path in logs]
    assert not [secret for secret in (*home.secrets, wrong) if any(secret in text for text in texts)]
