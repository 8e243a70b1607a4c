"""Training as people train: every loop gives the twin's numbers, to the last digit.

`rebuild` and `store` are the same function of the same weights and seeds, so whatever
a loop does with gradients (scale, clip, add up, average over processes), both must go
the same way for good. Here they do, or the loop is refused by name.
"""

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

import meft
from library.models import VOCAB, batch, classifier, gradient, gradients, reversible
from marks import slow_but_for
from meft.reversible.blocks import ReversibleBlocks
from meft.reversible.convert import find_stacks
from meft.reversible.integer_format import FRACTION_BITS_WIDE
from meft.reversible.probe import Probe
from meft.testing import check_reversible

Gradients = dict[str, torch.Tensor]
Batch = dict[str, torch.Tensor]

variants = pytest.mark.parametrize(
    "variant", slow_but_for(["meft1", "meft2", "meft3"], "meft1", "meft3")
)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
families = pytest.mark.parametrize("family", ["bert", "llama"])


def llama(depth: int = 3, **config: Any) -> LlamaForCausalLM:
    """A small reversible causal language model in training mode, dropout on."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=depth,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
            attention_dropout=0.1,
        )
    )
    torch.manual_seed(1)
    options = {"bottleneck_size": 3, **config}
    meft.make_reversible(model, meft.ReversibleConfig(**options))
    model.train()
    return model


def built(family: str, **config: Any) -> tuple[PreTrainedModel, Batch]:
    """A model of a family, and a batch for it."""
    rows = batch()
    if family == "bert":
        return reversible(3, dropout=0.1, **config), rows
    return llama(**config), rows | {"labels": rows["input_ids"]}


def stack_of(model: PreTrainedModel) -> ReversibleBlocks:
    (stack,) = find_stacks(model).values()
    return stack


def trainable(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def left(model: PreTrainedModel) -> Gradients:
    """What backwards have left at the trainable parameters."""
    return {name: gradient(p) for name, p in trainable(model).items()}


def stored_gradients(model: PreTrainedModel, inputs: Batch) -> Gradients:
    """Those of the twin."""
    stack = stack_of(model)
    stack.backward_pass = "store"
    expected = gradients(model, inputs)
    stack.backward_pass = "rebuild"
    return expected


def assert_same(got: Gradients, expected: Gradients) -> None:
    """Every bit of every tensor."""
    assert got.keys() == expected.keys()
    assert got
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


# Loops -------------------------------------------------------------------------------


@pytest.mark.parametrize("bf16", [False, True])
@variants
def test_the_trainer_logs_the_twins_losses(
    variant: str, bf16: bool, tmp_path: Path
) -> None:
    """transformers' `Trainer`, with dropout, accumulation and clipping: losses, norms
    and trained weights are the twin's in every digit, with BF16 autocast too."""
    rows = batch(rows=12, padded=False)
    dataset = [{name: tensor[i] for name, tensor in rows.items()} for i in range(12)]
    seen = []
    for backward in ("rebuild", "store"):
        model = reversible(3, dropout=0.1, variant=variant, backward=backward)
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=5,
            per_device_train_batch_size=3,
            gradient_accumulation_steps=2,
            max_grad_norm=0.1,
            learning_rate=2e-2,
            logging_steps=1,
            bf16=bf16,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=dataset)
        trainer.train()
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
        numbers = [(entry["loss"], entry["grad_norm"]) for entry in log]
        trained = {name: p.detach() for name, p in trainable(model).items()}
        seen.append((numbers, trained))
    (rebuilt, rebuilt_weights), (stored, stored_weights) = seen
    assert rebuilt == stored
    assert len({loss for loss, _ in stored}) == 5
    assert min(norm for _, norm in stored) > 0.1, "clipping had nothing to do"
    assert_same(rebuilt_weights, stored_weights)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@families
