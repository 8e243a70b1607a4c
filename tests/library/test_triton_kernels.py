import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import meft
import meft.reversible
from library.models import batch, gradients, reversible
from marks import pairs
from meft.reversible import fixed
from meft.reversible.coupling import Branch, Coupling
from meft.reversible.fixed import Fixed
from meft.reversible.integer_format import FRACTION_BITS, FRACTION_BITS_WIDE

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# The interpreter is slow: each size takes one type.
SIZES = {
    1: torch.bfloat16,
    33: torch.float32,
    300: torch.float16,
    1000: torch.bfloat16,
    5003: torch.float32,
}

NUM_BITS = [0, 1, 2, 3, 4, 5, 8, 16]
every_num_bits = pytest.mark.parametrize("num_bits", NUM_BITS)
couplings = pytest.mark.parametrize("difference", [True, False], ids=["diff", "paper"])


@pytest.fixture(scope="module")
def interpreted() -> ModuleType:
    """The kernels in triton's interpreter, on the CPU."""
    return copy_of_kernels(interpret=True)


@pytest.fixture(scope="module")
def compiled() -> ModuleType:
    """The kernels as they are compiled, which takes no GPU."""
    return copy_of_kernels(interpret=False)


def copy_of_kernels(interpret: bool) -> ModuleType:
    """Of its own: triton decides on import how a kernel will be run."""
    pytest.importorskip("triton", reason="triton is not installed")
    spec = importlib.util.find_spec("meft.reversible.triton_kernels")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", str(int(interpret)))
        spec.loader.exec_module(module)
    return module


def coupling(num_bits: int, difference: bool, starts: bool) -> Coupling:
    return Coupling(
        target=0,
        branch=Branch(),
        scale=2.0**-num_bits,
        difference=difference,
        block=0,
        number=0,
        starts=starts,
    )


def streams(
    size: int, starts: bool, dtype: torch.dtype = torch.int32
) -> tuple[Tensor, Tensor]:
    """Any integers there are, the extremes among them, so that sums wrap around."""
    generator = torch.Generator().manual_seed(size)
    drawn = torch.randint(-(2**31), 2**31, (2, size), generator=generator)
    if dtype == torch.int64:
        drawn = (drawn << 32) + torch.randint(0, 2**32, (2, size), generator=generator)
    bounds = torch.iinfo(dtype)
    extremes = torch.tensor([bounds.min, bounds.max, 0, -1, 1])
    drawn[0, : len(extremes)] = extremes[:size]
    drawn[1, : len(extremes)] = extremes.flip(0)[:size]
    target, source = drawn.to(dtype)
    return (source.clone(), source) if starts else (target, source)


def values(size: int, dtype: torch.dtype, fraction_bits: int) -> Tensor:
    """Ordinary numbers; every sort of other one first, as far as there is room."""
    quantum = 2.0**-fraction_bits
    half = [(i + 0.5) * quantum for i in (-3, -2, -1, 0, 1, 2, 4194303, 4194304)]
    powers = (22, 23, 24, 29, 30, 31, 33, 60, 61, 62)
    whole = [sign * 2.0**i * quantum for i in powers for sign in (1, -1)]
    other = [float("nan"), float("inf"), -float("inf"), 1e38, -1e38, 1e-45, -1e-40, 0.0]
    generator = torch.Generator().manual_seed(size)
    drawn = torch.randn(size, generator=generator) * 10
    special = torch.tensor([*other, *half, *whole])[:size]
    drawn[: len(special)] = special
    return drawn.to(dtype)


