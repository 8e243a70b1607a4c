"""Backbones with quantised weights: measured, and planned without their values.

What is compared with bitsandbytes and torchao runs where these are installed, which the
tests do not need otherwise: `pip install 'meft[quantised]'`.
"""

import contextlib
import copy
import dataclasses
import importlib.util
import json
import sys
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers.quantizers.base import HfQuantizer

from harness.tiny import FAMILIES, SHAPE, batch, cell, classifier
from meft_bench.child.backbones import any_family, quantised
from meft_bench.child.backbones.quantised import chosen_layers, num_weights, tensors_of
from meft_bench.child.training.steps import Stepper
from meft_bench.child.worker import run
from meft_bench.parent import arguments, fields, planning
from meft_bench.shared.cell import Cell
from meft_bench.shared.options import ChildOptions
from meft_bench.shared.quantisations import TABLE
from meft_bench.shared.registry import FLOATS_ONLY, METHODS, TRAIN_BACKBONE, load
from meft_bench.shared.source import Source
from meft_bench.virtual.emulation import quantised_layers, quantised_lora
from meft_bench.virtual.prediction.plan import MemoryPlan, plan
from meft_bench.virtual.recording.ledger import Ledger
from meft_bench.virtual.recording.trace import Trace

pytestmark = [
    pytest.mark.usefixtures("no_garbage_collection"),
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="there is a real GPU, which is left alone"
    ),
    pytest.mark.filterwarnings("ignore:.* will be removed in v6:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.* is deprecated .* v6:FutureWarning"),
]
ROWS, TOKENS = 2, 800
"""Above 1536 tokens, bitsandbytes never multiplies without making the weight."""
LINEAR = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 4096 * 14336)
"""Weights of the linear layers of the blocks of LLaMA-3.1-8B."""
OTHERS = 2 * 128256 * 4096 + 65 * 4096
"""Its embedding, head and norms."""
LAYERS = 32 * 7
BLOCK = 512
"""The least that the allocator gives, which a table of codes or an offset takes."""
FREQUENCIES = 2 * BLOCK
"""Two buffers of 64 float32 for the positions."""
STATISTICS = {
    "nf4": LINEAR // 64 * 4 + LAYERS * BLOCK,
    "nf4-double": LINEAR // 64
    + LINEAR // 64 // 256 * 4
    + LAYERS * (BLOCK + 2 * BLOCK + BLOCK),
    "int8": 5 * 32 * (4096 + 1024 + 1024 + 4096 + 14336 + 14336 + 4096),
}
"""Bytes of scales, of what their scales need, and of tables; of zero points in int8."""


def planned(weights_dtype: str, method: str = "lora", **changes: Any) -> MemoryPlan:
    usual: dict[str, Any] = {"backbone": "random:llama-3.1-8b", "dtype": "bf16"}
    usual |= {"task": "", "batch_size": 1, "seq_len": 64, "device": "virtual-H100"}
    one = Cell(method=method, weights_dtype=weights_dtype, **usual | changes)
    return plan(one, Source(allow_download=False), 0.05)


@pytest.mark.parametrize("way", TABLE)
def test_weights_of_llama_take_what_is_computed_by_hand(way: str) -> None:
    """Half a byte or a byte for each weight of a linear layer of the blocks, two for
    all others, and the statistics."""
    found = planned(way).by_kind
    assert found is not None
    assert found["frozen"] == LINEAR * (1 if way == "int8" else 0.5) + 2 * OTHERS
    # Scales of all layers are whole blocks of the allocator, but in int8.
    slack = LAYERS * BLOCK if way == "int8" else 0
    assert 0 <= found["buffers"] - STATISTICS[way] - FREQUENCIES <= slack
    if way == "nf4":
        assert (found["frozen"], STATISTICS[way]) == (5_591_539_712, 436_322_304)


def test_what_it_loads_never_was_in_another_dtype() -> None:
    """Weights of 9 billion parameters fit in nf4 where those in bf16 do not."""
    large: dict[str, Any] = {
        "backbone": "random:llama-3.1-70b",
        "depth": 8,
        "device": "virtual-T4",
    }
    found = [planned(way, **large) for way in ("bf16", "nf4")]
    assert [one.verdict for one in found] == ["too large", "fits"]