def test_accelerate_sees_the_twins_losses(family: str, precision: str) -> None:
    """`accelerate.Accelerator` prepares, accumulates and clips it unchanged."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    seen = []
    for backward in ("rebuild", "store"):
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = Accelerator(
            cpu=True, mixed_precision=precision, gradient_accumulation_steps=2
        )
        model, inputs = built(family, variant="meft1", backward=backward)
        optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2)
        model, optimizer = accelerator.prepare(model, optimizer)
        torch.manual_seed(3)
        numbers = []
        for _ in range(6):
            with accelerator.accumulate(model):
                loss = model(**inputs).loss
                accelerator.backward(loss)
                numbers.append(loss.item())
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
                    numbers.append(float(norm))
                optimizer.step()
                optimizer.zero_grad()
        seen.append(numbers)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert seen[0] == seen[1]
    assert len(set(seen[0])) == len(seen[0]) == 9


@dtypes
@variants
def test_twenty_steps_of_adamw_are_the_twins(variant: str, dtype: torch.dtype) -> None:
    """Twenty losses in every digit, and they fall; one wrong bit anywhere would grow
    from step to step."""
    seen = []
    for backward in ("rebuild", "store"):
        model = reversible(
            4, dropout=0.1, dtype=dtype, variant=variant, backward=backward
        )
        optimizer = torch.optim.AdamW(trainable(model).values(), lr=3e-2)
        torch.manual_seed(3)
        losses = []
        for _ in range(20):
            optimizer.zero_grad()
            loss = model(**batch_without_reseeding).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        seen.append(losses)
    assert seen[0] == seen[1]
    assert seen[0][-1] < 0.9 * seen[0][0]


batch_without_reseeding = batch()
"""Made once: `batch()` seeds torch, which would give every step the same masks."""


# Precision ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@families
@variants
def test_autocast_and_a_loss_scaler(
    variant: str, family: str, dtype: torch.dtype
) -> None:
    """Half-precision autocast, in FP16 with a scaler: three steps leave the gradients,
    the scale and the weights that the twin's leave."""
    seen = []
    for backward in ("rebuild", "store"):
        model, inputs = built(family, variant=variant, backward=backward)
        optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2)
        half = dtype == torch.float16
        scaler = torch.amp.GradScaler("cpu", enabled=half, growth_interval=2)
        torch.manual_seed(3)
        for _ in range(3):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype):
                loss = model(**inputs).loss
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        weights = {name: p.detach() for name, p in trainable(model).items()}
        seen.append((left(model), weights, scaler.get_scale()))
    (rebuilt, rebuilt_weights, rebuilt_scale), (stored, stored_weights, scale) = seen
    assert_same(rebuilt, stored)
    assert_same(rebuilt_weights, stored_weights)
    assert rebuilt_scale == scale
    assert all(torch.isfinite(tensor).all() for tensor in rebuilt.values())
    assert any(tensor.any() for tensor in rebuilt.values())


@pytest.mark.parametrize("block", [0, 1, 2])
@families
@variants
def test_an_overflow_skips_the_step_and_is_undone_exactly(
    variant: str, family: str, block: int
) -> None:
    """A frozen weight that is infinite in FP16: streams clamp and are rebuilt exactly,
    but loss and gradients are not finite, so the scaler skips the step and halves its
    scale. With the weight mended the next step is an ordinary one."""
    model, inputs = built(family, variant=variant)
    stack = stack_of(model)
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = {name: p.detach().clone() for name, p in trainable(model).items()}
    weight = (
        stack[block].intermediate.dense.weight
        if family == "bert"
        else stack[block].mlp.down_proj.weight
    )

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.float16):
            loss: torch.Tensor = model(**inputs).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss

    with torch.no_grad():
        weight[0, 0] += 2.0**20
    stack.probe = Probe(num_samples=0)
    assert not torch.isfinite(step())
    assert any(not torch.isfinite(g).all() for g in left(model).values())
    assert stack.probe.rebuilt_errors() == [0.0, 0.0, 0.0]
    assert scaler.get_scale() == 2.0**9
    assert_same({name: p.detach() for name, p in trainable(model).items()}, before)

    stack.probe = None
    with torch.no_grad():
        weight[0, 0] -= 2.0**20
    assert torch.isfinite(step())
    assert scaler.get_scale() == 2.0**9
    assert any(not torch.equal(p, before[n]) for n, p in trainable(model).items())


# Several backwards, several forwards -------------------------------------------------


