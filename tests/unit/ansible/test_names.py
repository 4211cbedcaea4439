"""Names of plays, tasks and handlers, as a person reads them scrolling by: a verb and its object."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[3]
FILES = sorted(
    [*ROOT.glob("playbooks/**/*.yml"), *ROOT.glob("roles/*/tasks/**/*.yml"), *ROOT.glob("roles/*/handlers/**/*.yml")]
)
# Add a verb here when a task does something that none of these says.
VERBS = {
    "Add", "Apply", "Build", "Check", "Choose", "Clear", "Close", "Collect", "Compare", "Compute", "Configure", "Confirm",
    "Copy", "Create", "Delete", "Deploy", "Determine", "Distribute", "Download", "Drain", "Enable", "Explain", "Fetch", "Find",
    "Follow", "Gather", "Give", "Group", "Import", "Inspect", "Install", "Keep", "Let", "Link", "List", "Load", "Look", "Mark",
    "Mount", "Move", "Pack", "Parse", "Prepare", "Probe", "Provide", "Pull", "Push", "Query", "Read", "Record", "Refuse", "Reload",
    "Remount", "Remove", "Render", "Repeat", "Report", "Request", "Resolve", "Restart", "Restore", "Restrict", "Revoke", "Run", "Save",
    "Select", "Serve", "Set", "Show", "Skip", "Start", "Stop", "Store", "Submit", "Switch", "Tag", "Test", "Train", "Uninstall", "Unmount",
    "Unpack", "Update", "Upload", "Use", "Verify", "Wait", "Write",
}  # fmt: skip
# A line is read alone: it names its subject.
PRONOUNS = {"he", "her", "him", "i", "it", "me", "she", "them", "they", "us", "we", "what", "who", "you"}


def names(entries: Any) -> Iterator[str]:
    """Names of plays, tasks and handlers, those of blocks too, in a file's order."""
    for entry in entries or []:
        yield entry.get("name", "")
        for part in ("pre_tasks", "tasks", "post_tasks", "handlers", "block", "rescue", "always"):
            yield from names(entry.get(part))


def of_file(file: Path) -> list[str]:
    content = yaml.safe_load(file.read_text())
    return [*names(content)] if isinstance(content, list) else []  # vars are no list


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_name_begins_with_an_imperative_verb(file: Path) -> None:
    wrong = [
        name
        for name in of_file(file)
        if name.split(" ")[0] not in VERBS or PRONOUNS & {*re.findall(r"[a-z]+", name.lower())}
    ]
    assert wrong == []


def test_there_are_names_to_look_at() -> None:
    assert sum(len(of_file(file)) for file in FILES) > 600


def test_every_verb_is_in_use() -> None:
    used = {name.split(" ")[0] for file in FILES for name in of_file(file)}
    assert VERBS - used == set()


def test_names_that_other_tests_look_for_exist() -> None:
    """Most of them ask that a task did not run, which a name that nothing has would pass."""
    known = {name.partition("{{")[0].rstrip() for file in FILES for name in of_file(file)}
    role = f"(?:{'|'.join(path.name for path in ROOT.glob('roles/*'))}) : "
    looks = re.compile(rf'(?:(?:(?:TASK|PLAY|HANDLER) \[|\bat(?:: str)? ?= ?")(?:{role})?|"{role})([A-Z][^"\]\[{{]+)')
    files = [*ROOT.glob("tests/lab/*.py"), *ROOT.glob("tests/unit/ansible/*.py")]
    found = [(file.name, name.rstrip(": ")) for file in files for name in looks.findall(file.read_text())]
    assert len(found) > 10
    assert [
        each for each in found if not any(name.startswith(each[1]) or each[1].startswith(name) for name in known)
    ] == []
