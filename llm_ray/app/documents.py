"""Questions and answers from a folder of documents, written by a deployed model.

report = from_documents(endpoint, "support-bot", Wanted(Path("handbook")), Settings(max_tokens=600), Path("rows.jsonl"),
    reporter)
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from llm_ray.client.ask import Answer, Settings, choose_model
from llm_ray.client.batch import answer_all
from llm_ray.client.endpoint import Endpoint
from llm_ray.client.errors import Failed
from llm_ray.client.prompts import Prompt
from llm_ray.documents import rows as asked
from llm_ray.documents.log import key_of, open_log
from llm_ray.documents.passages import Passage, split
from llm_ray.documents.read import find, read
from llm_ray.documents.repeats import repeats
from llm_ray.documents.rows import ABOUT_THE_PASSAGE, Row
from llm_ray.documents.support import support
from llm_ray.errors import ConfError, DataError, ServeError
from llm_ray.progress import Reporter

__all__ = ["Judged", "Report", "Wanted", "from_documents", "preview_documents"]

ROW_TOKENS = 200
"""Tokens that an answer may take for each row, where nothing else is set."""
GIVE_UP = 8
"""Passages that fail before any is answered, after which no more are asked."""


@dataclass(frozen=True)
class Wanted:
    """What is to be made of which documents. `support` is the share of an answer's words that its passage must have,
    `held_out` the share of documents whose rows go to a second file; `instructions` are added to what the model is
    told."""

    folder: Path
    rows: int = 3
    characters: int = 2000
    passages: int | None = None
    support: float = 0.7
    held_out: float = 0.1
    instructions: str = ""
    concurrency: int = 8


@dataclass(frozen=True)
class Judged:
    """A row, and why it is dropped; empty where it is kept."""

    row: Row
    dropped: str = ""


@dataclass
class Report:
    """What became of documents, passages and rows. `unread` are documents that gave nothing, with the reasons."""

    model: str
    documents: int = 0
    unread: list[str] = field(default_factory=list)
    others: dict[str, int] = field(default_factory=dict)
    passages: int = 0
    repeated_passages: int = 0
    over_limit: int = 0
    asked: int = 0
    answered_before: int = 0
    without_json: int = 0
    without_rows: int = 0
    failures: list[str] = field(default_factory=list)
    rows: int = 0
    held_out_rows: int = 0
    held_out_documents: list[str] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    output: Path | None = None
    held_out_output: Path | None = None

    def table(self) -> list[str]:
        """The figures as lines of text."""
        documents = [f"{self.documents} read"]
        if self.unread:
            documents.append(f"{len(self.unread)} could not be read")
        if self.others:
            documents.append(f"other files: {', '.join(f'{count} {name}' for name, count in self.others.items())}")
        passages = [f"{self.passages}", f"{self.asked} asked now", f"{self.answered_before} answered before"]
        counts = {
            "failed": len(self.failures),
            "repeat another": self.repeated_passages,
            "beyond --max-passages": self.over_limit,
            "answered without JSON": self.without_json,
            "answered without rows": self.without_rows,
        }
        passages += [f"{count} {what}" for what, count in counts.items() if count]
        rows = [f"{self.rows + self.held_out_rows} kept", f"{self.rows} to learn from"]
        if self.held_out_rows:
            rows.append(f"{self.held_out_rows} held out, of {', '.join(self.held_out_documents[:5])}")
            rows[-1] += f" and {more} more documents" if (more := len(self.held_out_documents) - 5) > 0 else ""
        dropped = [f"{self.dropped.total()}", *(f"{count} {why}" for why, count in self.dropped.most_common())]
        files = [str(path) for path in (self.output, self.held_out_output) if path]
        table = {"documents": documents, "passages": passages, "rows": rows, "dropped": dropped, "written": files}
        return [f"{name:<11}{'; '.join(cells)}" for name, cells in table.items() if cells]

    def check(self) -> None:
        """Raises ServeError where passages were not answered, DataError where no row is left."""
        if self.failures:
            first = "".join(f"\n  {failure}" for failure in self.failures[:3])
            raise ServeError(
                f"{len(self.failures)} of {self.passages} passages were not answered; run the same command to ask "
                f"them again:{first}"
            )
        if not self.rows:
            raise DataError(
                "no row is left, so nothing was written: `--preview 3` shows what the model answers; a larger model, "
                "or another --passage-characters, may do better"
            )


def from_documents(
    endpoint: Endpoint, model: str | None, wanted: Wanted, settings: Settings, output: Path, reporter: Reporter
) -> Report:
    """Ask `model` (None: the only one there is) about each passage, and write the rows: to `output`, and those of held
    out documents beside it (``NAME.heldout.jsonl``). Answers are kept in a log beside it (``NAME.jsonl.answers``): what
    it answers is not asked again.

    Not to be called in a thread with a running event loop. Raises LlmRayError when nothing can be read or asked at all;
    what failed of it is in the report.
    """
    if output.suffix != ".jsonl":
        raise ConfError(f"--output {output}: rows are JSON lines: let the name end in .jsonl")
    held_out = output.with_suffix(".heldout.jsonl")
    report, passages, requests = _prepare(endpoint, model, wanted, settings, reporter)
    with open_log(output.with_name(f"{output.name}.answers")) as log:
        for path in (output, held_out):
            log.check(path)
        waiting = [number for number, request in enumerate(requests) if request.key not in log.answers]
        report.asked, report.answered_before = len(waiting), len(passages) - len(waiting)

        def keep(number: int, answer: Answer) -> None:
            place, said = passages[number].place, answer.finish_reason
            log.keep(requests[number].key, answer.text, place=place, finish_reason=said, usage=answer.usage)

        try:
            report.failures = _ask(endpoint, requests, waiting, wanted, settings, keep, report.model, reporter)
        except (KeyboardInterrupt, ServeError):
            reporter.line(f"{log.path} keeps the answers received so far: run the same command to continue from there")
            raise
        answers = {n: log.answers[r.key] for n, r in enumerate(requests) if r.key in log.answers}
        kept = [one.row for one in _judge(passages, answers, wanted, report) if not one.dropped]
        aside = _held_out([row.passage.document for row in kept], wanted.held_out)
        sides: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
        for row in kept:
            sides[row.passage.document in aside].append(row.values(report.model))
        report.rows, report.held_out_rows, report.held_out_documents = (
            len(sides[False]),
            len(sides[True]),
            sorted(aside),
        )
        if not kept:
            return report
        try:
            log.write(output, sides[False])
            report.output = output
            if sides[True]:
                log.write(held_out, sides[True])
                report.held_out_output = held_out
            else:
                held_out.unlink(missing_ok=True)  # of a run before: its rows are learnt now
        except OSError as error:
            raise DataError(f"{error.filename or output} cannot be written: {error.strerror}") from error
    if wanted.held_out and not aside:
        reporter.line("all rows are from one document: none is held out")
    return report


def preview_documents(
    endpoint: Endpoint, model: str | None, wanted: Wanted, settings: Settings, passages: int, reporter: Reporter
) -> tuple[list[Judged], Report]:
    """The rows of so many passages, those that are dropped as well; nothing is written. Raises LlmRayError."""
    few = replace(wanted, passages=min(passages, wanted.passages or passages))
    report, chosen, requests = _prepare(endpoint, model, few, settings, reporter)
    answers: dict[int, str] = {}

    def keep(number: int, answer: Answer) -> None:
        answers[number] = answer.text

    report.asked = len(requests)
    report.failures = _ask(endpoint, requests, range(len(requests)), few, settings, keep, report.model, reporter)
    judged = _judge(chosen, answers, few, report)
    report.rows = sum(not one.dropped for one in judged)
    return judged, report


@dataclass(frozen=True, slots=True)
class _Request:
    prompt: Prompt
    key: str


def _prepare(
    endpoint: Endpoint, model: str | None, wanted: Wanted, settings: Settings, reporter: Reporter
) -> tuple[Report, list[Passage], list[_Request]]:
    """The report so far, the passages to ask about, and the requests that do."""
    if not endpoint.openai:
        raise ConfError(
            f"--model_endpoint {endpoint.url}: a model's own route has no JSON schemas; use {endpoint.base}"
        )
    report = Report(model or "")
    passages = _passages(wanted, report, reporter)
    report.model = asyncio.run(choose_model(endpoint, model, settings.timeout))
    settings = _settings(wanted, settings)
    requests = []
    for passage in passages:
        messages = asked.messages(passage, wanted.rows, wanted.instructions)
        key = key_of({"model": report.model, "messages": messages, **settings.given()})
        requests.append(_Request(Prompt(messages, passage.place), key))
    return report, passages, requests


def _settings(wanted: Wanted, settings: Settings) -> Settings:
    return replace(
        settings,
        max_tokens=settings.max_tokens or ROW_TOKENS * wanted.rows,
        response_format=asked.response_format(wanted.rows),
    )


def _passages(wanted: Wanted, report: Report, reporter: Reporter) -> list[Passage]:
    found = find(wanted.folder)
    report.others = dict(found.others.most_common())
    by_document: list[list[Passage]] = []
    seen: set[str] = set()
    with reporter.bar("documents", len(found.files)) as bar:
        for number, (name, path) in enumerate(found.files.items(), 1):
            try:
                document = read(path, name)
            except DataError as error:
                report.unread.append(str(error))
                reporter.line(f"left out: {error}", "warning")
            else:
                report.documents += 1
                if document.note:
                    reporter.line(f"{path}: {document.note}", "warning")
                fresh = []
                for passage in split(document, wanted.characters):
                    if passage.likeness in seen:
                        report.repeated_passages += 1
                    else:
                        seen.add(passage.likeness)
                        fresh.append(passage)
                by_document.append(fresh)
            bar.update(number, len(found.files))
    every = list(chain.from_iterable(by_document))
    if not every:
        raise DataError(f"{wanted.folder}: none of its {len(found.files)} documents has a passage to ask about")
    # The first of each document, then the second: a higher limit adds passages, and takes none away.
    turns = [passage for turn in zip_longest(*by_document) for passage in turn if passage]
    chosen = set(turns[: wanted.passages])
    report.over_limit = len(every) - len(chosen)
    report.passages = len(chosen)
    return [passage for passage in every if passage in chosen]


def _ask(
    endpoint: Endpoint,
    requests: Sequence[_Request],
    numbers: Sequence[int],
    wanted: Wanted,
    settings: Settings,
    keep: Callable[[int, Answer], None],
    model: str,
    reporter: Reporter,
) -> list[str]:
    """Ask those of the requests, and hand each answer to `keep` as it comes; gives what failed. Raises ServeError when
    nothing can be asked."""
    answered = failed = 0

    def on_answer(number: int, prompt: Prompt, answer: Answer | Failed) -> None:
        nonlocal answered, failed
        if isinstance(answer, Answer):
            answered += 1
            keep(number, answer)
            return
        failed += 1
        if not answered and failed == GIVE_UP:
            raise ServeError(f"the first {GIVE_UP} passages all failed, so no more are asked: {answer}")

    prompts = [(number, requests[number].prompt) for number in numbers]
    with reporter.bar("passages", len(prompts)) as bar:
        failures = answer_all(endpoint, model, _settings(wanted, settings), prompts, wanted.concurrency, on_answer, bar)
    return [f"{prompt.place}: {error}" for prompt, error in failures]


def _judge(passages: Sequence[Passage], answers: dict[int, str], wanted: Wanted, report: Report) -> list[Judged]:
    """The rows in the answers, in the order of the passages, and which are dropped; the report counts them."""
    judged: list[Judged] = []
    for number in sorted(answers):
        found = asked.read_answer(answers[number], passages[number], wanted.rows)
        report.without_json += not found.form
        report.without_rows += found.form and not (found.rows or found.cut or found.empty)
        report.dropped.update({why: n for why, n in (("cut off", found.cut), ("empty", found.empty)) if n})
        judged += [Judged(row, _fault(row, wanted)) for row in found.rows]
    sound = [number for number, one in enumerate(judged) if not one.dropped]
    kinds = {"": "", "exact": "repeat an earlier question", "near": "nearly repeat an earlier row"}
    found_repeats = repeats([(judged[number].row.question, judged[number].row.answer) for number in sound])
    for number, repeat in zip(sound, found_repeats, strict=True):
        judged[number] = replace(judged[number], dropped=kinds[repeat])
    report.dropped.update(one.dropped for one in judged if one.dropped)
    return judged


def _fault(row: Row, wanted: Wanted) -> str:
    if ABOUT_THE_PASSAGE.search(row.question):
        return "ask about the passage itself"
    return "" if support(row.answer, row.passage.text) >= wanted.support else "not supported by the passage"


def _held_out(documents: Sequence[str], share: float) -> set[str]:
    """Of the names in `documents` that share, at least one and never all; the same ones each time."""
    names = sorted(set(documents), key=lambda name: hashlib.sha256(name.encode()).digest())
    if not share or len(names) < 2:
        return set()
    return set(names[: min(len(names) - 1, max(1, round(share * len(names))))])
