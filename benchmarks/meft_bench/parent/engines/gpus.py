"""Which GPUs of this machine a cell has: those on which the fewest cells run.

A cell of several ranks has as many, of one model where that is possible.

Where cells are packed, a GPU is a number of bytes, of which each cell takes those that
were predicted for it, and a cell waits for a GPU with room:

    bytes of the cells on a GPU  +  bytes of the next one  <=  bytes that were free

A cell without a prediction has a GPU for itself, and so have one that would fit on none
and one of several ranks.
"""

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from meft_bench.parent.engines.child_process import Stopped
from meft_bench.parent.engines.environment import PhysicalGpu

_WAIT_SECONDS = 0.2


@dataclass(eq=False)
class Share:
    """What one cell has of the GPUs."""

    gpus: tuple[PhysicalGpu, ...] = ()
    """One for each of its ranks; none on other devices."""
    num_bytes: int | None = None
    """What the cell takes of its GPU; None where that is not known."""
    is_shared: bool = False
    """Whether another cell has been on one of the GPUs at the same time."""

    @property
    def model(self) -> str:
        """The model of the first GPU; "" without one."""
        return self.gpus[0].model if self.gpus else ""


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

    def uuids_of(self, share: Share) -> str:
        """Return the UUIDs that select GPUs, separated by commas.

        It is empty where there is nothing to select.
        """
        if len(self._gpus) < 2:
            return ""
        return ",".join(gpu.uuid for gpu in share.gpus)

    @contextlib.contextmanager
    def some(self, device: str, count: int = 1) -> Iterator[Share]:
        """Keep GPUs for a cell during the block; none for other devices.

        A cell that needs more than there are has all, and its child refuses it.

        Args:
            device: the device of the cell.
            count: the number of its ranks, each of which has a GPU.
        """
        if device != "cuda" or not self._gpus:
            yield Share()
            return
        with self._changed:
            share = Share(self._least_used(count))
            self._take(share)
        with self._leaving(share):
            yield share

    @contextlib.contextmanager
    def with_room(
        self, needs: Mapping[str, int], stop: threading.Event, count: int = 1
    ) -> Iterator[Share]:
        """Wait for GPUs with room for a cell, and keep that room during the block.

        No cell overtakes one that waits: else small ones could keep out a large one
        until the end.

        Args:
            needs: bytes that the cell takes, by model of GPU. It has a GPU of a model
                that is not among them for itself.
            stop: when set, `Stopped` is raised.
            count: the number of its ranks. Several have GPUs for themselves.

        Raises:
            Stopped: `stop` was set.
        """
        if not self._gpus:
            yield Share()
            return
        with self._turn, self._changed:
            while (share := self._with_room(needs, count)) is None:
                if stop.is_set():
                    raise Stopped
                self._changed.wait(_WAIT_SECONDS)
            self._take(share)
        with self._leaving(share):
            yield share

    def _with_room(self, needs: Mapping[str, int], count: int) -> Share | None:
        if count > 1:
            chosen = self._least_used(count)
            is_free = not any(self._shares[gpu] for gpu in chosen)
            return Share(chosen) if is_free else None
        for gpu in self._by_use():
            others = self._shares[gpu]
            wanted = needs.get(gpu.model)
            if not others:
                return Share((gpu,), wanted)
            held = [share.num_bytes for share in others]
            if wanted is None or None in held:
                continue
            if sum(filter(None, held)) + wanted <= gpu.free_bytes:
                return Share((gpu,), wanted)
        return None

    def _by_use(self) -> list[PhysicalGpu]:
        return sorted(self._gpus, key=lambda gpu: len(self._shares[gpu]))

    def _least_used(self, count: int) -> tuple[PhysicalGpu, ...]:
        by_use = self._by_use()
        of_models = [
            [gpu for gpu in by_use if gpu.model == model][:count]
            for model in dict.fromkeys(gpu.model for gpu in by_use)
        ]
        whole = [gpus for gpus in of_models if len(gpus) == count]
        if not whole:
            return (*by_use[:count],)
        uses = ([len(self._shares[gpu]) for gpu in gpus][::-1] for gpus in whole)
        _, chosen = min(zip(uses, whole, strict=True), key=lambda pair: pair[0])
        return (*chosen,)

    def _take(self, share: Share) -> None:
        for gpu in share.gpus:
            others = self._shares[gpu]
            others.append(share)
            for one in others if len(others) > 1 else ():
                one.is_shared = True

    @contextlib.contextmanager
    def _leaving(self, share: Share) -> Iterator[None]:
        try:
            yield
        finally:
            with self._changed:
                for gpu in share.gpus:
                    self._shares[gpu].remove(share)
                self._changed.notify_all()