def assert_same(
    interpreted: ModuleType,
    coupling: Coupling,
    target: Tensor,
    source: Tensor,
    value: Tensor,
    fraction_bits: int,
) -> None:
    """Target, kept and inverse of the two paths; each undoes what the other did."""
    arithmetic = Fixed(
        compute_dtype=torch.float32,
        fraction_bits=fraction_bits,
        stream_dtype=target.dtype,
    )
    num_bits = fixed.lost_bits(coupling)
    keep = num_bits > 0 and not coupling.starts
    expected, got, untouched = target.clone(), target.clone(), source.clone()
    kept = arithmetic.couple_(expected, source, value, coupling)
    arguments = (num_bits, coupling.difference, fraction_bits)
    got_kept = interpreted.couple_(got, source, value, *arguments, keep)
    assert torch.equal(got, expected)
    if keep:
        assert kept is not None
        assert got_kept.dtype == kept.dtype == torch.int32
        assert torch.equal(got_kept, kept)
    else:
        assert kept is None
        assert got_kept is None
    interpreted.uncouple_(got, source, value, kept, *arguments)
    assert torch.equal(got, target)
    arithmetic.uncouple_(expected, source, value, coupling, got_kept)
    assert torch.equal(expected, target)
    assert torch.equal(source, untouched)


@pairs(num_bits=NUM_BITS, difference=[True, False], starts=[False, True])
def test_the_kernels_compute_the_bits_of_the_reference(
    interpreted: ModuleType, num_bits: int, difference: bool, starts: bool
) -> None:
    """Stream, what is kept, and the way back, for every size and kind of number."""
    for size, dtype in SIZES.items():
        bits = FRACTION_BITS.get(dtype, FRACTION_BITS_WIDE)
        assert_same(
            interpreted,
            coupling(num_bits, difference, starts),
            *streams(size, starts),
            values(size, dtype, bits),
            bits,
        )


