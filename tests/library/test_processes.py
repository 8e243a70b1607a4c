"""Several processes: FSDP2 as it is used (`fully_shard` of each block, and then of the
model), DistributedDataParallel, and `torchrun` with transformers' `Trainer`.

Gradients are those of one process without FSDP, in every bit: all processes are given
the same batch, and the mean of equal numbers is exact.
"""

import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard

import meft
from library.processes import (
    KINDS,
    gradients,
    in_each_process,
    layers,
    model_of,
    shard,
)


def _assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [n for n in expected if not torch.equal(found[n], expected[n])]
    assert different == []


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[Any]:
    """A mesh of this process alone."""
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backward", ["rebuild", "store"])
@pytest.mark.parametrize("steps", [1, 2])
def test_gradients_of_sharded_blocks(
    kind: str, backward: str, steps: int, one_process: Any
) -> None:
    """None is missing, also when gradients are accumulated."""
    sharded = shard(model_of(kind, backward), one_process)
    expected = gradients(model_of(kind, "store"), steps=steps)
    _assert_equal(gradients(sharded, steps=steps), expected)


def test_as_many_gradients_as_plain_fsdp(one_process: Any) -> None:
    """Of LoRA inside: in a plain model, those of the same parameters."""
    plain = gradients(shard(model_of("lora", None), one_process))
    found = gradients(shard(model_of("lora"), one_process))
    assert found.keys() == plain.keys()


def test_sharded_modules_inside_a_block(one_process: Any) -> None:
    """The block that holds them is called."""
    model = model_of("bottleneck")
    for block in layers(model):
        attention: Any = block.self_attn
        fully_shard(attention, mesh=one_process)
    fully_shard(model, mesh=one_process)
    _assert_equal(gradients(model), gradients(model_of("bottleneck", "store")))


@pytest.mark.parametrize("config", [{"variant": "meft3"}, {"mlp_chunks": 2}])
def test_blocks_in_parts_cannot_be_sharded(
    config: dict[str, Any], one_process: Any
) -> None:
    """Halves, and chunks, are not calls of the block."""
    model = shard(model_of("bottleneck", **config), one_process)
    with pytest.raises(meft.UnsupportedCallError, match="sharded by FSDP2"):
        gradients(model)


def test_a_wrong_structure_is_refused(
    one_process: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The halves are compared with the block's own forward here too."""
    model = shard(model_of("bottleneck"), one_process)
    kind: Any = type(layers(model)[0])
    original = kind.forward

    @functools.wraps(original)
    def twice(*args: Any, **call: Any) -> Tensor:
        doubled: Tensor = 2 * original(*args, **call)
        return doubled

    monkeypatch.setattr(kind, "forward", twice)
    with pytest.raises(meft.UnsupportedModelError, match="does not compute"):
        gradients(model)


def _expected(kind: str, rows: list[int]) -> dict[str, Tensor]:
    """The mean of the gradients of one process for each number of rows."""
    every = [gradients(model_of(kind, "store"), n) for n in rows]
    names = every[0].keys() - {"loss"}
    return {n: sum(g[n] for g in every) / len(every) for n in names}  # type: ignore[misc]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("how", "rows"), [("fsdp", "same"), ("fsdp", "other"), ("ddp", "other")]
)
def test_two_processes(kind: str, rows: str, how: str, tmp_path: Path) -> None:
    """The same gradients in both, and one step of AdamW on shards is one on the whole;
    also if the processes have batches of different shapes."""
    spawn: Any = torch.multiprocessing.spawn  # type: ignore[attr-defined]
    spawn(in_each_process, (2, str(tmp_path), kind, rows, how), nprocs=2)
    first, second = (torch.load(tmp_path / f"gradients-{r}.pt") for r in (0, 1))
    del first["loss"], second["loss"]
    _assert_equal(first, second)
    expected = _expected(kind, [3, 3] if rows == "same" else [1, 2])
    _assert_equal(first, expected)
    alone = model_of(kind, "store")
    optimizer = torch.optim.AdamW(alone.parameters(), 1e-2)
    for name, parameter in alone.named_parameters():
        parameter.grad = expected.get(name)
    optimizer.step()
    stepped = torch.load(tmp_path / "weights-0.pt")
    for name, parameter in alone.named_parameters():
        torch.testing.assert_close(stepped[name], parameter.detach())


_SCRIPT = """
import sys, gloo_group, torch
from transformers import Trainer, TrainingArguments
from library.processes import CASE, model_of

kind, backward, folder = sys.argv[1:]
batch = CASE.batch()
rows = [{name: x[i] for name, x in batch.items()} for i in (0, 1, 2, 1)] * 2
arguments = TrainingArguments(
    folder, max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2,
    use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
    dataloader_pin_memory=False, ddp_find_unused_parameters=False,
)
model = model_of(kind, backward)
Trainer(model, arguments, train_dataset=rows).train()
assert torch.distributed.get_world_size() == 2
if torch.distributed.get_rank() == 0:
    state = {name: p.detach() for name, p in model.named_parameters()}
    torch.save(state, f"{folder}/{backward}.pt")
gloo_group.leave()
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "bottleneck"])
def test_torchrun_with_the_trainer(kind: str, tmp_path: Path) -> None:
    """Two processes end at the weights of two processes that store activations."""
    script = tmp_path / "train.py"
    script.write_text(_SCRIPT)
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": f"{root}:{root / 'tests'}"}
    for backward in ("rebuild", "store"):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node=2", str(script), kind, backward, str(tmp_path)]
        subprocess.run(command, check=True, env=environment, timeout=240)
    rebuilt, stored = (torch.load(tmp_path / f"{b}.pt") for b in ("rebuild", "store"))
    plain = dict(model_of(kind).named_parameters())
    assert all(torch.equal(rebuilt[name], stored[name]) for name in stored)
    assert not all(torch.equal(rebuilt[name], plain[name]) for name in stored)
