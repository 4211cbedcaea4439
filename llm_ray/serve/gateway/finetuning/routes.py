"""The operations of the fine-tuning API: they parse requests, call the service, and return OpenAI's objects.

Source: https://platform.openai.com/docs/api-reference/fine-tuning and /files
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Annotated, Any, Literal, TypeVar, get_args

from fastapi import Body, FastAPI, Query, Request
from pydantic import BaseModel
from starlette.responses import FileResponse, Response, StreamingResponse

from llm_ray.serve.gateway import openapi
from llm_ray.serve.gateway.errors import ApiError
from llm_ray.serve.gateway.finetuning import objects
from llm_ray.serve.gateway.finetuning.objects import CreateJob, L, Page
from llm_ray.serve.gateway.finetuning.service import Method, Named, Problem, Service, Upload
from llm_ray.serve.gateway.finetuning.upload import receive
from llm_ray.serve.gateway.scopes import check_scope, is_admin, key_of

FILES, JOBS = "/v1/files", "/v1/fine_tuning/jobs"
_LOOK = 1.0  # seconds between checks of a job whose events are streamed
_ENDED = ("succeeded", "failed", "cancelled")
_BINARY = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["purpose", "file"],
                    "properties": {
                        "purpose": {"type": "string", "enum": ["fine-tune"]},
                        "file": {"type": "string", "format": "binary"},
                        "format": {"type": "string", "description": "The format of its rows; left out, it is found."},
                    },
                }
            }
        },
    }
}
T = TypeVar("T")
Limit = Annotated[int, Query(ge=1, le=100)]


class Operations:
    """The operations and their dependencies.

    `look` returns the model that the endpoint serves to a request's client under a name; `stopping` is true once the
    gateway accepts no new work.
    """

    def __init__(
        self,
        service: Service,
        look: Callable[[str, Request], Awaitable[Named | None]],
        stopping: Callable[[], bool],
    ) -> None:
        self._service, self._look, self._stopping = service, look, stopping

    def add_to(self, app: FastAPI) -> None:
        """Registers the routes."""
        made = (400, 401, 403, 404, 408, 413, 415, 429, 500, 503, 504)
        looked = (400, 401, 403, 404, 500)
        changed = (400, 401, 403, 404, 429, 500, 503)
        job = f"{JOBS}/{{fine_tuning_job_id}}"
        described: list[tuple[str, str, Callable[..., Any], dict[str, Any], Sequence[int], dict[str, Any]]] = [
            ("POST", FILES, self.create_file, {"model": objects.FileObject}, made, _FORM),
            ("GET", FILES, self.list_files, {"model": Page[objects.FileObject]}, looked, {}),
            ("GET", f"{FILES}/{{file_id}}", self.retrieve_file, {"model": objects.FileObject}, looked, {}),
            ("GET", f"{FILES}/{{file_id}}/content", self.file_content, {"content": _BINARY}, looked, {}),
            ("DELETE", f"{FILES}/{{file_id}}", self.delete_file, {"model": objects.FileDeleted}, looked, {}),
            ("POST", JOBS, self.create_job, {"model": objects.JobObject}, made, {}),
            ("GET", JOBS, self.list_jobs, {"model": Page[objects.JobObject]}, looked, {}),
            ("GET", job, self.retrieve_job, {"model": objects.JobObject}, looked, {}),
            ("POST", f"{job}/cancel", self.cancel_job, {"model": objects.JobObject}, changed, {}),
            ("POST", f"{job}/pause", self.pause_job, {"model": objects.JobObject}, changed, {}),
            ("POST", f"{job}/resume", self.resume_job, {"model": objects.JobObject}, changed, {}),
            (
                "GET",
                f"{job}/events",
                self.list_events,
                {"model": Page[objects.EventObject], "content": openapi.EVENT_STREAM},
                looked,
                {},
            ),
            ("DELETE", "/v1/models/{model:path}", self.delete_model, {"model": objects.ModelDeleted}, changed, {}),
            ("GET", f"{job}/checkpoints", self.list_checkpoints, {"model": Page[objects.CheckpointObject]}, looked, {}),
        ]
        for method, path, operation, answer, errors, more in described:
            app.add_api_route(
                path,
                operation,
                methods=[method],
                tags=["finetuning"],
                responses=openapi.described(answer, errors),
                response_model=None,
                operation_id=operation.__name__,
                summary=openapi.summary(operation),
                openapi_extra=more or None,
            )
            if method == "GET":
                app.add_api_route(path, operation, methods=["HEAD"], include_in_schema=False, response_model=None)

    # Files ------------------------------------------------------------------------------------------------------------

    async def create_file(self, request: Request) -> Response:
        """Upload a training file. Its rows are validated on arrival."""
        self._begins()
        owner = self._owner(request)
        begun = asyncio.ensure_future(_done(self._service.begin, owner))
        kept = False
        try:
            upload = await asyncio.shield(begun)
            form = await _told(receive(request, upload))
            if (purpose := form.fields.pop("purpose", None)) != "fine-tune":
                told = "it is missing" if purpose is None else f"`{purpose[:50]}` is not supported here"
                raise ApiError(400, f"purpose: {told}: send fine-tune", "invalid_request", param="purpose")
            form_of_rows = form.fields.pop("format", None)
            if form.fields:
                name = next(iter(form.fields))
                why = "files do not expire here" if name.startswith("expires_after") else "there is no such field"
                raise ApiError(400, f"{name[:50]}: {why}", "unsupported_parameter", param=name[:50])
            file = await _done(self._service.keep, owner, upload, form.label, form_of_rows)
            kept = True
        finally:
            if not kept:
                # Also when the client disconnects and this task is cancelled: the file's check must end.
                await asyncio.shield(self._abandon(owner, begun))
        return _json(objects.file_object(file))

    async def _abandon(self, owner: str, begun: asyncio.Future[Upload]) -> None:
        with contextlib.suppress(ApiError):  # there was no room for the upload
            upload = await begun
            await asyncio.to_thread(self._service.abandon, owner, upload)

    async def list_files(
        self,
        request: Request,
        purpose: str | None = None,
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
        order: Literal["asc", "desc"] = "desc",
    ) -> Response:
        """List the uploaded files, newest first by default."""
        found = await _done(self._service.files, self._owner(request))
        shown = [objects.file_object(file) for file in (found if order == "asc" else reversed(found))]
        return _json(_cut(shown if purpose in (None, "fine-tune") else [], after, limit))

    async def retrieve_file(self, file_id: str, request: Request) -> Response:
        """Retrieve a file."""
        return _json(objects.file_object(await _done(self._service.file, self._owner(request), file_id)))

    async def file_content(self, file_id: str, request: Request) -> Response:
        """Download a file as it was uploaded."""
        owner = self._owner(request)
        file = await _done(self._service.file, owner, file_id)
        path = await _done(self._service.content, owner, file_id)
        return FileResponse(path, media_type="application/octet-stream", filename=f"{file.id}{file.suffix}")

    async def delete_file(self, file_id: str, request: Request) -> Response:
        """Delete a file."""
        await _done(self._service.delete_file, self._owner(request), file_id)
        return _json(objects.FileDeleted(id=file_id))

    # Jobs -------------------------------------------------------------------------------------------------------------

    async def create_job(self, body: Annotated[CreateJob, Body()], request: Request) -> Response:
        """Create a fine-tuning job. It waits in the queue."""
        self._begins()
        _check(body)
        key = key_of(request)
        named = await self._look(body.model, request)
        job = await _done(
            self._service.create,
            self._owner(request),
            key.name if key else None,
            objects.asked_of(body),
            named,
            any_model=key is None or key.models is None,
            urgent=is_admin(key),
        )
        return _json(objects.job_object(job))

    async def list_jobs(self, request: Request, after: str | None = None, limit: Limit = 20) -> Response:
        """List the jobs, newest first."""
        found = await _done(self._service.jobs, self._owner(request))
        wanted = {
            name.removeprefix("metadata[").removesuffix("]"): value
            for name, value in request.query_params.items()
            if name.startswith("metadata[") and name.endswith("]")
        }
        without = request.query_params.get("metadata") == "null"
        shown = [
            objects.job_object(job)
            for job in reversed(found)
            if wanted.items() <= dict(job.asked.metadata or {}).items() and not (without and job.asked.metadata)
        ]
        return _json(_cut(shown, after, limit))

    async def retrieve_job(self, fine_tuning_job_id: str, request: Request) -> Response:
        """Retrieve a job."""
        return _json(objects.job_object(await _done(self._service.job, self._owner(request), fine_tuning_job_id)))

    async def cancel_job(self, fine_tuning_job_id: str, request: Request) -> Response:
        """Cancel a job permanently."""
        return _json(objects.job_object(await _done(self._service.cancel, self._owner(request), fine_tuning_job_id)))

    async def pause_job(self, fine_tuning_job_id: str, request: Request) -> Response:
        """Pause a job at its next checkpoint."""
        return _json(objects.job_object(await _done(self._service.pause, self._owner(request), fine_tuning_job_id)))

    async def resume_job(self, fine_tuning_job_id: str, request: Request) -> Response:
        """Resume a paused or failed job."""
        return _json(objects.job_object(await _done(self._service.resume, self._owner(request), fine_tuning_job_id)))

    async def list_events(
        self,
        fine_tuning_job_id: str,
        request: Request,
        after: str | None = None,
        limit: Limit = 20,
        stream: bool = False,
    ) -> Response:
        """List a job's events, newest first. With stream: true, all events are streamed as they occur, oldest first."""
        owner = self._owner(request)
        found = await _done(self._service.events, owner, fine_tuning_job_id)
        if stream:
            return StreamingResponse(self._events(owner, fine_tuning_job_id), media_type="text/event-stream")
        return _json(_cut([objects.event_object(event) for event in reversed(found)], after, limit))

    async def list_checkpoints(
        self, fine_tuning_job_id: str, request: Request, after: str | None = None, limit: Limit = 10
    ) -> Response:
        """List the checkpoints that a job's run keeps, newest first."""
        found = await _done(self._service.checkpoints, self._owner(request), fine_tuning_job_id)
        shown = [objects.checkpoint_object(fine_tuning_job_id, one) for one in reversed(found)]
        return _json(_cut(shown, after, limit))

    async def delete_model(self, model: str, request: Request) -> Response:
        """Delete a model that a job made."""
        owner = self._owner(request)
        served = await self._look(model, request) is not None
        any_owner = is_admin(key_of(request))
        kept = await _done(self._service.delete_model, owner, model, served=served, any_owner=any_owner)
        return _json(objects.ModelDeleted(id=model, kept=kept))

    async def _events(self, owner: str, id: str) -> AsyncIterator[str]:
        seen: set[str] = set()
        try:
            while True:
                job = await _done(self._service.job, owner, id)  # read first, so that its last events are sent
                for event in await _done(self._service.events, owner, id):
                    if event.id not in seen:
                        seen.add(event.id)
                        yield f"data: {objects.event_object(event).model_dump_json()}\n\n"
                if job.state in _ENDED:
                    yield "data: [DONE]\n\n"
                    return
                await asyncio.sleep(_LOOK)
        except ApiError as error:
            yield error.event()

    # Requests ---------------------------------------------------------------------------------------------------------

    def _owner(self, request: Request) -> str:
        check_scope(request, "train")
        key = key_of(request)
        return self._service.owner_of(key.name if key else None)

    def _begins(self) -> None:
        if self._stopping():
            raise ApiError(503, "This endpoint is being stopped.", "stopping", retry_after=5)


