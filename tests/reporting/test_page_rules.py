"""The sentences of the page: when a rule speaks, what it says, when it is silent."""

from typing import Any

import pytest

from meft_reports.frame import to_frame
from meft_reports.intervals import holm, over_rows, over_seeds
from meft_reports.page.answers import answers_of
from meft_reports.page.caveats import caveats_of
from meft_reports.page.cells import all_cells, comparable_cells
from meft_reports.page.oom import at_least_bytes
from meft_reports.page.pairs import pairs_of
from meft_reports.page.score_answers import front_of
from meft_reports.page.searches import searches_of
from meft_reports.page.settings import Setting, settings_of
from meft_reports.tables import find_tables
from reporting.conftest import MIB, build_all, build_knowledge
from reporting.kinds import MakeRecord, Record, equal_memory
from reporting.pages import as_text

PREDICTED = {"device": "virtual-H200", "prediction": "by rules"}


def settings_from(records: list[Record]) -> list[Setting]:
    return settings_of(comparable_cells(to_frame(records)))


def answers(records: list[Record]) -> str:
    settings = settings_from(records)
    searches = searches_of(to_frame(records))
    found = answers_of(settings, pairs_of(settings), searches)
    return " ".join(as_text(str(sentence)) for sentence in found)


def caveats(records: list[Record]) -> dict[str, list[int]]:
    frame = to_frame(records)
    settings = settings_of(comparable_cells(frame))
    return {c.title: c.cells for c in caveats_of(all_cells(frame), settings)}


def memory_run(make: MakeRecord, sizes: dict[str, int], **its: Any) -> list[Record]:
    return [
        make(
            method=method,
            task="synthetic",
            model_state_bytes=MIB,
            peak_allocated_bytes=(1 + size) * MIB,
            **its,
        )
        for method, size in sizes.items()
    ]


def test_the_headline_is_what_an_exact_method_saves(make_record: MakeRecord) -> None:
    text = answers(memory_run(make_record, {"full": 100, "meft1-exact": 25}))
    assert "exact MEFT (meft1-exact) needs 25.0 MiB" in text
    assert "full fine-tuning needs 100.0 MiB: 75 % less" in text


def test_of_several_exact_methods_the_best_is_called_so(
    make_record: MakeRecord,
) -> None:
    sizes = {"full": 100, "meft1-exact": 25, "meft2-exact": 20}
    text = answers(memory_run(make_record, sizes))
    assert "(meft2-exact, the best of 2)" in text
    trials = memory_run(make_record, sizes, scored_on="validation", seed=1000)
    assert answers([*memory_run(make_record, sizes), *trials]) == text


def test_caveats_of_the_sweep_come_first(make_record: MakeRecord) -> None:
    """As their author wrote them, each with its cells; a long title is cut."""
    long = "words " * 40
    few = make_record() | {"sweep_caveats": f"Few rows.\n{long}"}
    found = caveats([few, make_record(seed=1), few | {"cell_id": "another"}])
    titles = list(found)
    assert titles[0] == "Few rows."
    assert len(found["Few rows."]) == 2
    assert titles[1].startswith("words words")
    assert titles[1].endswith("...")
    assert len(titles[1]) < len(long)


def test_a_prediction_would_need_memory(make_record: MakeRecord) -> None:
    sizes = {"full": 100, "meft1-exact": 25}
    text = answers(memory_run(make_record, sizes, **PREDICTED))
    assert "would need 25.0 MiB" in text
    assert "needs" not in text


def test_numbers_of_two_places_are_never_compared(make_record: MakeRecord) -> None:
    """Two versions of the code give two workloads, and no sentence compares them."""
    records = memory_run(make_record, {"full": 100})
    records += memory_run(make_record, {"meft1-exact": 25}, code_sha256="cc" * 32)
    (only,) = answers_of(settings_from(records), [], [])
    assert only.startswith("Every setting would fit in a GPU")
    assert "2 versions of the code" in caveats(records)


