"""Event handlers of the screens; every call requires a role.

    @handler(Role.USER)
    def greet(visitor: Visitor, name: str) -> str:
        return f"Hello {name}, says {visitor.name}"

    on(button.click, greet, inputs=name, outputs=answer)

`on` refuses functions that are not handlers, and the server does not start if one was connected without `on`.
"""

from __future__ import annotations

import contextlib
import functools
import html
import inspect
import logging
import secrets
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr
from gradio.context import Context

from llm_ray.errors import LlmRayError
from llm_ray.ui.sessions import Session, Visitor
from llm_ray.ui.users import Role

_LOG = logging.getLogger("llm_ray.ui")
GO = "url => { if (url) window.location.assign(url) }"
"""JavaScript for a hidden field's event: navigates to the URL that a handler has put into the field."""
_AT_ONCE = 8  # concurrent calls per handler; Gradio's default is one for all users together


@dataclass(frozen=True)
class Handler:
    """A screen's function and the minimum role to call it."""

    function: Callable[..., Any]
    least: Role


def handler(least: Role) -> Callable[[Callable[..., Any]], Handler]:
    """Turns a function into a handler. Its first argument is the calling `Visitor`, taken from the server-side session;
    the others are the values of the inputs. It returns or yields the outputs. An LlmRayError is shown as a message."""
    if not isinstance(least, Role):
        raise TypeError("a handler needs the least role that may call it: @handler(Role.USER)")

    def make(function: Callable[..., Any]) -> Handler:
        return Handler(function, least)

    return make


def on(
    event: Callable[..., Any],
    call: Handler,
    inputs: Any = None,
    outputs: Any = None,
    *,
    at_once: int = _AT_ONCE,
    **options: Any,
) -> Any:
    """Connects a component's event (`button.click`, `blocks.load`, `timer.tick`) to a handler, with at most `at_once`
    concurrent calls.

    `options` are Gradio's own (show_progress, trigger_mode, cancels, …). Raises TypeError if `call` is not a handler.
    """
    if not isinstance(call, Handler):
        raise TypeError(
            f"{getattr(call, '__name__', call)!r} has no least role: make it a handler with @handler(Role.…)"
        )
    options = {"api_visibility": "private", "concurrency_limit": at_once, **options, "queue": True}
    return event(_asked(call), inputs=inputs, outputs=outputs, **options)


def on_load() -> Callable[..., Any]:
    """Returns the load event of the page for a screen being built: ``on(on_load(), call)``."""
    page = Context.root_block
    if page is None:
        raise TypeError("a screen is built within the page")
    load: Callable[..., Any] = page.load
    return load


def check(blocks: gr.Blocks) -> None:
    """Raises TypeError if a function was connected without a role."""
    if blocks.renderables:
        raise TypeError(
            "gr.render connects functions while the page runs, which nobody checks: build the screen when the page "
            "starts"
        )
    for function in blocks.fns.values():
        connected = [call for call in (function.fn, function.validator) if call is not None]
        if not all(isinstance(getattr(call, "handler", None), Handler) for call in connected):
            raise TypeError(f"{function.name} was connected without a role: connect it with llm_ray.ui.handlers.on")


def _asked(call: Handler) -> Callable[..., Any]:
    """Returns the function that Gradio calls: it checks the role and then calls the handler."""
    function = call.function
    kinds = typing.get_type_hints(function)
    parameters = list(inspect.signature(function).parameters.values())[1:]
    asked: Any
    if inspect.isgeneratorfunction(function):

        def stream(request: gr.Request, *values: Any) -> Iterator[Any]:
            with _explained(call), contextlib.closing(function(_visitor(call, request), *values)) as shown:
                for value in shown:
                    yield value
                    _visitor(call, request)  # the stream ends with the session

        asked = stream
    elif inspect.isasyncgenfunction(function) or inspect.iscoroutinefunction(function):
        raise TypeError(
            f"{function.__name__} is asynchronous, in which one that waits holds up everybody: make it an ordinary "
            "function"
        )
    else:

        def once(request: gr.Request, *values: Any) -> Any:
            with _explained(call):
                return function(_visitor(call, request), *values)

        asked = once
    functools.update_wrapper(asked, function)
    del asked.__wrapped__
    first = inspect.Parameter("request", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=gr.Request)
    asked.__signature__ = inspect.Signature([first, *parameters])
    asked.__annotations__ = {"request": gr.Request, **{p.name: kinds[p.name] for p in parameters if p.name in kinds}}
    asked.handler = call
    return asked


def _visitor(call: Handler, request: gr.Request) -> Visitor:
    """Returns the caller. Raises gr.Error if the session has ended or the role does not suffice."""
    session: Session | None = getattr(getattr(request.request, "state", None), "session", None)
    if session is None or session.ended.is_set():
        raise gr.Error("You are signed out: load the page again.", title="Signed out", print_exception=False)
    if not session.visitor.role.covers(call.least):
        raise gr.Error(
            f"This requires the role {call.least}; yours is {session.visitor.role}. An admin can change it: llm-ray "
            "ui users role.",
            title="Not allowed",
            print_exception=False,
        )
    return session.visitor


@contextlib.contextmanager
def _explained(call: Handler) -> Iterator[None]:
    """Turns errors into messages for the user: LlmRayErrors with their text, others with a number that is also in the
    log."""
    try:
        yield
    except gr.Error:
        raise
    except LlmRayError as error:
        raise gr.Error(html.escape(str(error)), title="That did not work", print_exception=False) from error
    except Exception as error:
        number = secrets.token_hex(4)
        _LOG.exception(f"{number}: {call.function.__qualname__}")
        raise gr.Error(
            f"This is a bug in llm-ray or in one of its libraries. In the log of llm-ray ui, see {number}.",
            title="Internal error",
            print_exception=False,
        ) from error
