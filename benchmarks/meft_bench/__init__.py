"""The benchmark harness, from sweeps to records.

Its entry point is `meft_bench.parent.cli`. For use in Python:

    virtual_gpu     run training code on a GPU that is not there: what memory it takes
    largest_batch   the largest batch size with which training code fits
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from meft_bench.virtual.prediction.training_code import largest_batch, virtual_gpu

__all__ = ["largest_batch", "virtual_gpu"]


def __getattr__(name: str) -> Any:
    """Import a public function when it is first used, as torch takes seconds."""
    if name in __all__:
        from meft_bench.virtual.prediction import training_code

        return getattr(training_code, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