def test_devices_with_equal_bytes_count_once(make_record: MakeRecord) -> None:
    sizes = {"full": 100, "meft1-exact": 25}
    records = [
        record
        for seq_len in (64, 128)
        for device in ("virtual-H200", "virtual-RTX3090-24GB")
        for record in memory_run(
            make_record,
            {name: size * seq_len for name, size in sizes.items()},
            seq_len=seq_len,
            device=device,
            prediction="by rules",
        )
    ]
    assert "75 % less than full in 2 workloads" in answers(records)


def test_what_does_not_fit_is_more_than_a_size(make_record: MakeRecord) -> None:
    message = (
        "OutOfMemoryError: no room for a segment of 64.0 MiB (a request of 64.0 MiB): "
        "1,000.5 MiB are allocated and 1,010.0 MiB reserved of 1,024.0 MiB."
    )
    records = memory_run(make_record, {"meft1-exact": 25})
    records.append(make_record("oom", method="full", task="synthetic", message=message))
    text = answers(records)
    assert (
        "In 1 workload full fine-tuning does not fit and an exact method does" in text
    )
    assert "full more than 1.0 GiB" in text
    (full,) = [s for s in settings_from(records) if s.method == "full"]
    assert full.least_bytes == round(1064.5 * MIB)


def test_a_message_without_sizes_says_no_size() -> None:
    assert at_least_bytes("OutOfMemoryError: CUDA out of memory.") is None
    real = (
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of "
        "24.00 GiB. Of the allocated memory 22.50 GiB is allocated by PyTorch, and ..."
    )
    assert at_least_bytes(real) == int(24.5 * 2**30)


def test_a_slope_needs_three_depths(make_record: MakeRecord) -> None:
    def run(*depths: int) -> str:
        return answers(
            [
                record
                for depth in depths
                for record in memory_run(
                    make_record,
                    {"full": 10 * depth, "meft1-exact": 2 * depth},
                    depth=depth,
                )
            ]
        )

    assert "Each further block adds 2.0 MiB to meft1-exact; full 10.0 MiB" in run(
        2, 4, 8
    )
    assert "Each further block" not in run(2, 4)


def scored(make: MakeRecord, method: str, scores: list[float]) -> list[Record]:
    return [make(method=method, seed=s, score=score) for s, score in enumerate(scores)]


def test_a_tie_is_not_told_apart(make_record: MakeRecord) -> None:
    records = scored(make_record, "lora", [0.80, 0.70, 0.90])
    records += scored(make_record, "full", [0.81, 0.73, 0.85])
    text = answers(records)
    assert "lora has the highest mean score, 0.800" in text
    assert "which is not significantly different from full (0.797)" in text
    assert "equal" not in text.replace("equal memory", "")


def test_a_clear_difference_is_ahead(make_record: MakeRecord) -> None:
    records = scored(make_record, "lora", [0.80, 0.81, 0.82])
    records += scored(make_record, "full", [0.70, 0.71, 0.7201])
    assert "and is ahead of full (by 0.100)" in answers(records)


def test_meft_is_held_against_the_best_of_those_that_take_no_more(
    make_record: MakeRecord,
) -> None:
    """Better ones take more memory; worse ones of equal memory are not named."""
    found = answers(equal_memory(make_record))
    assert (
        "Against the best other method that takes no more memory: meft1-exact is not "
        "significantly different from lora-checkpointing (+0.077, "
    ) in found


def test_equal_scores_have_no_winner(make_record: MakeRecord) -> None:
    for scores, seeds in (([0.0, 0.0], "two"), ([0.0], "one")):
        records = scored(make_record, "lora", scores)
        records += scored(make_record, "full", scores)
        text = answers(records)
        assert "all of 2 settings have the same score, 0.000." in text, seeds
        assert "highest" not in text


def test_one_seed_tells_nothing_apart(make_record: MakeRecord) -> None:
    records = [
        make_record(method=m, score=s) for m, s in (("lora", 0.8), ("full", 0.9))
    ]
    assert "full has the highest score, 0.900, of one seed: no difference" in answers(
        records
    )


