"""Somebody at the page of a host in the lab: over HTTP as a browser asks, through an SSH tunnel or not."""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import socket
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import httpx

from tests.lab.hosts import Host

PORT = 7860


@contextlib.contextmanager
def tunnel(host: Host, port: int = PORT) -> Iterator[str]:
    """A port of this machine's loopback that leads to one of the host's: its URL."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        here = free.getsockname()[1]
    line = ["ssh", "-N", "-L", f"127.0.0.1:{here}:127.0.0.1:{port}", "-i", str(host.key), "-o", "BatchMode=yes"]
    line += ["-o", f"UserKnownHostsFile={host.known_hosts}", "-o", "ExitOnForwardFailure=yes", f"root@{host.address}"]
    process = subprocess.Popen(line, stdin=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 30
        while time.monotonic() < end:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", here), 1):
                break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{here}"
    finally:
        process.terminate()
        process.wait()


class Visitor:
    """A browser, as far as the page can tell; `known_as` is what it calls the page."""

    def __init__(self, url: str, known_as: str = f"127.0.0.1:{PORT}", **options: Any) -> None:
        scheme = url.partition(":")[0]
        headers = {"host": known_as, "origin": f"{scheme}://{known_as}"}
        self.http = httpx.Client(base_url=url, headers=headers, timeout=120, trust_env=False, **options)

    def sign_in(self, name: str, password: str) -> int:
        """The status of the answer: 303 leads on, 401 is a wrong password."""
        form = re.search(r'name="csrf" value="([^"]+)"', self.http.get("/login").text)
        assert form
        return self.http.post("/login", data={"name": name, "password": password, "csrf": form[1]}).status_code

    def press(self, button: str, **fields: str) -> list[dict[str, Any]]:
        """Press the button, with these fields (by their labels) filled in: the events that follow."""
        config = self.http.get("/config").raise_for_status().json()
        parts = {part["id"]: part for part in config["components"]}
        pressed = {
            part["id"] for part in parts.values() if part["type"] == "button" and part["props"].get("value") == button
        }
        (call,) = [
            call
            for call in config["dependencies"]
            if {target[0] for target in call["targets"]} & pressed and call["backend_fn"]
        ]
        inputs = [parts[part] for part in call["inputs"]]
        labels = {part["props"].get("label") for part in inputs}
        assert set(fields) <= labels, set(fields) - labels
        data = [
            None
            if part["type"] == "state"
            else fields.get(part["props"].get("label") or "", part["props"].get("value") or "")
            for part in inputs
        ]
        return self.call(call["id"], *data)

    def look(self) -> str:
        """What the page shows by itself on all its screens, as far as it asks nothing of the visitor."""
        calls = self.http.get("/config").raise_for_status().json()["dependencies"]
        timed = [
            call for call in calls if call["backend_fn"] and any(target[1] == "tick" for target in call["targets"])
        ]
        return json.dumps([self.call(call["id"], *[None] * len(call["inputs"])) for call in timed])

    def call(self, number: int, *data: Any) -> list[dict[str, Any]]:
        page = secrets.token_hex(8)
        sent = {"fn_index": number, "session_hash": page, "data": data}
        self.http.post("/gradio_api/queue/join", json=sent).raise_for_status()
        events = []
        with self.http.stream("GET", f"/gradio_api/queue/data?session_hash={page}", timeout=600) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    events.append(json.loads(line[6:]))
                    if events[-1]["msg"] in ("process_completed", "close_stream"):
                        break
        return events
