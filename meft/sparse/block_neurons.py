"""The neurons of one block as the two semantics use them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from meft.sparse.config import SparseConfig
from meft.sparse.rows import Rows
from meft.sparse.shapes import Ids


class ActivityCounts:
    """Statistics of the batches of one block since `clear()`.

    A batch that checkpointing or a reversible stack computes again counts again.
    """

    def __init__(self) -> None:
        self.clear()

    def __getstate__(self) -> dict[str, Any]:
        """Return the numbers, of which none is on its way."""
        self._arrive()
        return self.__dict__

    def clear(self) -> None:
        """Set all counters to 0."""
        self.num_batches = self.total_tokens = 0
        self.total_candidates = 0
        """Distinct neurons that were scored: those in an expert of some token."""
        self._total_active = 0
        self._coming: Callable[[], Ids] | None = None
        """Returns the active neurons of the last batch."""

    @property
    def total_active(self) -> int:
        """Return the distinct active neurons: the unions over a batch's tokens."""
        self._arrive()
        return self._total_active

    def add(self, tokens: int, candidates: int, active: Callable[[], Ids]) -> None:
        """Add the counts of one batch.

        Args:
            tokens: number of tokens.
            candidates: number of distinct neurons that were scored.
            active: returns the active neurons. It is called at the next batch or when
                `total_active` is read, so that the host does not wait now.
        """
        self._arrive()
        self.num_batches += 1
        self.total_tokens += tokens
        self.total_candidates += candidates
        self._coming = active

    def _arrive(self) -> None:
        if self._coming is not None:
            self._total_active += len(self._coming())
            self._coming = None


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockNeurons:
    """The rows of one block, how tokens choose among them, and how often they did."""

    rows: Rows
    config: SparseConfig
    counts: ActivityCounts

    @property
    def rows_per_piece(self) -> int:
        """Return the number of neurons that are processed on the device at a time."""
        row_bytes = 2 * 4 * self.rows.store.width  # as float32, and their gradient
        return max(self.config.device_bytes // 8 // row_bytes, 1)
