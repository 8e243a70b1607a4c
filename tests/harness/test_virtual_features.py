"""What training can ask of a GPU that is not there.

Each thing leaves its mark on what the ledger holds or on what has been run, by which it
is known to have been done; and what has no answer says so.
"""

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from torch import Tensor, library, nn
from torch.autograd.graph import save_on_cpu
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from harness.tiny import BLOCKS, HIDDEN, batch, cell, classifier
from meft import ReversibleConfig, make_reversible
from meft.reversible.blocks import ReversibleBlocks
from meft.reversible.packing import packed_bytes
from meft_bench.child.training.steps import Stepper
from meft_bench.child.worker import run
from meft_bench.shared.options import ChildOptions
from meft_bench.shared.registry import METHODS
from meft_bench.shared.source import MissingError, Source
from meft_bench.virtual.device import gpu
from meft_bench.virtual.emulation.virtual_gpu import VirtualGpu
from meft_bench.virtual.prediction.plan import plan
from meft_bench.virtual.recording.trace import Trace

pytestmark = [
    pytest.mark.usefixtures("no_garbage_collection"),
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="there is a real GPU, which is left alone"
    ),
]
SIZE = {"batch_size": 8, "seq_len": 32}


def h200() -> VirtualGpu:
    return VirtualGpu(gpu.find("H200"))


