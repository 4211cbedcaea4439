"""The page with one more screen, whose handlers the tests need: python -m tests.integration.ui.page PORT"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

import gradio as gr

from llm_ray.conf.section import home
from llm_ray.ui.handlers import handler, on
from llm_ray.ui.screens import SCREENS, Screen, Site
from llm_ray.ui.server import Settings, serve
from llm_ray.ui.sessions import Visitor
from llm_ray.ui.users import Role


@handler(Role.USER)
def greet(visitor: Visitor, name: str) -> str:
    return f"Hello {name}, says {visitor.name}"


@handler(Role.VIEWER)
def count(visitor: Visitor) -> Iterator[str]:
    for number in range(600):
        yield str(number)
        time.sleep(0.1)


def _build(site: Site) -> None:
    @handler(Role.USER)
    def take(visitor: Visitor, path: str) -> str:
        taken = site.uploads.take(visitor, path)
        return f"{taken.relative_to(site.home)}: {taken.read_text()}"

    name, answer = gr.Textbox(label="Name"), gr.Textbox(label="Answer")
    on(gr.Button("Greet").click, greet, inputs=name, outputs=answer)
    on(gr.Button("Count").click, count, outputs=answer)
    sent = gr.File(label="Rows")
    on(sent.upload, take, inputs=sent, outputs=answer)


if __name__ == "__main__":
    settings = Settings(home(), port=int(sys.argv[1]), most_upload_bytes=2**20)
    serve(settings, lambda url: print("The page:", url, flush=True), (*SCREENS, Screen("try", "Try", _build)))
