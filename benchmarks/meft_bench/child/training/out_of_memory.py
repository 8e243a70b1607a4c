"""Which exceptions say that memory ran out. No heavy imports: torch may not fit."""

import errno

# How torch and the libraries below it say it.
_PHRASES = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "std::bad_alloc",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory, of the host or the device, ran out."""
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    return isinstance(error, RuntimeError) and any(s in str(error) for s in _PHRASES)
