"""Compare the gradients of the exact inverse with the stored twin, bit for bit.

Each model runs twice: with the kernels that PyTorch chooses, some of which sum in an
order that varies between runs, and with deterministic kernels only.
"""

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

import torch

from meft.testing import check_reversible
from meft_bench.child.tasks import synthetic
from meft_bench.child.tasks.batches import full_batches
from meft_bench.child.training import prepare
from meft_bench.shared.cell import Cell
from meft_bench.shared.source import MissingError, Source
from meft_bench.virtual.validation.place import CheckFigure, Place

SHAPES: tuple[dict[str, Any], ...] = (
    {"backbone": "random:roberta-large", "dtype": "bf16", "batch_size": 16},
    {"backbone": "random:bert-base", "dtype": "fp32", "batch_size": 16},
    {
        "backbone": "random:opt-1.3b",
        "dtype": "bf16",
        "weights_dtype": "bf16",
        "batch_size": 8,
    },
    {
        "backbone": "random:llama-7b",
        "dtype": "bf16",
        "weights_dtype": "bf16",
        "batch_size": 2,
    },
    {"backbone": "random:roberta-large", "dtype": "fp16", "batch_size": 8},
)


def figures(place: Place) -> Iterator[CheckFigure]:
    """Yield the largest errors over all blocks."""
    if place.virtual is not None:
        raise MissingError("gradients have values on a real GPU only")
    for fields in SHAPES:
        cell = Cell(method="meft1-exact", device="cuda", seq_len=512, **fields)
        for deterministic in (False, True):
            yield from _check(cell, deterministic)


def _check(cell: Cell, deterministic: bool) -> Iterator[CheckFigure]:
    name = f"{cell.backbone} {cell.dtype} {cell.batch_size} x {cell.seq_len}"
    name += ", deterministic kernels" if deterministic else ""
    with _kernels(deterministic):
        source = Source(data_dir=None, allow_download=False)
        backbone = prepare.load_backbone(cell, synthetic.load(cell, source), source)
        rows = synthetic.examples(cell, backbone.model.config.vocab_size)
        stepper = prepare.apply_method(backbone, cell)
        stepper.model.train()
        batches = full_batches(rows, cell)
        for _ in range(2):  # so that adapters differ from their initialisation
            stepper.step(batches, learning_rate=1e-3)
        with stepper.autocast():
            report = check_reversible(stepper.model, stepper.to_device(batches[0]))
    for quantity in ("reconstruction_error", "gradient_error", "repeat_error"):
        worst = max(getattr(report, quantity))
        yield CheckFigure(case=name, quantity=quantity, value=worst)
    del backbone, stepper
    gc.collect()
    torch.cuda.empty_cache()


@contextlib.contextmanager
def _kernels(deterministic: bool) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(deterministic)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
