"""An endpoint with API keys, and on it `team/pair`, which has adapters and is to have a second replica, and `vectors`
for embeddings."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.integration import tiny
from tests.integration.serving import Home

ADAPTERS = ("red", "team/blue")
TEMPLATE = "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"


class Guarded(Home):
    """A home whose endpoint asks for keys. `conf` is what is deployed; `secrets` are the keys that were made."""

    def __init__(self, folder: Path, model: Path) -> None:
        super().__init__(folder, model)
        self.conf: dict[str, Any] = {"endpoint": {"port": self.port, "api_keys": "on"}, "models": {}}
        self.secrets: list[str] = []
        self.key = self.add_key("everybody")

    def add_key(self, name: str, *options: str) -> str:
        added = self.run("serve", "keys", "add", name, *options)
        assert added.returncode == 0, added.stderr
        self.secrets.append(added.stdout.strip())
        return self.secrets[-1]

    def apply(self, only: str | None = None) -> None:
        """Deploy the conf as it is now."""
        file = self.folder / "serve.yaml"
        file.write_text(json.dumps(self.conf))
        deployed = self.run("serve", "deploy", "--config", str(file), *(["--only", only] if only else []))
        assert deployed.returncode == 0, deployed.stderr

    def http(self, key: str | None = None) -> httpx.Client:
        return httpx.Client(
            base_url=self.url, headers={"Authorization": f"Bearer {key}"} if key else {}, trust_env=False, timeout=120
        )

    def ask(self, name: str, **more: Any) -> httpx.Response:
        body = {
            "model": name,
            "prompt": "Once upon a time",
            "max_tokens": 64,
            "temperature": 0,
            "ignore_eos": True,
        } | more
        with self.http(self.key) as client:
            return client.post("/v1/completions", json=body)


@pytest.fixture(scope="package")
def llama(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("llama"), smollm2)


@pytest.fixture(scope="package")
def adapters(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters on the model, by name."""
    return {name: tiny.adapter(tmp_path_factory.mktemp("adapter"), llama, seed) for seed, name in enumerate(ADAPTERS)}


@pytest.fixture(scope="package")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model that makes vectors, and its tokenizer in a folder of its own."""
    folder, tokenizer = tmp_path_factory.mktemp("bert"), tmp_path_factory.mktemp("tokenizer")
    return tiny.bert(folder, tokenizer), tokenizer


@pytest.fixture(scope="package")
def home(
    llama: Path, adapters: dict[str, Path], bert: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Guarded]:
    made = Guarded(tmp_path_factory.mktemp("home"), llama)
    template = made.folder / "template.jinja"
    template.write_text(TEMPLATE)
    made.conf["models"]["team/pair"] = {
        "model": str(llama),
        "chat_template": str(template),
        "cpus": 1,
        "kv_cache_gib": 0.05,
        "adapters": {name: str(folder) for name, folder in adapters.items()},
    }
    made.conf["models"]["vectors"] = {"model": str(bert[0]), "tokenizer": str(bert[1]), "cpus": 1}
    made.apply()
    yield made
    made.run("serve", "stop", "--all")


@pytest.fixture
def client(home: Guarded) -> Iterator[openai.OpenAI]:
    """OpenAI's client, which does not ask again by itself."""
    with openai.OpenAI(
        base_url=f"{home.url}/v1",
        api_key=home.key,
        max_retries=0,
        http_client=openai.DefaultHttpxClient(trust_env=False),
    ) as made:
        yield made
