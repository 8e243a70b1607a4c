"""What methods recall by the bytes on the device of what they train."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import stdtrit

from meft_reports.frame import to_frame
from meft_reports.intervals import holm
from meft_reports.tables import find_tables
from reporting.kinds import MakeRecord, Record


def arms(make: MakeRecord) -> list[Record]:
    """A sparse adapter, LoRA of about its bytes and of more, over three seeds."""
    known = {
        ("sparse-experts-frozen", 8): (100, 0.7, 0.02),
        ("lora-all", 4): (104, 0.5, 0.01),  # within the margin
        ("lora-all", 2): (50, 0.3, 0.03),
        ("lora-all", 16): (400, 0.9, 0.0),
    }
    return [
        make(
            method=method,
            lora_rank=rank,
            task="facts-random",
            seed=seed,
            score=score + seed * step,
            score_name="exact_recall",
            second_score=0.75,
            second_score_name="token_accuracy",
            third_score=0.8,
            third_score_name="share_of_bits",
            recalled_bits=288 * 100,
            trainable_device_bytes=size * 2**20,
            guard_start_perplexity=20.0,
            guard_perplexity=21.0,
        )
        for (method, rank), (size, score, step) in known.items()
        for seed in (0, 1, 2)
    ]


def test_recall_is_shown_with_the_bytes_on_the_device(make_record: MakeRecord) -> None:
    """With the bits for each of them, and the perplexity of other text."""
    table, _ = find_tables("capacity")(to_frame(arms(make_record)))
    found = {row[0]: dict(zip(table.header, row, strict=True)) for row in table.rows}
    one = found["sparse-experts-frozen"]
    assert (one["seeds"], one["on the device"]) == ("3", "100.0 MiB")
    assert one["exact recall"] == "0.720 ± 0.020"
    assert (one["tokens"], one["bits"], one["perplexity"]) == (
        "0.750",
        "0.800",
        "1.050",
    )
    assert one["bits per byte"] == f"{28_800 / (100 * 2**20):.4f}"
    assert len(found) == 4


def test_only_what_takes_no_more_bytes_is_compared(make_record: MakeRecord) -> None:
    """The two ranks of LoRA that do; a rank of four times the bytes is left out."""
    _, table = find_tables("capacity")(to_frame(arms(make_record)))
    rows = [dict(zip(table.header, row, strict=True)) for row in table.rows]
    assert [row["its bytes"] for row in rows] == ["50.0 MiB", "104.0 MiB"]
    assert {row["method"] for row in rows} == {"sparse-experts-frozen"}
    assert [row["difference"] for row in rows] == ["+0.390", "+0.210"]
    for row in rows:
        low, high = map(float, row["interval"].split(" to "))
        assert low < float(row["difference"]) < high


@pytest.mark.parametrize("name", ["train_rows", "max_steps"])
def test_arms_with_other_facts_or_exposures_are_not_compared(
    make_record: MakeRecord, name: str
) -> None:
    records = arms(make_record)
    for record in records:
        if record["cell"]["lora_rank"] == 2:
            record["cell"][name] = 777
    _, table = find_tables("capacity")(to_frame(records))
    assert [row[3] for row in table.rows] == ["104.0 MiB"]


def test_records_without_recalled_bits_make_no_table(make_record: MakeRecord) -> None:
    assert find_tables("capacity")(to_frame([make_record(score=0.5)])) == []


@pytest.mark.parametrize(
    ("values", "adjusted"),
    [
        ([], []),
        ([0.04], [0.04]),
        ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]),
        ([0.02, 0.02], [0.04, 0.04]),
        ([0.9, 0.8, 0.001], [1.0, 1.0, 0.003]),
    ],
)
def test_holm_multiplies_the_least_by_the_number_of_tests(
    values: list[float], adjusted: list[float]
) -> None:
    """The next by one less, never less than the one before, and never above 1."""
    assert holm(values) == pytest.approx(adjusted)


def power(num_seeds: int, difference: float, level: float, num_facts: int = 0) -> float:
    """Share of simulated experiments in which a paired t-test over seeds finds one.

    Recall is 0.5, the correlation of the two arms 0.3, and the deviation between seeds
    0.02, to which the draw of facts adds its own where their number is given.
    """
    generator = np.random.default_rng(0)
    variance = 0.02**2 + (0.25 / num_facts if num_facts else 0)
    noise = generator.standard_normal((2, 40_000, num_seeds))
    other = 0.3 * noise[0] + np.sqrt(1 - 0.3**2) * noise[1]
    differences = difference + np.sqrt(variance) * (noise[0] - other)
    errors = differences.std(axis=1, ddof=1) / np.sqrt(num_seeds)
    critical = stdtrit(num_seeds - 1, 1 - level / 2)
    return float((differences.mean(axis=1) / errors > critical).mean())


@pytest.mark.parametrize(
    ("arguments", "stated"),
    [
        ((8, 0.05, 0.05 / 8), 0.93),
        ((8, 0.03, 0.05 / 8), 0.47),
        ((8, 0.05, 0.05 / 8, 2_000), 0.85),
        ((8, 0.03, 0.05 / 8, 2_000), 0.34),
        ((2, 0.1, 0.05, 250), 0.20),
        ((2, 0.2, 0.05, 250), 0.38),
        ((2, 0.4, 0.05, 250), 0.68),
        ((2, 0.8, 0.05, 250), 0.96),
    ],
)
def test_the_power_of_the_sweeps_of_facts_is_as_stated(
    arguments: tuple[Any, ...], stated: float
) -> None:
    """In benchmarks/README.md."""
    assert power(*arguments) == pytest.approx(stated, abs=0.015)
    text = (Path(__file__).parents[2] / "benchmarks" / "README.md").read_text()
    assert f"{stated:.2f}" in text.partition("**Power**")[2].partition("\n- ")[0]