@families
@variants
def test_gradients_add_up(variant: str, family: str) -> None:
    """Two backwards leave the sum, rounded once per element, as autograd adds."""
    model, inputs = built(family, variant=variant)
    first, second = gradients(model, inputs, seed=3), gradients(model, inputs, seed=4)
    model.zero_grad()
    for seed in (3, 4):
        torch.manual_seed(seed)
        model(**inputs).loss.backward()
    assert_same(left(model), {name: first[name] + second[name] for name in first})


@families
@variants
def test_several_forwards_before_one_backward(variant: str, family: str) -> None:
    """Nothing of a forward hangs on the model: three of them, of two shapes and with
    masks of their own, then one backward, give the twin's bits."""
    model, first = built(family, variant=variant)
    second = {name: tensor[:2] for name, tensor in first.items()}

    def summed() -> Gradients:
        model.zero_grad()
        torch.manual_seed(3)
        losses = [model(**inputs).loss for inputs in (first, second, first)]
        (losses[0] + 2 * losses[1] + losses[2]).backward()
        return left(model)

    rebuilt = summed()
    stack_of(model).backward_pass = "store"
    assert_same(rebuilt, summed())


@variants
def test_clipping(variant: str) -> None:
    """By norm and by value, for each parameter and for all, as the twin."""
    model = reversible(3, dropout=0.1, variant=variant)
    seen = []
    for backward in ("rebuild", "store"):
        stack_of(model).backward_pass = backward
        gradients(model, batch())
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        nn.utils.clip_grad_value_(model.parameters(), 0.01)
        assert norm > 0.1
        seen.append(left(model) | {"norm": norm})
    assert_same(*seen)
    assert max(float(tensor.abs().max()) for tensor in left(model).values()) <= 0.01


# Several processes -------------------------------------------------------------------


@pytest.mark.slow
def test_distributed_data_parallel(tmp_path: Path) -> None:
    """Two processes, each with rows of its own: without a search for unused parameters,
    both end with the same average, which has the twin's bits; `no_sync` keeps
    gradients at home, and the next backward averages the sum; a few clipped steps of
    AdamW stay together."""
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("torch was built without gloo")
    tests = Path(__file__).parents[1]
    loopback = next(n for _, n in socket.if_nameindex() if n.startswith("lo"))
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests)]),
        "GLOO_SOCKET_IFNAME": loopback,
        "OMP_NUM_THREADS": "1",
    }
    script = tests / "library" / "workers" / "distributed.py"
    workers = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(tmp_path)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for worker in workers:
            output, _ = worker.communicate(timeout=200)
            assert worker.returncode == 0, output
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for variant in ("meft1", "meft2", "meft3"):
        for seen in ranks:
            rebuilt, stored = seen[variant, "rebuild"], seen[variant, "store"]
            for name in ("once", "local", "accumulated", "trained"):
                assert_same(rebuilt[name], stored[name])
            assert rebuilt["losses"] == stored["losses"]
        one, other = (seen[variant, "rebuild"] for seen in ranks)
        for name in ("once", "accumulated", "trained"):
            assert_same(one[name], other[name])
        assert one["losses"] != other["losses"]
        for name, tensor in one["local"].items():
            assert not torch.equal(tensor, other["local"][name])
            assert not torch.equal(tensor, one["accumulated"][name])


# What is refused ---------------------------------------------------------------------

Change = Callable[[PreTrainedModel], None]


def _step(kind: Callable[..., torch.optim.Optimizer], **options: Any) -> Change:
    """One step on the adapters; a change to the head above would be torch's to find."""

    def change(model: PreTrainedModel) -> None:
        adapters = list(stack_of(model).adapters.parameters())
        for parameter in adapters:
            parameter.grad = torch.ones_like(parameter)
        kind(adapters, lr=1e-2, **options).step()

    return change


def _moving_average(model: PreTrainedModel) -> None:
    with torch.no_grad():
        stack_of(model)[0].attention.self.query.weight.lerp_(torch.zeros(()), 1e-3)


def _buffer(model: PreTrainedModel) -> None:
    stack_of(model)[1].get_buffer("seen").add_(1)


