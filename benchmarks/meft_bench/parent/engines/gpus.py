"""Which GPU of this machine a cell has: the one on which the fewest cells run."""

import contextlib
import threading
from collections.abc import Iterator, Sequence

from meft_bench.parent.engines.environment import PhysicalGpu

NONE = PhysicalGpu(uuid="", model="")


class Gpus:
    """The GPUs of a machine, and how many cells each of them runs.

    Args:
        gpus: the GPUs that children can use, in NVML's order.
    """

    def __init__(self, gpus: Sequence[PhysicalGpu]) -> None:
        if len(gpus) == 1:  # there is nothing to select
            gpus = [PhysicalGpu(uuid="", model=gpus[0].model)]
        self._num_cells = dict.fromkeys(gpus, 0)
        self._lock = threading.Lock()

    @property
    def models(self) -> list[str]:
        """The models of the GPUs, in their order."""
        return [gpu.model for gpu in self._num_cells]

    @contextlib.contextmanager
    def one(self, device: str) -> Iterator[PhysicalGpu]:
        """Keep a GPU for a cell during the block; `NONE` for other devices.

        Args:
            device: the device of the cell.
        """
        if device != "cuda" or not self._num_cells:
            yield NONE
            return
        with self._lock:
            gpu = min(self._num_cells, key=self._num_cells.__getitem__)
            self._num_cells[gpu] += 1
        try:
            yield gpu
        finally:
            with self._lock:
                self._num_cells[gpu] -= 1
