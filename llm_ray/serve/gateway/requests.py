"""Request bodies that clients may send: vLLM's request models without engine internals, and with bounds.

Refused parameters get a 400 with the reason, and are left out of the OpenAPI description. Parameters of OpenAI's API
that no engine here uses (`metadata`, `store`, `service_tier`, …) are ignored, as in vLLM.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NotRequired, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    ModelWrapValidatorHandler,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError
from ray.llm._internal.serve.core.configs.openai_api_models import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingCompletionRequest,
    TokenizeChatRequest,
    TokenizeCompletionRequest,
)
from typing_extensions import TypedDict  # pydantic rejects typing.TypedDict before Python 3.12
from vllm.entrypoints.generate.base.protocol import (
    AnyResponseFormat,
    LegacyStructuralTagResponseFormat,
    ResponseFormat,
    StructuralTagResponseFormat,
)
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionToolsParam
from vllm.exceptions import VLLMClientError, VLLMValidationError
from vllm.sampling_params import SamplingParams, StructuredOutputsParams

from llm_ray.serve.gateway.schemas import Fault, unenforced, unenforced_pattern, unenforced_tag

_FETCH = "it tells an engine where to fetch caches from"
_IMAGES = "it changes the cost of reading an image or audio"
_ELSEWHERE = "it belongs to an API that is not served here"
_GUIDED = "it is an old name: use response_format or structured_outputs"
_FUNCTIONS = "it is an old form: use tools"

# Parameters that a client may not set, and why.
REFUSED: Mapping[str, str] = {
    # beyond the request itself: other hosts, other clients' queue positions, code
    "kv_transfer_params": _FETCH,
    "ec_transfer_params": _FETCH,
    "priority": "requests are answered in the order of their arrival",
    "request_id": "each request gets its own id",
    "session_id": "requests are not tied to a replica",
    "vllm_xargs": "no extension reads it here",
    "prompt_embeds": "tensors from clients are not accepted: they can crash an engine",
    "chat_template": "a template is a program; the model's own is used (chat_template_kwargs sets its variables)",
    "mm_processor_kwargs": _IMAGES,
    "media_io_kwargs": _IMAGES,
    # many times the cost of one answer
    "use_beam_search": "it costs a request for each beam and token",
    "best_of": "it computes more answers than it returns: use n",
    # without effect, which the client should know
    "length_penalty": "it belongs to beam search, which is not supported here",
    "watermarking": "no engine here supports it",
    "thinking_token_budget": "no engine here counts them",
    "routed_experts_prompt_start": _ELSEWHERE,
    "return_token_offsets": _ELSEWHERE,
    "mm_payload": _ELSEWHERE,
    "return_mm_kwargs": _ELSEWHERE,
    "guided_json": _GUIDED,
    "guided_regex": _GUIDED,
    "guided_choice": _GUIDED,
    "guided_grammar": _GUIDED,
    "functions": _FUNCTIONS,
    "function_call": _FUNCTIONS,
    "audio": "answers are text",
    "web_search_options": "nothing is fetched from the web",
}
# Values of refused parameters that are accepted because they request nothing.
_NOTHING: Mapping[str, Any] = {
    "priority": 0,
    "use_beam_search": False,
    "best_of": 1,
    "length_penalty": 1.0,
    "function_call": "none",
}


class Body(BaseModel):
    """A request body. Validation fails only with ValidationError, whatever else a validator raises."""

    @model_validator(mode="wrap")
    @classmethod
    def _tame(cls, data: Any, handler: ModelWrapValidatorHandler[Any]) -> Any:
        if isinstance(data, dict):
            for name, reason in REFUSED.items():
                if data.get(name) is not None and data[name] != _NOTHING.get(name, ()):
                    raise PydanticCustomError(
                        "unsupported_parameter", "it cannot be set here: {reason}", {"param": name, "reason": reason}
                    )
            _check_text(data)
            data = {name: value for name, value in data.items() if name not in REFUSED}
        try:
            return handler(data)
        except ValidationError:
            raise
        except VLLMClientError as error:
            detail = {"told": str(error.args[0]), "param": getattr(error, "parameter", None)}
            raise PydanticCustomError("value_error", "{told}", detail) from error
        except Exception as error:  # vLLM's validators use values before checking their types
            raise PydanticCustomError("value_error", "one of its values is of the wrong type", {}) from error

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: Any) -> Any:
        schema = handler(core_schema)
        properties = handler.resolve_ref_schema(schema)["properties"]
        for name in REFUSED.keys() & properties.keys():
            del properties[name]
        return schema


def _check_text(data: Any) -> None:
    """Raises PydanticCustomError for half a surrogate pair: it is valid JSON, but tokenizers and responses cannot
    encode it."""
    waiting = [data]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            if not value.isascii():
                try:
                    value.encode()
                except UnicodeEncodeError:
                    raise PydanticCustomError(
                        "value_error", "it contains half of a surrogate pair, which is not a character", {}
                    ) from None
        elif isinstance(value, dict):
            waiting += value.keys()
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


# Messages -------------------------------------------------------------------------------------------------------------


def _inline(url: str) -> str:
    if not url.startswith("data:"):
        raise ValueError("nothing is fetched from the network: send the content itself, as data:…;base64,…")
    return url


_Url = Annotated[str, AfterValidator(_inline), Field(json_schema_extra={"pattern": "^data:"})]


class TextPart(TypedDict):
    """Text in a message."""

    type: Literal["text"]
    text: str


class ImageUrl(TypedDict):
    """An image, inline in the request."""

    url: _Url
    detail: NotRequired[Literal["auto", "low", "high"] | None]


class ImagePart(TypedDict):
    """An image in a message, for vision models."""

    type: Literal["image_url"]
    image_url: ImageUrl


class InputAudio(TypedDict):
    """A sound in base64."""

    data: str
    format: Literal["wav", "mp3"]


class AudioPart(TypedDict):
    """A sound in a message, for audio models."""

    type: Literal["input_audio"]
    input_audio: InputAudio


class CalledFunction(TypedDict):
    """The function of a tool call."""

    name: str
    arguments: NotRequired[str]


class ToolCall(TypedDict):
    """A tool call of an earlier answer."""

    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: CalledFunction


_Texts = str | Annotated[list[TextPart], Field(max_length=1024)]
_Parts = (
    str
    | Annotated[list[Annotated[TextPart | ImagePart | AudioPart, Field(discriminator="type")]], Field(max_length=1024)]
)


class SystemMessage(TypedDict):
    """Instructions for the model before the conversation."""

    role: Literal["system", "developer"]
    content: _Texts
    name: NotRequired[str | None]


class UserMessage(TypedDict):
    """A message of the user."""

    role: Literal["user"]
    content: _Parts
    name: NotRequired[str | None]


class AssistantMessage(TypedDict):
    """An earlier answer."""

    role: Literal["assistant"]
    content: NotRequired[_Texts | None]
    reasoning: NotRequired[str | None]
    tool_calls: NotRequired[Annotated[list[ToolCall], Field(max_length=128)] | None]
    name: NotRequired[str | None]


class ToolMessage(TypedDict):
    """The result of a tool call."""

    role: Literal["tool"]
    content: _Texts
    tool_call_id: NotRequired[str | None]
    name: NotRequired[str | None]


Message = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]
Messages = Annotated[list[Message], Field(min_length=1, max_length=4096)]

# Bounded fields -------------------------------------------------------------------------------------------------------

_MODEL = Field(
    None,
    description="Name of a model or of an adapter, as /v1/models lists them. Optional if there is only one.",
    max_length=200,
)
_Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
_TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Stop = Annotated[str, Field(min_length=1, max_length=1000)]
_Logprobs = Annotated[int, Field(ge=0, le=20)]
_MAX_TOKENS = 2**24


class StructuredOutputs(TypedDict, total=False):
    """vLLM's constraints on the form of an answer; set one of them."""

    json: dict[str, Any] | str
    regex: Annotated[str, Field(min_length=1, max_length=10_000)]
    choice: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=1000)]
    grammar: Annotated[str, Field(min_length=1, max_length=100_000)]
    json_object: Literal[True]


