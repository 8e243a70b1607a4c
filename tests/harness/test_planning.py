"""`plan` and `fit`, as people type them."""

import json
from pathlib import Path

import pandas
import pytest
from transformers import LlamaConfig

from meft_bench import cli, planning
from meft_bench.cell import Cell
from meft_bench.virtual import gpu

TINY = ["--batch", "2", "--seq", "16", "--gpu", "RTX3090"]


def test_a_plan_tells_what_a_step_takes(capsys: pytest.CaptureFixture[str]) -> None:
    """Of two methods, in order; `exact` is a short name."""
    words = ["plan", "bert-tiny", "--method", "full", "exact", *TINY, "--json"]
    assert cli.main(words) == 0
    full, exact = json.loads(capsys.readouterr().out)
    rtx = gpu.find("RTX3090")
    assert (full["method"], exact["method"]) == ("full", "meft1-exact")
    for plan in (full, exact):
        assert plan["verdict"] == "fits"
        assert plan["needed_bytes"] > plan["reserved_bytes"] >= plan["allocated_bytes"]
        # Of each of two threads: 8 times 4 MiB, as children of the harness ask of
        # cuBLAS, and what cuBLASLt takes.
        own = 8 * 4 * 2**20 + rtx.cublaslt_workspace_bytes
        assert plan["by_kind"]["libraries"] == 2 * own
        assert "not held against a real GPU" in plan["prediction"]
    assert full["num_trainable_parameters"] > exact["num_trainable_parameters"]
    assert full["by_kind"]["optimizer"] > exact["by_kind"]["optimizer"]
    assert "h2d forward" in planning.details(full)
    # Where host and GPU cannot be told apart, nothing is known to move.
    assert "h2d" not in planning.details(full | {"moved": None})


def test_the_table_says_that_it_is_a_prediction(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And, of what cannot be planned, why; with details of what can."""
    words = ["plan", "bert-tiny", "--method", "lora", "sparse", *TINY, "--details"]
    words += ["--set", "num_neurons=100", "top_k_neurons=101", "--margin", "0.1"]
    assert cli.main([*words, "--attention", "sdpa-math"]) == 0
    out = capsys.readouterr().out
    assert "random:bert-tiny on NVIDIA GeForce RTX 3090 (24 GiB)" in out
    assert "lora    fits" in out
    assert "sparse  unknown" in out
    assert "sparse: `top_k_neurons` is 101, but there are only 100 neurons" in out
    assert "no number here has been held against a real GPU yet" in out
    assert "fits leaves 10% free" in out
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
    assert most == sum(plan["by_kind"].values()) - plan["by_kind"]["libraries"]
    assert list(dict.fromkeys(frame["phase"])) == ["forward", "backward", "update"]


@pytest.mark.slow
def test_what_sparse_adapters_need_is_asked_by_its_field(
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
def test_a_plan_of_a_language_model_is_asked_by_its_task(
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
    """Rows of sparse adapters have no place beside BART's feed-forward."""
    words = [command, "bart-tiny", "--method", "sparse", *TINY, "--json"]
    assert cli.main([*words, "--set", f"task={task}"]) == 0
    (plan,) = json.loads(capsys.readouterr().out)
    assert plan["verdict"] == "unknown"
    assert "is not supported by sparse adapters" in plan["message"]


def test_what_fits_is_the_largest(capsys: pytest.CaptureFixture[str]) -> None:
    """Held against the plans of the answer and of the next."""
    words = ["fit", "bert-tiny", "--method", "lora", "--seq", "512", "--gpu", "RTX3090"]
    assert cli.main([*words, "--maximize", "batch", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    room = 0.95 * gpu.find("RTX3090").memory_bytes
    assert found["needed_bytes"] <= room < found["beyond_bytes"]
    assert found["largest"] > 100
    assert found["num_probes"] <= 16
    cells = [Cell(method="lora", backbone="random:bert-tiny", device="virtual-RTX3090")]
    out = planning.table(cells, [found], "batch", 0.05)
    assert f"lora: batch {found['largest'] + 1} would need" in out
    assert f"MiB of {room / 2**20:,.0f}" in out


@pytest.mark.slow
def test_a_config_is_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A directory without weights."""
    config = {"model_type": "bert", "num_hidden_layers": 1, "hidden_size": 32}
    config |= {"num_attention_heads": 2, "intermediate_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert cli.main(["plan", str(tmp_path), "--method", "full", *TINY, "--json"]) == 0
    (plan,) = json.loads(capsys.readouterr().out)
    assert plan["verdict"] == "fits"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["bert-tiny", "--gpu", "H20O"], "unknown GPU 'H20O'; did you mean 'H200'?"),
        (["bert-tiny", "--gpu", "RTX"], "'RTX' may be RTX3090-24GB or RTX4090-24GB"),
        (["bert-tinny", "--gpu", "H200"], "did you mean 'bert-tiny'?"),
        (
            ["bert-tiny", "--gpu", "H200", "--method", "exakt"],
            "did you mean 'exact'?",
        ),
        (["bert-tiny", "--gpu", "no.json"], "No such file"),
        (
            ["bert-tiny", "--gpu", "H200", "--set", "neurons=3"],
            "unknown key 'neurons'; did you mean 'num_neurons'?",
        ),
        (
            ["bert-tiny", "--gpu", "H200", "--set", "num_neurons=many"],
            "'num_neurons=many'",
        ),
        (
            ["bert-tiny", "--gpu", "H200", "--timeline", "none/moments.csv"],
            "there is no folder 'none'",
        ),
    ],
)
def test_a_mistake_is_named(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", *words]) == 2
    assert said in capsys.readouterr().err


def test_a_gpu_of_ones_own(tmp_path: Path) -> None:
    """A JSON file; what is missing in one, or too much, is named."""
    path = tmp_path / "mine.json"
    text = (gpu.FOLDER / "H200.json").read_text()
    path.write_text(text)
    assert gpu.find(str(path)) == gpu.find("H200")
    fields = json.loads(text)
    del fields["memory_bytes"]
    path.write_text(json.dumps(fields | {"memory": 1}))
    with pytest.raises(gpu.GpuError, match=r"missing fields \['memory_bytes'\]"):
        gpu.find(str(path))
    path.write_text(text.replace('"math"', '"maths"'))
    with pytest.raises(gpu.GpuError, match="should name each of cudnn, flash"):
        gpu.find(str(path))


def test_every_gpu_that_comes_along_is_whole() -> None:
    for name in gpu.names():
        found = gpu.find(name)
        assert found.memory_bytes > found.context_bytes > 0
    assert set(planning.FIELDS.values()) == set(planning.AT_MOST)
