"""Memory of a virtual GPU that no operator makes: files, storages, generators."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
import transformers
from safetensors import safe_open
from torch import nn
from torch.utils.checkpoint import checkpoint

import meft_bench
from meft_bench.shared.source import MissingError
from meft_bench.virtual.emulation.operator_rules import GRU_WORKSPACE, LSTM_WORKSPACE

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="there is a real GPU, which is left alone"
)
KIB = 1024
FLOATS = 4 * KIB
"""Bytes of a tensor of 1024 floats."""


def allocated() -> int:
    return torch.cuda.memory_allocated()


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with two tensors of 1024 and 2048 floats, in two formats."""
    tensors = {"a": torch.ones(32, 32), "b": torch.ones(2048)}
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors")
    torch.save(tensors, tmp_path / "x.pt")
    return tmp_path


@pytest.mark.parametrize("device", ["cuda", "cuda:0", 0, torch.device("cuda")])
def test_files_are_loaded_onto_the_gpu(files: Path, device: Any) -> None:
    """Each tensor takes its memory there, and what is on the host takes none."""
    with meft_bench.virtual_gpu("T4") as memory:
        named: Any = device if isinstance(device, str | int) else "cuda"
        loaded = safetensors.torch.load_file(files / "x.safetensors", device=named)
        assert {one.device.type for one in loaded.values()} == {"cuda"}
        assert allocated() == 3 * FLOATS
        kept = torch.load(files / "x.pt", map_location=named or "cuda")
        assert {one.device.type for one in kept.values()} == {"cuda"}
        assert allocated() == 6 * FLOATS
        host = torch.load(files / "x.pt", map_location="cpu")
        assert allocated() == 6 * FLOATS
        del loaded, kept, host
        assert allocated() == 0
    assert memory.plan().h2d_bytes == 6 * FLOATS


def test_a_file_is_read_by_parts(files: Path) -> None:
    """By whatever name `safe_open` was imported before."""
    with meft_bench.virtual_gpu("T4"):
        path = files / "x.safetensors"
        with safetensors.safe_open(path, "pt", device="cuda") as file:
            assert sorted(file.keys()) == ["a", "b"]
            part = file.get_slice("b")
            assert part.get_shape() == [2048]
            assert part[:1024].device.type == "cuda"
            one = file.get_tensor("a")
            assert allocated() == FLOATS
            del one
        opened: Any = safe_open(path, framework="pt", device="cuda:0")
        assert opened.get_tensor("b").device.type == "cuda"
        with safe_open(path, "pt") as file:
            assert file.get_tensor("b").device.type == "cpu"


def test_shared_weights_of_a_file_are_one(tmp_path: Path) -> None:
    weight = torch.ones(1024)
    torch.save({"one": weight, "view": weight[10:]}, tmp_path / "x.pt")
    with meft_bench.virtual_gpu("T4"):
        loaded = torch.load(tmp_path / "x.pt", map_location="cuda")
        assert allocated() == FLOATS
        del loaded["one"]
        assert allocated() == FLOATS


