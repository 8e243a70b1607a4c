"""The ledger against others who count: the CPU's allocator, PyTorch's MemTracker."""

import gc
import hashlib
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from harness.tiny import (
    BLOCKS,
    FAMILIES,
    batch,
    cell,
    classifier,
    num_lists,
)
from marks import slow_but_for
from meft_bench.child.meters import profiled
from meft_bench.child.meters.memory import cpu_step_peak_bytes
from meft_bench.child.tasks.batches import Batch
from meft_bench.child.training.steps import Stepper
from meft_bench.shared.registry import METHODS, load
from meft_bench.virtual.device import gpu, workspaces
from meft_bench.virtual.emulation.virtual_gpu import VirtualGpu
from meft_bench.virtual.recording import views
from meft_bench.virtual.recording.breakdown import breakdown
from meft_bench.virtual.recording.ledger import Ledger

pytestmark = pytest.mark.usefixtures("no_garbage_collection")

ACCURACY = 0.0005
RANDOM_STATE_BYTES = 6_000
SIZE = {"batch_size": 8, "seq_len": 32}


def ready(method: str, model_type: str) -> Stepper:
    here = cell(method=method, **SIZE)
    model = classifier(model_type, _attn_implementation="eager", use_cache=False)
    stepper = Stepper(load(METHODS[method])(model, here), here)
    stepper.model.train()
    for _ in range(2):
        stepper.step([batch(**SIZE)], 1e-3)
    return stepper


@pytest.mark.parametrize("model_type", slow_but_for(FAMILIES, "bert", "llama"))
@pytest.mark.parametrize("method", ["full", "lora", "checkpointing", "meft1"])
def test_a_peak_is_what_the_allocator_saw(method: str, model_type: str) -> None:
    """From the profiler's events, without a mode in between."""
    stepper, rows = ready(method, model_type), [batch(**SIZE)]
    truth = cpu_step_peak_bytes(lambda: stepper.step(rows, 1e-3))
    with Ledger(round_bytes=1) as ledger:
        ledger.watch(stepper.model, stepper.optimizer)
        for tensor in rows[0].values():
            ledger.see(tensor)
        before = sum(s.num_bytes for s in ledger.trace().storages)
        started = ledger.time
        stepper.step(rows, 1e-3)
    peak = ledger.trace().peak("cpu", started).num_bytes - before
    # A checkpoint keeps the state of random numbers, which no operator makes.
    num_blocks = num_lists(model_type) * BLOCKS
    unseen = num_blocks * RANDOM_STATE_BYTES if method == "checkpointing" else 0
    assert peak == pytest.approx(truth, rel=ACCURACY, abs=unseen)


PHASES = ("forward", "backward", "update")


def phases_of(
    stepper: Stepper, rows: Batch
) -> Iterator[tuple[str, Callable[[], object]]]:
    """One step, phase by phase."""
    losses: list[torch.Tensor] = []
    yield "forward", lambda: losses.append(stepper.loss(rows))
    yield "backward", lambda: losses.pop().backward()
    yield "update", stepper.optimizer.step
    stepper.optimizer.zero_grad()


