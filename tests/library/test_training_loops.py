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
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from library.models import batch, gradients, reversible
from library.training import (
    Gradients,
    assert_same,
    batch_without_reseeding,
    built,
    dtypes,
    families,
    left,
    stack_of,
    stored_gradients,
    trainable,
    variants,
)
from meft.reversible.inverse_error import InverseErrorProbe
from meft.testing import check_reversible

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
    stack.probe = InverseErrorProbe(num_samples=0)
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
