"""Sends streamed requests to an OpenAI endpoint and measures when each token arrives.

    report = run_load(endpoint, "quickstart", builtin_prompts(64), Load(concurrency=16, requests=128))
    print(report.output_tokens_per_second, report.time_to_first_token)

Metrics are defined as in ``vllm bench serve`` (vllm/benchmarks/serve.py, endpoint_request_func.py):

- time to first token (TTFT): from sending the request to the first chunk with a token;
- end to end: from sending the request to the last chunk with a token (the later usage chunk does not count);
- time per output token (TPOT), for each request with more than one token: (end to end - TTFT) / (output tokens - 1);
- inter-token latency (ITL): between consecutive chunks with tokens, over all requests. Where a server puts several
  tokens into a chunk, or several chunks into a packet, this is the interval at which the client can show text;
- tokens are counted by the server (``usage``); throughput covers complete answers only, over the time from the first
  request to the end of the last.

One difference: the first chunk of a chat, which names the role and holds no token, does not count as a token. vLLM
sends it together with the first token, so TTFT is the same, and ITL loses one zero interval per request.

A request without a complete answer is a failure. It is counted by kind ("status 503", "timeout", "broken",
"unreachable") and excluded from all other metrics. A single thread sends and reads everything;
:attr:`LoadReport.client_cpu_share` is the share of a core that it used.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from llm_ray.client.endpoint import CONNECT_SECONDS, Endpoint
from llm_ray.client.errors import Broken, Failed, failed, refused
from llm_ray.client.prompts import Prompt
from llm_ray.errors import ConfError

if TYPE_CHECKING:
    import aiohttp

BACKOFF = 0.1
"""Pause after a failure, in seconds, before a worker sends its next request. Without it, a failing endpoint would be
flooded."""
KEEP_ALIVE = 3.0
"""Seconds to keep an idle connection: shorter than servers do, so that no connection is reused while the server closes
it."""

Progress = Callable[["LoadReport"], None]
Request = Callable[[], Coroutine[Any, Any, bool]]


@dataclass(frozen=True, slots=True)
class Load:
    """The load to generate.

    Set exactly one of `concurrency` (requests in flight; each answer triggers the next request) and `rate` (mean
    requests per second of a Poisson process, independent of response times), and exactly one of `requests` and
    `duration` (seconds during which requests are sent; those in flight are awaited). `warmup` requests run first, one
    at a time, and are not measured. `timeout` is per request, in seconds. `keep_alive` False opens a connection per
    request, for servers that close connections without announcing it.

    Raises ConfError if both or neither of a pair are set.
    """

    concurrency: int | None = None
    rate: float | None = None
    requests: int | None = None
    duration: float | None = None
    max_tokens: int = 128
    temperature: float = 0.0
    ignore_eos: bool = False
    completion: bool = False
    warmup: int = 1
    seed: int = 0
    timeout: float = 600.0
    keep_alive: bool = True

    def __post_init__(self) -> None:
        if (self.concurrency is None) == (self.rate is None):
            raise ConfError("give either --concurrency or --rate")
        if (self.requests is None) == (self.duration is None):
            raise ConfError("give either --requests or --duration")


@dataclass(slots=True)
class Sample:
    """One complete answer. `sent` is in seconds since the load began; `arrivals` are the times of its chunks with
    tokens, in seconds since it was sent (at least one). Token counts are the server's."""

    sent: float
    arrivals: list[float]
    prompt_tokens: int
    output_tokens: int

    @property
    def first(self) -> float:
        return self.arrivals[0]

    @property
    def last(self) -> float:
        return self.arrivals[-1]

    @property
    def per_token(self) -> float | None:
        """Seconds per token after the first; None for a one-token answer."""
        return (self.last - self.first) / (self.output_tokens - 1) if self.output_tokens > 1 else None


