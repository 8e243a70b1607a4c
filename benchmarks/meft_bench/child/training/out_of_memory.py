"""Exceptions that mean out of memory. No heavy imports: torch may not fit."""

import errno

# Messages of torch and of the libraries it uses.
_PHRASES = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "std::bad_alloc",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether `error` means that memory of the host or the device ran out."""
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    return isinstance(error, RuntimeError) and any(s in str(error) for s in _PHRASES)
