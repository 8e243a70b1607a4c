"""The programs of `gpu-check`, and what a real H200 said to them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from meft_bench.parent import checks, cli, sweep
from meft_bench.shared.options import ChildOptions
from meft_bench.shared.registry import CHECKS, load
from meft_bench.shared.source import MissingError
from meft_bench.virtual.device import gpu, workspaces
from meft_bench.virtual.emulation.virtual_gpu import VirtualGpu
from meft_bench.virtual.validation import checks as programs
from meft_bench.virtual.validation.place import place

pytestmark = [
    pytest.mark.usefixtures("no_garbage_collection"),
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="there is a real GPU, which is left alone"
    ),
]
MEASURED = Path(__file__).parents[2] / "reports" / "published" / "gpu" / "checks.jsonl"
ON_REAL_ONLY = ("allocator", "exactness")

Figures = dict[tuple[str, str], Any]


def measured(check: str) -> Figures:
    """What the H200 said, by case and quantity."""
    found: Figures = {}
    for text in MEASURED.read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        if line["check"] == check:
            for figure in line["figures"]:
                found[figure["case"], figure["quantity"]] = figure["value"]
    return found


def predicted(check: str) -> Figures:
    with place("virtual-H200") as it:
        return {(f.case, f.quantity): f.value for f in load(CHECKS[check])(it)}


def assert_near(check: str, rel: float) -> None:
    here = predicted(check)
    there = measured(check)
    both = [key for key in there if key in here and isinstance(here[key], int)]
    assert len(both) > 100
    for key in both:
        assert here[key] == pytest.approx(there[key], rel=rel, abs=2**15), key
    kernels = [key for key in there if key[1] == "kernel" and key in here]
    assert kernels
    assert {key: here[key] for key in kernels} == {key: there[key] for key in kernels}


@pytest.mark.parametrize("check", ["attention", "attention-kernels"])
def test_kernels_of_attention_are_those_of_an_h200(check: str) -> None:
    """Which one runs, what it keeps for backward, and both its peaks."""
    assert_near(check, rel=2e-4)


def test_libraries_keep_what_they_keep_on_an_h200(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing before the first product, then by library and thread."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch, "__version__", "2.11.0")  # the H200's
    assert predicted("workspaces") == measured("workspaces")


def test_a_card_is_described_as_an_h200_is() -> None:
    """Its memory and context to the byte; rates are the vendor's, and lower in fact."""
    here, there = predicted("card"), measured("card")
    for case, quantity in (
        ("properties", "name"),
        ("properties", "memory_bytes"),
        ("properties", "num_multiprocessors"),
        ("properties", "compute_capability"),
        ("properties", "cudnn_version"),
        ("after first kernels", "context_bytes"),
    ):
        assert here[case, quantity] == there[case, quantity], quantity
    rates = [key for key in here if key[0] == "rates"]
    assert len(rates) == 6
    for key in rates:
        assert 0.6 * here[key] < there[key] < here[key]


@pytest.mark.slow
def test_steps_take_what_they_take_on_an_h200() -> None:
    """Allocated within 0.1 %, reserved within 1 %, padded and over ten lengths."""
    here, there = predicted("steps"), measured("steps")
    cases = {case for case, _ in there}
    assert len(cases) == 5
    for case in cases:
        allocated, reserved = (
            (here[case, f"peak_{name}_bytes"], there[case, f"peak_{name}_bytes"])
            for name in ("allocated", "reserved")
        )
        assert allocated[0] == pytest.approx(allocated[1], rel=1e-3)
        assert reserved[0] == pytest.approx(reserved[1], rel=1e-2)


