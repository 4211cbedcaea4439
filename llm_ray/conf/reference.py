"""Writes the reference of the finetune, serve and sweep confs (docs/reference/KIND-conf.md, KIND-conf.schema.json) from
their schemas.

python -m llm_ray.conf.reference            # write
python -m llm_ray.conf.reference --check    # exit 1 if the files are out of date
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import llm_ray
from llm_ray.conf.keys import FINETUNE, SERVE, SWEEP, Key, Keys, describe, first_sentence
from llm_ray.conf.load import shipped

FOLDER = Path(llm_ray.__file__).parent.parent / "docs" / "reference"

FINETUNE_HEAD = """\
# The finetune conf

<!-- Written by `python -m llm_ray.conf.reference` from llm_ray/conf/finetune.py: change it there. -->

A conf is YAML, rendered from a Jinja template. The smallest one:

```yaml
name: support-bot
model:
  base: smollm2-135m-instruct
data:
  train: tickets.jsonl
```

    llm-ray finetune --config support-bot.yaml --dry-run    # shows the conf with every default filled in
    llm-ray finetune --config support-bot.yaml

Unknown keys are errors. [finetune-conf.schema.json](finetune-conf.schema.json) is the same as JSON Schema; editors with the YAML language
server complete and check a conf that begins with `# yaml-language-server: $schema=` and its path or URL.

## Shipped templates

`--config` takes a file or one of these names:

{templates}

The head of each file in [conf/finetune](../../conf/finetune) holds the commands that run it.

## Variables, `--set` and precedence

A template sees the given variables, and two more: `env`, the environment variables, as `env.NAME` or
`env("NAME", "default")`; and `shipped`, the folder of the package's bundled files. An undefined variable is an error, unless
the template has `{{{{ name | default("something") }}}}`, or `--set` overrides the key it is used for. Templates run in Jinja's sandbox and
cannot include others. Values other than text are written as JSON, which is valid YAML; `{{{{ name | tojson }}}}` does the same for text that
may contain `#` or `:`.

| given as | meaning |
| --- | --- |
| `--set NAME=VALUE` | the template's variable NAME, if the template uses one of that name; otherwise the conf's key NAME |
| `--vars FILE` | variables from a YAML file |
| `{{{{ env.NAME }}}}` in the template | an environment variable |

A variable comes from `--set`, else from the last `--vars` file that has it, else from the template's `default(…)`.
A key comes from `--set`, else from the conf, else from the defaults below.

Values are YAML: `--set training.learning_rate=1e-3`, `--set "data.train=[a.jsonl, b.jsonl]"`, `--set training.epochs=null`.
YAML is read as version 1.2: `1e-3` is a number, `no` and `2024-01-01` are text, and a repeated key is an error.

## Relative paths

Files and folders are looked up next to the conf file, then in the current folder; data files finally under `paths.data`.
Those given with `--set`, and those of shipped templates, are looked up in the current folder (and data files under `paths.data`).
`LLM_RAY_HOME` is an environment variable, `~/.llm-ray` if unset.

## Keys

"""

SERVE_HEAD = """\
# The serve conf

<!-- Written by `python -m llm_ray.conf.reference` from llm_ray/conf/serve.py: change it there. -->

An endpoint and the models behind it. A conf is YAML, rendered from a Jinja template. The smallest one:

```yaml
models:
  support-bot:
    model: support-bot
```

    llm-ray serve deploy --config support-bot.yaml
    llm-ray serve deploy --config support-bot.yaml --set models.support-bot.cpus=4

Unknown keys are errors. [serve-conf.schema.json](serve-conf.schema.json) is the same as JSON Schema; editors with the YAML language
server complete and check a conf that begins with `# yaml-language-server: $schema=` and its path or URL.

## Shipped templates

`--config` takes a file or one of these names:

{templates}

The head of each file in [conf/serve](../../conf/serve) holds the commands that run it.

## Variables, `--set` and precedence