def _unfreezing(model: PreTrainedModel) -> None:
    stack_of(model)[1].output.LayerNorm.requires_grad_(True)


def _hidden_change(model: PreTrainedModel) -> None:
    stack_of(model)[2].output.dense.bias.data[0] += 0.1


def _replacement(model: PreTrainedModel) -> None:
    dense = stack_of(model)[0].output.dense
    dense.weight = nn.Parameter(dense.weight.clone(), requires_grad=False)


@pytest.mark.parametrize(
    "change",
    [
        _step(torch.optim.AdamW),
        _step(torch.optim.SGD, foreach=False),
        _moving_average,
        _buffer,
        _unfreezing,
        _replacement,
    ],
    ids=["adamw", "sgd", "average", "buffer", "unfreezing", "replacement"],
)
@variants
def test_changes_between_forward_and_backward_are_refused(
    variant: str, change: Change
) -> None:
    """Of trainable and frozen weights and of buffers alike: a recompute would use the
    new ones. A new forward is fine."""
    model = reversible(3, dropout=0.1, variant=variant)
    stack_of(model)[1].register_buffer("seen", torch.zeros(()))
    loss = model(**batch()).loss
    change(model)
    with pytest.raises(meft.UnsupportedCallError, match="between forward and backward"):
        loss.backward()
    rebuilt = gradients(model, batch())
    assert_same(rebuilt, stored_gradients(model, batch()))


def test_changes_elsewhere_are_nobodys_business() -> None:
    """Weights outside of the blocks may change, as far as autograd allows it."""
    model = reversible(2, variant="meft1")
    loss = model(**batch()).loss
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight.add_(1.0)
    loss.backward()


def test_a_block_that_changes_its_own_buffers_is_refused() -> None:
    """Running statistics would be updated once more by every recompute."""
    model = reversible(2, variant="meft1")
    block = stack_of(model)[0]
    block.register_buffer("calls", torch.zeros(()))
    Replaced(block.output.LayerNorm, lambda calls: float(block.calls.add_(1)) * 0)
    loss = model(**batch()).loss
    with pytest.raises(meft.UnsupportedCallError, match="running statistics"):
        loss.backward()


@pytest.mark.parametrize(
    ("change", "block"),
    [(_step(torch.optim.AdamW, fused=True), 3), (_hidden_change, 2)],
    ids=["fused", "data"],
)
def test_a_change_that_leaves_no_trace_is_found_where_it_matters(
    change: Change, block: int
) -> None:
    """Torch does not count changes by fused optimizers or through `.data`. They are
    found in what the block gives, so by its number, and no gradient is left."""
    model = reversible(4, variant="meft1")
    loss = model(**batch()).loss
    change(model)
    stack_of(model).zero_grad()
    with pytest.raises(meft.ReconstructionError, match=f"input of block {block} is"):
        loss.backward()
    adapters = stack_of(model).adapters.parameters()
    assert all(parameter.grad is None for parameter in adapters)


@variants
def test_a_second_backward_only_on_request(variant: str) -> None:
    """`retain_graph=True` gives the same bits again, any number of times; without it
    torch refuses."""
    model = reversible(3, dropout=0.1, variant=variant)
    parameters = list(trainable(model).values())
    loss = model(**batch()).loss
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    second = torch.autograd.grad(loss, parameters, retain_graph=True)
    third = torch.autograd.grad(loss, parameters)
    assert all(map(torch.equal, first, second))
    assert all(map(torch.equal, first, third))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, parameters)


@families
def test_gradient_checkpointing_is_refused(family: str, tmp_path: Path) -> None:
    """Switched on before conversion, after it, or by the `Trainer`: two ways to save
    the same memory would run every block three times."""
    config = meft.ReversibleConfig(variant="meft1")
    checkpointed = classifier(1)
    checkpointed.activation_checkpointing_enable()
    with pytest.raises(meft.UnsupportedModelError, match="gradient checkpointing"):
        meft.make_reversible(checkpointed, config)

    model, inputs = built(family, variant="meft1")
    model.activation_checkpointing_enable()
    with pytest.raises(meft.UnsupportedCallError, match="activation_checkpointing_dis"):
        model(**inputs)
    model.activation_checkpointing_disable()
    model(**inputs).loss.backward()

    model, inputs = built(family, variant="meft1")
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        activation_checkpointing=True,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    dataset = [{name: tensor[0] for name, tensor in inputs.items()}]
    trainer = Trainer(model=model, args=arguments, train_dataset=dataset)
    with pytest.raises(meft.UnsupportedCallError, match="gradient checkpointing"):
        trainer.train()


