"""Which GPUs of this machine a cell has: those on which the fewest cells run.

A cell of several ranks has as many, of one model where that is possible.
"""

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
    def some(self, device: str, count: int = 1) -> Iterator[PhysicalGpu]:
        """Keep GPUs for a cell during the block; `NONE` for other devices.

        A cell that needs more than there are has all, and its child refuses it.

        Args:
            device: the device of the cell.
            count: the number of its ranks, each of which has a GPU.

        Yields:
            The GPU, or several as one, with their UUIDs separated by commas.
        """
        if device != "cuda" or not self._num_cells:
            yield NONE
            return
        with self._lock:
            chosen = self._least_used(count)
            for gpu in chosen:
                self._num_cells[gpu] += 1
        try:
            uuids = ",".join(gpu.uuid for gpu in chosen)
            yield PhysicalGpu(uuid=uuids, model=chosen[0].model)
        finally:
            with self._lock:
                for gpu in chosen:
                    self._num_cells[gpu] -= 1

    def _least_used(self, count: int) -> list[PhysicalGpu]:
        by_use = sorted(self._num_cells, key=self._num_cells.__getitem__)
        of_models = [
            [gpu for gpu in by_use if gpu.model == model][:count]
            for model in dict.fromkeys(gpu.model for gpu in by_use)
        ]
        whole = [gpus for gpus in of_models if len(gpus) == count]
        if not whole:
            return by_use[:count]
        return min(whole, key=lambda gpus: [self._num_cells[gpu] for gpu in gpus][::-1])
