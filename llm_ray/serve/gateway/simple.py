"""The request of a model's own route, `/<model>`: a text or a conversation, and a few settings.

curl http://127.0.0.1:8000/support-bot -H 'Content-Type: application/json' \\
    -d '{"text": "What is Ray?", "config": {"max_new_tokens": 32}, "stream": false}'

The format is that of the earlier LLM on Ray; it is converted to an OpenAI request. With a chat template, a text is a
user message; without one, it is a prompt to continue. The answer is plain text, or JSON for clients that accept JSON.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from llm_ray.serve.gateway.requests import Body, Chat, Completion, Stop


class SimpleMessage(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "user", "assistant"]
    content: str


class SimpleConfig(BaseModel):
    """Settings of the answer, named as in Hugging Face's generate."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    max_new_tokens: int | None = Field(None, ge=1, le=2**24, description="Maximum tokens of the answer.")
    temperature: float | None = Field(None, ge=0, le=2, description="0: always the likeliest token.")
    top_p: float | None = Field(None, ge=0, le=1, description="0: always the likeliest token.")
    top_k: int | None = Field(None, ge=0, lt=2**31, description="0: all.")
    do_sample: bool | None = Field(None, description="false: always the likeliest token.")
    repetition_penalty: float | None = Field(None, ge=0.01, le=2)
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)


Text = Annotated[str, Field(min_length=1)]


class SimpleRequest(Body):
    """A request to `/<model>`."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        json_schema_extra={"examples": [{"text": "What is Ray?", "config": {"max_new_tokens": 32}}]},
    )

    text: (
        Text
        | Annotated[list[SimpleMessage], Field(min_length=1, max_length=4096)]
        | Annotated[list[Text], Field(min_length=1, max_length=64)]
    )
    config: SimpleConfig = SimpleConfig()
    stream: bool = False

    @property
    def is_conversation(self) -> bool:
        """Whether the text is a list of messages."""
        return isinstance(self.text, list) and isinstance(self.text[0], SimpleMessage)

    def bodies(self, model: str, chat: bool) -> list[Chat] | list[Completion]:
        """Returns the equivalent OpenAI requests: several for a list of texts."""
        common = self._settings() | {"model": model, "stream": self.stream}
        if isinstance(self.text, list) and isinstance(self.text[0], SimpleMessage):
            messages = [m.model_dump() for m in self.text if isinstance(m, SimpleMessage)]
            return [Chat.model_validate(common | {"messages": messages})]
        texts = [self.text] if isinstance(self.text, str) else self.text
        if chat:
            return [Chat.model_validate(common | {"messages": [{"role": "user", "content": text}]}) for text in texts]
        return [Completion.model_validate(common | {"prompt": text}) for text in texts]

    def _settings(self) -> dict[str, Any]:
        given = self.config.model_dump(exclude_none=True)
        if given.pop("do_sample", True) is False:
            given["temperature"] = 0.0
        if "max_new_tokens" in given:
            given["max_tokens"] = given.pop("max_new_tokens")
        return given
