"""Host memory that is page-locked, with CUDA's runtime replaced by a list of calls."""

import gc

import pytest
import torch

from meft.errors import MeftError
from meft.page_lock import page_locked, page_locked_bytes


class Runtime:
    """CUDA's runtime, which registers memory, or fails with `code`."""

    def __init__(self, code: int = 0) -> None:
        self.code = code
        self.registered: list[int] = []

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:
        self.registered.append(address)
        return self.code

    def cudaHostUnregister(self, address: int) -> int:
        self.registered.remove(address)
        return 0


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    runtime = Runtime()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    return runtime


def test_locked_memory_counts_as_long_as_it_is_alive(runtime: Runtime) -> None:
    """Its bytes, without rounding; memory of no elements is not locked."""
    before = page_locked_bytes()
    rows, moments = page_locked(torch.zeros(3, 5)), page_locked(torch.zeros(7))
    page_locked(torch.zeros(0))
    assert page_locked_bytes() - before == (15 + 7) * 4
    assert runtime.registered == [rows.data_ptr(), moments.data_ptr()]
    del rows
    gc.collect()
    assert page_locked_bytes() - before == 7 * 4
    assert runtime.registered == [moments.data_ptr()]


def test_memory_that_cannot_be_locked_does_not_count(runtime: Runtime) -> None:
    """It is refused."""
    before, runtime.code = page_locked_bytes(), 2
    with pytest.raises(MeftError, match="could not be page-locked"):
        page_locked(torch.zeros(3))
    assert page_locked_bytes() == before
