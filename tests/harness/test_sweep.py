import dataclasses
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meft_bench.parent import fields, sweep
from meft_bench.parent.sweep import Condition, Matrix, Point, Sweep, SweepError
from meft_bench.shared import methods, registry
from meft_bench.shared.cell import Cell

HEAD = 'question = "Which?"\n'
MATRIX = HEAD + '[[matrix]]\nname = "one"\n'


@pytest.fixture
def load(tmp_path: Path) -> Callable[[str], Sweep]:
    """Load a sweep written in the test."""

    def load_text(text: str) -> Sweep:
        path = tmp_path / "mine.toml"
        path.write_text(text)
        return sweep.load(str(path), device="cpu")

    return load_text


@pytest.mark.parametrize("name", sorted(sweep.shipped()))
def test_shipped(name: str) -> None:
    """Every sweep that ships loads by its name, and no two of its cells share an id."""
    loaded = sweep.load(name, device="cpu")
    assert loaded.name == name
    cells = [*loaded.cells, *loaded.trainings.values()]
    for tuning in loaded.tunings:
        cells += [*tuning.trials, *tuning.cells]
    assert cells or loaded.checks
    assert len({cell.id for cell in cells}) == len(cells)
    assert len({cell.key for cell in cells}) == len(cells)


def test_every_cell_of_the_gpu_has_a_virtual_twin() -> None:
    """Of the sweep that holds one against the other."""
    on = {"cuda": set[Cell](), "virtual-H200": set[Cell]()}
    for cell in sweep.load("gpu-validation", device="cpu").cells:
        on[cell.device].add(dataclasses.replace(cell, device=""))
    assert on["cuda"] == on["virtual-H200"]


@pytest.mark.parametrize("name", ["gpu-validation", "memory-paper"])
def test_decoders_have_the_head_that_they_were_trained_with(name: str) -> None:
    """Of those whose memory is looked at, encoders have a classifier's."""
    heads: dict[str, set[str]] = {"synthetic": set(), "synthetic-lm": set()}
    for cell in sweep.load(name, device="cpu").cells:
        family, *_ = cell.backbone.removeprefix("random:").split("-")
        heads[cell.task].add(family)
    assert heads["synthetic-lm"] >= {"opt", "llama"}
    assert heads["synthetic"] >= {"bert", "roberta"}
    assert not heads["synthetic"] & heads["synthetic-lm"]


def test_quickstart() -> None:
    """The quickstart is small, and measures every method of its list.

    These are the references, the paper's own and one exact method. What the exact
    inverse costs, against its own adapters under checkpointing, is the sweep `depth`;
    what sparse adapters transfer, `sparsity`. MEFT2, whose memory is MEFT1's, is scored
    only.
    """
    cells = sweep.load("quickstart", device="cpu").cells
    methods = {cell.method for cell in cells}
    assert methods == {
        *("full", "head", "lora", "adapters", "checkpointing", "lora-checkpointing"),
        *("meft1", "meft2", "meft3", "meft1-exact"),
    }
    assert len(cells) <= 92
    scored = {(cell.method, cell.seed) for cell in cells if cell.task == "bbc-news"}
    assert scored == set(itertools.product(methods, (0, 1)))
    for field, dtype, values in [
        ("batch_size", "fp32", {4, 8, 16}),
        ("batch_size", "bf16", {4, 16}),
        ("depth", "fp32", {2, 6, 12}),
        ("depth", "bf16", {6, 12}),
    ]:
        for method in methods - {"meft2"}:
            seen = {
                getattr(cell, field)
                for cell in cells
                if (cell.method, cell.dtype) == (method, dtype)
                and cell.task == "synthetic"
            }
            assert seen == values


def test_the_short_gate_is_a_part_of_the_gate() -> None:
    """Its cells and the lines of its baseline are the gate's, to the byte."""
    whole, short = (sweep.load(n, device="cpu").cells for n in ("gate", "gate-short"))
    assert len(short) == 10
    assert set(short) <= set(whole)
    folder = Path(__file__).parents[2] / "benchmarks" / "baselines"
    ids = {cell.id for cell in short}
    lines = (folder / "gate.jsonl").read_text().splitlines()
    wanted = [line for line in lines if json.loads(line)["cell_id"] in ids]
    assert (folder / "gate-short.jsonl").read_text().splitlines() == wanted


