"""Pages of searches by `fit`: what fits best, by which method, against what."""

from typing import Any

import pandas as pd
import pytest

from meft_reports.frame import read_frame, to_frame
from meft_reports.longest import find
from meft_reports.page.searches import search_answers, searches_of
from meft_reports.searches import options_in_words
from reporting.conftest import build_longest
from reporting.kinds import MakeRecord, Record, Write
from reporting.pages import as_text, before_figures, column, data_of, page_of

CAVEAT = "Predicted, with {}% of the memory left free, padding none; copies included."


def answers(records: list[Record]) -> list[str]:
    searches = searches_of(to_frame(records))
    return [as_text(text) for text in search_answers(searches)]


def on(device: str, records: list[Record]) -> list[Record]:
    """The same answers for another GPU."""
    return [
        record
        | {"cell_id": f"{record['cell_id']}/{device}"}
        | {"cell": record["cell"] | {"device": device}}
        for record in records
    ]


def test_a_search_is_one_workload() -> None:
    """The value that fits is the answer, and tells no two workloads apart."""
    data = data_of(page_of(to_frame(build_longest())))
    assert len(data["workloads"]) == 1
    assert data["workloads"][0]["seq_len"] == "largest"


def test_the_answer_compares_with_the_best_method_that_is_alike() -> None:
    """What keeps activations on the host is compared with what does, too."""
    (card, sentence) = answers(build_longest())
    assert "24 GB" in card
    assert (
        "with host memory 40,960 by meft1-exact against 20,480 by "
        "lora-checkpointing-offload (2.00 times)" in sentence
    )
    assert "by lora-checkpointing, no method of MEFT in this search" in sentence


def test_several_searches_have_a_range_and_short_titles() -> None:
    records = build_longest() + on("virtual-RTX4090-24GB", build_longest())
    first, _, *sentences = answers(records)
    assert "2.00 to 2.00 times with host memory (2 searches)" in first
    assert [text.partition(",")[0] for text in sentences] == ["H100", "RTX4090-24GB"]


def test_a_bound_is_compared_with_nothing(make_record: MakeRecord) -> None:
    """Where the model's positions are the limit, a longer sequence may fit."""
    records = [
        record
        if record["cell"]["method"] != "meft1-exact"
        else record | {"message": "memory is not the limit: the model has 40,960"}
        for record in build_longest()
    ]
    sentence = answers(records)[-1]
    assert "≥ 40,960 by meft1-exact" in sentence
    assert "times" not in sentence


def test_the_figure_has_every_method_of_every_search() -> None:
    data = data_of(page_of(to_frame(build_longest())))
    rows = data["searches"]
    assert column(rows, "method") == [
        *("lora", "lora-checkpointing", "lora-checkpointing-offload", "meft1-exact")
    ]
    assert column(rows, "value") == [0, 10_240, 20_480, 40_960]
    assert column(rows, "text") == [
        "nothing fits",
        "10,240",
        "20,480",
        "40,960 · 2.00×",  # noqa: RUF001
    ]
    assert column(rows, "share") == [0, 0.25, 0.5, 1]
    assert column(rows, "kind")[2:] == [
        "others, with host memory",
        "MEFT, with host memory",
    ]


def test_searches_for_batches_have_a_figure_too(make_record: MakeRecord) -> None:
    shape: Any = {"task": "synthetic-lm", "device": "virtual-H100", "seq_len": 512}
    records = [
        make_record(method=method, batch_size=size, **shape)
        | {"sweep": "fit-batch_size"}
        for method, size in (("lora-checkpointing", 4), ("meft1-exact", 12))
    ]
    (sentence,) = answers(records)
    assert (
        "largest batch in rows: on the device 12 by meft1-exact against 4" in sentence
    )
    assert "(3.00 times)" in sentence
    rows = data_of(page_of(to_frame(records)))["searches"]
    assert column(rows, "what") == ["largest batch"] * 2


def test_peaks_of_searches_are_in_no_other_sentence() -> None:
    """They are as large as the GPU by construction."""
    top = as_text(before_figures(page_of(to_frame(build_longest()))))
    assert "would hold" not in top
    assert "Each further" not in top


def test_two_searches_with_other_options_have_other_titles() -> None:
    """In the tables, in the figure and on the page."""
    records = []
    for percent in (5, 10):
        records += [
            record
            | {"sweep_caveats": CAVEAT.format(percent)}
            | {"cell_id": f"{record['cell_id']}/{percent}"}
            for record in build_longest()
        ]
    frame = to_frame(records)
    titles = [title for title, _ in find(frame)]
    assert [title.rpartition(" · ")[2] for title in titles] == [
        "with 10% of the memory left free",
        "with 5% of the memory left free",
    ]
    assert [search.title for search in searches_of(frame)] == [
        "with 10% of the memory left free",
        "with 5% of the memory left free",
    ]
    top = as_text(before_figures(page_of(frame)))
    assert top.count("Answers of searches by fit with 2 sets of options: 8 cells") == 1


@pytest.mark.parametrize(
    ("caveats", "words"),
    [
        ([], []),
        (["a, b; c."], [""]),
        (["a, b; c.", "a, d; c."], ["b", "d"]),
        (["", "a, b."], ["", "a, b"]),
        (["a 1, b 2, c", "a 3, b 4, c"], ["a 1, b 2", "a 3, b 4"]),
    ],
)
def test_options_are_the_clauses_that_differ(
    caveats: list[str], words: list[str]
) -> None:
    assert [*options_in_words(caveats).values()] == words


def test_names_are_those_of_the_whole_frame(make_record: MakeRecord) -> None:
    """A method is called the same in a search that lacks one of its variants."""
    shape: Any = {"task": "synthetic-lm", "method": "meft1-exact"}
    cells = [
        ("virtual-H100", "device"),
        ("virtual-H100", "host"),
        ("virtual-H200", "device"),
    ]
    records = [
        make_record(device=device, side_buffer=place, **shape)
        | {"sweep": "fit-seq_len"}
        for device, place in cells
    ]
    names = pd.concat([part for _, part in find(to_frame(records))])["name"]
    assert [*names] == [
        "meft1-exact (side_buffer=device)",
        "meft1-exact (side_buffer=host)",
        "meft1-exact (side_buffer=device)",
    ]


def test_searches_may_have_the_same_answer(write: Write) -> None:
    """With other options, they are two cells, of which none is left out."""
    records = [
        record | {"sweep_caveats": CAVEAT.format(percent)}
        for percent in (5, 10)
        for record in build_longest()
    ]
    frame = read_frame([write(records)])
    assert len(frame) == 8
    assert [len(part) for _, part in find(frame)] == [4, 4]
    assert (
        sum(name.endswith("5% of the memory left free") for name in frame["cell_id"])
        == 4
    )


def test_a_bar_opens_its_cell() -> None:
    """Whatever the order of methods is."""
    frame = to_frame(build_longest()[::-1])
    rows = data_of(page_of(frame))["searches"]
    for position, method in zip(
        column(rows, "cell"), column(rows, "method"), strict=True
    ):
        assert frame["method"][position] == method
