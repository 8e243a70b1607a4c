"""Rows of sparse adapters are state of the model: read, written, copied and saved as
any parameter, although idle rows take their steps late and the device holds copies."""

import copy
import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import swa_utils
from transformers import LlamaForCausalLM, PreTrainedModel

import meft
from library.sparse import (
    HIDDEN,
    batches,
    config,
    plain_model,
    sparse_model,
    train,
)
from marks import slow_but_for
from meft import host_memory
from meft.errors import AdapterFileError, HostMemoryError, UnsupportedCallError
from meft.sparse.adapter import sparse_adapters
from meft.sparse.idle import NUM_FACTORS
from meft.sparse.row_parameter import RowParameter, rows_of


def row_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [adapter.neurons for adapter in sparse_adapters(model).values()]


def trainable(model: PreTrainedModel) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def logits(model: nn.Module) -> Tensor:
    (inputs,) = batches(1)
    with torch.no_grad():
        found: Tensor = model.eval()(**inputs).logits
    model.train()
    return found


def behind_and_dense(**fields: Any) -> tuple[PreTrainedModel, Tensor]:
    """A model with rows that are behind, and what its first block's should be."""
    behind, dense = (sparse_model(update=u, **fields) for u in ("catchup", "dense"))
    for model in (behind, dense):
        train(model, steps=3)
    stores = [
        next(iter(sparse_adapters(model).values())).rows.store
        for model in (behind, dense)
    ]
    right = stores[1].settled().clone()
    assert not torch.equal(stores[0].rows, right)
    return behind, right


def saved(tensor: Tensor, path: Path) -> Tensor:
    save_file({"rows": tensor}, path / "rows.safetensors")
    return load_file(path / "rows.safetensors")["rows"]


def unpickled(tensor: Tensor) -> Tensor:
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    buffer.seek(0)
    found: Tensor = torch.load(buffer, weights_only=True)
    return found


READS: dict[str, Callable[[nn.Parameter, Path], Tensor]] = {
    "detach": lambda p, path: p.detach().clone(),
    "data": lambda p, path: p.data + 0,
    "clone": lambda p, path: p.clone(),
    "numpy": lambda p, path: torch.from_numpy(p.detach().numpy().copy()),
    "tolist": lambda p, path: torch.tensor(p.tolist()),
    "view": lambda p, path: p.detach().view(-1).clone().view(p.shape),
    "row by row": lambda p, path: torch.stack([p[i] for i in range(len(p))]),
    "vector": lambda p, path: nn.utils.parameters_to_vector([p]).view(p.shape),
    "copy_": lambda p, path: torch.empty(p.shape).copy_(p.detach()),
    "safetensors": lambda p, path: saved(p.detach(), path),
    "torch.save": lambda p, path: unpickled(p.detach()),
    "deepcopy": lambda p, path: copy.deepcopy(p).detach().clone(),
    "dlpack": lambda p, path: torch.utils.dlpack.from_dlpack(p.detach()).clone(),
    "pointer": lambda p, path: _at(p.detach()),
}


def _at(tensor: Tensor) -> Tensor:
    storage = tensor.untyped_storage()
    assert storage.data_ptr() == tensor.data_ptr()
    found = torch.empty(0).set_(storage, 0, tensor.shape, tensor.stride())
    return found.clone()


@pytest.mark.parametrize("read", READS)
def test_a_read_is_never_behind(read: str, tmp_path: Path) -> None:
    """Its bits are those of rows that took every step at once."""
    model, right = behind_and_dense(depth=1)
    found = READS[read](row_parameters(model)[0], tmp_path)
    assert torch.equal(found, right)


def test_a_state_dict_shows_later_steps_as_that_of_any_model_does() -> None:
    model, dense = sparse_model(depth=1), sparse_model(depth=1, update="dense")
    state = model.state_dict()
    for each in (model, dense):
        train(each, steps=3)
    key = "model.layers.0.parallel_adapter.neurons"
    assert torch.equal(state[key], dense.state_dict()[key])
    assert torch.equal(state[key], model.state_dict()[key])


WRITES: dict[str, Callable[[nn.Parameter, Tensor], object]] = {
    "copy_": lambda p, new: p.copy_(new),
    "data": lambda p, new: setattr(p, "data", new),
    "data in place": lambda p, new: p.data.copy_(new),
    "detach": lambda p, new: p.detach().copy_(new),
    "row by row": lambda p, new: [p[i].copy_(new[i]) for i in range(len(p))],
    "setitem": lambda p, new: p.__setitem__(slice(None), new),
    "flat": lambda p, new: p.view(-1).copy_(new.view(-1)),
    "add_": lambda p, new: p.add_(new - p),
    "foreach": lambda p, new: torch._foreach_copy_([p], [new]),
    "vector": lambda p, new: nn.utils.vector_to_parameters(new.view(-1), [p]),
    "init": lambda p, new: nn.init.zeros_(p).add_(new),
}


