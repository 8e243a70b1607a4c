"""Which GPU of this machine a cell has: the one on which the fewest cells run.

Where cells are packed, a GPU is a number of bytes, of which each cell takes those that
were predicted for it, and a cell waits for a GPU with room:

    bytes of the cells on a GPU  +  bytes of the next one  <=  bytes that were free

A cell without a prediction has a GPU for itself, and so has one that would fit on none.
"""

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from meft_bench.parent.engines.child_process import Stopped
from meft_bench.parent.engines.environment import PhysicalGpu

NONE = PhysicalGpu(uuid="", model="")
_WAIT_SECONDS = 0.2


@dataclass(eq=False)
class Share:
    """What one cell has of a GPU."""

    gpu: PhysicalGpu
    num_bytes: int | None = None
    """What the cell takes of the GPU; None where that is not known."""
    is_shared: bool = False
    """Whether another cell has been on the GPU at the same time."""


class Gpus:
    """The GPUs of a machine, and the cells on each of them.

    Args:
        gpus: the GPUs that children can use, in NVML's order.
    """

    def __init__(self, gpus: Sequence[PhysicalGpu]) -> None:
        self._gpus = gpus
        self._shares: dict[PhysicalGpu, list[Share]] = {gpu: [] for gpu in gpus}
        self._changed = threading.Condition()
        self._turn = threading.Lock()

    @property
    def models(self) -> list[str]:
        """The models of the GPUs, in their order."""
        return [gpu.model for gpu in self._gpus]

    def uuid_of(self, gpu: PhysicalGpu) -> str:
        """Return the UUID that selects a GPU; "" where there is nothing to select."""
        return gpu.uuid if len(self._gpus) > 1 else ""

    @contextlib.contextmanager
    def one(self, device: str) -> Iterator[Share]:
        """Keep a GPU for a cell during the block; `NONE` for other devices.

        Args:
            device: the device of the cell.
        """
        if device != "cuda" or not self._gpus:
            yield Share(NONE)
            return
        with self._changed:
            share = Share(min(self._gpus, key=lambda gpu: len(self._shares[gpu])))
            self._take(share)
        with self._leaving(share):
            yield share

    @contextlib.contextmanager
    def with_room(
        self, needs: Mapping[str, int], stop: threading.Event
    ) -> Iterator[Share]:
        """Wait for a GPU with room for a cell, and keep that room during the block.

        No cell overtakes one that waits: else small ones could keep out a large one
        until the end.

        Args:
            needs: bytes that the cell takes, by model of GPU. It has a GPU of a model
                that is not among them for itself.
            stop: when set, `Stopped` is raised.

        Raises:
            Stopped: `stop` was set.
        """
        if not self._gpus:
            yield Share(NONE)
            return
        with self._turn, self._changed:
            while (share := self._with_room(needs)) is None:
                if stop.is_set():
                    raise Stopped
                self._changed.wait(_WAIT_SECONDS)
            self._take(share)
        with self._leaving(share):
            yield share

    def _with_room(self, needs: Mapping[str, int]) -> Share | None:
        for gpu in sorted(self._gpus, key=lambda gpu: len(self._shares[gpu])):
            others = self._shares[gpu]
            wanted = needs.get(gpu.model)
            if not others:
                return Share(gpu, wanted)
            held = [share.num_bytes for share in others]
            if wanted is None or None in held:
                continue
            if sum(filter(None, held)) + wanted <= gpu.free_bytes:
                return Share(gpu, wanted)
        return None

    def _take(self, share: Share) -> None:
        others = self._shares[share.gpu]
        others.append(share)
        for one in others if len(others) > 1 else ():
            one.is_shared = True

    @contextlib.contextmanager
    def _leaving(self, share: Share) -> Iterator[None]:
        try:
            yield
        finally:
            with self._changed:
                self._shares[share.gpu].remove(share)
                self._changed.notify_all()
