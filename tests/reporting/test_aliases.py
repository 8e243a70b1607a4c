"""Methods, backbones and tasks of a user in reports: by their short names."""

from typing import Any

import pytest

from meft_reports.aliases import with_aliases
from meft_reports.errors import RecordError
from meft_reports.frame import read_frame
from meft_reports.style import look
from meft_reports.valid_records import validate
from reporting.kinds import Cli, MakeRecord, Write

LORA, OTHER = "peft:lora-05fc0062d4fa", "peft:lora-3f2a91bc0d12"
MODEL, ROWS = "dir:bert-9ab5fe219c13", "data:classification-c4364747818f"


def of_seed(make_record: MakeRecord, seed: int) -> list[dict[str, Any]]:
    names = {MODEL: "small", ROWS: "reviews"}
    its: Any = {"backbone": MODEL, "task": ROWS, "score_name": "own:kappa"}
    its |= {"seed": seed, "majority_score": -9.0}
    full = make_record(method="full", score=seed - 3.5, **its)
    own = make_record(method=LORA, score=seed + 2.5, **its)
    return [full | {"aliases": names}, own | {"aliases": {**names, LORA: "mine"}}]


@pytest.fixture
def mine(make_record: MakeRecord) -> list[dict[str, Any]]:
    """A method, a model and data of a user, next to full fine-tuning."""
    return of_seed(make_record, seed=0)


def test_the_frame_has_short_names(mine: list[dict[str, Any]], write: Write) -> None:
    """And the digests in what joins records."""
    frame = read_frame(write(mine))
    assert [*frame["method"]] == ["full", "mine"]
    assert {*frame["backbone"]} == {"small"}
    assert {*frame["task"]} == {"reviews"}
    assert frame["cell_id"].str.contains(MODEL).all()


def test_a_reference_has_its_short_name(mine: list[dict[str, Any]]) -> None:
    mine[0]["cell"]["reference"] = LORA
    assert with_aliases(mine)[0]["cell"]["reference"] == "mine"
    assert mine[0]["cell"]["reference"] == LORA


def test_two_things_of_one_name_are_told_apart(mine: list[dict[str, Any]]) -> None:
    """By the beginnings of their digests, and so is what has a name of ours."""
    mine[0]["cell"]["method"] = OTHER
    mine[0]["aliases"][OTHER] = "mine"
    found = [record["cell"]["method"] for record in with_aliases(mine)]
    assert found == ["mine-3f2a", "mine-05fc"]
    mine[1]["aliases"] = {LORA: "lora"}
    assert with_aliases(mine)[1]["cell"]["method"] == "lora-05fc"


@pytest.mark.parametrize("aliases", [None, 3, [], {LORA: 3}, {LORA: ""}])
def test_records_without_short_names_are_as_they_were(
    mine: list[dict[str, Any]], aliases: Any
) -> None:
    records = [record | {"aliases": aliases} for record in mine]
    assert with_aliases(records) == records


@pytest.mark.parametrize(
    "name", ["own:kappa", "perplexity", "log_likelihood_per_token"]
)
def test_some_scores_may_be_any_number(make_record: MakeRecord, name: str) -> None:
    """Those of a user's metric, and of language modelling; others are shares."""
    for score in (-1e9, 17.0):
        assert not validate(make_record(score_name=name, score=score), "line 1")
        with pytest.raises(RecordError, match=r"`measurement\.score` should be"):
            validate(make_record(score_name="accuracy", score=score), "line 1")
    with pytest.raises(RecordError, match=r"`measurement\.score` should be"):
        validate(make_record(score_name="pearson", score=-1.5), "line 1")
    assert not validate(make_record(score_name="pearson", score=-0.5), "line 1")


def test_a_method_of_a_user_always_looks_the_same() -> None:
    assert look("mine") == look("mine")
    assert look("mine") != look("full")


def test_every_report_has_them(make_record: MakeRecord, write: Write, cli: Cli) -> None:
    """A page, tables and a figure, with scores below 0 and above 1."""
    path = write([*of_seed(make_record, 0), *of_seed(make_record, 1)])
    for words in (
        ["table", "results", path],
        ["table", "differences", path],
        ["plot", "score_memory", path, "-o", path.with_suffix(".svg")],
        ["page", path, "-o", path.with_suffix(".html")],
        ["frame", path, "-o", path.with_suffix(".csv")],
    ):
        done = cli(*map(str, words))
        assert done.returncode == 0, done.stderr
        if words[0] == "table":
            assert "mine" in done.stdout
    assert "mine" in path.with_suffix(".svg").read_text()
    assert "mine" in path.with_suffix(".csv").read_text()
    page = path.with_suffix(".html").read_text()
    assert "mine" in page
    baseline = path.with_name("baseline.jsonl")
    assert cli("baseline", str(path), "-o", str(baseline)).returncode == 0
    assert LORA in baseline.read_text()
    checked = cli(
        "check", str(path), "--baseline", str(baseline), "--fail-on", "saved:0"
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
