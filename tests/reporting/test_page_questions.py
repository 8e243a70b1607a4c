"""What a reader asks first: what fits, what counts as a difference, how to run it."""

from pathlib import Path
from typing import Any

import pytest

from meft_reports.frame import read_frame, to_frame
from meft_reports.page.card_answers import USABLE_BYTES, fits_card
from meft_reports.page.cells import comparable_cells
from meft_reports.page.pairs import pairs_of
from meft_reports.page.reading import differences_that_count, example_cell
from meft_reports.page.settings import Setting, settings_of
from reporting.conftest import GIB
from reporting.kinds import MakeRecord, Record
from reporting.pages import as_text, before_figures, page_of

ROOT = Path(__file__).parents[2] / "reports" / "published"
OUT_OF_MEMORY = (
    "OutOfMemoryError: no room for a segment of {0} GiB (a request of {0} GiB): "
    "{1} GiB are allocated and {1} GiB reserved of 24.0 GiB."
)


def settings_from(records: list[Record]) -> list[Setting]:
    return settings_of(comparable_cells(to_frame(records)))


def fitting(records: list[Record]) -> str:
    return " ".join(as_text(str(s)) for s in fits_card(settings_from(records)))


def counted(records: list[Record]) -> str:
    settings = settings_from(records)
    found = differences_that_count(settings, pairs_of(settings))
    return " ".join(as_text(str(sentence)) for sentence in found)


def run_of(make: MakeRecord, gib: dict[str, float], **its: Any) -> list[Record]:
    return [
        make(
            method=method, task="synthetic", peak_allocated_bytes=int(size * GIB), **its
        )
        for method, size in gib.items()
    ]


def test_all_fit(make_record: MakeRecord) -> None:
    """Tensors of a CPU are no proof of a GPU's peak, so it "would fit"."""
    text = fitting(run_of(make_record, {"full": 3, "lora": 1}))
    assert "Every setting would fit in a GPU of 24 GB; full on minilm-l6" in text
    assert text.endswith("would need most, 3.0 GiB.")


def test_what_ran_on_a_gpu_fits(make_record: MakeRecord) -> None:
    text = fitting(run_of(make_record, {"full": 30, "lora": 1}, device="cuda"))
    assert "A GPU of 24 GB holds full in 0 of 1 workload, lora in 1 of 1;" in text
    assert "the largest that fits is minilm-l6" in text


def test_a_prediction_would_fit(make_record: MakeRecord) -> None:
    predicted = {"device": "virtual-H200", "prediction": "by rules"}
    text = fitting(run_of(make_record, {"full": 30, "meft1-exact": 9}, **predicted))
    assert "would hold full in 0 of 1 workload, meft1-exact in 1 of 1" in text
    assert "the largest that would fit is" in text
    assert text.endswith("with meft1-exact, 9.0 GiB.")


def test_settings_that_do_not_count_are_named(make_record: MakeRecord) -> None:
    """Those with an assumed share of neurons, which may need more."""
    records = run_of(make_record, {"full": 12}, device="cuda")
    records += run_of(make_record, {"sparse": 30}, device="cuda", active_fraction=0.5)
    text = fitting(records)
    assert "Every setting, but for 1 setting with an assumed share of neurons," in text


def test_every_setting_is_every_one_of_every_place(make_record: MakeRecord) -> None:
    """A method that fits with one version of the code may not fit with another."""
    records = run_of(make_record, {"full": 12}, device="cuda", num_slots=1)
    records += run_of(make_record, {"full": 30}, device="cuda", num_slots=2)
    for index, record in enumerate(records):
        record["cell_id"] += f"/{index}"
    assert "Every setting" not in fitting(records)


def test_reserved_memory_counts_where_it_is_known(make_record: MakeRecord) -> None:
    records = run_of(
        make_record, {"full": 22.9}, device="cuda", peak_reserved_bytes=USABLE_BYTES + 1
    )
    assert "Nothing of this run fits in a GPU of 24 GB" in fitting(records)
    records = run_of(
        make_record, {"full": 22.9}, device="cuda", peak_reserved_bytes=USABLE_BYTES
    )
    assert "Every setting fits" in fitting(records)


@pytest.mark.parametrize(
    ("request_gib", "allocated_gib", "expected"),
    [
        (1.5, 22.5, "Nothing of this run would fit in a GPU of 24 GB; full on"),
        (1.5, 10.5, ""),
    ],
    ids=["of 24 GB", "of a smaller GPU"],
)
def test_out_of_memory_is_no_fit_where_it_needed_more(
    make_record: MakeRecord, request_gib: float, allocated_gib: float, expected: str
) -> None:
    """And says nothing of 24 GB where a smaller GPU was full."""
    message = OUT_OF_MEMORY.format(request_gib, allocated_gib)
    record = make_record("oom", method="full", task="synthetic", message=message)
    text = fitting([record])
    assert text.startswith(expected)
    assert bool(text) == bool(expected)
    assert not expected or text.endswith("would need least, more than 24.0 GiB.")


def test_a_workload_counts_once_whatever_the_device(make_record: MakeRecord) -> None:
    records = [
        record
        for device in ("virtual-H200", "virtual-RTX3090-24GB")
        for record in run_of(
            make_record,
            {"full": 30, "lora": 3},
            device=device,
            prediction="by rules",
        )
    ]
    assert "full in 0 of 1 workload, lora in 1 of 1" in fitting(records)


def test_assumed_sparsity_is_no_result(make_record: MakeRecord) -> None:
    assumed = {"active_fraction": 0.5}
    assert fitting(run_of(make_record, {"sparse": 3}, **assumed)) == ""


def test_without_a_peak_nothing_is_said(make_record: MakeRecord) -> None:
    assert fitting([make_record("error", task="synthetic")]) == ""
    assert counted([make_record("error", task="synthetic")]) == ""


def test_what_counts_as_a_difference(make_record: MakeRecord) -> None:
    """Of bytes each, of scores what the tests tell apart, of times what alternated."""
    records = [
        make_record(method=method, seed=seed, score=score + seed * slope)
        for method, score, slope in (("full", 0.9, 0.01), ("lora", 0.7, 0.02))
        for seed in (0, 1, 2)
    ]
    text = counted(records)
    assert "Bytes are counted, so a difference needs no test." in text
    assert "Scores: 1 of 1 pair on the same seeds differs significantly." in text
    assert "Times: none was timed in turns, so compare none." in text
    assert "too few seeds to test any difference" in counted(records[::3])
    timed = make_record(method="lora", reference="full", step_ratio=1.1)
    assert "compare those timed in turns only" in counted([timed])


def test_an_example_is_an_ok_cell_of_an_exact_method(make_record: MakeRecord) -> None:
    records = [
        make_record("oom", method="meft3-exact", task="synthetic"),
        *run_of(make_record, {"full": 3, "meft1-exact": 1}),
    ]
    found = example_cell(settings_from(records))
    assert found is not None
    assert found[1] == "meft1-exact"
    assert to_frame(records)["method"][found[0]] == "meft1-exact"
    assert example_cell([]) is None


@pytest.mark.parametrize(
    "path",
    sorted(ROOT.glob("*/records.jsonl.gz")),
    ids=lambda path: f"{path.parent.name}-run",
)
def test_published_runs_answer_a_reader(path: Path) -> None:
    """What fits, what counts, how to run it again, before the first figure."""
    top = as_text(before_figures(page_of(read_frame([path]))))
    assert "24 GB" in top
    assert "What counts: Bytes are counted" in top
    assert "opens its cell, with the command to copy" in top