@pytest.mark.parametrize("wire", slow_but_for(["float32", "bfloat16"], "bfloat16"))
@pytest.mark.parametrize("write", WRITES)
def test_a_write_reaches_every_copy(write: str, wire: str) -> None:
    """The 16-bit copy, and rows that the device holds; moments stay, as torch's do."""
    model = sparse_model(depth=1, transfer_dtype=wire)
    train(model, steps=2)
    (parameter,) = row_parameters(model)
    logits(model)  # rows are on the device now
    new = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        WRITES[write](parameter, new)
    torch.testing.assert_close(parameter.detach().clone(), new)
    wanted = sparse_model(depth=1, transfer_dtype=wire)
    wanted.load_state_dict(model.state_dict())
    assert torch.equal(logits(model), logits(wanted))
    store = sparse_adapters(model)["model.layers.0.parallel_adapter"].rows.store
    assert store.moments[0].any()


def test_numpy_gives_a_copy_that_cannot_be_written_to() -> None:
    """A write to it would not reach the rows without a word."""
    (parameter,) = row_parameters(sparse_model(depth=1))
    with pytest.raises(ValueError, match="read-only"):
        parameter.detach().numpy()[0] = 1


@pytest.mark.parametrize("placement", ["offloaded", "resident"])
@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_can_be_put_back(placement: str, assign: bool) -> None:
    """Also while training: the model computes what it did, and trains on."""
    model = sparse_model(placement=placement)
    optimizer = meft.SparseAdamW(model.parameters(), lr=1e-2)
    first, *others = batches(4)
    model(**first).loss.backward()
    optimizer.step()
    state = copy.deepcopy(model.state_dict())
    wanted = logits(model)
    for inputs in others:
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(logits(model), wanted)
    message = model.load_state_dict(state, assign=assign)
    assert not message.missing_keys
    assert not message.unexpected_keys
    assert torch.equal(logits(model), wanted)
    model(**first).loss.backward()
    optimizer = meft.SparseAdamW(model.parameters(), lr=1e-2)
    optimizer.step()
    assert not torch.equal(logits(model), wanted)


def test_moving_and_casting_leave_rows_in_float32_where_they_are() -> None:
    model = sparse_model(depth=1)
    (parameter,) = row_parameters(model)
    router = sparse_adapters(model)["model.layers.0.parallel_adapter"].router
    before = parameter.data_ptr()
    nn.Module.half(model)
    assert router is not None
    assert router.dtype == torch.float16
    moves: list[Callable[[nn.Module], object]] = [
        nn.Module.bfloat16,
        nn.Module.double,
        nn.Module.float,
        nn.Module.cpu,
        lambda m: nn.Module.to(m, "cpu", torch.float32),
    ]
    for move in moves:
        move(model)
        assert parameter is row_parameters(model)[0]
        assert (parameter.dtype, parameter.data_ptr()) == (torch.float32, before)
    nn.Module.to(model, "meta")
    assert router.is_meta or model.get_parameter("lm_head.weight").is_meta
    assert (parameter.device.type, parameter.data_ptr()) == ("cpu", before)


AVERAGES: dict[str, Any] = {
    "mean": lambda swa: {},
    "decaying mean": lambda swa: {"multi_avg_fn": swa.get_ema_multi_avg_fn(0.5)},
    "one by one": lambda swa: {"avg_fn": swa.get_ema_avg_fn(0.5)},
}


@pytest.mark.parametrize("average", AVERAGES)
def test_an_averaged_model_averages_rows(average: str) -> None:
    model = sparse_model(depth=1, transfer_dtype="bfloat16")
    averaged = swa_utils.AveragedModel(model, **AVERAGES[average](swa_utils))
    seen = []
    for _ in range(3):
        train(model, steps=1)
        averaged.update_parameters(model)
        seen.append(row_parameters(model)[0].detach().clone())
    if average == "mean":
        wanted = (seen[0] + seen[1] + seen[2]) / 3
    else:
        wanted = seen[0] / 4 + seen[1] / 4 + seen[2] / 2
    (found,) = row_parameters(averaged.module)
    assert isinstance(found, RowParameter)
    torch.testing.assert_close(found.detach().clone(), wanted)
    other = sparse_model(depth=1, transfer_dtype="bfloat16")
    other.load_state_dict(averaged.module.state_dict())
    assert torch.equal(logits(averaged.module), logits(other))


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize(
    "placement", slow_but_for(["offloaded", "resident"], "offloaded")
)
def test_a_copied_or_pickled_model_is_whole(how: str, placement: str) -> None:
    """It computes the same, trains to the same bits, and shares nothing."""
    model = sparse_model(placement=placement, depth=2)
    train(model, steps=2)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert torch.equal(logits(twin), logits(model))
    before = [p.detach().clone() for p in trainable(model)]
    trained = train(twin, steps=2)
    for parameter, old in zip(trainable(model), before, strict=True):
        assert torch.equal(parameter, old)
    assert train(model, steps=2) == trained


