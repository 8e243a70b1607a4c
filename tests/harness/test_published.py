"""Predictions of numbers that others measured on real GPUs and published."""

import re

import pytest
import torch

from meft_bench.shared.tables import path_in_use
from meft_bench.virtual.validation import published

pytestmark = [
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="there is a real GPU, which is left alone"
    ),
    # peft 0.21 on transformers 5.23.
    pytest.mark.filterwarnings("ignore:.* will be removed in v6:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),
    pytest.mark.filterwarnings("ignore:Accessing the data pointer:UserWarning"),
]
ROWS = published.read(path_in_use(published.FILE))
OPERATORS = [row for row in ROWS if row.source == "liger-kernel"]
STEPS = [row for row in ROWS if row.metric == "memory_allocated"]


def errors(rows: list[published.Published]) -> list[float]:
    return [one.error for one in published.compare(rows)]


@pytest.mark.parametrize(
    "program",
    [
        *("swiglu", "cross_entropy"),
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("geglu", "rms_norm", "layer_norm")
        ),
        pytest.param("fused_linear_cross_entropy", marks=pytest.mark.slow),
    ],
)
def test_operators_take_what_they_took_on_an_a100(program: str) -> None:
    """Within 1 part in 5,000; most to the byte."""
    rows = [row for row in OPERATORS if row.program == program]
    assert len(rows) >= 4
    assert max(map(abs, errors(rows))) < 2e-4


@pytest.mark.slow
def test_steps_hold_what_they_held_on_an_l40s() -> None:
    """Of full fine-tuning and six methods of PEFT, after a step of a 3B model."""
    assert len(STEPS) == 7
    assert max(map(abs, errors(STEPS))) < 2e-3


def test_every_number_has_a_source() -> None:
    for row in ROWS:
        assert row.source in published.PROGRAMS
        assert re.match(r"https://github\.com/\w+/", row.url)
        assert row.num_bytes > 2**20
        assert row.note


def test_a_table_names_the_worst() -> None:
    one, other = OPERATORS[:2]
    found = [
        published.Compared(published=one, predicted=one.num_bytes),
        published.Compared(published=other, predicted=other.num_bytes * 2),
    ]
    *_, line = published.table(found).splitlines()
    assert line.startswith("| liger-kernel | A100-80GB | `max_memory_allocated` | 2 |")
    assert line.endswith(f"| +100.00%: {other.program} {other.size} |")
