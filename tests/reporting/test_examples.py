"""Commands in documents and in `--help` do what they are there for."""

import re
import shlex
from pathlib import Path

import matplotlib.image
import pytest

from meft_reports import cli
from meft_reports.cli import main, parser
from meft_reports.threshold import parse_threshold
from reporting.kinds import MakeRecord, Write

ROOT = Path(__file__).parents[2]
DOCUMENTS = {
    name: (ROOT / name).read_text()
    for name in (
        *("README.md", "reports/README.md", "benchmarks/README.md"),
        *("reports/published/README.md", "CONTRIBUTING.md", "docs/numbers.md"),
        *(
            "tox.ini",
            "reports/meft_reports/cli.py",
            "benchmarks/meft_bench/parent/harness.py",
        ),
    )
}


def _commands(text: str) -> list[list[str]]:
    """Every `meft-report` with arguments, as words, in the order of the text."""
    joined = re.sub(r"\\+\n\s*", "", text)
    names = "|".join(cli.COMMANDS)
    found = re.findall(rf"meft-report ((?:{names}) [^\n`;\"',)]+)", joined)
    return [shlex.split(line) for line in found if "." in line or "RUNS" in line]


EXAMPLES = [
    (name, words)
    for name, text in DOCUMENTS.items()
    for words in _commands(text)
    if not re.search(r"[{*]", " ".join(words))
]
GATE = [(name, words) for name, words in EXAMPLES if words[0] in ("check", "baseline")]


def test_the_readme_has_the_table_and_the_figure_of_the_published_records(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The table to the letter; the figure to the pixel, with this matplotlib."""
    records = ROOT / "reports" / "published" / "gpu" / "records.jsonl.gz"
    assert main(["table", "headline", str(records)]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) > 8
    assert "\n".join(rows) in DOCUMENTS["README.md"]
    figure = tmp_path / "headline.png"
    assert main(["plot", "headline", str(records), "-o", str(figure)]) == 0
    drawn, kept = (
        matplotlib.image.imread(path)
        for path in (figure, ROOT / "docs" / "figures" / "headline.png")
    )
    assert (drawn == kept).all()


def test_a_published_document_has_the_figure_of_its_records(tmp_path: Path) -> None:
    """To the pixel, with this matplotlib; `tox -e published` makes all of them."""
    folder = ROOT / "reports" / "published" / "knowledge"
    figure = tmp_path / "score_top_k.png"
    records = str(folder / "records.jsonl.gz")
    assert main(["plot", "score_top_k", records, "-o", str(figure)]) == 0
    drawn, kept = (
        matplotlib.image.imread(path) for path in (figure, folder / figure.name)
    )
    assert (drawn == kept).all()


def test_documents_have_examples_of_the_gate() -> None:
    """So that the tests below are about something."""
    assert {name for name, words in GATE if words[0] == "check"} >= {
        "README.md",
        "reports/README.md",
        "reports/meft_reports/cli.py",
    }
    assert any("step_seconds:20%" in words for _, words in GATE)


@pytest.mark.parametrize(("name", "words"), EXAMPLES, ids=str)
def test_every_command_in_a_document_can_be_parsed(name: str, words: list[str]) -> None:
    """Every flag and every column exists."""
    arguments = parser().parse_args(words)
    for limit in getattr(arguments, "fail_on", []):
        parse_threshold(limit)


@pytest.mark.parametrize("num_slots", [1, 2])
@pytest.mark.parametrize("name", sorted({name for name, _ in GATE}))
def test_the_gate_of_a_document_passes(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    make_record: MakeRecord,
    write: Write,
    name: str,
    num_slots: int,
) -> None:
    """Of two runs of the same code, however many of their cells ran side by side.

    The document's commands run in its order, on a run and a baseline of a day before
    whose numbers agree but for times that differ by less than the example allows.
    """
    for folder in ("runs", "benchmarks/baselines"):
        (tmp_path / folder).mkdir(parents=True)
    for path, seconds in {
        "benchmarks/baselines/gate.jsonl": 0.5,
        "runs/gate.jsonl": 0.55,
        "RUNS": 0.55,
    }.items():
        cells: list[dict[str, object]] = [{"seed": 0}, {"seed": 1, "method": "meft1"}]
        write(
            [
                make_record(num_slots=num_slots, step_seconds=seconds, **cell)
                for cell in cells
            ],
            path,
        )
    monkeypatch.chdir(tmp_path)
    for document, words in GATE:
        if document == name:
            assert main(words) == 0, words
