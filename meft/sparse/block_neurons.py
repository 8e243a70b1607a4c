"""The neurons of one block as the two semantics use them."""

from dataclasses import dataclass

from meft.sparse.config import SparseConfig
from meft.sparse.rows import Rows


@dataclass(slots=True)
class ActivityCounts:
    """Statistics of the batches of one block since `clear()`."""

    num_batches: int = 0
    total_tokens: int = 0
    total_candidates: int = 0
    """Distinct neurons that were scored because they are in an expert of some token."""
    total_active: int = 0
    """Distinct active neurons: the union over a batch's tokens."""

    def clear(self) -> None:
        """Set all counters to 0."""
        self.num_batches = self.total_tokens = 0
        self.total_candidates = self.total_active = 0

    def add(self, tokens: int, active: int) -> None:
        """Add the counts of one batch."""
        self.num_batches += 1
        self.total_tokens += tokens
        self.total_active += active


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
