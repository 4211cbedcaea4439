"""A PDF made by hand, and a small endpoint that writes questions and answers."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tests.server import serving

MakePdf = Callable[[Path, Sequence[str]], Path]


@pytest.fixture
def make_pdf() -> MakePdf:
    return pdf


def pdf(path: Path, pages: Sequence[str]) -> Path:
    """A PDF with a page for each text; an empty one is a page without text, as a scan is."""
    kids = " ".join(f"{4 + 2 * n} 0 R" for n in range(len(pages)))
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for n, page in enumerate(pages):
        lines = " T* ".join(f"({line}) Tj" for line in page.split("\n")) if page else ""
        stream = f"BT /F1 12 Tf 14 TL 72 720 Td {lines} ET"
        objects += [
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Resources << /Font << /F1 3 0 R >> >> "
            f"/Contents {5 + 2 * n} 0 R >>",
            f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream",
        ]
    data, offsets = b"%PDF-1.4\n", []
    for number, text in enumerate(objects, 1):
        offsets.append(len(data))
        data += f"{number} 0 obj\n{text}\nendobj\n".encode("latin-1")
    table = "".join(f"{offset:010} 00000 n \n" for offset in offsets)
    size = len(objects) + 1
    end = (
        f"xref\n0 {size}\n0000000000 65535 f \n{table}trailer << /Size {size} /Root 1 0 R >>\nstartxref\n{len(data)}\n"
    )
    path.write_bytes(data + f"{end}%%EOF\n".encode())
    return path


@dataclass
class Writer:
    """The endpoint. What it does is in the model's name; `passages` are those it was asked about, in order."""

    url: str = ""
    passages: list[str] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    now: int = 0
    most: int = 0
    stop_after: int | None = None
    reached: threading.Event = field(default_factory=threading.Event)

    def answer(self, model: str, passage: str) -> str:
        """Rows whose answers stand in the passage: its first sentence."""
        sentence = passage.replace("\n", " ").split(". ")[0].strip("# .") + "."
        row = {"question": f"What is said of {' '.join(sentence.split()[:6])}?", "answer": sentence}
        match model:
            case "invents":
                row["answer"] = "Penguins of Antarctica invented quantum telegraphy during 1789."
            case "words":
                return "Sure! Here are some questions."
            case "fenced":
                return f"Here you are:\n```json\n{json.dumps({'rows': [row]})}\n```"
            case "cut":
                return json.dumps({"rows": [row, row]})[:-20]
            case "nothing":
                return '{"rows": []}'
            case "same":
                row = {"question": "What is it?", "answer": sentence}
            case "mentions":
                row["question"] = "What does the passage say?"
        return json.dumps({"rows": [row]})


@pytest.fixture(scope="module")
def running() -> Iterator[Writer]:
    state = Writer()

    async def models(request: Request) -> Response:
        return JSONResponse(
            {"object": "list", "data": [{"id": "good", "object": "model", "created": 0, "owned_by": "t"}]}
        )

    async def chat(request: Request) -> Response:
        body = await request.json()
        model = body["model"]
        passage = body["messages"][-1]["content"].partition("Passage:\n")[2].rpartition("\n\nWrite up to")[0]
        state.bodies.append(body)
        if model == "busy" and len(state.bodies) == 1:
            return JSONResponse({"error": {"message": "full"}}, 429, {"Retry-After": "0"})
        if model in ("unknown", "picky", "down"):
            status = {"unknown": 404, "picky": 400, "down": 500}[model]
            return JSONResponse({"error": {"message": "it is the model"}}, status)
        if model == "patchy" and "bad" in passage:
            return JSONResponse({"error": {"message": "bad"}}, 500)
        if state.stop_after is not None and len(state.passages) >= state.stop_after:
            state.reached.set()
            while not await request.is_disconnected():
                await asyncio.sleep(0.01)
            return Response()
        state.passages.append(passage)
        state.now += 1
        state.most = max(state.most, state.now)
        await asyncio.sleep(0.02)
        state.now -= 1
        message = {"role": "assistant", "content": state.answer(model, passage)}
        choice = {"index": 0, "finish_reason": "length" if model == "cut" else "stop", "message": message}
        usage = {"prompt_tokens": 5, "completion_tokens": 5, "total_tokens": 10}
        head = {"id": "1", "object": "chat.completion", "created": 0, "model": model}
        return JSONResponse({**head, "choices": [choice], "usage": usage})

    routes = [Route("/v1/models", models), Route("/v1/chat/completions", chat, methods=["POST"])]
    with serving(Starlette(routes=routes)) as url:
        state.url = f"{url}/v1"
        yield state


@pytest.fixture
def writer(running: Writer, monkeypatch: pytest.MonkeyPatch) -> Writer:
    for variable in ("LLM_RAY_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(variable, raising=False)
    vars(running).update(vars(Writer(running.url)))
    return running