def test_gate() -> None:
    """The gate runs on the CPU with one thread, whatever is requested, every method of
    the library and what it is measured against.

    At the sizes of the papers, it predicts.
    """
    gate = sweep.load("gate", device="cuda")
    assert gate.num_threads == 1
    on_cpu = [cell for cell in gate.cells if cell.device == "cpu"]
    ours = {n for n, m in methods.TABLE.items() if m.streams or m.neurons}
    ours -= {"sparse-experts-divided"}  # in one rank, it is `sparse-experts`
    found = {cell.method for cell in on_cpu}
    assert ours <= found
    assert {"full", "head", "lora", "adapters", "checkpointing"} <= found - ours
    others = {cell.device for cell in gate.cells} - {"cpu"}
    assert others == {"virtual-H200"}


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    """Some editors write one."""
    path = tmp_path / "mine.toml"
    path.write_text(AXES, encoding="utf-8-sig")
    assert len(sweep.load(str(path), device="cpu").cells) == 1


def test_product(load: Callable[[str], Sweep]) -> None:
    """Axes multiply in the order in which they stand, the last one fastest."""
    cells = load(
        MATRIX + "defaults = { batch_size = 2 }\n"
        'axes = { method = ["full", "head"], depth = [2, 4] }'
    ).cells
    assert [(cell.method, cell.depth) for cell in cells] == [
        ("full", 2),
        ("full", 4),
        ("head", 2),
        ("head", 4),
    ]
    assert {cell.batch_size for cell in cells} == {2}


def test_zip(load: Callable[[str], Sweep]) -> None:
    """Zipped lists move together, and multiply with the axes."""
    cells = load(
        MATRIX + 'axes = { method = ["full", "head"] }\n'
        "[[matrix.zip]]\nbatch_size = [1, 2, 3]\nseq_len = [30, 20, 10]\n"
        "[[matrix.zip]]\ndepth = [2, 4]\nseed = [7, 8]\n"
    ).cells
    assert len(cells) == 2 * 3 * 2
    assert {(c.batch_size, c.seq_len) for c in cells} == {(1, 30), (2, 20), (3, 10)}
    assert {(c.depth, c.seed) for c in cells} == {(2, 7), (4, 8)}


def test_set(load: Callable[[str], Sweep]) -> None:
    """A rule changes the cells it names, and a later rule sees what it did."""
    cells = load(
        MATRIX + 'axes = { method = ["full", "head", "lora"] }\n'
        '[[matrix.set]]\nwhen = { method = ["full", "head"] }\nlearning_rate = 1\n'
        "[[matrix.set]]\nwhen = { learning_rate = 1.0 }\nmax_steps = 9\n"
    ).cells
    assert [(cell.learning_rate, cell.max_steps) for cell in cells] == [
        (1.0, 9),
        (1.0, 9),
        (Cell(method="lora").learning_rate, Cell(method="lora").max_steps),
    ]
    assert isinstance(cells[0].learning_rate, float)


def test_a_method_has_defaults_of_its_own(load: Callable[[str], Sweep]) -> None:
    """Where no value is given: in defaults, in an axis or by a rule, it is kept."""
    axes = 'axes = { method = ["meft1-exact", "lora-exact"] }\n'
    found = [
        [cell.lost_bits for cell in load(MATRIX + text).cells]
        for text in (
            axes,
            axes + "defaults = { lost_bits = 4 }",
            axes + '[[matrix.set]]\nwhen = { method = "lora-exact" }\nlost_bits = 2',
            axes + "[[matrix.set]]\nwhen = { lost_bits = 8 }\nseed = 1",
        )
    ]
    assert found == [[4, 8], [4, 4], [4, 2], [4, 8]]


def test_every_default_of_a_method_is_valid() -> None:
    """A field of a cell that the method uses, with a value that a sweep may give."""
    for name, method in methods.TABLE.items():
        for option, value in method.defaults.items():
            assert fields.check(option, value) == value, name
            assert option in method.options


def test_exclude(load: Callable[[str], Sweep]) -> None:
    """An exclusion takes out the cells that match all of it, and no others."""
    cells = load(
        MATRIX + 'axes = { method = ["full", "head"], depth = [2, 4, 6] }\n'
        '[[matrix.exclude]]\nmethod = "full"\ndepth = [4, 6]\n'
    ).cells
    assert [(cell.method, cell.depth) for cell in cells] == [
        ("full", 2),
        ("head", 2),
        ("head", 4),
        ("head", 6),
    ]


