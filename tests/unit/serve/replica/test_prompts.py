"""A conversation sent to a server makes the very tokens that training put before the answer: vLLM's own renderer is
asked."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from vllm.config import ModelConfig, VllmConfig
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.renderers import BaseRenderer, renderer_from_config
from vllm.renderers.hf import resolve_chat_template_content_format

from llm_ray.conf.finetune import Data, Model
from llm_ray.conf.section import Paths
from llm_ray.data.encode import IGNORED, ChatEncoder, Encoded
from llm_ray.data.formats import Conversation, Formatter
from llm_ray.data.sources import Row
from llm_ray.models.chat import ChatTemplate
from llm_ray.models.load import find_base, load_tokenizer
from llm_ray.models.registry import template_text
from llm_ray.serve.models import ServedModel
from llm_ray.serve.replica.server import chat_template, llm_config, told

TEMPLATES = Path(__file__).parents[2] / "data" / "templates"
NAMES = [
    None,
    *sorted(p.stem for p in TEMPLATES.glob("*.jinja") if p.stem not in ("mistral", "thinking")),
]  # of other tokenizers, of none


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


def call(name: str, arguments: str) -> dict[str, Any]:
    # As clients of OpenAI's send it, in an order of their own.
    return {"type": "function", "id": "call00000", "function": {"arguments": arguments, "name": name}}


TOOLS = [
    {
        "type": "function",
        "function": {"parameters": {"type": "object", "properties": {"city": {"type": "string"}}}, "name": "weather"},
    },
    {
        "type": "function",
        "function": {
            "name": "clock",
            "description": "Tells the time.",
            "parameters": {"type": "object"},
            "returns": "text",
        },
    },
]
ROWS: dict[str, dict[str, Any]] = {
    "text": {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]},
    "parts": {
        "messages": [
            {"role": "user", "content": parts("First line.", " Second. ")},
            {"role": "assistant", "content": parts("One.", "Two.")},
            {"role": "user", "content": parts("Third.")},
            {"role": "assistant", "content": "Three."},
        ]
    },
    "system in parts": {
        "messages": [
            {"role": "system", "content": parts("Be brief.", "Be kind.")},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello."},
        ]
    },
    "tools": {
        "tools": TOOLS,
        "messages": [
            {"role": "system", "content": parts("Be brief.", "Be kind.")},
            {"role": "user", "content": parts("Rain", "in Oslo?")},
            {"role": "assistant", "content": None, "tool_calls": [call("weather", '{"city":"Oslo","day":null}')]},
            {"role": "tool", "tool_call_id": "call00000", "content": parts("rain", "and wind")},
            {"role": "assistant", "content": "Rain."},
        ],
    },
    "reasoning": {
        "messages": [
            {"role": "user", "content": "2+2?"},
            {"role": "assistant", "content": "4", "reasoning_content": "easy"},
            {"role": "user", "content": "Sure?"},
            {"role": "assistant", "content": "Yes."},
        ]
    },
}


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="module")
def renderer(smollm2: Path) -> BaseRenderer[Any]:
    return renderer_from_config(VllmConfig(model_config=ModelConfig(model=str(smollm2), max_model_len=4096)))


def learnt_prompts(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any]) -> list[list[int]]:
    """The tokens before each answer that is learnt."""
    conversation = Formatter(Data(train=("rows.jsonl",)), "conversations")(Row("rows.jsonl", 1, copy.deepcopy(row)))
    assert isinstance(conversation, Conversation)
    (encoded,) = ChatEncoder(tokenizer, 4096).encode([conversation])
    assert isinstance(encoded, Encoded), encoded
    starts = [
        sequence.input_ids[:i]
        for sequence in encoded.sequences
        for i, label in enumerate(sequence.labels)
        if label != IGNORED and sequence.labels[i - 1] == IGNORED
    ]
    return sorted(starts, key=len)


def without_reasoning(row: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{k: v for k, v in message.items() if k != "reasoning_content"} for message in row["messages"]]}


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("template", NAMES)
def test_served_prompts_are_those_learnt(
    smollm2: Path,
    tokenizer: PreTrainedTokenizerBase,
    renderer: BaseRenderer[Any],
    monkeypatch: pytest.MonkeyPatch,
    template: str | None,
    row: str,
) -> None:
    text = (TEMPLATES / f"{template}.jinja").read_text() if template else tokenizer.chat_template
    monkeypatch.setattr(tokenizer, "chat_template", text)
    ours = ChatTemplate(tokenizer)
    given = llm_config(ServedModel("model", smollm2), ours).engine_kwargs["chat_template_content_format"]
    found = resolve_chat_template_content_format(text, None, "auto", tokenizer, model_config=renderer.model_config)
    assert given == found  # so that any other vLLM makes the same prompts
    served = served_prompts(renderer, ours, ROWS[row], text, given)
    if row == "reasoning" and template != "calls":  # such a template is refused the row
        assert served == learnt_prompts(tokenizer, without_reasoning(ROWS[row]))
    else:
        assert served == learnt_prompts(tokenizer, ROWS[row])
    if row == "system in parts":
        assert "Be brief." in tokenizer.decode(served[0]) and "Be kind." in tokenizer.decode(served[0])


def served_prompts(
    renderer: BaseRenderer[Any], ours: ChatTemplate, row: dict[str, Any], template: str | None, form: Any
) -> list[list[int]]:
    """The prompts of the row's answers as vLLM's front end makes them of requests."""
    served = []
    for number in (n for n, message in enumerate(row["messages"]) if message["role"] == "assistant"):
        request = {
            "model": "model",
            "messages": row["messages"][:number],
            **({"tools": row["tools"]} if "tools" in row else {}),
        }
        asked = told(ChatCompletionRequest.model_validate(copy.deepcopy(request)), ours, tools=True)
        tools = [tool.model_dump() for tool in asked.tools] if asked.tools else None
        params = asked.build_chat_params(template, form).with_defaults({"tools": tools, "tokenize": True})
        served.append(renderer.render_messages(asked.messages, params)[1]["prompt_token_ids"])
    return served


PAIRS = [
    ("smollm2", "qwen3"),
    ("plain", "calls"),
    ("smollm2", "parts"),
    ("parts", "qwen3"),
    ("qwen3", "plain"),
    ("calls", "parts"),
]


@pytest.mark.parametrize("where", ["list", "folder"])
@pytest.mark.parametrize(("default", "tool_use"), PAIRS)
def test_templates_for_tools_of_their_own(
    smollm2: Path, tmp_path: Path, default: str, tool_use: str, where: str
) -> None:
    """`default` and `tool_use`, in tokenizer_config.json or as files: the one that serving uses is the one learnt
    with."""
    texts = [
        smollm2 / "chat_template.jinja" if name == "smollm2" else TEMPLATES / f"{name}.jinja"
        for name in (default, tool_use)
    ]
    written = dict(zip(("default", "tool_use"), (text.read_text() for text in texts), strict=True))
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(smollm2 / name, tmp_path)
    if where == "list":
        settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
        settings["chat_template"] = [{"name": name, "template": text} for name, text in written.items()]
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    else:
        (tmp_path / "additional_chat_templates").mkdir()
        (tmp_path / "chat_template.jinja").write_text(written["default"])
        (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text(written["tool_use"])
    assert all(text in template_text(tmp_path) or where == "list" for text in written.values())
    tokenizer = load_tokenizer(find_base(Model(base=str(tmp_path)), Paths()))
    renderer = renderer_from_config(VllmConfig(model_config=ModelConfig(model=str(tmp_path), max_model_len=4096)))
    model = ServedModel("model", tmp_path)
    ours = chat_template(model)
    assert ours
    engine = llm_config(model, ours).engine_kwargs
    rows = ROWS | {"calls without tools": {"messages": ROWS["tools"]["messages"]}}
    rows["reasoning"] = without_reasoning(rows["reasoning"])
    for name, row in rows.items():
        served = served_prompts(
            renderer, ours, row, engine.get("chat_template"), engine["chat_template_content_format"]
        )
        assert served == learnt_prompts(tokenizer, row), name
        texts_of = tokenizer.decode(served[-1])
        assert ("Be brief." in texts_of and "Be kind." in texts_of) or "system" not in {
            m["role"] for m in row["messages"]
        }, name
        assert ('"Oslo"' in texts_of and "and wind" in texts_of) or "tools" not in name, name
