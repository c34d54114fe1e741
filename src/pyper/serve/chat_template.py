"""Which template a served model uses."""

from pathlib import Path

from pyper.data.chat_template import ChatTemplate, find_template, read_template
from pyper.mixture import find_mixture


def open_template(model: Path, file: Path | None) -> ChatTemplate:
    """The template in `file`, or else that of a run or a mixture. Raises ConfigError."""
    source = find_template(find_mixture(model)) if file is None else read_template(file)
    return ChatTemplate(source)