def test_shared_cells(load: Callable[[str], Sweep]) -> None:
    """A cell that two matrices declare is run once."""
    cells = load(
        MATRIX + 'axes = { method = ["full"], depth = [2, 4] }\n'
        '[[matrix]]\nname = "two"\naxes = { depth = [4, 6], method = ["full"] }\n'
    ).cells
    assert [cell.depth for cell in cells] == [2, 4, 6]


def test_device(load: Callable[[str], Sweep], tmp_path: Path) -> None:
    """Cells run on the requested device unless their matrix names one."""
    load(MATRIX + 'axes = { method = ["full"] }')
    mine = str(tmp_path / "mine.toml")
    assert {c.device for c in sweep.load(mine, device="cuda").cells} == {"cuda"}


def test_limits(load: Callable[[str], Sweep]) -> None:
    """Limits are in bytes and seconds; without them there is time, but not forever."""
    body = '[[matrix]]\nname = "one"\naxes = { method = ["full"] }'
    limited = load(
        f'{HEAD}memory_limit = "1.5GiB"\ntimeout_seconds = 60\nnum_threads = 2\n{body}'
    )
    assert limited.memory_limit_bytes == 1610612736
    assert (limited.timeout_seconds, limited.num_threads) == (60.0, 2)
    free = load(HEAD + body)
    assert (free.memory_limit_bytes, free.num_threads) == (None, None)
    assert free.timeout_seconds == sweep.TIMEOUT_SECONDS
    for forever in ("inf", str(10**400)):
        unlimited = load(f"{HEAD}timeout_seconds = {forever}\n{body}")
        assert unlimited.timeout_seconds > 1e300


AXES = MATRIX + 'axes = { method = ["full"] }\n'

