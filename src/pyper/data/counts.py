"""What reading met."""

import dataclasses
from dataclasses import dataclass, field


@dataclass(slots=True)
class ReadCounts:
    """What was read, mended and left out; each field counts documents unless it says otherwise."""

    files: int = 0
    documents: int = 0
    """Documents handed on, duplicates not included once `prepare` has found them."""
    duplicates: int = 0
    empty: int = 0
    too_short: int = 0
    bad_utf8: int = 0
    """With bytes that are no UTF-8; each became U+FFFD."""
    nul_bytes: int = 0
    """With NUL characters, which were removed."""
    byte_order_marks: int = 0
    malformed_lines: int = 0
    """Lines of `.jsonl`, or records, without a text or messages."""
    skipped_files: int = 0
    """Files that are not text."""
    chats: int = 0
    chats_without_answers: int = 0
    """In which there is nothing to learn."""
    refused_chats: int = 0
    """That the chat template could not write."""
    filtered: dict[str, int] = field(default_factory=dict)
    """By filter: left out by the first that did not hold."""

    def as_dict(self) -> dict[str, int]:
        """By name; filters as `filter: EXPRESSION`. What came later is only named where it is."""
        values = dataclasses.asdict(self)
        filtered = values.pop("filtered")
        for name in ("chats", "chats_without_answers", "refused_chats"):
            if values[name] == 0:
                del values[name]
        return values | {f"filter: {source}": n for source, n in filtered.items()}


def say_count(name: str) -> str:
    """What a count is called for people; of a filter by its expression."""
    kind, _, source = name.partition("filter: ")
    return f"left out by the filter `{source}`" if source else kind.replace("_", " ")
