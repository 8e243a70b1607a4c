"""Sparse adapters whose rows are divided among processes."""

import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed

import meft
from library.row_share_calls import WORLD_SIZE
from library.row_shares import KINDS, QUICK, both
from library.sparse import batches, plain_model, sparse_model
from meft.sparse.adapter import sparse_adapters

TESTS = Path(__file__).parents[1]


def run_in_each(module: str, size: int, arguments: list[str]) -> None:
    """Run a module in several processes, each with its number as first argument."""
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    started = [
        subprocess.Popen(
            [sys.executable, "-m", module, str(rank), *arguments],
            env=os.environ | {"PYTHONPATH": path},
        )
        for rank in range(size)
    ]
    try:
        assert [one.wait(500) for one in started] == [0] * size
    finally:
        for one in started:
            one.kill()


@functools.cache
def found_by(size: int, kinds: tuple[str, ...]) -> list[dict[str, Any]]:
    """What each of some processes has found."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = [str(size), folder, *kinds]
        run_in_each("library.row_shares", size, arguments)
        return [torch.load(f"{folder}/{rank}.pt") for rank in range(size)]


def same(one: Any, other: Any) -> bool:
    """Whether two nested values are equal in every bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def check(found: list[dict[str, Any]], kind: str) -> None:
    for rank, its in enumerate(found):
        whole, share = its[kind][False], its[kind][True]
        for part in ("losses", "norms"):
            assert same(whole[part], share[part]), (rank, part)
    whole, share = found[0][kind][False], found[0][kind][True]
    assert whole["weights"].keys() == share["weights"].keys()
    for name, tensor in whole["weights"].items():
        assert torch.equal(tensor, share["weights"][name]), name
    assert same(whole["optimizer"], share["optimizer"])


@pytest.mark.parametrize("kind", QUICK)
def test_two_processes_with_a_share_have_the_bits_of_two_with_all(kind: str) -> None:
    """Losses, norms of clipping, rows and moments, from batches of unequal size."""
    check(found_by(2, QUICK), kind)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("size", "kinds"), [(1, QUICK), (2, (*KINDS,)), (3, (*KINDS,)), (4, QUICK)]
)
def test_any_number_of_processes_has_these_bits(
    size: int, kinds: tuple[str, ...]
) -> None:
    """With every update, wire, cache and way to run blocks."""
    found = found_by(size, kinds)
    for kind in kinds:
        check(found, kind)


def test_each_process_has_a_share_of_the_bytes() -> None:
    """Of rows, moments, 16-bit copies and factors: half of 64 rows."""
    for its in found_by(2, QUICK):
        for kind in QUICK:
            assert its[kind][True]["bytes"] * 2 == its[kind][False]["bytes"]