As in [the finetune conf](finetune-conf.md#variables---set-and-precedence).

In the keys below, NAME is the model's name for clients: `--set models.support-bot.cpus=4`. A name may contain dots:
`--set models.qwen2.5.cpus=4` refers to the model `qwen2.5`. To add a model that is not in the conf, set its key `model`:
`--set models.base.model=smollm2-135m-instruct`.

## Relative paths

Files and folders are looked up next to the conf file, then in the current folder. Those given with `--set`, and those of shipped
templates, are looked up in the current folder. `model`, `tokenizer` and adapters are folders if they begin with `./`, `../`, `~` or `/`, or
if a folder of that name contains a model (an adapter); otherwise they are names: in the model registry, of a run, or on the hub.
`LLM_RAY_HOME` is an environment variable, `~/.llm-ray` if unset.

## Keys

"""

SWEEP_HEAD = """\
# The sweep conf

<!-- Written by `python -m llm_ray.conf.reference` from llm_ray/conf/sweep.py: change it there. -->

A finetune, the keys to search, and limits ([how to sweep](../how-to/sweep.md)). A conf is YAML, rendered from a Jinja template. The smallest one:

```yaml
name: support-bot
config: lora
set: {{train: tickets.jsonl}}
search:
  training.learning_rate: {{loguniform: [1e-4, 4e-3]}}
  tuning.lora.r: {{choice: [8, 16, 32]}}
```

    llm-ray sweep --config support-bot.yaml --dry-run    # trials at once, cores and time, and the conf with every default
    llm-ray sweep --config support-bot.yaml

Unknown keys are errors, including those of the finetune: before anything starts, every searched key is checked against
[its schema](finetune-conf.md), with every choice or both ends of its range. [sweep-conf.schema.json](sweep-conf.schema.json) is the same as
JSON Schema.

## Shipped templates

`--config` takes a file or one of these names:

{templates}

The head of each file in [conf/sweep](../../conf/sweep) holds the commands that run it.

## Variables, `--set` and precedence

As in [the finetune conf](finetune-conf.md#variables---set-and-precedence). `--set` sets variables and keys of the sweep; those of its finetune
are under `set`: `--set set.training.epochs=2`. In the keys below, NAME is a key of the finetune: `--set search.tuning.lora.r.choice=[8,64]`.

## Relative paths

`config` is looked up next to the sweep's conf, then in the current folder. Files named in `set` are looked up as with
`llm-ray finetune --set`: in the current folder, and data files under `paths.data`.

## Keys

"""

HEADS = {"finetune": FINETUNE_HEAD, "serve": SERVE_HEAD, "sweep": SWEEP_HEAD}


def markdown(keys: Keys[Any]) -> str:
    """Returns the reference page of a kind of conf."""
    templates = "\n".join(f"- `{name}`: {_headline(file)}" for name, file in shipped(keys.kind).items())
    parts = [HEADS[keys.kind].format(templates=templates), _table(keys, "")]
    for key in keys.table.values():
        if key.section:
            text = keys.schema["$defs"][key.section]["description"]
            required = " Required." if key.required else ""
            unset = " Off by default." if "anyOf" in key.schema else ""
            parts.append(f"\n### {key.name}\n\n{' '.join(text.split())}{required}{unset}\n\n{_table(keys, key.name)}")
    return "".join(parts)


def json_schema(keys: Keys[Any]) -> str:
    """Returns the text of the JSON Schema file of a kind of conf."""
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return json.dumps(head | _one_line(keys.schema), indent=2, ensure_ascii=False) + "\n"


def pages() -> dict[str, str]:
    """Returns the text of each generated file."""
    kinds: tuple[Keys[Any], ...] = (FINETUNE, SERVE, SWEEP)
    return {
        name: text
        for keys in kinds
        for name, text in (
            (f"{keys.kind}-conf.md", markdown(keys)),
            (f"{keys.kind}-conf.schema.json", json_schema(keys)),
        )
    }


def _one_line(node: Any) -> Any:
    """Returns the schema with each description on one line."""
    if isinstance(node, dict):
        return {
            k: " ".join(v.split()) if k == "description" and isinstance(v, str) else _one_line(v)
            for k, v in node.items()
        }
    return [_one_line(item) for item in node] if isinstance(node, list) else node


def _headline(file: Path) -> str:
    """Returns the first sentence of a template's leading comment."""
    comment = " ".join(
        line.removeprefix("#").strip() for line in file.read_text(encoding="utf-8").split("\n#\n")[0].splitlines()
    )
    return first_sentence(comment)


def _table(keys: Keys[Any], section: str) -> str:
    lines = [
        f"| `{key.name}` | {describe(key.schema, '`')} | {_default(key)} | {key.text.replace('|', chr(92) + '|')} |\n"
        for key in keys.below(section)
        if not key.section
    ]
    return "".join(["| key | value | default | meaning |\n| --- | --- | --- | --- |\n", *lines]) if lines else ""


def _default(key: Key) -> str:
    if key.required:
        return "required"
    default = key.schema.get("default")
    if default is None:
        return "" if key.free else "`null`"
    return f"`{default}`" if isinstance(default, str) else f"`{json.dumps(default)}`"


def update(pages: dict[str, str], command: str, check: bool) -> None:
    """Writes the pages (by file name) into docs/reference; with `check` only compares, and exits 1 on a difference."""
    for name, text in pages.items():
        file = FOLDER / name
        current = file.read_text(encoding="utf-8") if file.exists() else None
        if current == text:
            continue
        if check:
            sys.exit(f"docs/reference/{name} is out of date: run `{command}` and commit the file")
        FOLDER.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    update(pages(), "python -m llm_ray.conf.reference", check="--check" in sys.argv[1:])