@pairs(num_bits=[0, 1, 4, 5], difference=[True, False], starts=[False, True])
def test_streams_of_64_bits_are_computed_as_the_reference_computes_them(
    interpreted: ModuleType, num_bits: int, difference: bool, starts: bool
) -> None:
    """What is kept has 32 bits a word either way."""
    for size, dtype in (
        (33, torch.float32),
        (300, torch.float16),
        (70, torch.bfloat16),
    ):
        at = coupling(num_bits, difference, starts)
        target, source = streams(size, starts, torch.int64)
        assert_same(interpreted, at, target, source, values(size, dtype, 14), 14)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    numbers=st.lists(
        st.tuples(
            st.integers(-(2**31), 2**31 - 1),
            st.integers(-(2**31), 2**31 - 1),
            st.floats(width=32),
        ),
        min_size=1,
        max_size=70,
    ),
    num_bits=st.integers(0, 16),
    difference=st.booleans(),
    fraction_bits=st.integers(0, 24),
)
def test_whatever_the_numbers_the_bits_are_the_references(
    interpreted: ModuleType,
    numbers: list[tuple[int, int, float]],
    num_bits: int,
    difference: bool,
    fraction_bits: int,
) -> None:
    """Any integers and any floats, at every scale that a config can ask for."""
    target, source, value = zip(*numbers, strict=True)
    assert_same(
        interpreted,
        coupling(num_bits, difference, False),
        torch.tensor(target, dtype=torch.int32),
        torch.tensor(source, dtype=torch.int32),
        torch.tensor(value, dtype=torch.float32),
        fraction_bits,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_all_numbers_of_16_bits_are_rounded_as_the_reference_rounds(
    interpreted: ModuleType, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """All 65536 of each type: every not-a-number, infinity, denormal and half."""
    monkeypatch.setattr(interpreted, "BLOCK", 2**16)  # one program
    value = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    zeros = torch.zeros(len(value), dtype=torch.int32)
    assert_same(interpreted, coupling(0, False, False), zeros, zeros, value, 14)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("fraction_bits", [14, 18])
def test_floats_are_rounded_half_to_even_at_every_magnitude(
    interpreted: ModuleType, fraction_bits: int, dtype: torch.dtype
) -> None:
    """The floats around halves and wholes, from 2^-2 quanta to where they clamp."""
    end = torch.iinfo(dtype).bits - 1
    whole = torch.cat([2.0 ** torch.arange(-2, end) + i for i in range(4)])
    exact = torch.cat([whole, whole + 0.5])
    near = [exact, exact.nextafter(exact * 2), exact.nextafter(exact * 0)]
    value = torch.cat([*near, *(-x for x in near)]) * 2.0**-fraction_bits
    zeros = torch.zeros(len(value), dtype=dtype)
    assert_same(
        interpreted, coupling(0, False, False), zeros, zeros, value, fraction_bits
    )


def test_double_precision_is_rounded_to_single_first(interpreted: ModuleType) -> None:
    """1.5 quanta less a bit that float32 lacks: 2, by way of 1.5; directly it is 1."""
    value = torch.tensor([1.5 - 2.0**-40, -1e300, 1e300], dtype=torch.float64)
    zeros = torch.zeros(3, dtype=torch.int32)
    got = zeros.clone()
    interpreted.couple_(got, zeros, value, 0, False, 0, False)
    assert got.tolist() == [2, -(2**29), 2**29]
    assert_same(interpreted, coupling(2, True, False), zeros, zeros, value, 0)


def test_values_may_lie_in_any_order(interpreted: ModuleType) -> None:
    """A transposed and an expanded value count by index, not by address."""
    target, source = (x.view(7, 5) for x in streams(35, False))
    transposed = values(35, torch.float32, 18).view(5, 7).t()
    expanded = values(5, torch.float32, 18).expand(7, 5)
    for value in (transposed, expanded):
        assert not value.is_contiguous()
        assert_same(interpreted, coupling(4, True, False), target, source, value, 18)


def test_streams_have_to_be_contiguous(interpreted: ModuleType) -> None:
    """A kernel would take them for something else: refused rather than ruined."""
    target, source = (x.view(7, 5).t() for x in streams(35, False))
    value = torch.zeros(5, 7)
    with pytest.raises(AssertionError):
        interpreted.couple_(target, source.contiguous(), value, 4, True, 18, True)
    with pytest.raises(AssertionError):
        interpreted.couple_(target.contiguous(), source, value, 4, True, 18, True)


def test_autograd_sees_that_a_stream_was_changed(interpreted: ModuleType) -> None:
    """What was saved before a coupling and is read after it raises, as in torch."""
    stream = torch.zeros(3, dtype=torch.int32)
    before = stream._version
    interpreted.couple_(stream, stream.clone(), torch.ones(3), 0, False, 0, False)
    assert stream._version > before


@pytest.mark.parametrize("lost_bits", [3, 4])
@pytest.mark.parametrize("coupling", ["difference", "paper"])
def test_a_model_has_the_same_gradients_with_either_path(
    interpreted: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    lost_bits: int,
    coupling: str,
) -> None:
    """Forward and backward through all couplings of a small model, equal in every bit.

    The kernels stand in here where they would on CUDA, and are seen to be called.
    """
    model = reversible(
        2, dropout=0.1, variant="meft1", lost_bits=lost_bits, coupling=coupling
    )
    inputs = batch()
    expected = gradients(model, inputs)
    calls = []

    def kernels(target: Tensor, source: Tensor) -> ModuleType:
        calls.append(target.shape)
        return interpreted

    monkeypatch.setattr(fixed, "kernels", kernels)
    got = gradients(model, inputs)
    # Forward and backward of two couplings a block; nothing reads what the last gives.
    assert len(calls) == 2 * 3
    assert got.keys() == expected.keys()
    for name, gradient in got.items():
        assert torch.equal(gradient, expected[name]), name


# Bytes moved per element: the streams, a number of 16 or 32 bits, k bits.
TRAFFIC = [
    ("_couple", "bf16", 4, True, 4 + 4 + 2 + 4 + 4 / 8),
    ("_couple", "fp32", 8, False, 4 + 4 + 4 + 8 / 8),
    ("_uncouple", "bf16", 4, True, 4 + 4 + 2 + 4 + 4 / 8),
    ("_uncouple", "fp16", 0, False, 4 + 2 + 4),
]


@pytest.mark.parametrize(
    ("kernel", "dtype", "num_bits", "difference", "moved"), TRAFFIC
)
def test_compiled_kernels_touch_every_number_once_and_round_as_written(
    compiled: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    kernel: str,
    dtype: str,
    num_bits: int,
    difference: bool,
    moved: float,
) -> None:
    """Counted in the code for a GPU, where every access is a vector's.

    The two sums that round must both be there: an optimizer that does not mind floats
    would cancel them.
    """
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    code = ptx(getattr(compiled, kernel), dtype, num_bits, difference)
    accesses = re.findall(r"(?:ld|st)\.global\.v(\d)\.b32", code)
    assert len(accesses) == len(re.findall(r"(?:ld|st)\.global", code))
    elements = 4 * (32 // num_bits if num_bits else 1)  # of one thread
    assert sum(4 * int(words) for words in accesses) / elements == moved
    assert len(re.findall(r"add\S*\.f32", code)) == 2 * elements


def ptx(kernel: Any, dtype: str, num_bits: int, difference: bool) -> str:
    """Code for a GPU of the year 2020 or later, with addresses as allocators align."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    pointers = {"target": "*i32", "source": "*i32", "value": f"*{dtype}"}
    numbers = {"num_values": "i32", "num_words": "i32", "scale": "fp32"}
    constants = {
        "NUM_BITS": num_bits,
        "OFFSET": 0,
        "WIDTH": num_bits,
        "ROWS": 32 // num_bits if num_bits else 1,
        "DIFFERENCE": difference,
        "LAST": True,
        "BLOCK": 512,
    }
    signature = pointers | {"words": "*i32"} | numbers | {"limit": "fp32"}
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(6)}
    source = ASTSource(
        kernel, signature | dict.fromkeys(constants, "constexpr"), constants, aligned
    )
    target = GPUTarget("cuda", 80, 32)
    code: str = triton.compile(source, target=target).asm["ptx"]
    return code


@pytest.mark.gpu
@couplings
@pytest.mark.parametrize("num_bits", [0, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [torch.int32, torch.int64], ids=str)
def test_a_gpu_computes_the_bits_of_the_reference(
    compiled: ModuleType,
    num_bits: int,
    difference: bool,
    dtype: torch.dtype,
    width: torch.dtype,
) -> None:
    """A stream of a real model's size, on CUDA by triton and by torch."""
    size = 8 * 512 * 1024 + 1
    bits = FRACTION_BITS.get(dtype, FRACTION_BITS_WIDE)
    target, source = (stream.cuda() for stream in streams(size, False, width))
    value = values(size, dtype, bits).cuda()
    at = coupling(num_bits, difference, False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fixed, "kernels", lambda *_: None)
        assert_same(compiled, at, target, source, value, bits)
    assert fixed.kernels(target, source) is not None


def test_on_a_cpu_the_reference_does_the_work() -> None:
    """Whether triton is there or not."""
    target, source = streams(8, False)
    assert fixed.kernels(target, source) is None


def test_the_library_does_without_triton() -> None:
    """Where it cannot be imported, `import meft` works and the reference is used.

    Nor does `import meft` import the kernels where it can (torch may import triton).
    """
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, meft\n"
        "assert 'meft.reversible.triton_kernels' not in sys.modules\n"
        "from meft.reversible import fixed\n"
        "assert fixed.kernels_on(torch.device('cpu')) is None"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture
def installed(
    interpreted: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ModuleType]:
    """The interpreted kernels as what `fixed` imports, and nothing decided yet."""
    monkeypatch.setitem(sys.modules, "meft.reversible.triton_kernels", interpreted)
    monkeypatch.setattr(meft.reversible, "triton_kernels", interpreted, raising=False)
    fixed.load_kernels.cache_clear()
    yield interpreted
    fixed.load_kernels.cache_clear()


def test_where_triton_works_the_kernels_are_used(installed: ModuleType) -> None:
    """They are tried on one element first; the interpreter works on a CPU."""
    assert fixed.kernels_on(torch.device("cpu")) is installed


def test_where_triton_does_not_work_the_reference_is_used_and_says_so(
    installed: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine without a C compiler: one warning, not an error in training."""

    def couple_(*_: object) -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(installed, "couple_", couple_)
    with pytest.warns(RuntimeWarning, match="without triton.*C compiler"):
        assert fixed.kernels_on(torch.device("cpu")) is None
    assert fixed.kernels_on(torch.device("cpu")) is None  # and no second warning
