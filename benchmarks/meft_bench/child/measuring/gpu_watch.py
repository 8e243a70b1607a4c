"""What a cell measures of its GPU through NVML, from its start to its end.

    before this process uses the GPU    which processes do
    after its CUDA context exists       bytes of the context
    in timed steps                      energy, clocks, throttling, foreign processes
    in a step of its own                bytes over the link, memory by NVML
    in another one                      bytes of copies, by torch's profiler
    at the end                          foreign processes

The last step has a profiler, which the others must not have.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from meft_bench.child.measuring.partial_result import PartialResult
from meft_bench.child.meters.copies import profiled_copies
from meft_bench.child.meters.link import LinkMeter
from meft_bench.child.meters.power import PowerMeter
from meft_bench.child.meters.processes import (
    ForeignProcesses,
    context_bytes,
    process_bytes,
)
from meft_bench.child.meters.sampler import Sampler
from meft_bench.shared import nvml
from meft_bench.shared.nvml import NvmlGpu, Reading

LOOK_SECONDS = 0.2
"""Time between two looks at energy, throttling and processes during the training."""

Step = Callable[[], object]


class GpuWatch:
    """The meters of one cell on one GPU.

    Args:
        gpu: the GPU that the cell uses.
        partial: the partial result to update.
    """

    def __init__(self, gpu: NvmlGpu, partial: PartialResult) -> None:
        self._gpu = gpu
        self._partial = partial
        self._power = PowerMeter(gpu)
        self._foreign = ForeignProcesses(gpu, has_context())

    def note_context(self) -> None:
        """Make the CUDA context, and note its bytes."""
        torch.cuda.synchronize()
        reserved = torch.cuda.memory_reserved()
        self._partial.note_readings(context_bytes=context_bytes(self._gpu, reserved))

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Look at the GPU from time to time while the body trains."""
        with Sampler(self._look, LOOK_SECONDS):
            yield

    def step(self) -> contextlib.AbstractContextManager[None]:
        """Return the context of a timed step, inside of `training`."""
        return self._power.step()

    def _look(self) -> None:
        self._power.look()
        self._foreign.look()

    def probe_link(self, step: Step) -> None:
        """Note the bytes that a step moves over the link, and memory by NVML.

        Args:
            step: function that takes the step.
        """
        gpu = self._gpu
        torch.cuda.synchronize()
        with LinkMeter(gpu) as link:
            step()
            torch.cuda.synchronize()
            # The link of a GPU that idles has a lower generation.
            now = {
                "link_generation": gpu.link_generation(),
                "link_width": gpu.link_width(),
            }
        self._foreign.look()
        self._partial.note_readings(
            nvml_process_bytes=process_bytes(gpu),
            nvml_device_bytes=gpu.used_bytes(),
            pcie_rx_bytes=link.received,
            pcie_tx_bytes=link.sent,
            pcie_source=link.source,
            **now,
            link_generation_maximum=gpu.link_generation_maximum(),
            link_width_maximum=gpu.link_width_maximum(),
        )

    def close(self) -> None:
        """Note what was measured of all timed steps."""
        self._foreign.look()
        self._partial.note_readings(
            step_energy_joules=self._power.step_energy_joules,
            mean_power_watts=self._power.mean_power_watts,
            sm_clock_megahertz=self._power.sm_clock_megahertz,
            memory_clock_megahertz=self._power.memory_clock_megahertz,
            throttle_reasons=self._power.throttle_reasons,
            num_foreign_processes=self._foreign.most,
        )


NVML_NUMBERS = (
    *("context_bytes", "nvml_process_bytes", "nvml_device_bytes"),
    *("pcie_rx_bytes", "pcie_tx_bytes", "pcie_source"),
    *("link_generation", "link_width"),
    *("link_generation_maximum", "link_width_maximum"),
    *("step_energy_joules", "mean_power_watts"),
    *("sm_clock_megahertz", "memory_clock_megahertz", "throttle_reasons"),
    "num_foreign_processes",
)
"""Numbers that no cell has where NVML does not know its GPU."""


@contextlib.contextmanager
def watched(device: str, partial: PartialResult) -> Iterator[GpuWatch | None]:
    """Provide the meters of a cell's GPU, and note what they measured at the end.

    Enter it before the process uses the GPU.

    Args:
        device: the device of the cell.
        partial: the partial result to update.

    Yields:
        The meters; None on a CPU, and where NVML does not know the GPU, which is noted.
    """
    if device != "cuda":
        yield None
        return
    module = nvml.load()
    if module.value is None:
        _note_unmeasured(partial, module.reason)
        yield None
        return
    uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
    with nvml.open_gpu(module.value, [f"GPU-{uuid}", f"MIG-{uuid}"]) as gpu:
        if gpu.value is None:
            _note_unmeasured(partial, gpu.reason)
            yield None
            return
        watch = GpuWatch(gpu.value, partial)
        watch.note_context()
        try:
            yield watch
        finally:  # a cell that fails has been disturbed, too
            watch.close()


def has_context() -> bool:
    """Return whether this process may have a CUDA context already."""
    ask = getattr(torch._C, "_cuda_hasPrimaryContext", None)
    return ask is None or bool(ask(torch.cuda.current_device()))


def _note_unmeasured(partial: PartialResult, reason: str) -> None:
    none: Reading[Any] = Reading(None, reason)
    partial.note_readings(**dict.fromkeys(NVML_NUMBERS, none))


def probe_copies(step: Step, partial: PartialResult) -> None:
    """Note the bytes that a step copies between host and GPU, by torch's profiler.

    Args:
        step: function that takes the step.
        partial: the partial result to update.
    """
    try:
        copies = profiled_copies(step)
    except RuntimeError as error:  # without room for the profiler, or without CUPTI
        first = str(error).strip().splitlines()[:1]
        copies = Reading(None, f"torch's profiler fails: {' '.join(first)}")
    partial.note_readings(
        profiled_h2d_bytes=copies.then(lambda its: its.profiled_h2d_bytes),
        profiled_d2h_bytes=copies.then(lambda its: its.profiled_d2h_bytes),
        profiled_pageable_bytes=copies.then(lambda its: its.profiled_pageable_bytes),
    )