@pytest.mark.parametrize("how", [{"device_map": "cuda"}, {"device_map": "auto"}, {}])
def test_a_model_is_loaded_onto_the_gpu(tmp_path: Path, how: dict[str, Any]) -> None:
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=512,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    with meft_bench.virtual_gpu("T4"):
        model: Any = transformers.LlamaForCausalLM.from_pretrained(tmp_path, **how)
        model.to("cuda")
        weights = [*model.parameters()]
        assert {one.device.type for one in weights} == {"cuda"}
        rounded = sum(-(-one.nbytes // 512) * 512 for one in [*weights])
        buffers = [one for one in model.buffers() if one.is_cuda]
        assert allocated() == rounded + 512 * len(buffers)


# Storages.


def test_the_memory_of_a_storage_is_freed_and_taken_again() -> None:
    """As FSDP and activation offloading do by hand; the new memory comes first."""
    with meft_bench.virtual_gpu("T4"):
        x = torch.zeros(1024, device="cuda")
        storage = x.untyped_storage()
        assert storage.nbytes() == FLOATS
        storage.resize_(0)
        assert allocated() == 0
        storage.resize_(FLOATS)
        assert allocated() == FLOATS
        torch.cuda.reset_peak_memory_stats()
        storage.resize_(2 * FLOATS)
        assert allocated() == 2 * FLOATS
        assert torch.cuda.max_memory_allocated() == 3 * FLOATS
        del x, storage
        assert allocated() == 0


def test_a_tensor_that_grows_is_copied() -> None:
    with meft_bench.virtual_gpu("T4"):
        x = torch.zeros(1024, device="cuda")
        x.resize_(3 * 1024)
        assert allocated() == 3 * FLOATS
        assert torch.cuda.max_memory_allocated() == 4 * FLOATS


def test_a_tensor_takes_over_a_storage() -> None:
    with meft_bench.virtual_gpu("T4"):
        x = torch.zeros(1024, device="cuda")
        y: Any = torch.zeros(2048, device="cuda")
        y.set_(x)
        assert allocated() == FLOATS
        y.set_(x.untyped_storage(), 10, (5,), (1,))
        del x
        assert allocated() == FLOATS
        y.set_()
        assert allocated() == 0
        assert torch.zeros(8, device="cuda").share_memory_().is_cuda
        weight = nn.Parameter(torch.zeros(1024, device="cuda"))
        weight.data = torch.empty(0, device="cuda")
        assert allocated() == 0


def test_a_storage_without_room_leaves_the_old_one() -> None:
    with meft_bench.virtual_gpu("T4"):
        x = torch.zeros(1024, device="cuda")
        with pytest.raises(torch.OutOfMemoryError):
            x.untyped_storage().resize_(2**40)
        assert allocated() == FLOATS
        del x
        assert allocated() == 0


@pytest.mark.parametrize("name", ["clone", "cpu", "cuda"])
def test_a_copy_of_a_storage_is_refused(name: str) -> None:
    with meft_bench.virtual_gpu("T4"):
        storage = torch.zeros(8, device="cuda").untyped_storage()
        with pytest.raises(NotImplementedError, match=f"`UntypedStorage.{name}` is"):
            getattr(storage, name)()
        real = torch.zeros(8, dtype=torch.long).untyped_storage()
        assert real.clone().nbytes() == 64


def test_what_is_beyond_a_storage_is_an_error() -> None:
    with meft_bench.virtual_gpu("T4"):
        x = torch.zeros(10, device="cuda")
        assert x.as_strided((5, 2), (2, 1)).shape == (5, 2)
        assert x[4:].as_strided((3, 2), (2, 1)).shape == (3, 2)
        with pytest.raises(RuntimeError, match="out of bounds for storage of size 40"):
            x.as_strided((20,), (1,))


# Random numbers.


def test_a_generator_of_the_gpu_takes_no_memory() -> None:
    with meft_bench.virtual_gpu("T4"):
        generator = torch.Generator(device="cuda")
        assert isinstance(generator, torch.Generator)
        assert generator.manual_seed(3) is generator
        assert generator.device.type == "cuda"
        assert generator.initial_seed() == 3
        generator.set_state(generator.get_state())
        drawn = [
            torch.randn(4, generator=generator, device="cuda"),
            torch.rand(4, generator=generator, device="cuda"),
            torch.randint(9, (4,), generator=generator, device="cuda"),
            torch.randperm(4, generator=generator, device="cuda"),
            torch.empty(4, device="cuda").normal_(generator=generator),
            torch.empty(4, device="cuda").exponential_(generator=generator),
            torch.bernoulli(torch.zeros(4, device="cuda"), generator=generator),
        ]
        assert {one.device.type for one in drawn} == {"cuda"}
        assert allocated() == 512 * len(drawn)
        on_host = torch.Generator()
        assert on_host.device.type == "cpu"
        assert isinstance(on_host, torch.Generator)
        assert sorted(torch.randperm(4, generator=on_host).tolist()) == [0, 1, 2, 3]
    assert torch.Generator().device.type == "cpu"


def test_states_of_random_numbers_are_kept_on_the_host() -> None:
    """As a checkpoint of activations keeps them."""
    with meft_bench.virtual_gpu("T4"):
        torch.cuda.manual_seed(1)
        torch.cuda.manual_seed_all(2)
        state = torch.cuda.get_rng_state()
        assert state.shape == (16,)
        torch.cuda.set_rng_state(state)
        assert isinstance(torch.cuda.default_generators[0], torch.Generator)
        with torch.random.fork_rng(devices=[0]):
            transformers.set_seed(3)
        assert allocated() == 0
        layers = nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.1)).to("cuda")
        for use_reentrant in (True, False):
            x = torch.zeros(8, 64, device="cuda", requires_grad=True)
            checkpoint(layers, x, use_reentrant=use_reentrant).sum().backward()
            assert x.grad is not None


# `torch.func`.


