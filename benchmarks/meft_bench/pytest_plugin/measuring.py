"""Measure what code takes, on a CPU, on a GPU, or on a virtual one."""

import contextlib
import gc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from meft_bench.virtual.device.allocator import ROUND_BYTES
from meft_bench.virtual.prediction.training_code import TrainingMemory
from meft_bench.virtual.recording.breakdown import breakdown
from meft_bench.virtual.recording.ledger import Ledger


@dataclass(kw_only=True, slots=True)
class Seen:
    """What code has taken; complete when its context has ended.

    Attributes:
        saved_bytes: bytes that one forward kept for its backward, the most of several;
            0 without a backward.
        peak_allocated_bytes: the most bytes that tensors held, weights included.
        memory_breakdown: what this peak consists of (docs/numbers.md).
    """

    saved_bytes: int | None = None
    peak_allocated_bytes: int | None = None
    memory_breakdown: dict[str, Any] | None = None


class Meter:
    """Measure the parts of one test.

    Args:
        virtual: the virtual GPU on which it runs; None for the devices that are there.
    """

    def __init__(self, virtual: TrainingMemory | None) -> None:
        self._virtual = virtual
        self.seen: list[Seen] = []
        """What was measured, in order."""
        self.device = "cpu"
        """Type of the device of the last model, or the name of the GPU."""

    @contextlib.contextmanager
    def measured(
        self,
        model: Any = None,
        optimizer: Any = None,
        before: Callable[[], object] = lambda: None,
    ) -> Iterator[Seen]:
        """Measure what runs in the context.

        Args:
            model: the model, whose weights are there before; None if there is none.
            optimizer: its optimizer, if there is one.
            before: called first; what it leaves behind is recorded, and what it takes
                is not measured.

        Yields:
            What was seen, which is complete when the context has ended.
        """
        seen = Seen()
        gc.collect()
        gc.disable()  # what it frees, and when, depends on what ran before
        try:
            if self._virtual is None:
                with self._on_device(seen, model, optimizer, before):
                    yield seen
            else:
                before()
                with _on_virtual(self._virtual, seen):
                    yield seen
        finally:
            gc.enable()
        self.seen.append(seen)

    @contextlib.contextmanager
    def _on_device(
        self, seen: Seen, model: Any, optimizer: Any, before: Callable[[], object]
    ) -> Iterator[None]:
        device = _device_of(model)
        is_cuda = device == "cuda"
        self.device = torch.cuda.get_device_name() if is_cuda else device
        ledger = Ledger(accelerator=device, round_bytes=ROUND_BYTES if is_cuda else 1)
        with ledger:
            if isinstance(model, nn.Module):
                ledger.watch(model, *([optimizer] if optimizer is not None else []))
            else:
                ledger.watch_all()
            before()
            if is_cuda:
                ledger.add_unattributed(torch.cuda.memory_allocated())
                torch.cuda.reset_peak_memory_stats()
            start = ledger.mark()
            yield
        _note(seen, ledger, start)
        if is_cuda:
            # With what kernels allocate themselves.
            seen.peak_allocated_bytes = torch.cuda.max_memory_allocated()


@contextlib.contextmanager
def _on_virtual(memory: TrainingMemory, seen: Seen) -> Iterator[None]:
    ledger = memory.ledger
    torch.cuda.reset_peak_memory_stats()
    start = ledger.mark()
    yield
    _note(seen, ledger, start)
    # With what the allocator makes blocks larger.
    seen.peak_allocated_bytes = torch.cuda.max_memory_allocated()


def _note(seen: Seen, ledger: Ledger, start: int) -> None:
    trace = ledger.trace()
    seen.memory_breakdown = breakdown(trace, start)
    seen.peak_allocated_bytes = seen.memory_breakdown["peak_bytes"]
    seen.saved_bytes = seen.memory_breakdown["saved_bytes"]


def _device_of(model: Any) -> str:
    parameters = model.parameters() if isinstance(model, nn.Module) else iter(())
    first = next(parameters, None)
    return "cpu" if first is None else first.device.type


def take_step(model: Any, batch: Any, optimizer: Any, loss: Any = None) -> None:
    """Take one training step: forward, backward, update, release of gradients.

    Args:
        model: the model.
        batch: its arguments: a mapping by name, a tuple, or a single one.
        optimizer: the optimizer.
        loss: function from the output to a scalar; None for the output's `loss`, or
            itself.

    Raises:
        TypeError: there is no scalar to differentiate.
    """
    if isinstance(batch, Mapping):
        output = model(**batch)
    else:
        output = model(*batch) if isinstance(batch, tuple) else model(batch)
    scalar = getattr(output, "loss", output) if loss is None else loss(output)
    if not isinstance(scalar, torch.Tensor) or scalar.numel() != 1:
        raise TypeError(
            f"the loss is {type(scalar).__name__}, not a scalar tensor: give "
            "`loss`, a function from the model's output to one"
        )
    scalar.backward()
    optimizer.step()
    optimizer.zero_grad()