class Operators(TorchDispatchMode):
    """Counts what is run, also what makes no memory. Goes below the ledger."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.counts[str(func.overloadpacket)] += 1
        return func(*args, **(kwargs or {}))


def held(trace: Trace, kind: str, device: str = "cuda") -> int:
    """The most bytes of a kind at a time."""
    return max(kinds[kind] for *_, kinds in trace.held(device))


def trained(model: nn.Module) -> int:
    """Bytes of the weights that train."""
    return sum(p.nbytes for p in model.parameters() if p.requires_grad)


# The Trainer of transformers, as it comes.


@dataclass(frozen=True, kw_only=True)
class Trained:
    trace: Trace
    counts: Counter[str]
    weight_bytes: int

    @property
    def optimizer_bytes(self) -> int:
        return held(self.trace, "optimizer")


@pytest.fixture(scope="module")
def by_trainer(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Trained]:
    """Two steps by the Trainer, with the arguments given; once for each."""
    rows = [{"input_ids": [1] * 32, "attention_mask": [1] * 32, "labels": 0}] * 64

    @functools.cache
    def train(**options: Any) -> Trained:
        with h200() as device, Operators() as seen, device.new_ledger() as ledger:
            model = classifier("bert")
            arguments = transformers.TrainingArguments(
                output_dir=str(tmp_path_factory.mktemp("trainer")),
                per_device_train_batch_size=8,
                max_steps=2,
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                **options,
            )
            trainer = transformers.Trainer(
                model=model,
                args=arguments,
                train_dataset=rows,
            )
            ledger.watch(model, trainer.create_optimizer())
            trainer.train()
            weight_bytes = trained(model)
        assert arguments.device.type == "cuda"
        assert ledger.step == 2
        assert ledger.trace().peak("cuda").num_bytes > 0
        return Trained(
            trace=ledger.trace(), counts=seen.counts, weight_bytes=weight_bytes
        )

    return train


def test_the_trainer_keeps_two_numbers_a_weight(
    by_trainer: Callable[..., Trained],
) -> None:
    """Blocks are multiples of 512 bytes; its AdamW is fused, counters on the GPU."""
    plain = by_trainer()
    assert plain.counts["aten._fused_adamw_"] > 0
    exact = sum(
        s.num_bytes
        for s in plain.trace.storages
        if plain.trace.kind_of(s) == "optimizer" and s.dtype == "float32"
        if s.shape != ()
    )
    assert exact == 2 * plain.weight_bytes


@pytest.mark.parametrize(
    ("option", "dtype"), [("bf16", "bfloat16"), ("fp16", "float16")]
)
def test_the_trainer_computes_in_half_of_the_memory(
    option: str, dtype: str, by_trainer: Callable[..., Trained]
) -> None:
    plain, half = by_trainer(), by_trainer(**{option: True})
    assert held(half.trace, "saved") < 0.8 * held(plain.trace, "saved")
    assert any(s.dtype == dtype for s in half.trace.storages)
    assert half.optimizer_bytes == plain.optimizer_bytes
    unscaled = "aten._amp_foreach_non_finite_check_and_unscale_"
    assert half.counts[unscaled] == (2 if option == "fp16" else 0)


def test_the_trainers_checkpoints_save_less(
    by_trainer: Callable[..., Trained],
) -> None:
    plain, kept = by_trainer(), by_trainer(activation_checkpointing=True)
    assert held(kept.trace, "saved") < 0.2 * held(plain.trace, "saved")
    assert held(kept.trace, "recompute") > 0
    assert held(plain.trace, "recompute") == 0


def test_the_trainers_accumulation_runs_more_and_keeps_the_same(
    by_trainer: Callable[..., Trained],
) -> None:
    """But for gradients, which are there while the second batch runs forward."""
    plain, twice_as_many = by_trainer(), by_trainer(gradient_accumulation_steps=2)
    for name in ("aten.embedding", "aten.native_layer_norm"):
        assert twice_as_many.counts[name] == 2 * plain.counts[name] > 0
    for name in ("aten._fused_adamw_", "aten._foreach_norm"):
        assert twice_as_many.counts[name] == plain.counts[name] > 0
    assert twice_as_many.optimizer_bytes == plain.optimizer_bytes
    gradients = twice_as_many.trace.peak("cuda").by_kind["gradients"]
    assert gradients >= twice_as_many.weight_bytes
    assert plain.trace.peak("cuda").by_kind["gradients"] < plain.weight_bytes / 2


def test_the_trainers_adafactor_keeps_rows_and_columns(
    by_trainer: Callable[..., Trained],
) -> None:
    """Of each matrix, and not a number for each weight."""
    small = by_trainer(optim="adafactor")
    assert 0 < small.optimizer_bytes < by_trainer().optimizer_bytes / 3


# Optimizers.

WIDTH, NUM_WEIGHTS = 64, 16
WEIGHT_BYTES = 4 * WIDTH**2
"""Of one; each is a whole number of blocks."""


def update(make: Callable[[list[Tensor]], torch.optim.Optimizer]) -> Trace:
    """Two steps of an optimizer that has its state after the first."""
    with h200() as device, device.new_ledger() as ledger:
        model = nn.ParameterList(
            [torch.zeros(WIDTH, WIDTH, device="cuda") for _ in range(NUM_WEIGHTS)]
        )
        optimizer = make(list(model))
        ledger.watch(model, optimizer)
        for _ in range(2):
            for weight in model:
                weight.grad = torch.zeros_like(weight)
            optimizer.step()
            optimizer.zero_grad()
    return ledger.trace()


@pytest.mark.parametrize(
    ("options", "least", "most"),
    [
        ({}, NUM_WEIGHTS, NUM_WEIGHTS + 2),
        ({"foreach": True}, NUM_WEIGHTS, NUM_WEIGHTS + 2),
        ({"foreach": False}, 1, 3),
        ({"fused": True}, 0, 0),
    ],
)
def test_the_implementation_of_adamw_decides_its_extra_memory(
    options: dict[str, Any], least: int, most: int
) -> None:
    """All weights' denominators at once, one weight's, or none; in copies of one."""
    trace = update(lambda weights: torch.optim.AdamW(weights, **options))
    state = held(trace, "optimizer")
    counters = NUM_WEIGHTS * 512 if "fused" in options else 0  # else on the host
    assert state == 2 * NUM_WEIGHTS * WEIGHT_BYTES + counters
    assert least * WEIGHT_BYTES <= held(trace, "update") <= most * WEIGHT_BYTES


def test_momentum_is_one_number_a_weight() -> None:
    trace = update(lambda weights: torch.optim.SGD(weights, lr=0.1, momentum=0.9))
    assert held(trace, "optimizer") == NUM_WEIGHTS * WEIGHT_BYTES
    plain = update(lambda weights: torch.optim.SGD(weights, lr=0.1))
    assert held(plain, "optimizer") == 0


# Our own steps.


def stepped(num_batches: int = 1, **fields: Any) -> tuple[Trace, Counter[str], int]:
    """Two of a small classifier: what was held, what was run, bytes that train."""
    here = cell(device="cuda", **SIZE | fields)
    with h200() as device, Operators() as seen, device.new_ledger() as ledger:
        stepper = Stepper(classifier("bert").to("cuda"), here)
        stepper.model.train()
        ledger.watch(stepper.model, stepper.optimizer)
        for _ in range(2):
            stepper.step([batch(**SIZE)] * num_batches, 1e-3)
        weight_bytes = trained(stepper.model)
    return ledger.trace(), seen.counts, weight_bytes


def test_accumulation_holds_gradients_through_the_next_forward() -> None:
    one, counts, weight_bytes = stepped()
    two, more_counts, _ = stepped(num_batches=2)
    assert more_counts["aten.embedding"] == 2 * counts["aten.embedding"] > 0
    assert more_counts["aten._foreach_norm"] == counts["aten._foreach_norm"] > 0
    assert held(one, "optimizer") == held(two, "optimizer")
    more = two.peak("cuda").num_bytes - one.peak("cuda").num_bytes
    assert 0.8 * weight_bytes < more < 1.5 * weight_bytes


def test_gradients_are_clipped_by_one_norm_of_all() -> None:
    """One list for each dtype and device, and no copy of what it scales."""
    _, counts, _ = stepped()
    assert counts["aten._foreach_norm"] == counts["aten.linalg_vector_norm"] == 2
    assert counts["aten._foreach_mul_"] > 0


def test_a_scaled_loss_is_unscaled_once_a_step() -> None:
    """Gradients in place; the scale goes up or down once for all of them."""
    unscaled = "aten._amp_foreach_non_finite_check_and_unscale_"
    for dtype, num_steps in {"fp16": 2, "bf16": 0}.items():
        trace, counts, _ = stepped(dtype=dtype)
        assert counts[unscaled] == counts["aten._amp_update_scale_"] == num_steps
        assert trace.peak("cuda").num_bytes > 0


# Activations that are not there when backward begins.

ROWS = 16


def layer() -> nn.Module:
    return nn.Linear(WIDTH, WIDTH)


def backward_of(
    run: Callable[[nn.Module, Tensor], Tensor], num_blocks: int = 4
) -> tuple[Trace, Counter[str]]:
    """What blocks of a layer and an activation hold and run, run in some way."""
    with h200() as device, Operators() as seen, device.new_ledger() as ledger:
        with torch.device("cuda"):
            model = nn.Sequential(
                *(nn.Sequential(layer(), nn.ReLU(), layer()) for _ in range(num_blocks))
            )
        ledger.watch(model)
        rows = torch.zeros(ROWS, WIDTH, device="cuda", requires_grad=True)
        run(model, rows).sum().backward()
    return ledger.trace(), seen.counts


@pytest.mark.parametrize(("use_reentrant", "num_again"), [(True, 8), (False, 4)])
def test_a_checkpoint_keeps_the_input_of_each_block(
    use_reentrant: bool, num_again: int
) -> None:
    """And runs it forward once more; if not reentrant, up to what is needed last."""

    def run(model: nn.Module, rows: Tensor) -> Tensor:
        for block in model.children():
            rows = checkpoint(block, rows, use_reentrant=use_reentrant)
        return rows

    plain, plain_counts = backward_of(lambda model, rows: model(rows))
    kept, counts = backward_of(run)
    activation, scalars = 4 * ROWS * WIDTH, 2 * 512
    # Of each of four blocks the input, of the plain one also the ReLU's output;
    # furthermore the loss and its gradient.
    assert held(kept, "saved") == 4 * activation + scalars
    assert held(plain, "saved") == 8 * activation + scalars
    assert counts["aten.addmm"] - plain_counts["aten.addmm"] == num_again
    assert held(kept, "recompute") > held(plain, "recompute") == 0


@pytest.mark.parametrize("pin_memory", [True, False])
def test_what_waits_on_the_host_goes_there_and_comes_back(pin_memory: bool) -> None:
    """By hand: a block saves the inputs and weights of two layers, and the ReLU its
    output, which is also the second layer's input and goes twice."""

    def run(model: nn.Module, rows: Tensor) -> Tensor:
        with save_on_cpu(pin_memory=pin_memory):
            out: Tensor = model(rows)
        return out

    trace, _ = backward_of(run, num_blocks=3)
    by_block = 3 * 4 * ROWS * WIDTH + 2 * WEIGHT_BYTES
    moved = Counter[str]()
    for copy in trace.copies:
        moved[f"{copy.direction} in {copy.phase}"] += copy.num_bytes
    assert moved == {"d2h in forward": 3 * by_block, "h2d in backward": 3 * by_block}
    plain, _ = backward_of(lambda model, rows: model(rows), num_blocks=3)
    assert held(trace, "saved") < held(plain, "saved") / 3


