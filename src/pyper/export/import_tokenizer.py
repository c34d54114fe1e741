"""The tokenizer of a foreign model, and the token that begins its documents."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from pyper.data import TextTokenizer
from pyper.data.bos_token import KNOWN_BOS, template_bos
from pyper.data.tokenizer_json import parse_tokenizer
from pyper.errors import TokenizerError
from pyper.export.hf_tokenizer import bos_template

_HINT = "download the model again"


@dataclass(frozen=True)
class ForeignTokenizer:
    """A tokenizer that begins documents as the model was taught to."""

    tokenizer: TextTokenizer
    bos: str
    bos_source: str
    """Why that token."""


def read_tokenizer(
    folder: Path, config: Mapping[str, Any], settings: Mapping[str, Any], bos: str | None = None
) -> ForeignTokenizer:
    """tokenizer.json of a folder; config, settings: its config.json and tokenizer_config.json.

    bos: the token that begins documents, where the user knows better. Raises TokenizerError.
    """
    text = _text_of(folder)
    raw = parse_tokenizer(text, str(folder / "tokenizer.json"), _HINT)
    chosen, source = _choose(raw, config, settings, bos)
    index: int = raw.get_vocab(with_added_tokens=True)[chosen]
    values = json.loads(text)
    if values.get("post_processor") == bos_template(chosen, index):
        values["post_processor"] = None  # our own export's: we put it ourselves
    tokenizer = TextTokenizer(Tokenizer.from_str(json.dumps(values)))
    if tokenizer.bos_id != index:
        values["post_processor"] = bos_template(chosen, index)
        tokenizer = TextTokenizer(Tokenizer.from_str(json.dumps(values)))
    return ForeignTokenizer(tokenizer, chosen, source)


def check_rows(tokenizer: TextTokenizer, vocab_size: int) -> None:
    """Raises TokenizerError where a token has no row in the model's tables."""
    if tokenizer.vocab_size > vocab_size:
        raise TokenizerError(
            f"the tokenizer goes up to id {tokenizer.vocab_size - 1:,}, the model's input table "
            f"has {vocab_size:,} rows (`vocab_size`)",
            hint="tokens were added without the model: use the tokenizer that it was trained with",
        )


def stop_ids(
    config: Mapping[str, Any], generation: Mapping[str, Any], vocab_size: int
) -> tuple[int, ...]:
    """The tokens that end what the model writes, as its generation_config.json or config.json says.

    What is no token of the model is left out.
    """
    stated = generation.get("eos_token_id", config.get("eos_token_id"))
    ids = stated if isinstance(stated, list) else [stated]
    return tuple(sorted({i for i in ids if _is_id(i) and i < vocab_size}))


def _choose(
    raw: Tokenizer, config: Mapping[str, Any], settings: Mapping[str, Any], bos: str | None
) -> tuple[str, str]:
    """Among what there is, what documents begin with; a chat's first token is the last choice."""
    if bos is not None:
        if raw.token_to_id(bos) is None:
            raise TokenizerError(
                f"`--bos {bos}`: the tokenizer has no such token", hint=f"it has {_added(raw)}"
            )
        return bos, "as asked for"
    if (first := template_bos(raw)) is not None:
        return first, "the tokenizer puts it before every text"
    stated = _name_of(settings.get("bos_token")) or _token_of(raw, config.get("bos_token_id"))
    if stated is not None and raw.token_to_id(stated) is None:
        stated = None
    if stated in KNOWN_BOS:
        return stated, "its `bos_token`"
    added = {token.content for token in raw.get_added_tokens_decoder().values()}
    for name in KNOWN_BOS:
        if name in added:
            return name, "it stands between documents"
    if stated is not None:
        return stated, "its `bos_token`"
    ids = config.get("eos_token_id")
    eos = _token_of(raw, ids[0] if isinstance(ids, list) and ids else ids)
    if eos is None:
        raise TokenizerError(
            "the tokenizer has no token that begins or separates documents",
            hint=f"name one with `--bos TOKEN`; it has {_added(raw)}",
        )
    return eos, "its `eos_token_id`, for want of a `bos_token`"


def _text_of(folder: Path) -> str:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise TokenizerError(
            f"{folder} has no tokenizer.json",
            hint="make one: `AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)`",
        )
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path} cannot be read: {error}", hint=_HINT) from None


def _name_of(token: Any) -> str | None:
    """Tokens are written as text, or as objects with the text in them."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _token_of(raw: Tokenizer, index: Any) -> str | None:
    token: str | None = raw.id_to_token(index) if _is_id(index) else None
    return token


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _added(raw: Tokenizer) -> str:
    names = [f"`{token.content}`" for token in raw.get_added_tokens_decoder().values()]
    return ", ".join(names[:8]) or "no special tokens"
