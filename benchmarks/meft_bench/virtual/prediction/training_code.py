"""Predict the memory of any training code, without a GPU.

    with meft_bench.virtual_gpu("RTX3090-24GB") as gpu:
        train()  # `cuda` is there; nothing is computed
    print(gpu.summary())

The code runs with fake CUDA tensors, so two or three steps suffice: there are no values
to train. Data may come from anywhere; tensors that the code moves to the GPU become
fake there, and small integers keep their values. Where another value is read, a
condition is true and a number is 0; a selection by such a mask keeps all elements,
which the plan says.
"""

import contextlib
import dataclasses
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch

from meft_bench.virtual.device import gpu as gpus
from meft_bench.virtual.device.allocator import settings_in_words
from meft_bench.virtual.emulation import assumed_selection, ordinary_code
from meft_bench.virtual.emulation.ranks import one_of
from meft_bench.virtual.emulation.virtual_gpu import VirtualGpu
from meft_bench.virtual.prediction import plan_text
from meft_bench.virtual.prediction.fit import Fit, largest_that_fits
from meft_bench.virtual.prediction.plan import MemoryPlan, assumptions, observe
from meft_bench.virtual.recording.ledger import Ledger

NOTHING = (
    "nothing was put on the GPU: move the model and the batches to `cuda` in the code "
    "that is planned"
)
STOPPED = (
    "what is shown was reached before that; `virtual_gpu(..., enforce_memory=False)` "
    "goes on, and says what would be needed"
)
ONE_STEP = (
    "assumed: one step is enough, although the state of its optimizer is made at its "
    "end: run two or three, of which the later ones take more"
)
MARGIN = 0.05
"""Default share of the GPU's memory that must stay free for the verdict `fits`."""


class TrainingMemory:
    """The memory of the code that runs inside `virtual_gpu`.

    Args:
        device: the virtual GPU, with a ledger.
        margin: share of the GPU's memory that must stay free for the verdict `fits`.
        selections: number of selections whose size was assumed, by operator.
    """

    def __init__(
        self, device: VirtualGpu, margin: float, selections: Counter[str]
    ) -> None:
        self._device = device
        self._margin = margin
        self._selections = selections
        self.error = ""
        """The message of the out-of-memory error that ended the code, if one did."""

    @property
    def name(self) -> str:
        """Name of the GPU, as `torch.cuda.get_device_name` returns it."""
        return self._device.gpu.name

    @property
    def ledger(self) -> Ledger:
        """What records the code."""
        ledger = self._device.ledger
        assert ledger is not None
        return ledger

    @property
    def memory_bytes(self) -> int:
        """The GPU's memory, as `torch.cuda.get_device_properties` returns it."""
        return self._device.gpu.memory_bytes

    def plan(self, *, timeline: bool = False) -> MemoryPlan:
        """Return what the code has taken since peaks were last reset.

        `torch.cuda.reset_peak_memory_stats()` resets them; to leave out the first
        step, in which the optimizer makes its state, call it after that step.

        Args:
            timeline: whether to include every change of memory.

        Returns:
            Peaks in bytes (allocated, reserved, as `nvidia-smi` shows it), the bytes at
            the peak by kind, phase, block and operator, transfers between host and
            GPU, and whether it fits.
        """
        device, ledger = self._device, self._device.ledger
        assert ledger is not None
        found = observe(
            device,
            margin=self._margin,
            flops_per_second=device.gpu.half_flops_per_second,
            timeline=timeline,
        )
        how = [device.backend.how, device.gpu.basis]
        how += [note] if (note := settings_in_words()) else []
        how += assumptions(device, self._selections)
        how += [ONE_STEP] if ledger.step == 1 else []
        changes: dict[str, Any] = {}
        if not found.allocated_bytes:
            changes = {"verdict": "unknown", "message": NOTHING}
        if self.error:
            changes = {"verdict": "too large", "message": f"{self.error}; {STOPPED}"}
        return dataclasses.replace(
            found,
            num_trainable_parameters=ledger.num_trainable_parameters,
            num_steps=ledger.step,
            prediction="; ".join(how),
            **changes,
        )

    def summary(self) -> str:
        """Return the plan as a readable text."""
        plan = self.plan().to_json()
        return plan_text.summary(self._device.gpu, plan, self._margin)


def need_of(plan: MemoryPlan) -> float:
    """Return the bytes that a plan needs; infinity if there was no room for it.

    Raises:
        ValueError: the code put nothing on the GPU.
    """
    if plan.verdict == "too large":
        return math.inf
    if not plan.allocated_bytes or plan.needed_bytes is None:
        raise ValueError(NOTHING)
    return plan.needed_bytes