def test_a_saved_model_has_its_rows_once(tmp_path: Path) -> None:
    """In transformers' own file, also in shards; both ways to load give the model."""
    model = sparse_model(save_backbone=True)
    train(model)
    wanted = logits(model)
    for size in ("1GB", "20KB"):
        folder = tmp_path / size
        model.save_pretrained(folder, max_shard_size=size)
        tensors: dict[str, list[Path]] = {}
        for path in folder.glob("*.safetensors"):
            for key in load_file(path):
                tensors.setdefault(key, []).append(path)
        keys = [key for key in tensors if key.endswith("neurons")]
        assert len(keys) == len(row_parameters(model))
        assert all(len(tensors[key]) == 1 for key in keys)
        loaded = LlamaForCausalLM.from_pretrained(folder)
        meft.load_adapters(loaded, folder)
        assert torch.equal(logits(loaded), wanted)


def test_rows_are_in_one_of_the_files_of_a_save(tmp_path: Path) -> None:
    """As `docs/composition.md` says: in `model.safetensors` of `save_pretrained`,
    without which the directory is refused; in the adapters' file of `save_adapters`."""
    model = sparse_model()
    model.save_pretrained(tmp_path / "whole")
    meft.save_adapters(model, tmp_path / "alone")
    found = load_file(tmp_path / "alone" / "adapters.safetensors")
    assert not (tmp_path / "whole" / "adapters.safetensors").exists()
    assert len([name for name in found if name.endswith(".neurons")]) == 3
    (tmp_path / "whole" / "model.safetensors").unlink()
    with pytest.raises(AdapterFileError, match=r"model\.safetensors"):
        meft.load_adapters(plain_model(), tmp_path / "whole")
    meft.load_adapters(plain_model(), tmp_path / "alone")


def test_an_adapter_file_without_rows_is_refused(tmp_path: Path) -> None:
    meft.save_adapters(sparse_model(), tmp_path)
    weights = load_file(tmp_path / "adapters.safetensors")
    name = next(name for name in weights if name.endswith("neurons"))
    del weights[name]
    save_file(weights, tmp_path / "adapters.safetensors")
    model = plain_model()
    with pytest.raises(AdapterFileError, match=r"lacks 'model\.layers\.0.*neurons'"):
        meft.load_adapters(model, tmp_path)
    assert not sparse_adapters(model)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_of_adapters_have_the_permissions_of_any_new_file(
    mask: int, tmp_path: Path
) -> None:
    old = os.umask(mask)
    try:
        meft.save_adapters(sparse_model(depth=1), tmp_path)
        (tmp_path / "other").touch()
    finally:
        os.umask(old)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert set(modes.values()) == {0o666 & ~mask}


def test_accelerate_saves_and_loads_a_run(tmp_path: Path) -> None:
    """To the same bits: rows with the model, moments with the optimizer."""
    accelerator = accelerate.Accelerator(cpu=True)
    runs = []
    for _ in range(2):
        model = sparse_model()
        optimizer = meft.SparseAdamW(model.parameters(), lr=1e-2)
        runs.append(accelerator.prepare(model, optimizer))
    data = list(batches(4))

    def steps(run: Any, some: list[dict[str, Tensor]]) -> None:
        model, optimizer = run
        for inputs in some:
            accelerator.backward(model(**inputs).loss)
            accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()

    accelerator._models, accelerator._optimizers = [runs[0][0]], [runs[0][1]]
    steps(runs[0], data[:2])
    accelerator.save_state(str(tmp_path))
    accelerator.save_model(runs[0][0], str(tmp_path / "model"))
    for name, tensor in load_file(tmp_path / "model" / "model.safetensors").items():
        assert torch.equal(tensor, runs[0][0].state_dict()[name])
    steps(runs[0], data[2:])
    accelerator._models, accelerator._optimizers = [runs[1][0]], [runs[1][1]]
    accelerator.load_state(str(tmp_path))
    steps(runs[1], data[2:])
    for one, other in zip(trainable(runs[0][0]), trainable(runs[1][0]), strict=True):
        assert torch.equal(one, other)