def test_the_front_is_what_nothing_beats_in_both(make_record: MakeRecord) -> None:
    points = {"head": (100, 0.5), "lora": (200, 0.4), "full": (300, 0.9)}
    records = [
        make_record(
            method=method,
            seed=seed,
            score=score + seed / 100,
            peak_allocated_bytes=size * MIB,
        )
        for method, (size, score) in points.items()
        for seed in (0, 1, 2)
    ]
    front = front_of(settings_from(records))
    assert [setting.method for setting in front] == ["head", "full"]
    assert "from 100.0 MiB head 0.510" in answers(records)


def test_pairs_agree_with_the_table_of_differences() -> None:
    """The same differences and intervals, one from a frame and one from cells."""
    settings = settings_from(build_knowledge())
    pairs = {
        (pair.setting.method, pair.against.method): pair for pair in pairs_of(settings)
    }
    (table,) = find_tables("differences")(to_frame(build_knowledge()))
    for row in table.rows:
        one, other = (text.partition(" ")[0] for text in row[:2])
        pair = pairs[one, other]
        assert f"{pair.interval.mean:+.3f}" == row[5]
        assert f"{pair.interval.low:+.3f} to {pair.interval.high:+.3f}" == row[6]
        assert str(pair.num_rows) == row[9]


def test_holm_corrects_for_the_number_of_tests() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []
    assert holm([0.5]) == [0.5]


def test_intervals_of_one_value_have_no_ends() -> None:
    assert over_seeds([0.5])[1:3] == (None, None)
    assert over_rows([0.5])[1:3] == (None, None)
    low, high = over_seeds([1.0, 2.0, 3.0])[1:3]
    assert low == pytest.approx(2 - 2.4841, abs=1e-3)
    assert high == pytest.approx(2 + 2.4841, abs=1e-3)


def test_seeds_of_a_setting_are_its_own() -> None:
    """Every cell is in one setting at most, with others of equal options and place."""
    settings = settings_from(build_all())
    indices = [cell["index"] for setting in settings for cell in setting.cells]
    assert len(indices) == len(set(indices))
    for setting in settings:
        assert len({cell["code_sha256"] for cell in setting.cells}) == 1
        seeds = [cell["seed"] for cell in setting.ok]
        assert len(seeds) == len(set(seeds))


def test_names_of_settings_of_a_workload_differ() -> None:
    settings = settings_from(build_all())
    names = [(setting.workload.index, setting.name) for setting in settings]
    assert len(names) == len(set(names))


def test_caveats_name_their_cells(make_record: MakeRecord) -> None:
    records = [
        make_record(method="full", seed=0),
        make_record("oom", method="lora"),
        make_record(method="meft1", dirty=True),
        make_record(method="sparse", task="synthetic", active_fraction=0.5),
    ]
    found = caveats(records)
    order = to_frame(records)["method"].tolist()
    assert [order[i] for i in found["1 cell out of memory"]] == ["lora"]
    assert [order[i] for i in found["Uncommitted code in 1 cell"]] == ["meft1"]
    assert [order[i] for i in found["Assumed sparsity in 1 cell"]] == ["sparse"]
    assert "Few seeds: 1 per setting" in found
    assert "Small evaluation: 445 rows" in found


def test_a_sound_run_has_no_caveat(make_record: MakeRecord) -> None:
    records = [make_record(seed=seed, num_eval_rows=5000) for seed in range(5)]
    assert caveats(records) == {}


def test_an_untrained_start_is_no_result(make_record: MakeRecord) -> None:
    """It is the point that methods start from, and on no front."""
    records = scored(make_record, "lora", [0.8, 0.81])
    records.append(make_record(method="lora", score=0.3, learning_rate=1e-12))
    names = {setting.name: setting for setting in settings_from(records)}
    assert set(names) == {"lora", "lora · before training"}
    assert names["lora"].numbers["score"] == pytest.approx(0.805)
