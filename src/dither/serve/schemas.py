"""What clients may ask and what they are told: OpenAI's completions and chat completions. Limits stand in the types; what would change the text and
is not done here is refused, never ignored."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Token = Annotated[int, Field(ge=0)]
StopString = Annotated[str, Field(min_length=1, max_length=256)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
MOST_CHOICES = 16
MOST_PROMPTS = 16


class _Ask(BaseModel):
    """An absent field and null are the same."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        return {k: v for k, v in data.items() if v is not None} if isinstance(data, dict) else data


class StreamOptions(_Ask):
    include_usage: bool = False


class Ask(_Ask):
    """What both kinds of request share. ``user`` is a label for the client's own books; ``top_k`` 0 keeps all tokens."""

    model: str = Field(max_length=256)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, ge=0, le=1)
    top_k: int = Field(0, ge=0)
    n: int = Field(1, ge=1, le=MOST_CHOICES)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63 - MOST_CHOICES)
    stop: list[StopString] = Field(default_factory=list, max_length=4)
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: dict[Token, Annotated[float, Field(ge=-100, le=100)]] = Field(default_factory=dict, max_length=1024)
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, max_length=256)

    where: ClassVar[str]  # the field that holds what the model reads

    @abstractmethod
    def texts(self) -> list[str]:
        """What is to be cut into tokens."""

    @abstractmethod
    def wanted(self) -> tuple[str, int | None]:
        """New tokens at the most, and the field that says so."""

    @abstractmethod
    def top(self) -> int | None:
        """Likeliest tokens to name beside each token; None: no log-probabilities."""

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _options_of_streams(self) -> Ask:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only allowed when stream is true")
        return self


class CompletionAsk(Ask):
    prompt: str | list[str] | list[Token] | list[list[Token]]
    max_tokens: int = Field(16, ge=1)
    logprobs: int | None = Field(None, ge=0, le=5)
    best_of: Literal[1] = 1
    echo: Literal[False] = False

    where: ClassVar[str] = "prompt"

    def texts(self) -> list[str]:
        return [prompt for prompt in self.prompts() if isinstance(prompt, str)]

    def wanted(self) -> tuple[str, int | None]:
        return "max_tokens", self.max_tokens

    def top(self) -> int | None:
        return self.logprobs

    def prompts(self) -> list[str | list[int]]:
        """Each a text or tokens. Raises ValueError for none, and for too many."""
        given = self.prompt
        if isinstance(given, str) or (given and isinstance(given[0], int)):
            return [given]
        if not 1 <= len(given) <= MOST_PROMPTS:
            raise ValueError(f"prompt: must be 1 to {MOST_PROMPTS} prompts, not {len(given)}")
        return given  # type: ignore[return-value]


class TextPart(_Ask):
    type: Literal["text"]
    text: str


class Message(_Ask):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = Field(None, max_length=256)

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        found = {"role": "system" if self.role == "developer" else self.role, "content": content}
        return found if self.name is None else found | {"name": self.name}


class ResponseFormat(_Ask):
    type: Literal["text"]


class ChatAsk(Ask):
    messages: list[Message] = Field(min_length=1, max_length=1024)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: list[Any] = Field(default_factory=list, max_length=0)

    where: ClassVar[str] = "messages"

    def texts(self) -> list[str]:
        return [message.plain()["content"] for message in self.messages]

    def wanted(self) -> tuple[str, int | None]:
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return "max_tokens", self.max_tokens

    def top(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @model_validator(mode="after")
    def _top_needs_logprobs(self) -> ChatAsk:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: only allowed when logprobs is true")
        return self


# -- answers


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None = None


class ChatChoice(BaseModel):
    index: int
    message: dict[str, str | None]
    logprobs: ChatLogprobs | None
    finish_reason: str | None


class ChatChunkChoice(BaseModel):
    index: int
    delta: dict[str, str]
    logprobs: ChatLogprobs | None
    finish_reason: str | None


class Answer(BaseModel):
    """A whole answer, or a chunk of a stream, whose last may have usage and no choices."""

    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice] | list[ChatChoice] | list[ChatChunkChoice]
    usage: Usage | None = None


class ModelCard(BaseModel):
    id: str
    object: str = "model"
    created: int
    owned_by: str = "dither"


class ModelList(BaseModel):
    object: str = "list"
    data: list[ModelCard]
