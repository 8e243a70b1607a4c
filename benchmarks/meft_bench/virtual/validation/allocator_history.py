"""Compare the model of the caching allocator with the allocator itself.

A program runs on the real GPU while torch records every request; the same requests are
then replayed by the model. Any difference is an error of the model.
"""

from collections.abc import Iterator

import torch

from meft_bench.shared.source import MissingError
from meft_bench.virtual.recording.snapshot import serve
from meft_bench.virtual.validation import training_steps
from meft_bench.virtual.validation.place import CheckFigure, Place

MOST_ENTRIES = 4_000_000


def figures(place: Place) -> Iterator[CheckFigure]:
    """Yield peaks from the GPU's allocator, and from the model of it."""
    if place.virtual is not None:
        raise MissingError("a history is recorded on a real GPU only")
    for name, run in training_steps.CASES.items():
        if "empty_cache" in name:  # the history does not record it
            continue
        with place.fresh():
            start_bytes = torch.cuda.memory_allocated()
            torch.cuda.memory._record_memory_history(
                context=None, max_entries=MOST_ENTRIES
            )
            try:
                run(place)
                torch.cuda.synchronize()
                (history,) = torch.cuda.memory._snapshot()["device_traces"]
            finally:
                torch.cuda.memory._record_memory_history(enabled=None)
            served = serve(history, start_bytes)
            yield from training_steps.peaks(name)
            for quantity, value in {
                "served_peak_allocated_bytes": served.allocated_bytes,
                "served_peak_reserved_bytes": served.reserved_bytes,
                "served_end_reserved_bytes": served.end_reserved_bytes,
                "num_entries": len(history),
            }.items():
                yield CheckFigure(case=name, quantity=quantity, value=value)
