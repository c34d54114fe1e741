"""From what a request holds to the tokens that the engine reads."""

from collections.abc import Mapping, Sequence

from pyper.data import TextTokenizer
from pyper.data.chat_template import ChatTemplate, encode_chat
from pyper.serve.api_error import ApiError, bad_request


def encode_text(
    tokenizer: TextTokenizer, text: str, context: int, *, keep: int | None, param: str
) -> tuple[int, ...]:
    """The document token and the tokens of `text`; special tokens in it are text like any other.

    keep: at most that many tokens, from the end. Raises ApiError 400 when the context is too small.
    """
    return _fit([tokenizer.bos_id, *tokenizer.encode(text)], context, keep, param)


def encode_messages(
    tokenizer: TextTokenizer,
    template: ChatTemplate,
    messages: Sequence[Mapping[str, str]],
    context: int,
    *,
    keep: int | None,
) -> tuple[int, ...]:
    """What the answer to a chat follows; see `encode_chat`.

    keep: at most that many tokens, from the end. Raises PromptError when the template refuses the
    messages, ApiError 400 when the context is too small.
    """
    return _fit(encode_chat(tokenizer, template, messages), context, keep, "messages")


def check_tokens(
    tokenizer: TextTokenizer, tokens: Sequence[int], context: int, *, keep: int | None, param: str
) -> tuple[int, ...]:
    """Token ids as the client sent them, behind the document token.

    Raises ApiError 400 when one is not in the vocabulary, or the context is too small.
    """
    bos_id, vocab_size = tokenizer.bos_id, tokenizer.vocab_size
    rest = tokens[1:] if tokens[0] == bos_id else tokens
    for token in rest:
        if not 0 <= token < vocab_size:
            raise bad_request(
                f"token {token} is not one of the {vocab_size:,} of this model: 0 … "
                f"{vocab_size - 1}",
                param,
            )
        if token == bos_id:
            raise bad_request(f"the document token {bos_id} can only come first", param)
    return _fit([bos_id, *rest], context, keep, param)


def _fit(tokens: list[int], context: int, keep: int | None, param: str) -> tuple[int, ...]:
    if keep is not None and len(tokens) > keep:
        tokens = [tokens[0], *tokens[len(tokens) - keep + 1 :]]
    if len(tokens) >= context:
        raise ApiError(
            400, _too_long(len(tokens), context, param), param=param, code="context_length_exceeded"
        )
    return tuple(tokens)


def _too_long(n_tokens: int, context: int, param: str) -> str:
    if param == "input":  # nothing is written after it
        return f"`input` has {n_tokens:,} tokens; the context holds {context - 1:,}"
    return (
        f"the prompt has {n_tokens:,} tokens; the context of {context:,} holds at most "
        f"{context - 1:,} and what is written"
    )