@pytest.mark.parametrize(
    ("model_type", "left_out"), [("llama", {"score"}), ("bert", {"classifier"})]
)
def test_all_linear_layers_are_quantised_but_the_head(
    model_type: str, left_out: set[str]
) -> None:
    model = classifier(model_type)
    found = chosen_layers(model, cell(weights_dtype="nf4"))
    linear = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert linear - found.keys() == left_out


@pytest.mark.parametrize("model_type", ["llama", "opt", "gpt2", "t5"])
def test_layers_are_those_that_transformers_replaces(model_type: str) -> None:
    """By its own function, of language models: the head of each is left out, the
    transposed layers of GPT-2 are not, and T5 keeps one in float32."""
    bitsandbytes()
    config = transformers.AutoConfig.for_model(model_type, tie_word_embeddings=False)
    for name in ("num_hidden_layers", "num_layers", "num_decoder_layers", "n_layer"):
        if hasattr(config, name):
            setattr(config, name, 1)
    name = any_family.factory_name(config, cell(task="synthetic-lm"), None)
    factory = getattr(transformers, name)
    with torch.device("meta"):
        model = factory.from_config(config)
    ours = chosen_layers(model, cell(weights_dtype="nf4")).keys()
    integration = importlib.import_module("transformers.integrations.bitsandbytes")
    left_out = HfQuantizer.get_modules_to_not_convert(
        model, None, [*(model._keep_in_fp32_modules or ())]
    )
    wanted = transformers.BitsAndBytesConfig(load_in_4bit=True)
    integration.replace_with_bnb_linear(model, left_out, wanted)
    theirs = {
        name for name, one in model.named_modules() if "Linear4bit" in str(type(one))
    }
    assert ours == theirs
    assert ours


def bitsandbytes() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("bitsandbytes", reason="no bitsandbytes")


def torchao() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("torchao.quantization", reason="no torchao")


def needs_package_of(way: str) -> None:
    torchao() if way == "int8" else bitsandbytes()


def llama(cell: Cell) -> Any:
    changes = {"max_position_embeddings": TOKENS, "vocab_size": 50}
    return classifier("llama", **changes).to(torch.bfloat16)


def here(way: str, method: str = "lora", **changes: Any) -> Cell:
    return cell(method=method, dtype="bf16", weights_dtype=way, **changes)


