"""`llm-ray data from-documents` against a small endpoint that answers, fails, and is broken off."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from llm_ray.cli.main import cli
from tests.unit.documents.conftest import MakePdf, Writer

Make = Callable[..., Result]
SUBJECTS = ("pumps", "motors", "valves", "filters", "sensors", "cables", "tanks", "doors", "lamps", "roofs")


def page(subject: str, about: str) -> str:
    return f"# {subject.title()}\n\nThe {subject} of station {about} need care every week of the year. " * 2


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "docs"
    made.mkdir()
    for subject in SUBJECTS:
        (made / f"{subject}.md").write_text(page(subject, subject[::-1]))
    return made


@pytest.fixture
def make(writer: Writer, folder: Path, tmp_path: Path) -> Make:
    def invoke(*arguments: str, model: str = "good", url: str = writer.url) -> Result:
        where = [] if "--preview" in arguments else ["--output", str(tmp_path / "rows.jsonl")]
        command = ["data", "from-documents", str(folder), "--endpoint", url, "--model", model, *where, *arguments]
        return CliRunner().invoke(cli, command, prog_name="llm-ray", catch_exceptions=False)

    return invoke


def rows_in(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def files_of(rows: list[dict[str, Any]]) -> set[str]:
    return {row["source"]["file"] for row in rows}


def test_rows_of_all_documents_some_held_out(make: Make, writer: Writer, tmp_path: Path) -> None:
    result = make("--held-out", "0.3", "--concurrency", "3")
    assert result.exit_code == 0, result.output
    learnt, held_out = rows_in(tmp_path / "rows.jsonl"), rows_in(tmp_path / "rows.heldout.jsonl")
    assert len(files_of(learnt)) == 7 and len(files_of(held_out)) == 3
    assert not files_of(learnt) & files_of(held_out)
    assert [row["source"]["file"] for row in learnt] == sorted(files_of(learnt))  # in order, whatever came first
    assert "documents  10 read\n" in result.stdout
    assert "passages   10; 10 asked now; 0 answered before\n" in result.stdout
    assert "rows       10 kept; 7 to learn from; 3 held out, of " in result.stdout
    assert writer.most == 3
    body = writer.bodies[0]
    assert body["response_format"]["type"] == "json_schema" and body["max_tokens"] == 600 and body["temperature"] == 0


def test_each_kind_of_document(make: Make, folder: Path, tmp_path: Path, make_pdf: MakePdf) -> None:
    make_pdf(
        folder / "z.pdf",
        ["x", "Fountains are found in parks.\nThey are rather wet, and most of them are also old and blue."],
    )
    (folder / "y.html").write_text(
        "<h1>Bridges</h1>\n<p>Bridges cross rivers and are made of steel or stone, or even of wood.</p>" * 2
    )
    make("--held-out", "0")
    sources = {row["source"]["file"]: row["source"] for row in rows_in(tmp_path / "rows.jsonl")}
    assert sources["z.pdf"]["page"] == 2 and "lines" not in sources["z.pdf"]
    assert sources["y.html"]["lines"] == [1, 3] and sources["y.html"]["heading"] == ["Bridges"]
    assert sources["pumps.md"]["passage"] == (folder / "pumps.md").read_text().replace("\n\n", "\n\n").strip()
    assert not (tmp_path / "rows.heldout.jsonl").exists()


def test_the_rows_are_read_without_conversion(make: Make, tmp_path: Path, smollm2: Path) -> None:
    make()
    (tmp_path / "own.yaml").write_text(f"name: own\nmodel: {{base: {smollm2}}}\ndata: {{train: rows.jsonl}}\n")
    command = ["data", "preview", "--config", str(tmp_path / "own.yaml"), "-n", "1"]
    shown = CliRunner().invoke(cli, command, catch_exceptions=False)
    assert "What is said of" in shown.output and "format messages;" in shown.output
    assert "left out: columns source, written_by (1 row)" in shown.output


def test_a_preview_shows_and_writes_nothing(make: Make, writer: Writer, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    result = make("--preview", "2", model="mentions")
    assert "cables.md:1\nQ: What does the passage say?\nA: Cables" in result.stdout
    assert "(dropped: ask about the passage itself)" in result.stdout
    assert len(writer.passages) == 2 and sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("model", "line"),
    [
        ("invents", "dropped    10; 10 not supported by the passage"),
        ("mentions", "dropped    10; 10 ask about the passage itself"),
        ("words", "passages   10; 10 asked now; 0 answered before; 10 answered without JSON"),
        ("nothing", "passages   10; 10 asked now; 0 answered before; 10 answered without rows"),
    ],
)
def test_where_no_row_is_left(make: Make, tmp_path: Path, model: str, line: str) -> None:
    result = make(model=model)
    assert result.exit_code == 1 and line in result.stdout
    assert "Error: no row is left, so nothing was written" in result.stderr
    assert not (tmp_path / "rows.jsonl").exists()


@pytest.mark.parametrize(
    ("model", "line"),
    [
        ("cut", "dropped    10; 10 cut off"),
        ("same", "dropped    9; 9 repeat an earlier question"),
        ("fenced", "dropped    0"),
        ("busy", "dropped    0"),
    ],
)
def test_what_is_dropped_is_counted(make: Make, model: str, line: str) -> None:
    result = make(model=model)
    assert result.exit_code == 0 and line in result.stdout.splitlines()


def test_the_same_passage_is_asked_about_once(make: Make, writer: Writer, folder: Path) -> None:
    (folder / "copy.md").write_text((folder / "pumps.md").read_text().upper())
    assert "10; 10 asked now; 0 answered before; 1 repeat another" in make().stdout
    assert len(writer.passages) == 10


def test_a_limit_takes_of_each_document_and_can_be_raised(make: Make, writer: Writer, folder: Path) -> None:
    (folder / "a.md").write_text("\n\n".join(page(subject, "north") for subject in SUBJECTS))
    result = make("--max-passages", "11", "--passage-characters", "200")
    assert "11; 11 asked now; 0 answered before; 9 beyond --max-passages" in result.stdout
    assert "11 read" in result.stdout and len({text.split()[1] for text in writer.passages}) == 10
    assert "20; 9 asked now; 11 answered before" in make("--passage-characters", "200").stdout


# Again ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_killed_and_run_again_asks_only_the_rest(
    make: Make, writer: Writer, folder: Path, tmp_path: Path, how: signal.Signals
) -> None:
    writer.stop_after = 6
    command = [Path(sys.executable).with_name("llm-ray"), "data", "from-documents", folder]
    options = ["--output", tmp_path / "rows.jsonl", "--endpoint", writer.url, "--model", "good", "--concurrency", "2"]
    process = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True)
    assert writer.reached.wait(60)
    process.send_signal(how)
    _, stderr = process.communicate(timeout=60)
    if how is signal.SIGTERM:  # as Ctrl-C
        assert process.returncode == 130 and "rows.jsonl.answers keeps the answers received so far" in stderr
    assert not (tmp_path / "rows.jsonl").exists()
    kept = len((tmp_path / "rows.jsonl.answers").read_text().splitlines())
    assert 5 <= kept <= 6
    writer.stop_after = None
    before = len(writer.passages)
    result = make()
    assert f"10; {10 - kept} asked now; {kept} answered before" in result.stdout
    assert len(writer.passages) == before + 10 - kept
    once = rows_in(tmp_path / "rows.jsonl")
    for path in (tmp_path / "rows.jsonl", tmp_path / "rows.heldout.jsonl", tmp_path / "rows.jsonl.answers"):
        path.unlink()
    make()
    assert rows_in(tmp_path / "rows.jsonl") == once  # as if it had not been killed


def test_what_changes_is_asked_again(make: Make, folder: Path) -> None:
    make()
    assert "0 asked now; 10 answered before" in make("--support", "0.5", "--held-out", "0.5").stdout
    (folder / "pumps.md").write_text(page("pumps", "south"))
    assert "1 asked now; 9 answered before" in make().stdout
    assert "10 asked now; 0 answered before" in make("--rows", "2").stdout
    assert "10 asked now; 0 answered before" in make(model="fenced").stdout


def test_rows_edited_by_hand_are_not_replaced(make: Make, tmp_path: Path) -> None:
    make()
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(rows.read_text().splitlines()[:3]) + "\n")
    result = make()
    assert result.exit_code == 2 and "was not written by this command or was changed since" in result.stderr
    assert len(rows_in(rows)) == 3


def test_a_held_out_file_of_a_run_before_does_not_stay(make: Make, tmp_path: Path) -> None:
    make()
    assert (tmp_path / "rows.heldout.jsonl").exists()
    make("--held-out", "0")
    assert not (tmp_path / "rows.heldout.jsonl").exists() and len(rows_in(tmp_path / "rows.jsonl")) == 10


def test_failed_passages_are_named_and_asked_again(make: Make, writer: Writer, folder: Path, tmp_path: Path) -> None:
    (folder / "pumps.md").write_text(page("bad", "pumps"))
    result = make(model="patchy")
    assert result.exit_code == 1 and "passages   10; 10 asked now; 0 answered before; 1 failed" in result.stdout
    assert "1 of 10 passages were not answered" in result.stderr and "pumps.md:1: " in result.stderr
    assert len(rows_in(tmp_path / "rows.jsonl")) == 8
    assert "1 asked now; 9 answered before" in make(model="patchy").stdout


# Failures -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def nobody() -> Iterator[str]:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}/v1"


def test_nothing_listens(make: Make, nobody: str) -> None:
    result = make(url=nobody)
    assert result.exit_code == 1 and "nothing listens at" in result.stderr and "Traceback" not in result.output


def test_a_models_own_route_has_no_schemas(make: Make, writer: Writer) -> None:
    result = make(url=writer.url.replace("/v1", "/good"))
    assert result.exit_code == 2 and "use http://127.0.0.1" in result.stderr


def test_an_unknown_model(make: Make, writer: Writer) -> None:
    result = make(model="unknown")
    assert result.exit_code == 1 and "serves good" in result.stderr and len(writer.bodies) <= 8


def test_an_endpoint_that_refuses_all_is_not_asked_on(make: Make, writer: Writer, folder: Path) -> None:
    result = make("--concurrency", "1", model="picky")
    assert result.exit_code == 1 and len(writer.bodies) == 8
    assert "the first 8 passages all failed" in result.stderr and "it is the model" in result.stderr


def test_documents_that_cannot_be_read_are_left_out(make: Make, folder: Path, make_pdf: MakePdf) -> None:
    make_pdf(folder / "scan.pdf", ["", ""])
    (folder / "broken.pdf").write_bytes(b"%PDF")
    (folder / "x.docx").touch()
    result = make()
    assert result.exit_code == 0
    assert "documents  10 read; 2 could not be read; other files: 1 .docx" in result.stdout
    assert "left out: " in result.stderr and "scan.pdf: none of its 2 pages has text" in result.stderr


def test_wrong_use(make: Make, folder: Path, tmp_path: Path) -> None:
    assert "give either --output FILE.jsonl or --preview N" in make("--preview", "1", "--output", "x.jsonl").stderr
    assert "end in .jsonl" in make("--output", str(tmp_path / "rows.json")).stderr
    for path in folder.iterdir():
        path.unlink()
    result = make()
    assert result.exit_code == 1 and "contains no documents" in result.stderr
    (folder / "a.md").write_text("# Short\n")
    assert "none of its 1 documents has a passage to ask about" in make().stderr


def test_json(make: Make, tmp_path: Path) -> None:
    found = json.loads(make("--json").stdout)
    assert (found["documents"], found["passages"], found["rows"], found["held_out_rows"]) == (10, 10, 9, 1)
    assert found["output"] == str(tmp_path / "rows.jsonl")
