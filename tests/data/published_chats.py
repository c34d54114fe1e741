"""Small tokenizers and chat templates of the kinds that are published."""

import json
import string
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer

from export.small_stock import transformers
from pyper.data import TextTokenizer
from pyper.data.chat_template import ChatTemplate, find_template

QWEN = (
    "{%- if messages[0]['role'] == 'system' %}\n"
    "    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}\n"
    "{%- else %}\n"
    "    {{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}\n"
    "{%- endif %}\n"
    "{%- for message in messages %}\n"
    '    {%- if (message.role == "user") or (message.role == "system" and not loop.first)'
    ' or (message.role == "assistant" and not message.tool_calls) %}\n'
    "        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>'"
    " + '\\n' }}\n"
    "    {%- endif %}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n"
    "    {{- '<|im_start|>assistant\\n' }}\n"
    "{%- endif %}\n"
)
SMOL = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are Smol<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] + eos_token }}{% else %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
)
PHI = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content']"
    " + '<|end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}"
    "{% else %}{{ eos_token }}{% endif %}"
)
TOOLS = (  # what the templates of our days ask for
    "{%- if tools is none and not documents %}{{ '<|im_start|>' }}{% endif %}"
    "{{ strftime_now('%Y') }}"
    "{% for message in messages %}{{ message.content | tojson }}<|im_end|>{% endfor %}"
)
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
HEADERS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)
TEXT = f"user assistant system hello there, naïve 深い helpful is 4. {string.printable}\n " * 40
CHAT = [
    {"role": "user", "content": "hello there, naïve 深い"},
    {"role": "assistant", "content": " 1 + 3 is 4.\n"},
    {"role": "user", "content": "  and 5?\n\nsay [/ or <| or it's\t12345"},
]


class Kind(NamedTuple):
    """A published kind of model."""

    template: str
    special: tuple[str, ...]
    bos: str | None
    eos: str
    sentences: bool = False
    """The tokenizer of Llama 2 and Mistral: spaces as ▁, one before every text."""
    flags: dict[str, bool] = {}  # noqa: RUF012
    in_vocabulary: bool = False


KINDS = {
    "qwen": Kind(QWEN, CHATML, None, "<|im_end|>"),
    "smol": Kind(SMOL, CHATML, "<|im_start|>", "<|im_end|>", in_vocabulary=True),
    "llama3": Kind(LLAMA3, HEADERS, "<|begin_of_text|>", "<|eot_id|>"),
    "mistral": Kind(MISTRAL, ("<unk>", "<s>", "</s>", "[INST]", "[/INST]"), "<s>", "</s>", True),
    "mistral of words": Kind(MISTRAL, ("<unk>", "<s>", "</s>"), "<s>", "</s>", True),
    "phi": Kind(PHI, ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"), None,
                "<|endoftext|>", flags={"rstrip": True}),
    "phi4": Kind(SMOL, CHATML, None, "<|im_end|>", flags={"lstrip": True, "rstrip": True}),
    "tools": Kind(TOOLS, CHATML, None, "<|im_end|>"),
}  # fmt: skip


def build(kind: Kind, folder: Path, *, special: bool = True) -> tuple[TextTokenizer, ChatTemplate]:
    """tokenizer.json and tokenizer_config.json, as they are published."""
    raw = Tokenizer(models.BPE(unk_token="<unk>" if kind.sentences else None, fuse_unk=True))
    if kind.sentences:
        raw.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    else:
        raw.normalizer = normalizers.NFC()
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        raw.decoder = decoders.ByteLevel()
    first = list(kind.special) if kind.in_vocabulary else list(kind.special[:1])
    alphabet = [] if kind.sentences else pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=400, special_tokens=first, initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator([TEXT], trainer)
    added = [
        AddedToken(name, special=special, normalized=False, **kind.flags) for name in kind.special
    ]
    raw.add_tokens(added)
    folder.mkdir(exist_ok=True)
    raw.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": kind.template,
        "bos_token": kind.bos,
        "eos_token": {"__type": "AddedToken", "content": kind.eos, "special": True},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return TextTokenizer.load(folder / "tokenizer.json"), ChatTemplate(find_template(folder))


def theirs(folder: Path, messages: list[dict[str, str]], **options: bool) -> list[int]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    options = {"add_generation_prompt": True} | options
    ids: list[int] = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=False, **options
    )
    return ids


def id_of(folder: Path, name: str) -> int:
    index = Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id(name)
    assert index is not None
    return int(index)