def test_more_neurons_than_host_memory_holds_are_refused_before_they_are_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows, moments, the 16-bit copy, factors of idle steps, gradients and a copy while
    rows are saved count, to the byte."""
    fields = {"num_neurons": 1024, "num_experts": 128, "transfer_dtype": "bfloat16"}
    numbers = 3 * 1024 * 2 * HIDDEN
    slots = min(9000 * 7 // 8 // (2 * HIDDEN * 6), 3 * 1024)
    needed = (4 + 2 + 8 + 4 + 4) * numbers + slots * 2 * HIDDEN * 6
    needed += 3 * 1024 * 8 * (NUM_FACTORS + 2)  # in which steps they moved, as well
    for available in (needed - 1, needed):
        monkeypatch.setattr(host_memory, "available_bytes", lambda n=available: n)
        model = plain_model()
        if available == needed:
            meft.add_sparse_adapters(model, config(device_bytes=9000, **fields))
            continue
        with pytest.raises(HostMemoryError, match=f"{needed:,} bytes.*{available:,}"):
            meft.add_sparse_adapters(model, config(device_bytes=9000, **fields))
        assert not sparse_adapters(model)
        assert all(parameter.requires_grad for parameter in model.parameters())


def test_available_memory_is_what_the_tightest_cgroup_leaves(tmp_path: Path) -> None:
    """Page cache that can be dropped counts as available; no limit is none."""
    (tmp_path / "proc/self").mkdir(parents=True)
    assert host_memory.available_bytes(tmp_path) is None
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9 kB\nMemAvailable: 8 kB\n")
    assert host_memory.available_bytes(tmp_path) == 8192
    (tmp_path / "proc/self/cgroup").write_text("0::/outer/inner\n")
    for name, limit in (("outer", "5000"), ("outer/inner", "max")):
        group = tmp_path / "sys/fs/cgroup" / name
        group.mkdir(parents=True)
        (group / "memory.max").write_text(limit)
        (group / "memory.current").write_text("3000")
        (group / "memory.stat").write_text("anon 2000\ninactive_file 700\n")
    assert host_memory.available_bytes(tmp_path) == 5000 - 3000 + 700
    (tmp_path / "proc/self/cgroup").write_text("4:memory:/\n")
    group = tmp_path / "sys/fs/cgroup/memory"
    group.mkdir()
    (group / "memory.limit_in_bytes").write_text("4000")
    (group / "memory.usage_in_bytes").write_text("3900")
    assert host_memory.available_bytes(tmp_path) == 100
    assert host_memory.available_bytes() is not None


def test_a_replaced_parameter_is_refused() -> None:
    """What the adapter would not use must not seem to be used."""
    model = sparse_model(depth=1)
    (inputs,) = batches(1)
    state = {n: torch.ones(p.shape) for n, p in model.named_parameters()}
    state["model.layers.0.parallel_adapter.router"].requires_grad_()
    with pytest.raises(UnsupportedCallError, match="was replaced"):
        torch.func.functional_call(model, state, kwargs=inputs)
    adapter = sparse_adapters(model)["model.layers.0.parallel_adapter"]
    adapter.neurons = nn.Parameter(adapter.neurons.detach().clone())
    with pytest.raises(UnsupportedCallError, match="load_state_dict"):
        model(**inputs)


@pytest.mark.parametrize("change", ["step", "copy_"])
def test_rows_changed_between_forward_and_backward_are_refused(change: str) -> None:
    """As torch refuses it of any weight that a backward needs."""
    model = sparse_model(depth=1)
    optimizer = meft.SparseAdamW(model.parameters())
    (inputs,) = batches(1)
    model(**inputs).loss.backward()
    loss = model(**inputs).loss
    (parameter,) = row_parameters(model)
    if change == "step":
        router = sparse_adapters(model)["model.layers.0.parallel_adapter"].router
        assert router is not None
        router.grad = None
        optimizer.step()
    else:
        with torch.no_grad():
            parameter.copy_(parameter + 1)
    with pytest.raises(UnsupportedCallError, match="between forward and backward"):
        loss.backward()


def test_only_row_parameters_have_rows() -> None:
    model = sparse_model(depth=1)
    names = [n for n, p in model.named_parameters() if rows_of(p) is not None]
    assert names == ["model.layers.0.parallel_adapter.neurons"]