BAD = {
    "not TOML": ("question = ", "not TOML", "end of document"),
    "unknown top key": (HEAD + "questions = 1", "'questions'", "'question'"),
    "no question": ("[[matrix]]\nname = 'one'", "`question` is missing"),
    "caveats are no list": (HEAD + "caveats = 'few rows'", "`caveats`", "a list"),
    "no sentence": (HEAD + "caveats = ['Few rows.', ' ']", "`caveats`", "' '"),
    "no matrix": (HEAD, "no [[matrix]]"),
    "matrix is no list": (HEAD + "[matrix]\nname = 'one'", "matrix", "[[...]]"),
    "unknown matrix key": (MATRIX + "axis = {}", "'one'", "'axis'", "'axes'"),
    "no name": (HEAD + "[[matrix]]\naxes = {}", "number 1", "`name`"),
    "same name": (AXES + '[[matrix]]\nname = "one"\n', "two matrices", "'one'"),
    "no method": (MATRIX + "axes = { seed = [0] }", "`method`"),
    "unknown axis": (MATRIX + "axes = { metod = ['full'] }", "'metod'", "'method'"),
    "unknown default": (AXES + "defaults = { batch = 4 }", "'batch'", "'batch_size'"),
    "unknown method": (MATRIX + "axes = { method = ['meft4'] }", "'meft4'", "'meft3'"),
    "unknown task": (AXES + "defaults = { task = 'sst' }", "'sst'", "'sst2'"),
    "unknown dtype": (AXES + "defaults = { dtype = 'fp33' }", "'fp33'", "'fp32'"),
    "unknown device": (AXES + "defaults = { device = 'cud' }", "'cud'", "'cuda'"),
    "unknown backbone": (
        AXES + "defaults = { backbone = 'minilm-l12' }",
        "'minilm-l12'",
        "'minilm-l6'",
    ),
    "no directory": (AXES + "defaults = { backbone = 'dir:no/where' }", "'no/where'"),
    "nothing after the colon": (AXES + "defaults = { backbone = 'hub:' }", "'hub:'"),
    "unknown shape": (
        AXES + "defaults = { backbone = 'random:bert-tyni' }",
        "'bert-tyni'",
        "'bert-tiny'",
    ),
    "wrong type": (AXES + "defaults = { seed = '0' }", "`seed` = '0'", "integer"),
    "a truth value": (AXES + "defaults = { seed = true }", "`seed`", "integer"),
    "a list by default": (AXES + "defaults = { task = ['sst2'] }", "`task`", "string"),
    "below one": (AXES + "defaults = { batch_size = 0 }", "`batch_size`", "least 1"),
    "no number": (AXES + "defaults = { learning_rate = nan }", "`learning_rate`"),
    "no float": (
        AXES + f"defaults = {{ learning_rate = {10**400} }}",
        "`learning_rate`",
        "finite",
    ),
    "more than 64 bits": (
        AXES + f"defaults = {{ depth = {2**63} }}",
        "`depth`",
        f"at most {2**63 - 1}",
    ),
    "no list": (MATRIX + "axes = { method = 'full' }", "`method`", "list"),
    "empty axis": (MATRIX + "axes = { method = [] }", "`method` is empty"),
    "twice in an axis": (MATRIX + "axes = { method = ['full', 'full'] }", "twice"),
    "axis and default": (AXES + "defaults = { method = 'head' }", "`method`", "twice"),
    "axis and zip": (AXES + "[[matrix.zip]]\nmethod = ['head']", "`method`", "twice"),
    "unequal zip": (
        AXES + "[[matrix.zip]]\nseed = [1, 2]\ndepth = [1]",
        "seed has 2, depth has 1",
    ),
    "twice in a zip": (
        AXES + "[[matrix.zip]]\nseed = [1, 2, 1]\ndepth = [1, 1, 1]",
        "zip: {seed = 1, depth = 1} is given twice",
    ),
    "larger than any seed": (AXES + f"defaults = {{ seed = {2**32} }}", "`seed`"),
    "a name of two lines": (
        AXES + 'defaults = { backbone = "hub:a\\nb" }',
        "cannot be printed",
    ),
    "a path too long": (
        AXES + f"defaults = {{ backbone = 'dir:{'x' * 5000}' }}",
        "File name too long",
    ),
    "empty zip": (AXES + "[[matrix.zip]]", "zip", "empty"),
    "set nothing": (AXES + "[[matrix.set]]\nwhen = { seed = 0 }", "nothing to set"),
    "set without when": (AXES + "[[matrix.set]]\nseed = 0", "when", "no condition"),
    "set unknown": (
        AXES + "[[matrix.set]]\nwhen = { seed = 0 }\nlr = 1",
        "set",
        "'lr'",
    ),
    "when matches nothing": (
        AXES + "[[matrix.set]]\nwhen = { method = ['head', 'lora'] }\nseed = 1",
        "method = ['head', 'lora']",
        "matches no cell",
    ),
    "when unknown method": (
        AXES + "[[matrix.set]]\nwhen = { method = 'ful' }\nseed = 1",
        "when",
        "'full'",
    ),
    "exclude matches nothing": (
        AXES + "[[matrix.exclude]]\nseed = 4",
        "exclude: {seed = 4} matches no cell",
    ),
    "exclude no condition": (AXES + "[[matrix.exclude]]", "exclude: no condition"),
    "exclude everything": (AXES + "[[matrix.exclude]]\nseed = 0", "every cell"),
    "all warm-up": (AXES + "defaults = { max_steps = 2 }", "`warmup_steps` = 2"),
    "rows step by themselves": (
        MATRIX + "axes = { method = ['sparse'], optimizer = ['sgd'] }",
        "`optimizer` = 'sgd'",
        "`method` = 'sparse'",
        "take 'adamw'",
    ),
    "a reference's rows, too": (
        AXES + "defaults = { reference = 'dense-offload', optimizer = 'adamw-fused' }",
        "`reference` = 'dense-offload'",
    ),
    "padding of one token": (
        AXES + "defaults = { seq_len = 1, padding = 'some' }",
        "`padding` = 'some' with `seq_len` = 1",
    ),
    "unknown padding": (AXES + "defaults = { padding = 'all' }", "padding 'all'"),
    "patience alone": (AXES + "defaults = { patience = 2 }", "`eval_every`"),
    "text for a random backbone": (
        AXES + 'defaults = { backbone = "random:bert-tiny", task = "bbc-news" }',
        "no tokenizer",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_sweep(load: Callable[[str], Sweep], tmp_path: Path, case: str) -> None:
    """A mistake is reported in one line: the file, what is wrong, what is right."""
    text, *words = BAD[case]
    with pytest.raises(SweepError) as caught:
        load(text)
    message = str(caught.value)
    assert "\n" not in message
    for word in (str(tmp_path / "mine.toml"), *words):
        assert word in message


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("memory_limit = 8", "`memory_limit` = 8"),
        ('memory_limit = "8GB"', "'8GB' is not a size"),
        ('memory_limit = "99999999999GiB"', "too large a size"),
        ("timeout_seconds = 0", "`timeout_seconds` = 0"),
        ("num_threads = 1.5", "`num_threads` = 1.5"),
        ("num_threads = 100000", "`num_threads` = 100000 should be at most 4,096"),
    ],
)
def test_bad_limit(load: Callable[[str], Sweep], line: str, word: str) -> None:
    """A limit that is none is refused and shown."""
    body = '[[matrix]]\nname = "one"\naxes = { method = ["full"] }'
    with pytest.raises(SweepError, match=word):
        load(f"{HEAD}{line}\n{body}")