@pytest.mark.parametrize(
    ("shape", "mebibytes"),
    [((2048, 768), 12), ((16384, 1024), 128), ((12608, 1024), 98.5), ((64, 768), 0)],
)
def test_sums_over_rows_take_what_they_take_on_an_h200(
    shape: tuple[int, int], mebibytes: float
) -> None:
    """As seen in its recorded history, of gradients of biases."""
    rows = torch.empty(shape, device="meta")
    take = workspaces.of(gpu.find("H200"))[torch.ops.aten.sum.dim_IntList]
    assert take((rows, [0], True), None) == mebibytes * 2**20


def test_layers_are_left_out_by_chance_and_not_by_emulation() -> None:
    """A number that a model draws on the host to decide so is a real one."""
    with VirtualGpu(gpu.find("H200")):
        assert not torch.rand([]) < 0.0
        assert torch.rand([]) < 1.0


@pytest.mark.parametrize("check", ON_REAL_ONLY)
def test_what_needs_values_is_skipped_on_a_virtual_gpu(check: str) -> None:
    with place("virtual-H200") as it, pytest.raises(MissingError, match="real GPU"):
        list(load(CHECKS[check])(it))


def test_without_a_gpu_a_check_is_skipped_and_says_why() -> None:
    answer = programs.run({"name": "card", "device": "cuda"}, ChildOptions())
    assert answer["status"] == "skipped"
    assert "no CUDA device" in answer["message"]
    assert answer["figures"] == []


def test_peaks_start_anew_and_the_cache_is_emptied_as_on_a_gpu() -> None:
    """What is free stays reserved until the cache is emptied."""
    with VirtualGpu(gpu.find("H200")) as device, device.new_ledger():
        tensor = torch.empty(2**26, device=device.backend.device)
        held = torch.cuda.memory_allocated()
        assert held >= 2**28
        del tensor
        assert torch.cuda.memory_allocated() == held - 2**28
        assert torch.cuda.max_memory_allocated() == held
        torch.cuda.reset_peak_memory_stats()
        assert torch.cuda.max_memory_allocated() == held - 2**28
        assert torch.cuda.memory_reserved() >= 2**28
        torch.cuda.empty_cache()
        assert torch.cuda.memory_reserved() == held - 2**28


def line(
    device: str, values: dict[str, Any], status: str = "ok", card: str = "a card"
) -> str:
    figures = [{"case": "a", "quantity": q, "value": v} for q, v in values.items()]
    head = {"check": "card", "device": device, "device_name": card, "status": status}
    return json.dumps(head | {"figures": figures, "environment": {}}) + "\n"


def test_figures_are_compared_where_both_sides_have_run(tmp_path: Path) -> None:
    """The newest of each side; text counts as equal or not."""
    path = tmp_path / "runs.checks.jsonl"
    path.write_text(line("virtual-H200", {"kernel": "flash", "bytes": 110}))
    assert checks.compare(path) == []
    with path.open("a") as file:
        file.write(line("cuda", {"kernel": "math", "bytes": 50}))
        file.write(line("cuda", {"kernel": "flash", "bytes": 100}))
    wanted = [
        "card: kernel: 1 of 1 as predicted",
        "card: bytes: 0 of 1 as predicted, median error 10.00%, worst +10.00% (a)",
    ]
    assert checks.compare(path) == wanted
    with path.open("a") as file:
        file.write(line("virtual-A100-40GB", {"bytes": 7}, card="another card"))
        file.write(line("cuda", {}, status="error"))
        file.write('{"check": "card", "dev')
    assert checks.compare(path) == wanted


SWEEP = """
question = "Is it as predicted?"
checks = ["card", "workspaces"]
[[matrix]]
name = "a"
defaults = { method = "full", backbone = "random:bert-tiny", seq_len = 8 }
axes = { seed = [0, 1] }
"""


