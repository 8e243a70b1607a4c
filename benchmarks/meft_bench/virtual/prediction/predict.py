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

import torch

from meft_bench.child import backbones
from meft_bench.child.measuring import probes
from meft_bench.child.measuring.partial_result import Sighting
from meft_bench.child.tasks.batches import Batch
from meft_bench.child.training import execution, prepare
from meft_bench.child.training.steps import Stepper
from meft_bench.shared import configs
from meft_bench.shared.cell import Cell
from meft_bench.shared.registry import HAVE_ROWS, TASKS, load
from meft_bench.shared.source import MissingError, Source
from meft_bench.virtual.device import gpu
from meft_bench.virtual.emulation import assumed_activation
from meft_bench.virtual.emulation.virtual_gpu import VirtualGpu
from meft_bench.virtual.recording.ledger import Ledger

HELD = "by rules that were held against an H200 (docs/virtual-gpu.md)"


@dataclass(frozen=True, kw_only=True, slots=True)
class Ready:
    """A cell that can step, and who watches it."""

    cell: Cell
    device: VirtualGpu
    ledger: Ledger
    stepper: Stepper
    num_blocks: int
    """Before the method takes them apart."""
    batches: list[Batch]
    """One step's."""
    how: str
    """How the numbers of the cell were predicted."""
    origins: dict[str, str | None]
    """Fields of `Environment`."""


@contextlib.contextmanager
def ready(cell: Cell, source: Source) -> Iterator[Ready]:
    """Everything of `cell` on its virtual GPU, for as long as the body lasts.

    Raises:
        MissingError: the backbone's config or the task is not at hand, or the method
            needs what this build of torch cannot tell.
        ValueError: the config, the method and the shape do not go together.
    """
    task = load(TASKS[cell.task])(cell, source)
    config, origin = backbones.load_config(cell, source)
    device = VirtualGpu(gpu.find(gpu.name_in(cell.device)))
    num_labels = prepare.num_labels_of(task)
    # For others, a size that depends on values is an error, and says so.
    has_rows = cell.method in HAVE_ROWS
    sizes = (
        assumed_activation.rows(cell.active_fraction)
        if has_rows
        else contextlib.nullcontext()
    )
    with (
        device,
        sizes,
        execution.attention(cell),
        device.new_ledger() as ledger,
    ):
        how = _how(cell, device)
        on_it = dataclasses.replace(cell, device=device.backend.device)
        backbone = backbones.from_config(config, origin, on_it, num_labels)
        num_blocks = len(backbones.blocks_of(backbone.model))
        stepper = prepare.apply_method(backbone, on_it)
        ledger.watch(stepper.model, stepper.optimizer)
        yield Ready(
            cell=cell,
            device=device,
            ledger=ledger,
            stepper=stepper,
            num_blocks=num_blocks,
            batches=_batches(cell, backbones.image_shape(config), num_labels),
            how=how,
            origins={
                "data_origin": f"shapes only; {task.origin}",
                "weights_origin": origin,
                "weights_sha256": configs.digest(cell.backbone),
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
        "prediction": HELD,
    }
    with ready(cell, source) as it:
        model = it.stepper.model
        sighting.environment |= {
            "device_name": it.device.gpu.name,
            "prediction": it.how,
            **it.origins,
        }
        sighting.note(
            **prepare.count(model),
            num_blocks=it.num_blocks,
        )
        # No kernel is tuned and no library warms up: after one step, all are alike.
        probes.probe_memory(
            it.stepper, it.cell, it.batches, sighting, num_first_steps=1
        )
        probes.probe_rows(it.stepper, it.batches, sighting)


def _how(cell: Cell, device: VirtualGpu) -> str:
    words = [device.backend.how, HELD]
    if cell.method in HAVE_ROWS:
        if device.backend.device == "cpu":
            raise MissingError(
                f"method {cell.method!r} keeps rows on the host, which this build of "
                f"torch ({torch.__version__}) cannot tell from a virtual GPU: run it "
                "on `cpu`, where every byte is counted, or take another build"
            )
        share = f"{cell.active_fraction:.0%} of a block's neurons"
        words.append(f"a batch is said to activate {share}")
    return "; ".join(words)


def _batches(
    cell: Cell, image_shape: tuple[int, int, int] | None, num_labels: int | None
) -> list[Batch]:
    """The largest step the cell can meet, of no particular tokens or images.

    As `meft_bench.child.tasks.batches.full_batches`, which goes through every token.
    """
    shape = (cell.batch_size, cell.seq_len)
    labels_shape = shape if num_labels is None else shape[:1]
    batches: list[Batch] = []
    for _ in range(cell.accumulation):
        labels = torch.zeros(labels_shape, dtype=torch.long)
        if image_shape is not None:
            pixels = torch.zeros(cell.batch_size, *image_shape)
            batches.append({"pixel_values": pixels, "labels": labels})
            continue
        ids = torch.zeros(shape, dtype=torch.long)
        batches.append(
            {
                "input_ids": ids,
                "token_type_ids": torch.zeros_like(ids),
                "attention_mask": torch.ones_like(ids),
                "labels": labels,
            }
        )
    return batches