def test_a_side_buffer_on_the_host_moves_what_it_counts() -> None:
    """The lost bits, once each way; and the batch goes to the GPU, as without it."""

    def moved(side_buffer: str) -> tuple[Counter[str], Any]:
        config = ReversibleConfig(variant="meft1", side_buffer=side_buffer)
        here = cell(method="meft1-exact", device="cuda", **SIZE)
        with h200() as device, device.new_ledger() as ledger:
            with torch.device("cuda"):
                model = make_reversible(classifier("bert"), config)
            stepper = Stepper(model, here)
            stepper.model.train()
            stepper.step([batch(**SIZE)], 1e-3)
        total = Counter[str]()
        for copy in ledger.trace().copies:
            total[copy.direction] += copy.num_bytes
        stacks = [m for m in model.modules() if isinstance(m, ReversibleBlocks)]
        return total, stacks[0].ledger

    near, _ = moved("device")
    far, counted = moved("host")
    # Of the first block, both streams are equal, and hold the bits.
    elements = SIZE["batch_size"] * SIZE["seq_len"] * HIDDEN
    lost = (BLOCKS - 1) * packed_bytes(elements, 4)
    assert (counted.d2h_bytes, counted.h2d_bytes) == (lost, lost)
    assert (far - near) == {"d2h": lost, "h2d": lost}