@dataclass(frozen=True, slots=True)
class Failure:
    """A request without a complete answer. `sent` and `ended` are in seconds since the load began."""

    sent: float
    ended: float
    kind: str
    message: str


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean and percentiles, in seconds."""

    mean: float
    p50: float
    p90: float
    p95: float
    p99: float

    @classmethod
    def of(cls, values: list[float]) -> Spread | None:
        """Returns mean and percentiles, interpolated as numpy does; None if `values` is empty."""
        import numpy as np

        if not values:
            return None
        percentiles = [int(each.name.removeprefix("p")) for each in fields(cls) if each.name != "mean"]
        return cls(float(np.mean(values)), *map(float, np.percentile(values, percentiles)))


@dataclass
class LoadReport:
    """The measurements. `seconds` runs from the first request to the end of the last; `client_cpu_seconds` is the CPU
    time of this process."""

    url: str
    model: str
    load: Load
    samples: list[Sample] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    seconds: float = 0.0
    client_cpu_seconds: float = 0.0

    @property
    def prompt_tokens(self) -> int:
        return sum(sample.prompt_tokens for sample in self.samples)

    @property
    def output_tokens(self) -> int:
        return sum(sample.output_tokens for sample in self.samples)

    @property
    def requests_per_second(self) -> float:
        return len(self.samples) / self.seconds

    @property
    def output_tokens_per_second(self) -> float:
        return self.output_tokens / self.seconds

    @property
    def total_tokens_per_second(self) -> float:
        return (self.prompt_tokens + self.output_tokens) / self.seconds

    @property
    def time_to_first_token(self) -> Spread | None:
        return Spread.of([sample.first for sample in self.samples])

    @property
    def time_per_output_token(self) -> Spread | None:
        return Spread.of([value for sample in self.samples if (value := sample.per_token) is not None])

    @property
    def inter_token_latency(self) -> Spread | None:
        return Spread.of(
            [after - before for sample in self.samples for before, after in itertools.pairwise(sample.arrivals)]
        )

    @property
    def end_to_end(self) -> Spread | None:
        return Spread.of([sample.last for sample in self.samples])

    @property
    def failures_by_kind(self) -> dict[str, int]:
        return dict(Counter(failure.kind for failure in self.failures).most_common())

    @property
    def client_cpu_share(self) -> float:
        """CPU time as a share of one core. Near 1, this process limits the results rather than the endpoint."""
        return self.client_cpu_seconds / self.seconds


def run_load(
    endpoint: Endpoint, model: str, prompts: Iterator[Prompt], load: Load, progress: Progress | None = None
) -> LoadReport:
    """Runs `load` against `endpoint` (an OpenAI API) and returns the measurements. `prompts` are sent in order and must
    not run out.

    `progress` is called after each request with the report so far. Raises ConfError for a model's own route, which does
    not stream tokens, and Failed if a warm-up request fails; later failures are recorded in the report.
    """
    if not endpoint.openai:
        raise ConfError(
            f"{endpoint.url} is a model's own route: a load test needs the OpenAI API, {endpoint.base}, and --model "
            f"{endpoint.name}"
        )
    return asyncio.run(_run(endpoint, model, prompts, load, progress))


async def _run(
    endpoint: Endpoint, model: str, prompts: Iterator[Prompt], load: Load, progress: Progress | None
) -> LoadReport:
    import aiohttp

    report = LoadReport(endpoint.url, model, load)
    session = aiohttp.ClientSession(
        connector=(
            aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE)
            if load.keep_alive
            else aiohttp.TCPConnector(limit=0, force_close=True)
        ),
        headers={"Content-Type": "application/json", "Accept-Encoding": "identity", **endpoint.headers},
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=load.timeout, sock_connect=min(load.timeout, CONNECT_SECONDS)),
        trust_env=endpoint.trust_env,
    )
    async with session:
        for _ in range(load.warmup):
            await _ask(session, endpoint, _body(model, next(prompts), load), load, 0.0)
        began, cpu = time.perf_counter(), time.process_time()

        async def request() -> bool:
            """Sends the next request; returns whether it succeeded."""
            body = _body(model, next(prompts), load)
            sent = time.perf_counter() - began
            try:
                report.samples.append(await _ask(session, endpoint, body, load, sent))
                answered = True
            except Failed as error:
                report.failures.append(Failure(sent, time.perf_counter() - began, error.kind, str(error)))
                answered = False
            report.seconds, report.client_cpu_seconds = time.perf_counter() - began, time.process_time() - cpu
            if progress:
                progress(report)
            return answered

        if load.concurrency is not None:
            await _at_once(load.concurrency, request, load, began)
        elif load.rate is not None:
            await _poisson(load.rate, request, load, began)
    return report


async def _at_once(concurrency: int, request: Request, load: Load, began: float) -> None:
    """Keeps `concurrency` requests in flight until all are sent or the duration has passed."""
    waiting = iter(range(load.requests) if load.requests is not None else itertools.count())

    async def worker() -> None:
        for _ in waiting:
            if load.duration is not None and time.perf_counter() - began >= load.duration:
                return
            if not await request():
                await asyncio.sleep(BACKOFF)

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(worker())


async def _poisson(rate: float, request: Request, load: Load, began: float) -> None:
    """Sends requests at the times of a Poisson process of `rate` per second until all are sent or the duration has
    passed."""
    import numpy as np

    gaps = np.random.default_rng(load.seed)
    at = 0.0
    async with asyncio.TaskGroup() as group:
        for number in itertools.count():
            if number == load.requests or (load.duration is not None and at >= load.duration):
                break
            await asyncio.sleep(max(0.0, began + at - time.perf_counter()))
            group.create_task(request())
            at += float(gaps.exponential(1 / rate))


def _body(model: str, prompt: Prompt, load: Load) -> bytes:
    """Returns the JSON request body. A completion sends the prompt's content unchanged."""
    asked: dict[str, Any] = {"prompt": prompt.content} if load.completion else {"messages": prompt.messages(None)}
    if load.ignore_eos:
        asked["ignore_eos"] = True
    return json.dumps(
        {
            "model": model,
            **asked,
            "max_tokens": load.max_tokens,
            "temperature": load.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()


async def _ask(session: aiohttp.ClientSession, endpoint: Endpoint, body: bytes, load: Load, sent: float) -> Sample:
    """Sends one request and reads the whole stream. Raises Failed."""
    import aiohttp

    url = f"{endpoint.url}/{'completions' if load.completion else 'chat/completions'}"
    stream = _Stream(endpoint)
    began = time.perf_counter()
    try:
        async with session.post(url, data=body) as response:
            if response.status != 200:
                raise refused(endpoint, response.status, response.headers, await response.text(errors="replace"))
            async for packet in response.content.iter_any():
                stream.read(packet, time.perf_counter() - began)
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
        raise failed(endpoint, error, load.timeout) from error
    return stream.sample(sent)


class _Stream:
    """Parser of one answer's server-sent events, kept cheap per token so that the client does not limit the load."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._rest = b""
        self._arrivals: list[float] = []
        self._usage: dict[str, int] | None = None
        self._finished = False

    def read(self, packet: bytes, now: float) -> None:
        """Parses a packet received at `now` (seconds since the request was sent). An incomplete event is kept for the
        next packet."""
        lines = (self._rest + packet).split(b"\n")
        self._rest = lines.pop()
        for line in lines:
            if not line.startswith(b"data:") or line[5:].strip() == b"[DONE]":
                continue  # empty line, comment, or the end
            chunk = json.loads(line[5:])
            try:
                if "error" in chunk:
                    raise Broken(f"{self._endpoint.url} aborted the answer: {chunk['error']['message']}")
                for choice in chunk["choices"]:
                    self._finished = self._finished or choice["finish_reason"] is not None
                    delta = choice.get("delta")
                    if delta is None or delta.get("content") or "role" not in delta:
                        self._arrivals.append(now)
                if usage := chunk.get("usage"):
                    self._usage = {name: int(usage[name]) for name in ("prompt_tokens", "completion_tokens")}
            except (KeyError, TypeError, AttributeError) as error:
                raise Broken(
                    f"{self._endpoint.url} does not answer like an OpenAI API: is this the right address?"
                ) from error

    def sample(self, sent: float) -> Sample:
        """Returns the finished answer. Raises Broken if the stream ended early or reported no usage."""
        if not self._arrivals or not self._finished:
            raise Broken(f"{self._endpoint.url} ended the answer early (without a finish_reason)")
        if self._usage is None:
            raise Broken(
                f"{self._endpoint.url} does not report usage (stream_options.include_usage): tokens cannot be counted"
            )
        return Sample(sent, self._arrivals, self._usage["prompt_tokens"], self._usage["completion_tokens"])
