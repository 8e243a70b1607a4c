"""Functions of the library that can be replaced where there is no real device.

A virtual GPU runs the library on tensors without values. It replaces what needs a GPU,
host memory, or the values of tensors:

    meft.reversible.fixed.kernels_on       which kernels couple streams on a device
    meft.sparse.adam_on.adam_on            which AdamW updates rows on a device
    meft.page_lock.page_locked             page-locks host memory
    meft.host_memory.available_bytes       how much host memory there is
    meft.sparse.choice.distinct            which neurons a batch uses
    meft.sparse.indices.ids_of, all_ids, new_steps
                                           index tensors, whose size or use by the host
                                           depends on values
    meft.sparse.indices.knows_sizes        whether sizes that depend on values are known

    with kernels_on.replaced(lambda device: None):
        ...                                # the reference implementation runs
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Generic, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class Replaceable(Generic[P, R]):
    """A function that calls `plain`, unless it is replaced by another.

    Args:
        plain: the function of the library.
    """

    def __init__(self, plain: Callable[P, R]) -> None:
        functools.update_wrapper(self, plain)
        self.__qualname__: str
        self.plain = plain
        self._current = plain

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the function that is in use now."""
        return self._current(*args, **kwargs)

    def __reduce__(self) -> str:
        """Pickle and copy by name, as functions are, so that there is one object."""
        return self.__qualname__

    @contextlib.contextmanager
    def replaced(self, function: Callable[P, R]) -> Iterator[None]:
        """Use `function` while the context is active, in all threads."""
        before, self._current = self._current, function
        try:
            yield
        finally:
            self._current = before
