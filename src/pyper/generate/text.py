"""From tokens to text while it streams: whole characters, stop strings held back."""

import codecs

from pyper.data import TextTokenizer


class TextStream:
    """Decodes one row. Bytes of half a character, and text that may begin a stop string, wait."""

    def __init__(self, tokenizer: TextTokenizer, stop: tuple[str, ...]) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Text that is certain after one more token; `stopped` is set at a stop string."""
        self._held += self._decoder.decode(self._tokenizer.decode_bytes([token]))
        ends = [at for s in self._stop if (at := self._held.find(s)) >= 0]
        if ends:
            self.stopped = True
            text, self._held = self._held[: min(ends)], ""
            return text
        keep = self._possible_stop()
        text = self._held[: len(self._held) - keep]
        self._held = self._held[len(self._held) - keep :]
        return text

    def finish(self) -> str:
        """What was held back, once no more tokens come."""
        text = self._held + self._decoder.decode(b"", final=True)
        self._held = ""
        return "" if self.stopped else text

    def _possible_stop(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max((len(s) for s in self._stop), default=1) - 1
        for n in range(min(longest, len(self._held)), 0, -1):
            if any(s.startswith(self._held[-n:]) for s in self._stop):
                return n
        return 0