def _structured(asked: StructuredOutputs | None) -> StructuredOutputsParams | None:
    given = {name: value for name, value in (asked or {}).items() if value is not None}
    if asked is not None and len(given) != 1:
        raise ValueError("it must have one of json, regex, choice, grammar and json_object")
    if "json" in given:
        try:
            schema = json.loads(given["json"]) if isinstance(given["json"], str) else given["json"]
        except ValueError as error:
            raise ValueError(f"json is neither an object nor the JSON text of one: {error}") from None
        _enforced(unenforced(schema, "structured_outputs.json"))
    if "regex" in given and (reason := unenforced_pattern(str(given["regex"]))):
        _enforced(Fault("structured_outputs.regex", reason))
    return StructuredOutputsParams(**given) if given else None


def _with_schema(asked: Any) -> Any:
    if isinstance(asked, ResponseFormat) and asked.type == "json_schema" and asked.json_schema:
        if asked.json_schema.json_schema is None:
            raise ValueError("json_schema.schema is missing")
        _enforced(unenforced(asked.json_schema.json_schema, "response_format.json_schema.schema"))
    elif isinstance(asked, StructuralTagResponseFormat | LegacyStructuralTagResponseFormat):
        _enforced(unenforced_tag(asked.model_dump(by_alias=True), "response_format"))
    return asked