# Faults ------------------------------------------------------------------------------


class Fault:
    """Adds an error to one element of a module's output: once, when armed."""

    def __init__(
        self, module: nn.Module, error: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        self._error = error
        self.armed = False
        module.register_forward_hook(self)

    def __call__(
        self, module: nn.Module, args: Any, output: torch.Tensor
    ) -> torch.Tensor | None:
        if not self.armed:
            return None
        self.armed = False
        return output + self._error(output.detach())


def one_ulp(output: torch.Tensor) -> torch.Tensor:
    """The least change of the greatest element, in the dtype of `output`."""
    flat = output.flatten()
    at = int(flat.abs().argmax())
    error = torch.zeros_like(flat)
    error[at] = torch.nextafter(flat[at], flat.new_tensor(torch.inf)) - flat[at]
    return error.view_as(output)


def quanta(number: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """So many quanta on the element that lies closest to a quantum in float32."""

    def error(output: torch.Tensor) -> torch.Tensor:
        flat = output.flatten()
        scaled = flat.double() * 2.0**FRACTION_BITS_WIDE
        at = int((scaled - scaled.round()).abs().argmin())
        error = torch.zeros_like(flat)
        error[at] = number * 2.0**-FRACTION_BITS_WIDE
        return error.view_as(output)

    return error


LEAST = {torch.float32: quanta(1), torch.bfloat16: one_ulp}
"""The least fault that a stream can hold. In float32 one ulp of a number of ordinary
size is far less than a quantum; in bfloat16 it is many."""

BOTTOM, MIDDLE, TOP = 0, 2, 4


def faulty(
    block: int, dtype: torch.dtype, variant: str, on_mismatch: str
) -> tuple[PreTrainedModel, Fault]:
    """Five blocks, one of which ends in a fault that can be armed."""
    model = reversible(
        5, dropout=0.1, dtype=dtype, variant=variant, on_mismatch=on_mismatch
    )
    return model, Fault(stack_of(model)[block].output.LayerNorm, LEAST[dtype])


@pytest.mark.parametrize("block", [BOTTOM, MIDDLE, TOP])
@dtypes
@variants
def test_the_least_fault_is_named_and_leaves_no_gradient(
    variant: str, dtype: torch.dtype, block: int
) -> None:
    """One element off by one, in the recompute of any block: the error has its number.
    Nothing of it stays: the next step has the twin's gradients."""
    model, fault = faulty(block, dtype, variant, "raise")
    model.zero_grad()
    loss = model(**batch()).loss
    fault.armed = True
    with pytest.raises(meft.ReconstructionError, match=f"input of block {block} is"):
        loss.backward()
    assert not fault.armed
    adapters = stack_of(model).adapters.parameters()
    assert all(parameter.grad is None for parameter in adapters)
    assert_same(gradients(model, batch()), stored_gradients(model, batch()))


@pytest.mark.parametrize("block", [0, 2, 3])
@variants
def test_a_fault_in_an_adapter_is_named(variant: str, block: int) -> None:
    """The other coupling of a block is watched as well."""
    model = reversible(5, dropout=0.1, variant=variant)
    adapters = stack_of(model).adapters_of(block)
    name = "attention" if variant == "meft3" else "reversible"
    fault = Fault(adapters[name], quanta(1000))
    loss = model(**batch()).loss
    fault.armed = True
    with pytest.raises(meft.ReconstructionError, match=f"input of block {block} is"):
        loss.backward()


@pytest.mark.parametrize("part", ["intermediate.dense", "output.dense"])
@variants
def test_a_fault_before_a_norm_is_named(variant: str, part: str) -> None:
    """What a layer norm gives adds up to nothing with and without the fault, so a plain
    sum would pass the block and blame another below. No dropout, which could drop the
    fault."""
    model = reversible(8, variant=variant)
    for block in range(8):
        fault = Fault(stack_of(model)[block].get_submodule(part), quanta(1000))
        loss = model(**batch_without_reseeding).loss
        fault.armed = True
        with pytest.raises(meft.ReconstructionError, match=f"of block {block} is"):
            loss.backward()


@pytest.mark.parametrize("block", [BOTTOM, MIDDLE, TOP])
@dtypes
@variants
def test_skip_leaves_the_stack_without_gradient(
    variant: str, dtype: torch.dtype, block: int
) -> None:
    """None for every parameter of the stack and for what lies below it; the head above
    has its own; a warning says so. The next step is the twin's."""
    model, fault = faulty(block, dtype, variant, "skip")
    model.get_submodule("bert.embeddings").requires_grad_(True)
    expected = stored_gradients(model, batch())
    model.zero_grad()
    torch.manual_seed(3)
    loss = model(**batch_without_reseeding).loss
    fault.armed = True
    told = f"block {block} .* what is above it, as a task head, has its own .*'skip'"
    with pytest.warns(meft.MismatchWarning, match=told):
        loss.backward()
    for name, parameter in trainable(model).items():
        if name.startswith("classifier"):
            assert torch.equal(gradient(parameter), expected[name])
        else:
            assert parameter.grad is None, name
    assert_same(gradients(model, batch()), expected)


@pytest.mark.parametrize("block", [BOTTOM, MIDDLE, TOP])
@dtypes
@variants
def test_redo_gives_the_twins_gradients(
    variant: str, dtype: torch.dtype, block: int
) -> None:
    """Computed again with stored activations, in the same bits, down to the embeddings;
    a warning says so."""
    model, fault = faulty(block, dtype, variant, "redo")
    model.get_submodule("bert.embeddings").requires_grad_(True)
    expected = stored_gradients(model, batch_without_reseeding)
    model.zero_grad()
    torch.manual_seed(3)
    loss = model(**batch_without_reseeding).loss
    fault.armed = True
    with pytest.warns(meft.MismatchWarning, match=f"block {block} .*'redo'"):
        loss.backward()
    assert_same(left(model), expected)
    assert_same(gradients(model, batch_without_reseeding), expected)


@pytest.mark.parametrize("on_mismatch", ["raise", "skip", "redo"])
@variants
def test_what_rounding_absorbs_is_no_fault(variant: str, on_mismatch: str) -> None:
    """A quarter of a quantum on an element that lies on one: the streams do not notice,
    so gradients are the twin's and nobody is told."""
    model = reversible(3, dropout=0.1, variant=variant, on_mismatch=on_mismatch)
    fault = Fault(stack_of(model)[1].output.LayerNorm, quanta(0.25))
    expected = stored_gradients(model, batch())
    model.zero_grad()
    torch.manual_seed(3)
    loss = model(**batch_without_reseeding).loss
    fault.armed = True
    loss.backward()
    assert not fault.armed
    assert_same(left(model), expected)


@pytest.mark.slow
@dtypes
@variants
def test_without_a_fault_there_is_no_alarm(variant: str, dtype: torch.dtype) -> None:
    """Thirty-six steps of three shapes, trained hard enough to move: no error (and any
    warning would be one)."""
    model = reversible(3, dropout=0.1, dtype=dtype, variant=variant)
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=5e-2)
    batches = [batch(), batch(rows=2, seq=11), batch(rows=1, seq=1, padded=False)]
    torch.manual_seed(3)
    losses = set()
    for step in range(36):
        optimizer.zero_grad()
        loss = model(**batches[step % 3]).loss
        loss.backward()
        optimizer.step()
        losses.add(loss.item())
    assert len(losses) > 18


# Branches that depend on how they are run --------------------------------------------


class Replaced:
    """Adds what `extra` says to a module's output, and counts its calls. Not a hook: a
    block with forward hooks is always run with a graph."""

    def __init__(self, module: nn.Module, extra: Callable[[int], float]) -> None:
        self._extra = extra
        self.calls = 0
        self._plain = module.forward
        module.forward = self

    def __call__(self, *args: Any) -> torch.Tensor:
        self.calls += 1
        output: torch.Tensor = self._plain(*args)
        return output + self._extra(self.calls)


def less_without_grad(calls: int) -> float:
    """Another kernel, a few quanta off, where no graph is wanted."""
    return 0.0 if torch.is_grad_enabled() else 2.0**-8


@variants
def test_a_branch_that_differs_without_grad_is_run_with_grad(variant: str) -> None:
    """Found out at its first use; from then on its forward gives what its backward
    meets, which is also what the twin computes."""
    model = reversible(3, dropout=0.1, variant=variant)
    plain = gradients(model, batch())
    hook = Replaced(stack_of(model)[1].output.LayerNorm, less_without_grad)
    stack_of(model)._repeatable.clear()
    for _ in range(2):
        rebuilt = gradients(model, batch())
        assert_same(rebuilt, stored_gradients(model, batch()))
    # The same function as without the hook, which adds nothing where there is a graph.
    assert_same(rebuilt, plain)
    # With grad, without, with grad again, and in the backward; then one of each.
    assert hook.calls == 4 + 1 + 2 + 1


@variants
def test_a_branch_that_never_repeats_is_refused(variant: str) -> None:
    """By name, with the reason, in the forward; and not only the first time."""
    model = reversible(3, variant=variant)
    Replaced(stack_of(model)[1].output.LayerNorm, lambda calls: calls * 2.0**-8)
    for _ in range(2):
        with pytest.raises(meft.UnsupportedCallError, match="block 1 does not give"):
            model(**batch())
    stack_of(model).backward_pass = "store"
    model(**batch()).loss.backward()


def test_a_branch_is_tried_out_once_per_shape_and_dtype() -> None:
    """Two forwards and a recompute where it is new, one and a recompute afterwards."""
    model = reversible(3, dropout=0.1, variant="meft1")
    hook = Replaced(stack_of(model)[1].output.LayerNorm, lambda calls: 0.0)

    def calls(inputs: Batch, half: bool = False) -> int:
        before = hook.calls
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = model(**inputs).loss
        loss.backward()
        return hook.calls - before

    short = batch(seq=4)
    assert [calls(batch()) for _ in range(3)] == [3, 2, 2]
    assert [calls(short) for _ in range(2)] == [3, 2]
    assert calls(batch()) == 2
    assert [calls(batch(), half=True) for _ in range(2)] == [3, 2]
    model.eval()
    assert [calls(batch()) for _ in range(2)] == [3, 2]
    with torch.no_grad():
        before = hook.calls
        model(**batch(seq=5))
        assert hook.calls == before + 1


# Threads and depth -------------------------------------------------------------------


@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("number", [1, 2])
@variants
def test_any_number_of_threads(variant: str, number: int) -> None:
    """Tensors large enough to be shared out: 512 tokens of width 128."""
    model = reversible(2, dropout=0.1, hidden=128, variant=variant)
    inputs = batch(rows=8, seq=64)
    with threads(number):
        assert_same(gradients(model, inputs), stored_gradients(model, inputs))


@pytest.mark.parametrize(
    "depth", [48, pytest.param(96, marks=pytest.mark.slow)], ids=str
)
@dtypes
@variants
def test_depth_does_not_matter(variant: str, dtype: torch.dtype, depth: int) -> None:
    """Four bits lost and found per block: the lowest block's gradients have the twin's
    bits."""
    model = reversible(depth, dropout=0.1, dtype=dtype, variant=variant, lost_bits=4)
    assert_same(gradients(model, batch()), stored_gradients(model, batch()))


@variants
def test_the_float_baseline_loses_what_fixed_keeps(variant: str) -> None:
    """At 24 blocks the paper's arithmetic trains the lowest one on noise; `fixed` has
    no error anywhere."""
    lossy = reversible(24, variant=variant, arithmetic="float")
    assert check_reversible(lossy, batch()).gradient_error[0] > 0.5
    exact = check_reversible(reversible(24, variant=variant), batch())
    assert exact.gradient_error == (0.0,) * 24
    assert exact.reconstruction_error == (0.0,) * 24
