"""The bodies that requests may have. What would change the answer and is not done is refused."""

from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from pyper.serve.api_error import ApiError, bad_request

MAX_CHOICES = 64
"""Sequences that one request may ask for: prompts × `n`."""
MAX_INPUTS = 256
"""Texts of one embeddings request."""
MAX_STOPS, MAX_STOP_CHARS = 16, 256

Tokens = list[int]
Prompt = str | Tokens


class Body(BaseModel):
    """Strict: no `"5"` for 5, and an unknown field is an error."""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def _as_prompts(value: Any) -> list[Prompt]:
    """A text, a list of texts, token ids, or a list of lists of token ids."""
    if isinstance(value, str) or _is_tokens(value):
        value = [value]
    if not isinstance(value, list) or not value:
        raise ValueError("must be a text, token ids, or a list of either")
    if not (all(isinstance(x, str) for x in value) or all(_is_tokens(x) for x in value)):
        raise ValueError("must be all texts, or all lists of token ids")
    if not all(value):
        raise ValueError("must not be empty")
    return value


def _is_tokens(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(x, int) and not isinstance(x, bool) for x in value)
    )


def _as_stops(value: Any) -> Any:
    return [] if value is None else [value] if isinstance(value, str) else value


def _refused(what: str, *harmless: Any) -> AfterValidator:
    """A field of OpenAI's that is not served: only values that ask for nothing are accepted."""

    def check(value: Any) -> Any:
        if value is None or any(
            value is h or (value == h and type(value) is type(h)) for h in harmless
        ):
            return value
        raise ValueError(f"{what} is not supported")

    return AfterValidator(check)


_TEXTS_OR_TOKENS = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1},
        {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
        {
            "type": "array",
            "items": {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
            "minItems": 1,
        },
    ]
}
Prompts = Annotated[list[Any], BeforeValidator(_as_prompts), WithJsonSchema(_TEXTS_OR_TOKENS)]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
Stops = Annotated[
    list[Stop],
    Field(max_length=MAX_STOPS),
    BeforeValidator(_as_stops),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "null"},
                {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS},
                {
                    "type": "array",
                    "items": {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS},
                    "maxItems": MAX_STOPS,
                },
            ]
        }
    ),
]
Count = Annotated[int, Field(ge=1, le=2**31)]


class StreamOptions(Body):
    """`stream_options`."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Sampling(Body):
    """What completions and chats share."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    """`NAME`, or `NAME/expert-3` to write with one expert."""
    n: Annotated[int, Field(ge=1, le=16)] | None = None
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31)] | None = None
    """Among the k likeliest; 0 and −1 are all."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    stop: Stops = []
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    truncate_prompt_tokens: Count | None = None
    """Keep only the end of a prompt that is longer."""

    # Of no consequence here.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    # Not served.
    frequency_penalty: Annotated[float | None, _refused("`frequency_penalty`", 0.0, 0)] = None
    presence_penalty: Annotated[float | None, _refused("`presence_penalty`", 0.0, 0)] = None
    logit_bias: Annotated[dict[str, Any] | None, _refused("`logit_bias`", {})] = None

    @model_validator(mode="after")
    def _options_belong_to_streams(self) -> "Sampling":
        if self.stream_options is not None and not self.stream:
            raise ValueError("`stream_options` needs `stream`")
        return self


class CompletionBody(Sampling):
    """POST /v1/completions."""

    prompt: Prompts
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: Annotated[bool | None, _refused("`echo`", False)] = None
    best_of: Annotated[int | None, _refused("`best_of`", 1)] = None
    suffix: Annotated[str | None, _refused("`suffix`")] = None


class TextPart(Body):
    """Text as part of a message; images, sound and files are not served."""

    type: Literal["text"]
    text: str


def _as_parts(value: Any) -> Any:
    """A text is one part. One kind of value, or a complaint would be about the other kind."""
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    if value is not None and not isinstance(value, list):
        raise ValueError("must be a text or a list of parts")
    return value


_TEXT_OR_PARTS = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": TextPart.model_json_schema()},
        {"type": "null"},
    ]
}
Content = Annotated[
    list[TextPart] | None, BeforeValidator(_as_parts), WithJsonSchema(_TEXT_OR_PARTS)
]


class Message(Body):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content = None
    name: Annotated[str, Field(max_length=256)] | None = None
    # An answer that is sent back with all its fields; these say nothing more.
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None

    @property
    def text(self) -> str:
        """The content as one text."""
        return "".join(part.text for part in self.content or [])


class ResponseFormat(Body):
    """Only plain text."""

    type: Literal["text"]


class ChatBody(Sampling):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1024)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    modalities: list[Literal["text"]] | None = None
    response_format: ResponseFormat | None = None
    parallel_tool_calls: bool | None = None
    tools: Annotated[list[Any] | None, _refused("`tools`", [])] = None
    tool_choice: Annotated[Any, _refused("`tool_choice`", "none", "auto")] = None

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> "ChatBody":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("`top_logprobs` needs `logprobs`")
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise ValueError("give `max_completion_tokens` or `max_tokens`, not both")
        if not any(message.text for message in self.messages):
            raise ValueError("`messages` holds no text")
        return self

    @property
    def n_logprobs(self) -> int | None:
        """Alternatives to report per token; None: report nothing."""
        return (self.top_logprobs or 0) if self.logprobs else None


class EmbeddingBody(Body):
    """POST /v1/embeddings."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    input: Prompts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Count | None = None
    user: str | None = None


AnyBody = TypeVar("AnyBody", bound=Body)


def read_body(kind: Callable[..., AnyBody], value: dict[str, Any]) -> AnyBody:
    """`value` as one of the bodies above. Raises ApiError 400 naming the first wrong field."""
    try:
        return kind(**value)
    except ValidationError as error:
        raise _first_complaint(error) from None


def _first_complaint(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    param = ".".join(str(part) for part in first["loc"])[:80] or None
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        return bad_request(f"there is no field `{param}`", param, "unknown_field")
    return bad_request(f"`{param}`: {message}" if param else message, param)