def by_package(model: Any, one: Cell) -> contextlib.AbstractContextManager[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised.quantise(model, one)
    return contextlib.nullcontext()


def virtually(model: Any, one: Cell) -> contextlib.AbstractContextManager[Any]:
    quantised_layers.quantise(model, one)
    return quantised_lora.known_to_peft()


Quantise = Callable[[Any, Cell], contextlib.AbstractContextManager[Any]]


def stepper_of(one: Cell, quantise: Quantise) -> Stepper:
    model = llama(one)
    model.score.float()
    model.score.register_forward_pre_hook(lambda _, args: (args[0].float(),))
    with quantise(model, one), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of merging weights of torchao
        model = load(METHODS[one.method])(model, one)
    model.train()
    return Stepper(model, one)


@pytest.mark.parametrize("way", TABLE)
def test_virtual_layers_have_the_sizes_of_real_layers(way: str) -> None:
    """Layer by layer: the weight, its scales, and what these need."""
    needs_package_of(way)
    one = here(way)
    real, virtual = llama(one), llama(one)
    by_package(real, one)
    virtually(virtual, one)
    names = chosen_layers(llama(one), one)
    for name in names:
        layer = virtual.get_submodule(name)
        ours = [layer.weight, *layer.buffers()]
        theirs = tensors_of(real.get_submodule(name).weight)
        assert sorted(t.nbytes for t in ours) == sorted(t.nbytes for t in theirs)
    assert num_weights(real) == num_weights(virtual) == num_weights(llama(one))


@pytest.mark.parametrize(
    ("way", "model_type", "most"),
    [("nf4", "llama", 0.2), ("nf4-double", "gpt2", 0.2), ("int8", "llama", 0.02)],
)
def test_real_layers_compute_what_they_did(
    way: str, model_type: str, most: float
) -> None:
    """But for rounding to 4 and 8 bits: GPT-2's weights are transposed, others not."""
    needs_package_of(way)
    config = transformers.AutoConfig.for_model(model_type)
    config.update({"hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 50})
    config.update({"intermediate_size": 128, "num_attention_heads": 2})
    config.update({"num_key_value_heads": 2, "head_dim": 32, "pad_token_id": 0})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    one = cell(weights_dtype=way)
    layers = [*chosen_layers(model, one)]
    before = {name: copy.deepcopy(model.get_submodule(name)) for name in layers}
    by_package(model, one)
    for name in layers:
        plain: Any = before[name]
        x = torch.randn(3, quantised.shape_of(plain)[1])
        wanted = plain(x)
        error = (model.get_submodule(name)(x) - wanted).norm() / wanted.norm()
        assert 0 < error < most


def saved(stepper: Stepper) -> Counter[tuple[Any, ...]]:
    """Shapes and dtypes of what a forward saves for backward."""
    found = Counter[tuple[Any, ...]]()

    def pack(tensor: Tensor) -> Tensor:
        found[tuple(tensor.shape), tensor.dtype] += 1
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        stepper.loss(batch())
    return found


@pytest.mark.parametrize("way", TABLE)
@pytest.mark.parametrize("method", ["lora", "adapters", "meft1-store"])
def test_virtual_layers_save_what_real_layers_save(way: str, method: str) -> None:
    needs_package_of(way)
    one = here(way, method)
    real, virtual = stepper_of(one, by_package), stepper_of(one, virtually)
    found = saved(real)
    assert found == saved(virtual)
    if method == "lora":  # of each layer: in int8 the weight in bf16, in nf4 nothing
        of_mlp = sum(found[shape, torch.bfloat16] for shape in [(64, 32), (32, 64)])
        assert of_mlp == (9 if way == "int8" else 0)


def cuda_code() -> Any:
    """The module of bitsandbytes with its code for CUDA, whose kernels do nothing."""
    bitsandbytes()
    name = "bitsandbytes.backends.cuda.ops"
    backend = importlib.import_module("bitsandbytes.cextension")
    operators = importlib.import_module("bitsandbytes._ops")
    made: dict[str, Any] = {}

    def keep(operator: str, device: str) -> Callable[[Any], Any]:
        return lambda function: made.setdefault(operator.split("::")[1], function)

    with (
        mock.patch.object(backend, "lib", mock.MagicMock()),
        mock.patch.object(operators, "register_kernel", keep),
        mock.patch.object(
            torch._C, "_cuda_getCurrentRawStream", mock.MagicMock(), create=True
        ),
        mock.patch.dict(sys.modules),
    ):
        sys.modules.pop(name, None)
        importlib.import_module(name)
    return made


@contextlib.contextmanager
def as_on_cuda() -> Iterator[None]:
    """Run bitsandbytes' code for CUDA on tensors of the CPU."""
    made = cuda_code()
    operators = torch.ops.bitsandbytes
    with contextlib.ExitStack() as stack:
        for name in ("gemm_4bit", "dequantize_4bit", "dequantize_blockwise"):
            one = types.SimpleNamespace(default=made[name])
            stack.enter_context(mock.patch.object(operators, name, one))
        yield


def step(one: Cell, quantise: Quantise) -> list[tuple[int, bool]]:
    """What the second step of training allocates and frees, in order."""
    stepper = stepper_of(one, quantise)
    with Ledger(accelerator="cpu", round_bytes=1) as ledger:
        ledger.watch(stepper.model, stepper.optimizer)
        stepper.step([batch(ROWS, TOKENS)], 0.0)
        start = ledger.mark()
        stepper.step([batch(ROWS, TOKENS)], 0.0)
    return events_of(ledger.trace(), start)


def events_of(trace: Trace, start: int) -> list[tuple[int, bool]]:
    return [(e.num_bytes, e.is_birth) for e in trace.events if e.time >= start]


@pytest.mark.parametrize("way", ["nf4", "nf4-double"])
@pytest.mark.parametrize("method", ["lora", "lora-checkpointing"])
def test_virtual_layers_allocate_what_the_code_for_cuda_allocates(
    way: str, method: str
) -> None:
    """A step of training with bitsandbytes' own code and PEFT's own layer, whose CUDA
    kernels are left out: request by request, in the same order."""
    one = here(way, method)
    with as_on_cuda():
        theirs = step(one, by_package)
    assert step(one, virtually) == theirs
    weights = [n for n, is_birth in theirs if is_birth and n == 2 * 64 * 32]
    # Forward, backward, and a recompute, which ends before the last layer of a block.
    num_times = {"lora": 9 + 9, "lora-checkpointing": 9 + 6 + 9}
    assert len(weights) == num_times[method]


@pytest.mark.parametrize("method", ["lora", "lora-checkpointing"])
def test_virtual_layers_allocate_what_torchao_allocates(method: str) -> None:
    """A step of training on a CPU, where torchao runs the same operators."""
    torchao()
    one = here("int8", method)
    assert step(one, virtually) == step(one, by_package)


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    """A backbone of random weights: a LLaMA in the shape of the tests."""
    shape = SHAPE | FAMILIES["llama"] | {"model_type": "llama"}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(shape))
    return f"random:{path}"


def outcome(one: Cell) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return run(one, ChildOptions())


@pytest.mark.parametrize("way", TABLE)
@pytest.mark.parametrize("method", ["lora", "lora-checkpointing", "meft1-exact"])
def test_what_is_measured_is_what_is_predicted(
    way: str, method: str, tiny: str
) -> None:
    """Of a cell on a CPU and on a virtual GPU: bytes saved and of the model
    state, numbers of parameters."""
    needs_package_of(way)
    one = here(way, method, backbone=tiny, attention="eager", task="synthetic-lm")
    found = [outcome(dataclasses.replace(one, device=d)) for d in ("cpu", "virtual-T4")]
    assert [one["status"] for one in found] == ["ok", "ok"], found
    measured, predicted = (one["measurement"] for one in found)
    same = ("saved_bytes", "num_parameters", "num_trainable_parameters")
    for name in (*same, "model_state_bytes"):
        assert measured[name] == predicted[name], name


def test_a_record_says_what_was_assumed(tiny: str) -> None:
    one = here("nf4", "lora", backbone=tiny, device="virtual-T4", task="synthetic-lm")
    found = outcome(one)
    assert "21 linear layers" in found["environment"]["prediction"]
    assert "nf4 without double quantisation" in found["environment"]["prediction"]
    assert "/weights_dtype=nf4" in one.id


def test_a_missing_package_is_named_with_ways_out(
    tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    found = outcome(here("nf4", "lora", backbone=tiny, task="synthetic-lm"))
    assert found["status"] == "skipped"
    for words in ("`weights_dtype` = 'nf4'", "pip install", "a virtual GPU"):
        assert words in found["message"]


@pytest.mark.parametrize("method", ["full", "checkpointing-offload", "full-exact"])
def test_weights_that_are_trained_are_not_quantised(method: str) -> None:
    with pytest.raises(ValueError, match="cannot be trained: take 'bf16', or a method"):
        fields.check_together(here("int8", method))


def test_all_methods_are_those_that_freeze_the_backbone() -> None:
    given = ["plan", "gpt2-small", "--gpu", "T4", "--dtype", "bf16"]
    words = [*given, "--weights-dtype", "nf4", "--method", "all"]
    parsed = arguments.parser().parse_args(words)
    found = {one.method for one in planning.cells(parsed)}
    assert found == METHODS.keys() - {*TRAIN_BACKBONE, *FLOATS_ONLY}


def test_a_layer_of_peft_that_is_not_modelled_is_refused(tmp_path: Path) -> None:
    found = planned("nf4", "peft:ia3", depth=1)
    assert "those of LoRA are modelled" in found.message
    config = tmp_path / "adapter.json"
    config.write_text(json.dumps({"peft_type": "LORA", "use_dora": True}))
    found = planned("nf4", f"peft:{config}", depth=1)
    assert "`use_dora` with quantised weights is not modelled" in found.message


def test_nothing_to_quantise_is_an_error() -> None:
    """torchao does not take the transposed layers of GPT-2."""
    found = planned("int8", backbone="random:gpt2-small")
    assert "no linear layer that it applies to: take 'bf16'" in found.message