@pytest.mark.slow
def test_checks_run_before_cells_and_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a budget that is over no cell runs, and the same command goes on."""
    sweep = tmp_path / "mine.toml"
    sweep.write_text(SWEEP)
    records = tmp_path / "runs.jsonl"
    words = ["run", str(sweep), "--device", "virtual-H200", "-o", str(records)]
    assert cli.main([*words, "--time-budget", "0.01s"]) == 3
    assert "the time budget is over: 0 of 2 cells" in capsys.readouterr().out
    assert cli.main(words) == 0
    said = capsys.readouterr().err
    assert "check card on virtual-H200: ok, 13 figures" in said
    lines = checks.path_next_to(records).read_text().splitlines()
    assert [json.loads(text)["check"] for text in lines] == ["card", "workspaces"]
    assert cli.main(words) == 0
    assert "check card" not in capsys.readouterr().err


@pytest.mark.slow
def test_a_half_written_line_is_passed_over_and_ended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that was killed leaves one; what comes next is a line of its own. The GPU
    is a file of the user's, whose path names no log."""
    sweep, mine = tmp_path / "mine.toml", tmp_path / "mine.json"
    text = SWEEP.replace('["card", "workspaces"]', '["card"]')
    sweep.write_text(text.replace("[0, 1]", "[0]"))
    mine.write_text((gpu.FOLDER / "H200.json").read_text())
    records = tmp_path / "runs.jsonl"
    path = checks.path_next_to(records)
    path.write_text('[1]\n{"check": "card", "dev')
    words = ["run", str(sweep), "--device", f"virtual-{mine}", "-o", str(records)]
    assert cli.main(words) == 0
    assert "ok, 13 figures" in capsys.readouterr().err
    *_, last = path.read_text().splitlines()
    assert json.loads(last)["status"] == "ok"
    assert cli.main(words) == 0
    assert "figures" not in capsys.readouterr().err


def test_a_check_that_the_budget_ends_is_not_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = tmp_path / "mine.toml"
    sweep.write_text(SWEEP)
    records = tmp_path / "runs.jsonl"
    words = ["run", str(sweep), "--device", "virtual-H200", "-o", str(records)]
    assert cli.main([*words, "--time-budget", "1s"]) == 3
    assert "check card on virtual-H200: out of time" in capsys.readouterr().err
    assert not checks.path_next_to(records).exists()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--device", "cpu"], "checks a GPU and there is none here"),
        (["--time-budget", "soon"], "'soon' is no duration such as 8min or 90s"),
        (["--time-budget", "0s"], "'0' is not a number above 0"),
    ],
)
def test_what_cannot_be_checked_is_refused(
    words: list[str],
    reason: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sweep = tmp_path / "mine.toml"
    sweep.write_text(SWEEP)
    command = ["run", str(sweep), *words, "-o", str(tmp_path / "runs.jsonl")]
    try:
        code = cli.main(command)
    except SystemExit as error:
        code = int(str(error.code))
    assert code == 2
    assert reason in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.toml"]


def test_an_unknown_check_is_named_with_the_nearest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = tmp_path / "mine.toml"
    sweep.write_text(SWEEP.replace('"workspaces"', '"workspace"'))
    assert cli.main(["list", str(sweep)]) == 2
    assert "unknown check 'workspace'" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_whole_list_is_rehearsed(tmp_path: Path) -> None:
    """Every check and every cell of `gpu-check`, on a GPU that is not there."""
    out = tmp_path / "gpu-check.jsonl"
    assert (
        cli.main(["run", "gpu-check", "--device", "virtual-H200", "-o", str(out)]) == 0
    )
    records = [json.loads(line) for line in out.read_text().splitlines()]
    cells = sweep.load("gpu-check", device="virtual-H200").cells
    assert len(records) == len(cells)
    assert {record["status"] for record in records} == {"ok"}
    lines = (tmp_path / "gpu-check.checks.jsonl").read_text().splitlines()
    statuses = {line["check"]: line["status"] for line in map(json.loads, lines)}
    needs_a_gpu = {"allocator", "exactness"}
    assert {n for n, status in statuses.items() if status == "skipped"} == needs_a_gpu
    assert {s for n, s in statuses.items() if n not in needs_a_gpu} == {"ok"}