def _check(body: CreateJob) -> None:
    """Raises ApiError for features of OpenAI that are not supported here."""
    method = body.method
    if method and method.type not in get_args(Method):
        raise ApiError(
            400,
            f"method.type: `{method.type[:50]}` is not supported here: jobs are {' or '.join(get_args(Method))}",
            "unsupported_parameter",
            param="method.type",
        )
    for name in ("supervised", "dpo", "reinforcement"):
        if method and name != method.type and getattr(method, name) is not None:
            raise ApiError(
                400, f"method.{name}: the method is {method.type}", "unsupported_parameter", param=f"method.{name}"
            )
    if body.integrations:
        raise ApiError(
            400,
            "integrations: none are supported here: the run's figures are in the job's events",
            "unsupported_parameter",
            param="integrations",
        )
    given = objects.asked_of_method(body)
    if given and body.hyperparameters and given.model_dump(exclude={"beta"}) != body.hyperparameters.model_dump():
        raise ApiError(
            400,
            f"hyperparameters: method.{method.type if method else ''}.hyperparameters says otherwise: leave one of the "
            "two out",
            "invalid_request",
            param="hyperparameters",
        )


async def _told(work: Awaitable[T]) -> T:
    """Awaits `work`. Raises ApiError for its Problem."""
    try:
        return await work
    except Problem as problem:
        retry = {429: 30, 503: 2}.get(problem.status)
        raise ApiError(problem.status, str(problem), problem.code, param=problem.param, retry_after=retry) from problem


async def _done(use_case: Callable[..., T], *arguments: Any, **more: Any) -> T:
    """Runs a use case in a thread and returns its result. Raises ApiError for its Problem."""
    return await _told(asyncio.to_thread(use_case, *arguments, **more))


def _cut(shown: Sequence[L], after: str | None, limit: int) -> Page[L]:
    """Returns the page of `limit` objects after the one with the id `after`. Raises ApiError if that does not exist."""
    ids, start = [one.id for one in shown], 0
    if after is not None:
        if after not in ids:
            raise ApiError(400, f"after: there is no `{after[:100]}` in this list", "invalid_request", param="after")
        start = ids.index(after) + 1
    cut = slice(start, start + limit)
    first, last = (ids[cut][0], ids[cut][-1]) if ids[cut] else (None, None)
    return Page(data=list(shown[cut]), has_more=cut.stop < len(shown), first_id=first, last_id=last)


def _json(answer: BaseModel) -> Response:
    return Response(answer.model_dump_json(), media_type="application/json")