# What has no answer without values.


@library.custom_op("meft_tests::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return 2 * x


class Asks(nn.Module):
    """Does what it was given in the middle of a model."""

    def __init__(self, ask: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.ask = ask

    def forward(self, x: Tensor) -> Tensor:
        self.ask(x)
        return x


UNANSWERED: dict[str, tuple[Callable[[Tensor], object], str]] = {
    "nonzero": (lambda x: x.nonzero(), "aten.nonzero.default"),
    "index by a mask": (lambda x: x[x > 0], "aten.nonzero.default"),
    "masked_select": (lambda x: x.masked_select(x > 0), "aten.masked_select.default"),
    "unique": (lambda x: x.unique(), "aten._unique2.default"),
    "allclose": (lambda x: torch.allclose(x, x), "aten.allclose.default"),
    "to_sparse": (lambda x: x.to_sparse(), "aten._to_sparse.default"),
    "numpy": (lambda x: x.detach().cpu().numpy(), "Tensor.numpy"),
    "an operator of one's own": (twice, "meft_tests::twice"),
}


@pytest.mark.parametrize("name", UNANSWERED)
def test_what_has_no_answer_says_where_and_what_to_do(name: str) -> None:
    ask, operator = UNANSWERED[name]
    model = nn.Sequential(nn.Flatten(), nn.Sequential(nn.Flatten(), Asks(ask)))
    with pytest.raises(MissingError) as reported, h200():
        model(torch.zeros(2, 4, device="cuda"))
    message = str(reported.value)
    assert operator in message
    assert "of 1.1 (Asks)" in message
    assert "or run it on `cpu` or `cuda`" in message


def test_a_value_that_decides_is_made_up() -> None:
    """A sum is 0, and every condition on it holds."""
    with h200():
        x = torch.ones(4, device="cuda")
        assert x.sum().item() == 0
        assert bool(x.sum() > 0)
        assert x.tolist() == [0, 0, 0, 0]


def test_other_errors_stay_as_they_are() -> None:
    with pytest.raises(RuntimeError, match="same reduction dim"), h200():
        torch.ones(2, 3, device="cuda") @ torch.ones(2, 3, device="cuda")


def a_method_that_looks(model: Any, here: object) -> Any:
    model.base_model.encoder.layer[1].output.register_forward_hook(
        lambda module, args, out: out[out > 0]
    )
    return model


def test_a_plan_and_a_record_say_so() -> None:
    """`unknown` and `skipped`, as of methods that need values; the message tells."""
    here = cell(device="virtual-H200", backbone="random:bert-tiny", method="full")
    name = f"{__name__}:{a_method_that_looks.__name__}"
    with mock.patch.dict(METHODS, {"full": name}):
        planned = plan(here, Source(), margin=0.05)
        reported = run(here, ChildOptions())
    assert planned.verdict == "unknown"
    assert reported["status"] == "skipped"
    for message in (planned.message, str(reported["message"])):
        assert "aten.nonzero.default" in message
        assert "bert.encoder.layer.1.output (BertOutput)" in message