def test_gradients_of_each_row_take_a_gradient_for_each_row() -> None:
    """By hand: of 8 rows, 8 matrices and 8 biases."""
    with meft_bench.virtual_gpu("T4"):
        layer = nn.Linear(64, 64).to("cuda")
        weights = {name: one.detach() for name, one in layer.named_parameters()}

        def loss(weights: Any, row: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = torch.func.functional_call(layer, weights, (row[None],))
            return out.sum()

        rows = torch.zeros(8, 64, device="cuda")
        before = allocated()
        found: Any = torch.vmap(torch.func.grad(loss), (None, 0))(weights, rows)
        assert found["weight"].shape == (8, 64, 64)
        libraries = 8_519_680 * 2  # of cuBLAS and cuBLASLt
        left = 4 * 8 * 64 * 64 + 4 * 8 * 64
        assert left <= allocated() - before <= left + libraries + 8 * KIB


def test_an_ensemble_runs_as_one_model() -> None:
    with meft_bench.virtual_gpu("T4"):
        models = [nn.Linear(8, 4).to("cuda") for _ in range(3)]
        weights, buffers = torch.func.stack_module_state(models)

        def run(weights: Any, buffers: Any, rows: torch.Tensor) -> Any:
            return torch.func.functional_call(models[0], (weights, buffers), (rows,))

        rows = torch.zeros(2, 8, device="cuda")
        assert torch.vmap(run, (0, 0, None))(weights, buffers, rows).shape == (3, 2, 4)


# Recurrent layers.


def held_by_cell(make: Callable[..., nn.Module], *, is_lstm: bool = False) -> int:
    """Bytes that a cell with 64 units keeps and returns for 128 rows."""
    with meft_bench.virtual_gpu("T4"):
        cell = make(64, 64, bias=False).to("cuda")
        x = torch.zeros(128, 64, device="cuda")
        state = torch.zeros(128, 64, device="cuda")
        torch.nn.functional.linear(x, x)  # cuBLAS takes its memory
        before = allocated()
        out = cell(x, (state, state) if is_lstm else state)
        after = allocated()
        (out[0] if is_lstm else out).sum().backward()
        return after - before


def test_a_cell_keeps_the_workspace_of_its_fused_kernel() -> None:
    """By hand: in units of 128 x 64 floats, the gates of the input and of the state,
    which autograd keeps, the new states and the workspace."""
    unit = 4 * 128 * 64
    assert held_by_cell(nn.GRUCell) == (2 * 3 + 1 + GRU_WORKSPACE) * unit
    assert (
        held_by_cell(nn.LSTMCell, is_lstm=True) == (2 * 4 + 2 + LSTM_WORKSPACE) * unit
    )


def test_a_layer_of_cudnn_is_refused_and_one_of_pytorch_is_not() -> None:
    """On the host there is no cuDNN."""
    with meft_bench.virtual_gpu("T4"):
        for make in (nn.RNN, nn.LSTM, nn.GRU):
            layer = make(8, 8)
            layer(torch.zeros(4, 2, 8))
            layer = layer.to("cuda")
            x = torch.zeros(4, 2, 8, device="cuda")
            with pytest.raises(NotImplementedError, match=r"`torch.nn.\w+ of cuDNN`"):
                layer(x)
            with torch.backends.cudnn.flags(enabled=False):
                layer(x)[0].sum().backward()


def test_what_was_imported_before_says_what_to_write() -> None:
    def train() -> None:
        with meft_bench.virtual_gpu("T4"):
            torch.UntypedStorage(8, device="cuda")

    with pytest.raises(MissingError, match="make a tensor, and take its storage"):
        train()


def test_a_reduced_loss_keeps_the_memory_of_all_elements() -> None:
    """As real ones do: their kernels make a tensor of all elements smaller."""
    x = torch.randn(100, 50)
    functional = torch.nn.functional
    for loss in (
        functional.mse_loss,
        functional.smooth_l1_loss,
        functional.binary_cross_entropy,
    ):
        real = loss(x.sigmoid(), x.sigmoid()).untyped_storage().nbytes()
        with meft_bench.virtual_gpu("H200"):
            y = x.cuda().sigmoid().requires_grad_()
            found = loss(y, y.detach())
            found.backward()
            assert found.untyped_storage().nbytes() == real == 4 * 5000
            assert loss(y, y, reduction="none").shape == y.shape


def test_memory_that_is_taken_over_again_is_taken_over() -> None:
    """The second time, too."""
    with meft_bench.virtual_gpu("H200"):
        several = [torch.zeros(1000, device="cuda") for _ in range(4)]
        before = torch.cuda.memory_allocated()
        for one in several[1:]:
            one.set_(several[0])  # type: ignore[call-overload]
            assert one.untyped_storage()._cdata == several[0].untyped_storage()._cdata
        assert before - torch.cuda.memory_allocated() == 3 * 4096


def test_what_is_beyond_a_storage_is_refused_though_it_fits_another() -> None:
    with meft_bench.virtual_gpu("H200"):
        torch.zeros(1000, device="cuda")[:10].as_strided((500,), (1,))
        with pytest.raises(RuntimeError, match="are out of bounds for storage"):
            torch.zeros(10, device="cuda").as_strided((500,), (1,))


def test_a_convolution_keeps_the_memory_format() -> None:
    """As cuDNN does: what reads its output as channels last copies nothing."""
    with meft_bench.virtual_gpu("H200"):
        layer = torch.nn.Conv2d(8, 8, 3, padding=1).cuda()
        images = torch.randn(2, 8, 16, 16, device="cuda")
        assert layer(images).is_contiguous()
        layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        found = layer(images.to(memory_format=torch.channels_last))
        assert found.is_contiguous(memory_format=torch.channels_last)
        before = torch.cuda.memory_allocated()
        found.permute(0, 2, 3, 1).contiguous()
        assert torch.cuda.memory_allocated() == before
