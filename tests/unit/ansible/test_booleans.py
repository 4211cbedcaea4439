"""What is true or false may come from -e, as text: wherever a role or a playbook asks for it, it is made a truth value
first."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[3]
_PLACES = ("tasks/*.yml", "vars/*.yml", "templates/*", "handlers/*.yml")


def test_no_truth_value_is_used_as_the_text_that_it_may_be() -> None:
    specs = [
        yaml.safe_load(path.read_text())["argument_specs"] for path in ROOT.glob("roles/*/meta/argument_specs.yml")
    ]
    names = {
        name
        for spec in specs
        for entry in spec.values()
        for name, option in (entry.get("options") or {}).items()
        if option["type"] == "bool"
    }
    assert "monitoring_enabled" in names
    # In conditions and expressions, not where it is a key, or a word of a text.
    used = re.compile(
        rf"(?:when: |- |\{{[{{%].*?)\b(?:not )?({'|'.join(names)})\b(?! *(?:\| *default\([^)]*\) *)?\| *bool)(?! *[:=])"
    )
    files = [file for where in _PLACES for file in ROOT.glob(f"roles/*/{where}")] + [*ROOT.glob("playbooks/**/*.yml")]
    found = [
        f"{file.relative_to(ROOT)}:{number}: {line.strip()}"
        for file in files
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if (match := used.search(line))
        and "fail_msg" not in line
        and f"-e {match[1]}" not in line
        and f"set {match[1]}" not in line
    ]
    assert found == []
