"""What OpenAI's endpoints take, as far as a diffusion model can honour it; the rest is refused."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from agrpo_megatron.config.settings import UNMASKING
from agrpo_megatron.types import Chat, Message

# Fields that change nothing here, and are taken for the sake of clients.
IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
# Fields that are not honoured, with the values that ask for nothing.
REFUSED: dict[str, tuple[Any, ...]] = {
    "logprobs": (None, False),  # a token's depends on its denoising step
    "top_logprobs": (None, 0),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "parallel_tool_calls": (None, True, False),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "echo": (None, False),
    "suffix": (None, ""),
    "best_of": (None, 1),
}
ROLES = ("system", "developer", "user", "assistant")
type Ids = list[Annotated[int, Field(ge=0)]]
type Count = Annotated[int, Field(ge=1)]


class ApiError(Exception):
    """A request that is answered with an error."""

    def __init__(
        self, message: str, *, status: int = 400, code: str | None = None, param: str | None = None
    ):
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    @property
    def body(self) -> dict[str, Any]:
        """Return the error as OpenAI's object."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        found = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": found}


class StreamOptions(BaseModel):
    """Options of a stream."""

    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False
    include_obfuscation: bool | None = None  # ignored


class Ask(BaseModel):
    """What both endpoints take."""

    model_config = ConfigDict(extra="forbid")
    model: str
    n: Annotated[int, Field(ge=1, le=128)] = 1
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = None
    # Of diffusion models; the openai client sends them by `extra_body`.
    top_k: Count | None = None
    denoising_steps: Count | None = None
    block_length: Count | None = None
    unmasking: Literal[*UNMASKING] | None = None  # type: ignore[valid-type]

    @property
    def stops(self) -> tuple[str, ...]:
        """Return the stop texts."""
        found = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in found if text)

    @property
    def most(self) -> int | None:
        """Return the most tokens; None: the model's default."""
        return self.max_tokens


class AskText(Ask):
    """A request to /v1/completions."""

    prompt: str | Ids | list[str] | list[Ids]

    @property
    def prompts(self) -> list[str | list[int]]:
        """Return the prompts, as texts or ids."""
        is_list = isinstance(self.prompt, list)
        many = is_list and bool(self.prompt) and not isinstance(self.prompt[0], int)
        return list(self.prompt) if many else [self.prompt]  # type: ignore[arg-type,list-item]


class TextPart(BaseModel):
    """A part of a message."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: str


class Turn(BaseModel):
    """A message of a chat."""

    model_config = ConfigDict(extra="forbid")
    role: Literal[*ROLES]  # type: ignore[valid-type]
    content: str | list[TextPart]
    name: str | None = None  # ignored
    refusal: None = None


class AskChat(Ask):
    """A request to /v1/chat/completions."""

    messages: Annotated[list[Turn], Field(min_length=1)]
    max_completion_tokens: Count | None = None

    @property
    def most(self) -> int | None:
        """Return the most tokens; None: the model's default."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def chat(self) -> Chat:
        """Return the messages."""
        texts = [
            turn.content
            if isinstance(turn.content, str)
            else "".join(part.text for part in turn.content)
            for turn in self.messages
        ]
        roles = ["system" if turn.role == "developer" else turn.role for turn in self.messages]
        return Chat(tuple(map(Message, roles, texts)))


def read[Kind: Ask](kind: type[Kind], body: Any) -> Kind:
    """Read a request.

    Raises:
        ApiError: it is not an object, or a field is unknown, not honoured or of a wrong value.
    """
    if not isinstance(body, dict):
        raise ApiError("the body must be a JSON object")
    for key, neutral in REFUSED.items():
        if key in body and body[key] not in neutral:
            message = f"{key}={body[key]!r:.80} is not supported by this server; leave it out"
            raise ApiError(message, code="unsupported_parameter", param=key)
    known = {key: value for key, value in body.items() if key not in {*REFUSED, *IGNORED}}
    try:
        return kind.model_validate(known)
    except ValidationError as error:
        found = error.errors()[0]
        key = ".".join(map(str, found["loc"]))
        if found["type"] == "extra_forbidden":
            message = f"Unrecognized request argument supplied: {key}"
            raise ApiError(message, code="unknown_parameter", param=key) from None
        message = f"{key}: {found['msg']}"
        raise ApiError(message, code="invalid_value", param=key.split(".")[0]) from None
