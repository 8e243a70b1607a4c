"""One cell on a virtual GPU: the same model, method and step, and the same meters.

    load task and config -> empty model on the virtual GPU -> apply the method
    -> probe memory, which steps as training does

There are no values, so nothing trains and nothing is scored; weights stay on disk, and
of the rows only their shape is used.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from unittest import mock

import torch

from meft.reversible import fixed
from meft.sparse.convert import sparse_adapters
from meft_bench import backbones, kernels, measure, probes
from meft_bench.cell import Cell
from meft_bench.registry import TASKS, load
from meft_bench.sighting import Sighting
from meft_bench.source import Source
from meft_bench.tasks.batches import Batch, Example, Image, full_batches
from meft_bench.tasks.question import AnswerTask
from meft_bench.training import Stepper
from meft_bench.virtual import declared, fused, gpu
from meft_bench.virtual.ledger import Ledger
from meft_bench.virtual.personality import VirtualGpu

HOW = "fake CUDA tensors; not held against a real GPU yet"


@dataclass(frozen=True, kw_only=True, slots=True)
class Ready:
    """A cell that can step, and who watches it."""

    cell: Cell
    """Its device is `cuda`."""
    device: VirtualGpu
    ledger: Ledger
    stepper: Stepper
    num_blocks: int
    """Before the method takes them apart."""
    batches: list[Batch]
    """One step's."""
    origins: dict[str, str]
    """Fields of `Environment`."""


@contextlib.contextmanager
def ready(cell: Cell, source: Source) -> Iterator[Ready]:
    """Everything of `cell` on its virtual GPU, for as long as the body lasts.

    Raises:
        MissingError: the backbone's config or the task is not at hand.
        ValueError: the config, the method and the shape do not go together.
    """
    task = load(TASKS[cell.task])(cell, source)
    config, origin = backbones.load_config(cell, source)
    device = VirtualGpu(gpu.find(gpu.name_in(cell.device)))
    cell = dataclasses.replace(cell, device="cuda")
    tells_tokens = isinstance(task, AnswerTask)
    num_labels = None if isinstance(task, AnswerTask) else task.num_labels
    ours = mock.patch.object(fixed, "_kernels_on", return_value=fused)
    sizes = declared.rows(cell.active_fraction)
    with (
        device,
        ours,
        sizes,
        kernels.attention(cell),
        Ledger(device.workspaces) as ledger,
    ):
        device.ledger = ledger
        backbone = backbones.from_config(config, origin, cell, num_labels)
        num_blocks = len(backbones.blocks_of(backbone.model))
        stepper = measure.apply_method(backbone, cell)
        ledger.watch(stepper.model, stepper.optimizer)
        yield Ready(
            cell=cell,
            device=device,
            ledger=ledger,
            stepper=stepper,
            num_blocks=num_blocks,
            batches=_batches(cell, backbones.image_shape(config), tells_tokens),
            origins={
                "data_origin": f"shapes only; {task.origin}",
                "weights_origin": origin,
            },
        )


def predict(cell: Cell, source: Source, sighting: Sighting) -> None:
    """Note in `sighting` what a step of `cell` would take.

    Raises:
        MissingError, ValueError: as `ready`.
        torch.OutOfMemoryError: the GPU is too small for it.
    """
    sighting.environment |= {
        "num_threads": torch.get_num_threads(),
        "prediction": HOW,
    }
    with ready(cell, source) as it:
        model = it.stepper.model
        sighting.environment |= {"device_name": it.device.gpu.name, **it.origins}
        if sparse_adapters(model):
            share = f"{it.cell.active_fraction:.0%} of a block's neurons"
            how = f"{HOW}; a batch is said to activate {share}"
            sighting.environment["prediction"] = how
        sighting.note(
            **measure.count(model),
            num_blocks=it.num_blocks,
        )
        probes.probe_memory(it.stepper, it.cell, it.batches, sighting)
        probes.probe_rows(it.stepper, it.batches, sighting)


def _batches(
    cell: Cell, image_shape: tuple[int, int, int] | None, tells_tokens: bool
) -> list[Batch]:
    """The largest step the cell can meet, of no particular tokens or images."""
    if image_shape is not None:
        return full_batches([Image(pixels=torch.zeros(image_shape), label=0)], cell)
    tokens = [0] * cell.seq_len
    row = Example(
        token_ids=tokens, segment_ids=tokens, label=tokens if tells_tokens else 0
    )
    return full_batches([row], cell)