def test_no_such_sweep() -> None:
    """A sweep that is neither shipped nor a file is named with the nearest one."""
    with pytest.raises(SweepError, match=r"'quikstart'; did you mean 'quickstart'\?"):
        sweep.load("quikstart", device="cpu")


def test_every_text_field_is_checked() -> None:
    """No text field of a cell takes just any text."""
    for name, field in fields.FIELDS.items():
        if field.type is str:
            with pytest.raises(ValueError, match="no-such-name"):
                fields.check(name, "no-such-name")


COUNTS = st.integers(min_value=1, max_value=9)
CELLS = st.builds(
    Cell,
    method=st.sampled_from(sorted(registry.METHODS)),
    task=st.sampled_from(sorted(registry.TASKS)),
    dtype=st.sampled_from(registry.DTYPES),
    device=st.sampled_from(registry.DEVICES),
    learning_rate=st.floats(min_value=1e-8, max_value=1),
    **{field.name: COUNTS for field in dataclasses.fields(Cell) if field.type is int},
)


@given(CELLS)
def test_cell_round_trip(cell: Cell) -> None:
    """A cell that goes to a child and back as JSON is the same cell."""
    again = Cell.from_json(json.loads(json.dumps(cell.to_json())))
    assert (again, again.id, again.key) == (cell, cell.id, cell.key)


@given(CELLS, CELLS)
def test_names_tell_cells_apart(one: Cell, other: Cell) -> None:
    """Two cells have the same id, or the same key, only if they are the same."""
    assert (one.id == other.id) == (one == other) == (one.key == other.key)


AXIS_VALUES = st.lists(COUNTS, min_size=1, max_size=3, unique=True)


@given(
    axes=st.dictionaries(
        st.sampled_from(["batch_size", "seq_len", "depth", "seed"]),
        AXIS_VALUES,
        max_size=4,
    ),
    zipped=st.lists(st.tuples(COUNTS, COUNTS), min_size=1, max_size=4, unique=True),
    data=st.data(),
)
def test_count(
    axes: dict[str, list[int]], zipped: list[tuple[int, int]], data: st.DataObject
) -> None:
    """A matrix has as many cells as its axes multiplied, less the excluded ones."""
    excluded: Condition = {
        name: tuple(data.draw(st.lists(st.sampled_from(values), min_size=1)))
        for name, values in axes.items()
        if data.draw(st.booleans())
    }
    points: list[tuple[Point, ...]] = [
        tuple({name: value} for value in values) for name, values in axes.items()
    ]
    points.append(tuple({"lora_rank": r, "eval_rows": e} for r, e in zipped))
    matrix = Matrix(
        name="any",
        defaults={"method": "full"},
        axes=tuple(points),
        rules=(),
        excludes=(excluded,) if excluded else (),
    )
    cells = list(sweep.expand(matrix, device="cpu"))
    whole = math.prod(map(len, axes.values()))
    matched = math.prod(len(set(excluded.get(name, axes[name]))) for name in axes)
    kept = whole - matched if excluded else whole
    assert len(cells) == len(set(cells)) == kept * len(zipped)


def test_readme(load: Callable[[str], Sweep]) -> None:
    """The sweep in the harness's README is a sweep, of as many cells as it says."""
    readme = Path(__file__).parents[2] / "benchmarks" / "README.md"
    text = readme.read_text(encoding="utf-8").partition("```toml\n")[2]
    assert len(load(text.partition("```")[0]).cells) == 12
