"""Kinds of URL, and where the key comes from."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llm_ray.client.endpoint import Endpoint, find_key, parse
from llm_ray.errors import ConfError


@pytest.mark.parametrize(
    ("url", "openai", "name", "base"),
    [
        ("http://127.0.0.1:8000/v1", True, "v1", "http://127.0.0.1:8000/v1"),
        ("http://127.0.0.1:8000/v1/", True, "v1", "http://127.0.0.1:8000/v1"),
        ("https://llm.example.org/team/v1", True, "team/v1", "https://llm.example.org/team/v1"),
        ("http://127.0.0.1:8000/custom-model", False, "custom-model", "http://127.0.0.1:8000/v1"),
        ("http://[::1]:8000/team/my-bot/", False, "team/my-bot", "http://[::1]:8000/v1"),
    ],
)
def test_the_path_tells_the_kind(url: str, openai: bool, name: str, base: str) -> None:
    endpoint = parse(url)
    assert (endpoint.openai, endpoint.name, endpoint.base) == (openai, name, base)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("127.0.0.1:8000/v1", "not a URL of the form"),
        ("localhost", "not a URL of the form"),
        ("ftp://host/v1", "not a URL of the form"),
        ("http://host:port/v1", "not a URL of the form"),
        ("http://[::1/v1", "not a URL of the form"),
        ("http:///v1", "not a URL of the form"),
        ("http://127.0.0.1:8000", "add /v1 .* or /MODEL"),
        ("http://127.0.0.1:8000/", "add /v1 .* or /MODEL"),
        ("http://127.0.0.1:8000/v1/chat/completions", "only the base of the API, http://127.0.0.1:8000/v1$"),
        ("http://127.0.0.1:8000/v1?model=a", "remove everything after the path"),
    ],
)
def test_urls_that_are_none(url: str, reason: str) -> None:
    with pytest.raises(ConfError, match=reason):
        parse(url)


@pytest.mark.parametrize(
    ("host", "trusted"),
    [
        ("127.0.0.1", False),
        ("127.1.2.3", False),
        ("[::1]", False),
        ("localhost", False),
        ("10.0.0.1", True),
        ("head.example.org", True),
    ],
)
def test_this_machine_is_asked_without_a_proxy(host: str, trusted: bool) -> None:
    assert Endpoint(f"http://{host}:8000/v1", True, None).trust_env is trusted


def test_the_key_is_looked_for_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "key"
    file.write_text("sk-file\n")
    monkeypatch.setenv("LLM_RAY_API_KEY", "sk-ours")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-openai")
    found = [find_key("sk-given", None, os.environ), find_key(None, file, os.environ), find_key(None, None, os.environ)]
    monkeypatch.delenv("LLM_RAY_API_KEY")
    found.append(find_key(None, None, os.environ))
    monkeypatch.delenv("OPENAI_API_KEY")
    assert [key and (key.value, key.source) for key in found] == [
        ("sk-given", "--api-key"),
        ("sk-file", f"--api-key-file {file}"),
        ("sk-ours", "LLM_RAY_API_KEY"),
        ("sk-openai", "OPENAI_API_KEY"),
    ]
    assert find_key(None, None, os.environ) is None
    with pytest.raises(ConfError, match="--api-key and --api-key-file cannot be combined"):
        find_key("sk-given", file, os.environ)
    assert "sk-given" not in repr(found[0])


@pytest.mark.parametrize("text", ["", "\n", "two words", "schlüssel", "a\x00b"])
def test_what_is_no_key(text: str, tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(text)
    with pytest.raises(ConfError, match=f"{file}: an API key is one word"):
        find_key(None, file, os.environ)


def test_a_key_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfError, match=r"none cannot be read: .*No such file"):
        find_key(None, tmp_path / "none", os.environ)
