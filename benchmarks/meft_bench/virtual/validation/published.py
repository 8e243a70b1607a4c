"""Predict memory that others measured on real GPUs and published.

Each run of `meft_bench.shared.published` is repeated inside `virtual_gpu`, by the
program of its source.
"""

from collections.abc import Callable, Iterator, Sequence

import transformers

from meft_bench.shared import published
from meft_bench.shared.published import Published, PublishedFigure
from meft_bench.virtual.validation import (
    published_bert,
    published_gpt,
    published_images,
    published_litgpt,
    published_losses,
    published_nanovlm,
    published_operators,
    published_training,
)

PROGRAMS: dict[str, Callable[[Sequence[Published]], Iterator[int]]] = {
    "liger-kernel": published_operators.predict,
    "peft": published_training.method_comparison,
    "fms-acceleration": published_training.full_and_lora,
    "litgpt": published_litgpt.fine_tuning,
    "transformers-docs": published_bert.bert_on_v100,
    "torchao": published_images.vision_transformer,
    "nanovlm": published_nanovlm.by_batch_size,
    "llms-from-scratch": published_gpt.from_scratch,
    "cut-cross-entropy": published_losses.capped_cross_entropy,
    "linear-cross-entropy-loss": published_losses.head_and_cross_entropy,
}
"""By source: a function that takes the rows of a run and yields predicted bytes."""


def figures(check: str, device: str) -> Iterator[PublishedFigure]:
    """Predict every number of a run.

    Args:
        check: the name of one of `published.runs`.
        device: its virtual GPU.
    """
    yield from predict(published.rows_of(check, device))


def predict(rows: Sequence[Published]) -> Iterator[PublishedFigure]:
    """Predict the numbers of one run.

    Args:
        rows: all rows of a run, or several of them.
    """
    transformers.logging.set_verbosity_error()
    others: dict[tuple[str, str, str, int, str], dict[str, int | None]] = {}
    for key, estimate in published.estimates():
        others.setdefault(key, {})[estimate.tool] = estimate.num_bytes
    for row, num_bytes in zip(rows, PROGRAMS[rows[0].source](rows), strict=True):
        key = (row.source, row.program, row.gpu, row.size, row.metric)
        yield PublishedFigure(
            case=f"{row.program} {row.size}",
            quantity=row.metric,
            value=num_bytes,
            measured=row.num_bytes,
            source=row.source,
            url=row.url,
            note=row.note,
            is_calibration=bool(row.settings.get("calibration")),
            estimates=others.get(key, {}),
        )
