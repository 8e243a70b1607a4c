"""One cell on a virtual GPU: the same model, method and step, and the same meters.

    load task and config -> empty model on the virtual GPU -> apply the method
    -> probe memory, which steps as training does

There are no values, so nothing trains and nothing is scored; weights stay on disk, and
of the rows only their shape is used.
"""

import dataclasses

import torch

from meft_bench import backbones, kernels, measure, probes
from meft_bench.cell import Cell
from meft_bench.registry import TASKS, VIRTUAL, load
from meft_bench.sighting import Sighting
from meft_bench.source import MissingError, Source
from meft_bench.tasks.batches import Batch, Example, full_batches
from meft_bench.tasks.question import AnswerTask
from meft_bench.virtual import gpu
from meft_bench.virtual.ledger import Ledger
from meft_bench.virtual.personality import VirtualGpu

HOW = "fake CUDA tensors; not held against a real GPU yet"


def predict(cell: Cell, source: Source, sighting: Sighting) -> None:
    """Note in `sighting` what a step of `cell` would take.

    Raises:
        MissingError: the backbone's config or the task is not at hand.
        torch.OutOfMemoryError: the GPU is too small for it.
    """
    if cell.method.startswith(("sparse", "dense-offload")):
        raise MissingError(
            f"method {cell.method!r} moves the rows that a batch activates, and on a "
            "virtual GPU there are no values to tell which: run it on `cpu`, where "
            "every byte is counted, or on `cuda`"
        )
    task = load(TASKS[cell.task])(cell, source)
    config, origin = backbones.load_config(cell, source)
    device = VirtualGpu(gpu.find(cell.device.removeprefix(VIRTUAL)))
    sighting.environment |= {
        "device_name": device.gpu.name,
        "num_threads": torch.get_num_threads(),
        "data_origin": f"shapes only; {task.origin}",
        "weights_origin": origin,
        "prediction": HOW,
    }
    cell = dataclasses.replace(cell, device="cuda")
    num_labels = None if isinstance(task, AnswerTask) else task.num_labels
    with device, kernels.attention(cell), Ledger(device.workspaces) as ledger:
        device.ledger = ledger
        backbone = backbones.from_config(config, origin, cell, num_labels)
        num_blocks = len(backbones.blocks_of(backbone.model))
        stepper = measure.apply_method(backbone, cell)
        ledger.watch(stepper.model, stepper.optimizer)
        parameters = list(stepper.model.parameters())
        sighting.note(
            num_parameters=sum(p.numel() for p in parameters),
            num_trainable_parameters=sum(
                p.numel() for p in parameters if p.requires_grad
            ),
            num_blocks=num_blocks,
        )
        batches = _batches(cell, tells_tokens=isinstance(task, AnswerTask))
        probes.probe_memory(stepper, cell, batches, sighting)


def _batches(cell: Cell, tells_tokens: bool) -> list[Batch]:
    """The largest step the cell can meet, of no particular tokens."""
    tokens = [0] * cell.seq_len
    row = Example(
        token_ids=tokens, segment_ids=tokens, label=tokens if tells_tokens else 0
    )
    return full_batches([row], cell)