def _enforced(fault: Fault | None) -> None:
    """Raises PydanticCustomError if a part of a schema would not be enforced."""
    if fault:
        raise PydanticCustomError("unenforced", "{said}", {"param": fault.place, "said": fault.said})


class _Sampling(Body):
    """Common parameters of chats and completions. Bounds are OpenAI's where it has any, else limit the cost of a
    request."""

    model: str | None = _MODEL
    n: int | None
    max_tokens: int | None
    temperature: float | None = Field(
        None, ge=0, le=2, allow_inf_nan=False, description="0: always the likeliest token."
    )
    top_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False, description="0: always the likeliest token.")
    top_k: int | None = Field(None, ge=-1, lt=2**31, description="0 and -1: all.")
    min_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    frequency_penalty: _Penalty | None = None
    presence_penalty: _Penalty | None = None
    repetition_penalty: float | None = Field(None, ge=0.01, le=10, allow_inf_nan=False)
    min_tokens: int = Field(0, ge=0, le=_MAX_TOKENS)
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = []
    stop_token_ids: Annotated[list[_TokenId], Field(max_length=128)] | None = []
    bad_words: list[Stop] = Field(default_factory=list, max_length=128)
    allowed_token_ids: Annotated[list[_TokenId], Field(min_length=1, max_length=1024)] | None = None
    logprob_token_ids: Annotated[list[_TokenId], Field(max_length=128)] | None = None
    logit_bias: (
        Annotated[
            dict[Annotated[str, Field(pattern="^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
            Field(max_length=1024),
        ]
        | None
    ) = None
    prompt_logprobs: _Logprobs | None = None
    truncate_prompt_tokens: int | None = Field(None, ge=-1, lt=2**31)
    structured_outputs: Annotated[StructuredOutputs | None, AfterValidator(_structured)] = None
    response_format: Annotated[AnyResponseFormat | None, AfterValidator(_with_schema)] = None

    @model_validator(mode="after")
    def _narrowest(self) -> Self:
        """Accepts a `top_p` of 0 as OpenAI does; vLLM rejects it."""
        if self.top_p == 0:
            self.temperature, self.top_p = 0.0, None
        return self

    def to_sampling_params(self, max_tokens: int, *args: Any) -> SamplingParams:
        """Returns vLLM's parameters. vLLM rejects `n` > 1 at temperature 0; here, as at OpenAI, the same answer is
        returned `n` times.

        Raises VLLMValidationError for a prompt that leaves no room for an answer.
        """
        if max_tokens < 1 and self.max_tokens != 0:  # vLLM would blame max_tokens, even if the client sent none
            text = "The prompt fills the model's maximum context length, which leaves no token for an answer."
            raise VLLMValidationError(text, parameter="input_tokens")
        several, self.n = self.n or 1, 1
        try:
            params: SamplingParams = super().to_sampling_params(max_tokens, *args)  # type: ignore[misc]
        finally:
            self.n = several
        params.n = several
        return params


class Chat(_Sampling, ChatCompletionRequest):
    """A request to /v1/chat/completions."""

    model_config = ConfigDict(
        extra="ignore",
        strict=True,
        json_schema_extra={
            "examples": [
                {"messages": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 32}
            ]
        },
    )

    messages: Messages
    n: int | None = Field(
        1, ge=1, le=128, description="Number of answers, at most as many as the model computes at once."
    )
    max_tokens: int | None = Field(
        None, ge=1, le=_MAX_TOKENS, description="Maximum tokens of the answer. Default: as many as fit."
    )
    max_completion_tokens: int | None = Field(
        None, ge=1, le=_MAX_TOKENS, description="OpenAI's newer name of max_tokens."
    )
    top_logprobs: _Logprobs | None = 0
    tools: Annotated[list[ChatCompletionToolsParam], Field(min_length=1, max_length=128)] | None = None
    documents: Annotated[list[dict[str, str]], Field(max_length=128)] | None = None

    @model_validator(mode="after")
    def _strict(self) -> Chat:
        """Enforces the tool's schema for a required call, unless the tool says `strict: false`: small models invent
        arguments."""
        if not self.tools or self.tool_choice in ("none", None):
            return self
        named = None if isinstance(self.tool_choice, str) else self.tool_choice.function.name
        for number, tool in enumerate(self.tools):
            if tool.function.strict is None and self.tool_choice != "auto":
                tool.function.strict = True
            if tool.function.strict and tool.function.parameters and named in (None, tool.function.name):
                _enforced(unenforced(tool.function.parameters, f"tools[{number}].function.parameters"))
        return self


class Completion(_Sampling, CompletionRequest):
    """A request to /v1/completions."""

    model_config = ConfigDict(
        extra="ignore", strict=True, json_schema_extra={"examples": [{"prompt": "Once upon a time", "max_tokens": 32}]}
    )

    prompt: (
        Annotated[str, Field(min_length=1)]
        | Annotated[list[_TokenId], Field(min_length=1)]
        | Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=128)]
        | Annotated[list[Annotated[list[_TokenId], Field(min_length=1)]], Field(min_length=1, max_length=128)]
    ) = Field(
        description="A text or its token ids, or several; times n, at most as many as the model computes at once."
    )
    n: int = Field(1, ge=1, le=128, description="Answers for each prompt.")
    max_tokens: int | None = Field(
        16, ge=0, le=_MAX_TOKENS, description="Maximum tokens of the answer; 0 with echo: only the prompt."
    )
    logprobs: _Logprobs | None = None


class Embedding(Body, EmbeddingCompletionRequest):
    """A request to /v1/embeddings."""

    model_config = ConfigDict(
        extra="ignore", strict=True, json_schema_extra={"examples": [{"input": "Ray is a framework."}]}
    )

    model: str | None = _MODEL
    input: (
        str
        | Annotated[list[_TokenId], Field(min_length=1)]
        | Annotated[list[str], Field(min_length=1, max_length=2048)]
        | Annotated[list[Annotated[list[_TokenId], Field(min_length=1)]], Field(min_length=1, max_length=2048)]
    )
    encoding_format: Literal["float", "base64"] = "float"


class TokenizeText(Body, TokenizeCompletionRequest):
    """A request to /tokenize for a text."""

    model_config = ConfigDict(extra="ignore", strict=True, json_schema_extra={"examples": [{"prompt": "Hello"}]})

    model: str | None = _MODEL


class TokenizeChat(Body, TokenizeChatRequest):
    """A request to /tokenize for a conversation, as the model's chat template writes it."""

    model_config = ConfigDict(
        extra="ignore",
        strict=True,
        json_schema_extra={"examples": [{"messages": [{"role": "user", "content": "Hello"}]}]},
    )

    model: str | None = _MODEL
    messages: Messages
    tools: Annotated[list[ChatCompletionToolsParam], Field(min_length=1, max_length=128)] | None = None


def _form(data: Any) -> str:
    return "chat" if isinstance(data, TokenizeChat) or (isinstance(data, dict) and "messages" in data) else "text"


Tokenize = Annotated[Annotated[TokenizeText, Tag("text")] | Annotated[TokenizeChat, Tag("chat")], Discriminator(_form)]


class Detokenize(Body, DetokenizeRequest):
    """A request to /detokenize."""

    model_config = ConfigDict(extra="ignore", strict=True, json_schema_extra={"examples": [{"tokens": [1, 2, 3]}]})

    model: str | None = _MODEL
    tokens: list[_TokenId] = Field(max_length=2**20)