def peaks_that_the_allocator_saw(stepper: Stepper, rows: Batch) -> dict[str, int]:
    """Of each phase, from the start of the step on."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        for phase, work in phases_of(stepper, rows):
            with torch.profiler.record_function(f"phase {phase}"):
                work()
    assert profile.profiler is not None
    results = profile.profiler.kineto_results
    assert results is not None
    events = list(results.events())
    spans = {
        e.name().removeprefix("phase "): (e.start_ns(), e.start_ns() + e.duration_ns())
        for e in events
        if e.name().startswith("phase ")
    }
    held, peaks = 0, dict.fromkeys(PHASES, 0)
    memory = (e for e in events if e.name() == "[memory]")
    for event in sorted(memory, key=lambda e: e.start_ns()):
        held += event.nbytes()
        for phase, (start, end) in spans.items():
            if start <= event.start_ns() <= end:
                peaks[phase] = max(peaks[phase], held)
    return peaks


@pytest.mark.parametrize("model_type", slow_but_for(FAMILIES, "bert", "llama"))
@pytest.mark.parametrize("method", ["full", "lora", "meft1"])
def test_every_phase_peaks_where_the_allocator_says(
    method: str, model_type: str
) -> None:
    stepper = ready(method, model_type)
    rows = stepper.to_device(batch(**SIZE))
    truth = peaks_that_the_allocator_saw(stepper, rows)
    with Ledger(round_bytes=1) as ledger:
        ledger.watch(stepper.model, stepper.optimizer)
        for tensor in rows.values():
            ledger.see(tensor)
        before = sum(s.num_bytes for s in ledger.trace().storages)
        started = ledger.time
        for _, work in phases_of(stepper, rows):
            work()
    found = views.peak_by_phase(ledger.trace(), "cpu", started)
    found["backward"] = max(found["backward"], found.pop("recompute", 0))
    # A view of what was there before the step allocates nothing.
    found["forward"] = max(found["forward"], found.pop("inputs", 0))
    assert found.keys() == truth.keys()
    # What no operator makes: MEFT's state of random numbers, numbers as tensors.
    unseen = RANDOM_STATE_BYTES if method == "meft1" else 64
    for phase, peak in found.items():
        within = pytest.approx(truth[phase], rel=ACCURACY, abs=unseen)
        assert peak - before == within, phase


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU")
@pytest.mark.filterwarnings("ignore:Module is None")
def test_pytorchs_tracker_counts_as_much() -> None:
    """One step, whose totals both know."""
    tracker_of = pytest.importorskip("torch.distributed._tools.mem_tracker")
    with VirtualGpu(gpu.find("H200")):
        model = classifier("bert").to("cuda").train()
        optimizer = torch.optim.SGD(model.parameters())
        rows = {name: tensor.to("cuda") for name, tensor in batch(**SIZE).items()}
        tracker = tracker_of.MemTracker()
        tracker.track_external(model, optimizer, *rows.values())
        with tracker:
            model(**rows).loss.backward()
            optimizer.step()
        theirs = tracker.get_tracker_snapshot("peak")[torch.device("cuda:0")]["Total"]
        model.zero_grad(set_to_none=True)
        with Ledger() as ledger:
            ledger.watch(model, optimizer)
            for tensor in rows.values():
                ledger.see(tensor)
            model(**rows).loss.backward()
            optimizer.step()
    ours = ledger.trace().peak("cuda").num_bytes
    # It sees gradients that are added up out of place.
    assert ours <= theirs <= 1.05 * ours


PROGRAM = """
from harness.test_ledger_truth import fingerprint
print(fingerprint())
"""


def fingerprint() -> str:
    """Of every event of two steps on a virtual GPU, under autocast."""
    here = cell(method="full", dtype="fp16", device="cuda", **SIZE)
    with VirtualGpu(gpu.find("H200")), Ledger() as ledger:
        stepper = Stepper(classifier("bert").to("cuda"), here)
        stepper.model.train()
        ledger.watch(stepper.model, stepper.optimizer)
        for _ in range(2):
            stepper.step([batch(**SIZE)], 1e-3)
    events = repr(ledger.trace().events)
    return hashlib.sha256(events.encode()).hexdigest()


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU")
def test_every_process_sees_the_same() -> None:
    """Five of them, whose addresses and hashes differ."""
    runs = [
        subprocess.run(
            [
                sys.executable,
                "-c",
                f"import sys; sys.path[:0] = {sys.path}{PROGRAM}",
            ],
            capture_output=True,
            text=True,
            check=True,
        )
        for _ in range(5)
    ]
    assert len({run.stdout for run in runs}) == 1


def test_fake_tensors_leave_no_trace_of_their_mode() -> None:
    """A ledger under a plain fake mode counts what is fake, and nothing else."""
    with FakeTensorMode(), Ledger() as ledger:
        torch.empty(1 << 40)
    (storage,) = ledger.trace().storages
    assert storage.num_bytes == 4 << 40


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["full", "lora", "meft1-exact"])
def test_what_the_ledger_misses_of_a_real_gpu_is_little(method: str) -> None:
    """Below a hundredth of the peak of what is requested.

    What is allocated is a little more: blocks keep what is too small to be split off.
    """
    here = cell(method=method, device="cuda", **SIZE)
    model = load(METHODS[method])(classifier("bert", hidden_size=512), here)
    stepper = Stepper(model.to("cuda"), here)
    stepper.model.train()
    rows = stepper.to_device(batch(**SIZE))
    for _ in range(2):
        stepper.step([rows], 1e-3)
    gc.collect()
    outside = torch.cuda.memory_stats()["requested_bytes.all.current"]
    torch.cuda.reset_peak_memory_stats()
    with Ledger(workspaces.of(gpu.find("H200")), round_bytes=1) as ledger:
        ledger.watch(stepper.model, stepper.optimizer)
        for tensor in rows.values():
            ledger.see(tensor)
        trace = ledger.trace()
        outside -= sum(trace.rounded(s.num_bytes) for s in trace.storages)
        stepper.step([rows], 1e-3)
    real = torch.cuda.memory_stats()["requested_bytes.all.peak"] - outside
    assert ledger.trace().peak("cuda").num_bytes == pytest.approx(real, rel=0.01)


@pytest.mark.parametrize("method", ["full", "lora", "checkpointing", "meft1"])
def test_the_profiler_sees_the_peak_that_a_ledger_records(method: str) -> None:
    """It is used where code is compiled; of eager code, both are known."""
    stepper, rows = ready(method, "bert"), [batch(**SIZE)]

    def step() -> None:
        stepper.step(rows, 1e-3)

    trace, start = profiled.trace_of(stepper.model, stepper.optimizer, step, "cpu")
    with Ledger(accelerator="cpu", round_bytes=1) as ledger:
        ledger.watch(stepper.model, stepper.optimizer)
        began = ledger.mark()
        step()
    seen = breakdown(trace, start)
    known = breakdown(ledger.trace(), began)
    # Checkpoints keep states of generators, which no operator of the ledger makes.
    states = RANDOM_STATE_BYTES * BLOCKS if method == "checkpointing" else 0
    margin = ACCURACY * known["peak_bytes"]
    assert -margin <= seen["peak_bytes"] - known["peak_bytes"] <= margin + states
    assert seen["phase"] == known["phase"].replace("recompute", "backward")
    stay = {"parameters", "frozen", "optimizer", "buffers"}
    assert [row for row in seen["rows"] if row[0] in stay][:8] == [
        row for row in known["rows"] if row[0] in stay
    ][:8]
