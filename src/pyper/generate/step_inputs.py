"""What the rows of a recorded step read: it stays on the device, and only changes are sent."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyper.generate.transfer import to_device

Row = tuple[int, int, list[int]]
"""Token, position and pages of a text; its list of pages only ever grows at the end."""


@dataclass
class _Held:
    """What the device knows of a row."""

    pages: list[int] | None = None
    n_pages: int = 0
    position: int = 0


class StepInputs:
    """Tokens (B,), positions (B,) and pages (B, n) in memory that never moves.

    Positions go on by themselves: a text that goes on sends something once a page, and then one
    number. Rows without a text stay at position 0 of page 0, which belongs to nobody.
    """

    def __init__(self, batch: int, n_pages: int, device: torch.device) -> None:
        n = batch * n_pages
        self._memory = torch.zeros(n + 3 * batch, dtype=torch.long, device=device)
        # First, as the only ones that are read several at a time: from an even address.
        self.pages = self._memory[:n].view(batch, n_pages)
        self.tokens, self.positions, self._moves = self._memory[n:].view(3, batch)
        self._held = [_Held() for _ in range(batch)]
        self._n_rows = 0

    def fill(self, rows: Sequence[Row], tokens: Tensor | None = None) -> None:
        """Before a step. tokens: (R,), not those of the rows where only the device knows them."""
        changes = self._changes(rows)
        if tokens is None:
            changes |= enumerate((token for token, _, _ in rows), self.pages.numel())
        if changes:
            sent = torch.tensor([list(changes), list(changes.values())])
            at, values = to_device(sent, self._memory.device)
            self._memory.index_copy_(0, at, values)
        if tokens is not None:
            self.tokens[: len(rows)] = tokens

    def advance(self) -> None:
        """After a step; part of what is recorded."""
        self.positions += self._moves

    def _changes(self, rows: Sequence[Row]) -> dict[int, int]:
        """Addresses in the memory, and what belongs there, before each row goes on by a token."""
        batch, width = self.pages.shape
        position_at, move_at = batch * width + batch, batch * width + 2 * batch
        changes: dict[int, int] = {}
        for row, (_, position, pages) in enumerate(rows):
            held = self._held[row]
            if held.pages is not pages:
                held.pages, held.n_pages = pages, 0
            if held.n_pages < len(pages):
                first = row * width + held.n_pages
                changes |= enumerate(pages[held.n_pages :], first)
                held.n_pages = len(pages)
            if held.position != position:
                changes[position_at + row] = position
            held.position = position + 1
        for row in range(self._n_rows, len(rows)):
            changes[move_at + row] = 1
        for row in range(len(rows), self._n_rows):
            self._held[row] = _Held()
            changes |= {position_at + row: 0, move_at + row: 0, row * width: 0}
        self._n_rows = len(rows)
        return changes