@pytest.fixture(scope="module")
def of_calls(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes has found of `library.row_share_calls`."""
    folder = tmp_path_factory.mktemp("calls")
    run_in_each("library.row_share_calls", WORLD_SIZE, [str(folder)])
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD_SIZE)]


@pytest.mark.slow
def test_a_saved_run_goes_on_with_any_number_of_processes(of_calls: list[Any]) -> None:
    """In every bit: with shares again, with all rows, from `meft.save_adapters`, and in
    one process that has the only share."""
    for its in of_calls:
        runs = its["saved_runs"]
        for name in ("shares", "all rows", "adapters"):
            assert torch.equal(runs[name], runs["went on"]), name
        assert torch.equal(runs["one share"], runs["half-way"])
        assert not torch.equal(runs["went on"], runs["half-way"])
        assert "that of share" in runs["share of another"]
        assert "gathered_rows(model, optimizer_state=True)" in runs["share of another"]


@pytest.mark.slow
def test_rows_that_are_not_gathered_are_not_saved(of_calls: list[Any]) -> None:
    """In any way, with the remedy; a copy would not know of other processes."""
    for its in of_calls:
        said = its["refused_reads"]
        for name in ("state_dict", "save_adapters", "save_pretrained"):
            assert "one of 2 shares of the rows" in said[name]
            assert "`with meft.gathered_rows(model):`" in said[name]
        for name in ("deepcopy", "pickle"):
            assert "copy the model before `meft.divide_rows()`" in said[name]
        for name in ("again", "average"):
            assert "divided among processes already" in said[name]
    second = of_calls[1]["refused_reads"]["not in this process"]
    assert "gathered in the first one: save the model in that process" in second


@pytest.mark.slow
def test_numbers_of_a_gradient_are_those_of_all(of_calls: list[Any]) -> None:
    """Norms and sums, also of a scaled copy; its values are those of the own rows."""
    first, second = (its["gradients"] for its in of_calls)
    whole = torch.stack([first["dense"], second["dense"]], 1).flatten(0, 1)
    for its in (first, second):
        assert its["shape"] == (32, 32)
        for order, norm in zip((0, 1, 2, torch.inf), its["norms"], strict=True):
            torch.testing.assert_close(norm, torch.linalg.vector_norm(whole, order))
        torch.testing.assert_close(its["norm of a copy"], 2 * whole.norm())
        torch.testing.assert_close(its["sum"], whole.sum())


@pytest.mark.slow
def test_an_overflow_in_one_process_is_one_in_all(of_calls: list[Any]) -> None:
    """The scaler of each halves the scale and skips the step."""
    assert [its["overflow"]["scale"] for its in of_calls] == [2.0, 2.0]


@pytest.mark.slow
def test_processes_in_different_calls_are_refused(of_calls: list[Any]) -> None:
    """Both say where each of them is."""
    for its in of_calls:
        said = its["other_calls"]["both"]
        assert "process 0 is at the rows of block 0 in a forward pass" in said
        assert "process 1 is at a norm, sum or check of the gradient" in said
        assert "as many forward and backward passes as the others" in said


@pytest.mark.slow
def test_a_process_that_waits_in_vain_says_for_what(of_calls: list[Any]) -> None:
    said = of_calls[0]["one_waits"]["message"]
    assert "waited for the others to exchange the rows of block 0" in said
    assert "does not answer within 0:00:02" in said


@pytest.mark.slow
def test_other_adapters_in_another_process_are_refused(of_calls: list[Any]) -> None:
    for its in of_calls:
        assert "rows in each block, but process" in its["other_adapters"]["both"]
        assert "other settings" in its["other_settings"]["both"]


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Path]:
    """This process is the only one of a group."""
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        yield tmp_path
    finally:
        distributed.destroy_process_group()


def test_one_process_has_the_only_share(alone: Path) -> None:
    """A script for several processes runs in one."""
    check([{"catchup": both("catchup", alone)}], "catchup")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"placement": "resident"}, "`placement` is 'resident'.*'offloaded'"),
        ({"cache": "home"}, "`cache` is 'home'.*cache='steps'"),
        ({"num_experts": 0}, "`num_experts` is 0.*average_row_gradients"),
    ],
)
def test_rows_that_cannot_be_divided(
    fields: dict[str, Any], message: str, alone: Path
) -> None:
    model = sparse_model(depth=1, **fields)
    with pytest.raises(meft.ConfigError, match=message):
        meft.divide_rows(model)


def test_what_comes_before_the_division_is_refused(alone: Path) -> None:
    """An optimizer, a gradient, an average; and a model without rows."""
    model = sparse_model(depth=1)
    meft.SparseAdamW(model.parameters())
    with pytest.raises(meft.UnsupportedCallError, match="before the optimizer"):
        meft.divide_rows(model)
    model = sparse_model(depth=1)
    model(**next(batches(1))).loss.backward()
    with pytest.raises(meft.UnsupportedCallError, match="have a gradient"):
        meft.divide_rows(model)
    model = sparse_model(depth=1)
    meft.average_row_gradients(model)
    with pytest.raises(meft.UnsupportedCallError, match="call either"):
        meft.divide_rows(model)
    with pytest.raises(meft.UnsupportedModelError, match="add_sparse_adapters"):
        meft.divide_rows(plain_model(depth=1))


def test_a_process_that_has_not_joined_others() -> None:
    with pytest.raises(meft.UnsupportedCallError, match="torchrun"):
        meft.divide_rows(sparse_model(depth=1))


def test_saved_rows_of_another_number_are_refused(alone: Path) -> None:
    """Also if they are as many as this process has."""
    model, other = sparse_model(depth=1), sparse_model(depth=1, num_neurons=32)
    state = {n: t for n, t in other.state_dict().items() if n.endswith(".neurons")}
    saved = meft.SparseAdamW(other.parameters()).state_dict()
    meft.divide_rows(model)
    before = sparse_adapters(model).values()
    with pytest.raises(meft.AdapterFileError, match=r"32 rows were saved.* have 64"):
        model.load_state_dict(state, strict=False)
    with pytest.raises(meft.ConfigError, match=r"of 32 rows, .* have 64"):
        meft.SparseAdamW(model.parameters()).load_state_dict(saved)
    assert [len(adapter.rows.store) for adapter in before] == [64]


def test_a_divided_model_can_be_made_reversible(alone: Path) -> None:
    """In this order too; parameters count for all processes."""
    model = sparse_model(depth=1)
    meft.divide_rows(model)
    meft.make_reversible(model, meft.ReversibleConfig(adapter=None))
    model(**next(batches(1))).loss.backward()
    (adapter,) = sparse_adapters(model).values()
    assert adapter.neurons.grad is not None


TRAINER = """
import sys
import gloo_group, meft
from torch import distributed
from transformers import Trainer, TrainingArguments
from library.sparse import batches, sparse_model

folder, checkpoint = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None
rows = [{n: t[i] for n, t in b.items()} for b in batches(8) for i in range(2)]
arguments = TrainingArguments(
    folder, max_steps=4, per_device_train_batch_size=2, learning_rate=1e-2,
    use_cpu=True, report_to="none", save_strategy="steps", save_steps=2,
    eval_strategy="steps", eval_steps=2, disable_tqdm=True,
    dataloader_pin_memory=False, ddp_find_unused_parameters=False,
)
arguments.device  # joins the other process
model = sparse_model(depth=2)
meft.make_reversible(model, meft.ReversibleConfig(adapter=None, on_mismatch="raise"))
meft.divide_rows(model)
trainer = Trainer(
    model, arguments, train_dataset=rows, eval_dataset=rows[:3],
    optimizer_cls_and_kwargs=meft.optimizer_cls_and_kwargs(arguments),
    callbacks=[meft.gather_for_trainer()],
)
trainer.train(resume_from_checkpoint=checkpoint)
with meft.gathered_rows(model):
    trainer.save_model(f"{folder}/last")
assert distributed.get_world_size() == 2
gloo_group.leave()
"""
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node=2"]
ACCELERATE = [
    "accelerate.commands.launch",
    *("--multi_gpu", "--num_processes=2", "--num_machines=1"),
    *("--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"),
]


LOOP = """
import sys
import gloo_group, meft, torch
from accelerate import Accelerator
from library.sparse import batches, sparse_model
from meft.sparse.adapter import sparse_adapters

folder, accelerator = sys.argv[1], Accelerator(cpu=True)

def prepared():
    model = sparse_model(depth=2)
    meft.divide_rows(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    return model, *accelerator.prepare(model.train(), meft.SparseAdamW(trained, 1e-2))

def rows_after(model, parallel, optimizer, steps):
    for step in steps:
        batch = next(batches(1, seed=2 * step + accelerator.process_index))
        accelerator.backward(parallel(**batch).loss)
        accelerator.clip_grad_norm_(parallel.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    return [a.rows.store.settled().clone() for a in sparse_adapters(model).values()]

first = prepared()
rows_after(*first, range(2))
with meft.gathered_rows(first[0], optimizer_state=True):
    accelerator.save_state(folder)
    accelerator.wait_for_everyone()
went_on = rows_after(*first, range(2, 4))
accelerator._models.clear()
accelerator._optimizers.clear()
second = prepared()
with meft.gathered_rows(second[0]):  # it reads the state dict, too
    accelerator.load_state(folder)
loaded = rows_after(*second, range(2, 4))
assert all(torch.equal(one, other) for one, other in zip(went_on, loaded))
assert accelerator.num_processes == 2
gloo_group.leave()
"""


def launch(launcher: list[str], text: str, folder: Path, more: list[str]) -> None:
    """Run a script in two processes."""
    script = folder / "script.py"
    script.write_text(text)
    path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    environment = os.environ | {"PYTHONPATH": path, "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-m", *launcher, str(script), *more]
    subprocess.run(command, check=True, env=environment, timeout=500)


@pytest.mark.slow
def test_accelerate_saves_and_loads_divided_rows(tmp_path: Path) -> None:
    """A run that is loaded goes on with the same bits."""
    launch(ACCELERATE, LOOP, tmp_path, [str(tmp_path / "state")])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_trainer_saves_and_resumes_divided_rows(tmp_path: Path) -> None:
    """With reversible blocks, evaluation and checkpoints; `accelerate launch` and
    torchrun end with the same rows, as does a run that was resumed half-way."""
    half_way = str(tmp_path / "torchrun" / "checkpoint-2")
    for launcher, name, more in (
        (TORCHRUN, "torchrun", []),
        (TORCHRUN, "resumed", [half_way]),
        (ACCELERATE, "accelerate", []),
    ):
        launch(launcher, TRAINER, tmp_path, [str(tmp_path / name), *more])
    whole, *others = (
        load_file(tmp_path / name / "last" / "model.safetensors")
        for name in ("torchrun", "resumed", "accelerate")
    )
    neurons = [name for name in whole if name.endswith(".neurons")]
    before = dict(sparse_model(depth=2).named_parameters())
    for name in neurons:
        assert whole[name].shape == before[name].shape
        assert not torch.equal(whole[name], before[name].detach())
    for other in others:
        assert same(whole, other)