@contextlib.contextmanager
def virtual_gpu(
    gpu: str = "H200",
    *,
    padding: bool = True,
    enforce_memory: bool = True,
    margin: float = MARGIN,
    ranks: int = 1,
) -> Iterator[TrainingMemory]:
    """Run training code on a GPU that is not there, and predict the memory it takes.

    While the context is active, `torch.cuda` describes the GPU, tensors on `cuda` are
    fake and hold no memory, and operators compute no values. All patches of torch are
    undone at the end; tensors made inside are of no use outside.

    Args:
        gpu: name of a GPU, which the help of the option `--gpu` lists, an unambiguous
            beginning of one, or the path of a JSON file.
        padding: whether the attention masks that models of transformers are given hide
            some tokens. Their values are unknown, and kernels for masks take more; code
            that passes no mask is not affected.
        enforce_memory: whether an operator whose output has no room raises
            `torch.OutOfMemoryError`, as on the GPU; if not, the code runs on and the
            plan says what it would have needed.
        margin: share of the GPU's memory that must stay free for the verdict `fits`.
        ranks: number of processes that train together, each on a GPU of its own, as
            `torchrun` starts them. The code runs once, as rank 0, and may use process
            groups and FSDP2.

    Yields:
        The memory of the code, which can be read inside the context and after it.

    Raises:
        GpuError: there is no such GPU.
        MissingError: an operator needs values; the message names it and its module.
        NotImplementedError: the code uses what is not modelled, as the documentation
            lists it; the message says what to do.
        RealGpuError: there is a real GPU in this process; set
            `CUDA_VISIBLE_DEVICES=""` before torch is imported.
        RuntimeError: another virtual GPU is active in this process.
        ValueError: `margin` is no share, or `ranks` is below 1.
    """
    if not 0 <= margin < 1:
        raise ValueError(f"`margin` is {margin}: expected a share from 0 to below 1")
    if ranks < 1:
        raise ValueError(f"`ranks` is {ranks}: expected 1 or more processes")
    if _is_active.is_set():
        raise RuntimeError(
            "a virtual GPU is active in this process: leave its context before another "
            "is entered (`largest_batch` enters one for each batch size)"
        )
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        raise NotImplementedError(
            "a process group of `torch.distributed` is not modelled by `virtual_gpu`: "
            "call `destroy_process_group()` before; `virtual_gpu(..., ranks=N)` plans "
            "one of several processes"
        )
    device = VirtualGpu(gpus.find(gpu))
    device.has_padding = padding
    device.num_ranks = ranks
    device.mode.makes_real_integers = True
    without_room = "raise" if enforce_memory else "go on"
    _is_active.set()
    try:
        with (
            _defaults_restored(),
            _new_accelerate_state(),
            device,
            ordinary_code.supported(ranks),
            assumed_selection.all_selected() as selections,
            device.new_ledger(without_room) as ledger,
            one_of(ranks, device.backend, ledger),
        ):
            memory = TrainingMemory(device, margin, selections)
            ledger.watch_all()
            try:
                yield memory
            except torch.OutOfMemoryError as error:
                memory.error = str(error)
                raise
    finally:
        _is_active.clear()


_is_active = threading.Event()


@contextlib.contextmanager
def _defaults_restored() -> Iterator[None]:
    """Restore the default dtype and device, which code may have set."""
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_default_device(device if device.type != "cpu" else None)


@contextlib.contextmanager
def _new_accelerate_state() -> Iterator[None]:
    """Let accelerate, and so the Trainer of transformers, look for devices anew.

    It keeps what it has found in the process, which may be that there is no GPU.
    """
    try:
        from accelerate.state import AcceleratorState, GradientState, PartialState
    except ImportError:
        yield
        return
    states = [
        kind._shared_state for kind in (AcceleratorState, GradientState, PartialState)
    ]
    before = [dict(state) for state in states]
    for state in states:
        state.clear()
    try:
        yield
    finally:
        for state, kept in zip(states, before, strict=True):
            state.clear()
            state.update(kept)


def largest_batch(
    train: Callable[[int], object],
    gpu: str = "H200",
    *,
    at_most: int = 4096,
    margin: float = MARGIN,
    ranks: int = 1,
) -> Fit:
    """Find the largest batch size with which training code fits on a GPU.

    Args:
        train: makes the model and runs two steps or more with a batch size; called
            several times, each time on an empty GPU.
        gpu: see `virtual_gpu`.
        at_most: upper bound of the batch size.
        margin: share of the GPU's memory that must stay free.
        ranks: see `virtual_gpu`; the batch size is that of one rank.

    Returns:
        The largest batch size, and the bytes needed by each that was tried; infinite
        where there was no room.

    Raises:
        ValueError: `at_most` is below 1, or the code put nothing on the GPU.
    """
    if at_most < 1:
        raise ValueError(f"`at_most` is {at_most}: expected 1 or more")

    def needed(batch_size: int) -> float:
        with virtual_gpu(
            gpu, enforce_memory=False, margin=margin, ranks=ranks
        ) as memory:
            train(batch_size)
            return need_of(memory.plan())

    room = (1 - margin) * gpus.find(gpu).memory_bytes
    return largest_that_fits(needed, room, at_most)
