"""The token that begins every document: `bos`, ours or the one that a tokenizer came with."""

import json

from tokenizers import AddedToken, Tokenizer

from pyper.errors import TokenizerError

BOS = "<|bos|>"
KNOWN_BOS = (BOS, "<|endoftext|>", "<|begin_of_text|>", "<bos>", "<s>")
"""What begins documents in tokenizers of others, where they do not say it themselves."""


def find_or_add_bos(tokenizer: Tokenizer) -> int:
    """Its id. Raises TokenizerError where the tokenizer cannot hold one more token."""
    # Only among the added tokens: a BPE of HTML may have a plain entry `<s>`, which is text.
    added = {token.content: index for index, token in tokenizer.get_added_tokens_decoder().items()}
    for name in (template_bos(tokenizer), *KNOWN_BOS):
        if name in added:
            add_special(tokenizer, name)
            return int(added[name])
    add_special(tokenizer, BOS)
    index = tokenizer.token_to_id(BOS)
    if index is None:
        raise TokenizerError(f"the tokenizer cannot hold the token {BOS}")
    return index


def template_bos(tokenizer: Tokenizer) -> str | None:
    """The special token that the tokenizer itself puts before every text, if there is one."""
    processor = json.loads(tokenizer.to_str())["post_processor"] or {}
    steps = processor.get("processors", [processor])
    for step in steps:
        if step.get("type") == "TemplateProcessing":
            name: str | None = step["single"][0].get("SpecialToken", {}).get("id")
            return name
    return None


def add_special(tokenizer: Tokenizer, name: str) -> None:
    """Add a token, marked as special, or it would be found inside a user's text."""
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False)])
