import itertools
import random
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import numpy
import pytest
import torch

from harness.tiny import FAMILIES, batch, cell, classifier
from meft.backbone.heads import NEW_HEADS
from meft.sparse.adapter import sparse_adapters
from meft_bench.child import backbones
from meft_bench.child.meters.clock import StepClock
from meft_bench.child.tasks import synthetic
from meft_bench.child.tasks.batches import Example, collate
from meft_bench.child.training.steps import (
    Stepper,
    learning_rate_at,
    predict,
    seed_everything,
    train,
)
from meft_bench.shared.cell import Cell
from meft_bench.shared.registry import METHODS, OPTIMIZERS, load
from meft_bench.shared.source import Source


def stepper_for(chosen: Cell) -> Stepper:
    return Stepper(classifier(), chosen)


def batches(chosen: Cell) -> Iterator[list[Example]]:
    return itertools.repeat(synthetic.examples(chosen, vocab_size=50))


def losses_of(
    stepper: Stepper, chosen: Cell, scores: list[float] | None = None
) -> list[float]:
    """Train, with validation giving one of `scores` after another."""
    given = iter(scores or [])
    clock = StepClock(chosen.warmup_steps, "cpu")
    return list(train(stepper, chosen, batches(chosen), clock, lambda: next(given)))


def test_the_learning_rate_rises_for_six_percent_and_falls_to_zero() -> None:
    """Of 100 steps, 6 rise from 0 and the rest fall in a straight line."""
    chosen = cell(max_steps=100, learning_rate=1.0)
    rates = [learning_rate_at(step, chosen) for step in range(101)]
    assert rates[:7] == [0, 1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1.0]
    assert rates[6:] == [(100 - step) / 94 for step in range(6, 101)]


def test_a_short_run_has_a_learning_rate_from_its_first_step() -> None:
    """Six percent of 5 steps are none."""
    assert learning_rate_at(0, cell(max_steps=5, learning_rate=1.0)) == 1.0


def test_rows_are_stepped_by_an_adamw_of_their_own() -> None:
    """Sweeps and plans tell people so before a step is made for another."""
    chosen = cell(method="sparse", optimizer="sgd", num_neurons=64)
    model = load(METHODS["sparse"])(classifier("llama"), chosen)
    with pytest.raises(AssertionError, match="sgd"):
        Stepper(model, chosen)


def test_biases_and_norms_do_not_decay() -> None:
    """Matrices decay by 0.1, vectors by nothing, and every parameter is in a group."""
    stepper = stepper_for(cell())
    decayed, plain = stepper.optimizer.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in stepper.model.named_parameters()}
    for parameter in plain["params"]:
        name = names.pop(id(parameter))
        assert name.endswith("bias") or "LayerNorm" in name
    for parameter in decayed["params"]:
        assert names.pop(id(parameter)).endswith("weight")
    assert not names


def test_a_step_with_learning_rate_zero_moves_nothing() -> None:
    """So memory can be probed on a trained model without spoiling it."""
    stepper = stepper_for(cell())
    before = [p.clone() for p in stepper.model.parameters()]
    stepper.step([batch()], 0.0)
    for parameter, expected in zip(stepper.model.parameters(), before, strict=True):
        assert torch.equal(parameter, expected)
        assert parameter.grad is None
    assert stepper.optimizer.state


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_training_lowers_the_loss_in_every_dtype(dtype: str) -> None:
    """Parameters and losses are float32 under autocast, too."""
    chosen = cell(dtype=dtype, max_steps=30, learning_rate=5e-3)
    stepper = stepper_for(chosen)
    losses = losses_of(stepper, chosen)
    assert len(losses) == 30
    assert losses[-1] < losses[0] / 2
    assert {p.dtype for p in stepper.model.parameters()} == {torch.float32}


OF_TORCH = [name for name in OPTIMIZERS if name.startswith(("adamw", "sgd"))]
OF_TORCH = [name for name in OF_TORCH if not name.endswith(("bit", "offload"))]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("optimizer", OF_TORCH)
def test_every_optimizer_lowers_the_loss(optimizer: str, dtype: str) -> None:
    """With a loss scale, too, and with the same groups to decay."""
    if (optimizer, dtype) == ("adamw-in-backward", "fp16"):
        pytest.skip("a loss scale needs all gradients")
    rate = 0.5 if optimizer == "sgd" else 5e-3
    chosen = cell(optimizer=optimizer, dtype=dtype, max_steps=30, learning_rate=rate)
    stepper = stepper_for(chosen)
    losses = losses_of(stepper, chosen)
    assert losses[-1] < losses[0] / 2
    decays = [group["weight_decay"] for group in stepper.optimizer.param_groups]
    assert decays == [0.1, 0.0]


def test_one_kernel_takes_the_step_of_many() -> None:
    """Fused or not, AdamW is AdamW: the same weights within rounding."""
    weights = []
    for optimizer in ("adamw", "adamw-fused"):
        stepper = stepper_for(cell(optimizer=optimizer))
        torch.manual_seed(3)
        for _ in range(3):
            stepper.step([batch()], 1e-3)
        weights.append([p.detach() for p in stepper.model.parameters()])
    torch.testing.assert_close(*weights)


def test_plain_sgd_keeps_nothing() -> None:
    """Between two steps there are the weights and no other state."""
    stepper = stepper_for(cell(optimizer="sgd"))
    before = [p.detach().clone() for p in stepper.model.parameters()]
    stepper.step([batch()], 1e-1)
    assert not any(stepper.optimizer.state.values())
    moved = zip(stepper.model.parameters(), before, strict=True)
    assert any(not torch.equal(*pair) for pair in moved)


def made(method: str, dtype: str, family: str) -> Stepper:
    """A tiny random backbone whose weights are in the compute dtype."""
    chosen = cell(
        method=method,
        backbone=f"random:{family}-tiny",
        depth=1,
        dtype=dtype,
        weights_dtype=dtype,
    )
    model = backbones.load(chosen, 2, Source()).model
    return Stepper(load(METHODS[method])(model, chosen), chosen)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["full", "lora", "adapters", "meft1-exact"])
def test_narrow_weights_need_no_autocast(method: str, family: str) -> None:
    """The backbone computes in bf16; what is new, and the loss, are float32."""
    stepper = made(method, "bf16", family)
    stepper.model.train()
    seen = []

    def look(module: torch.nn.Module, args: object, output: torch.Tensor) -> None:
        seen.append((torch.is_autocast_enabled("cpu"), output.dtype))

    (head,) = backbones.heads_of(stepper.model)
    head.register_forward_hook(look)
    assert stepper.loss(stepper.to_device(batch())).dtype == torch.float32
    assert seen == [(False, torch.float32)]
    stepper.step([batch()], 1e-3)
    for name, parameter in stepper.model.named_parameters():
        is_new = name.startswith(NEW_HEADS) or "lora" in name or "adapter" in name
        assert parameter.dtype == (torch.float32 if is_new else torch.bfloat16), name
    for name, buffer in stepper.model.named_buffers():
        # A narrow table of rotations would turn every token a little too far.
        assert buffer.dtype in (torch.float32, torch.int64), name


def test_fp16_weights_train_with_a_loss_scale_if_they_are_frozen() -> None:
    """Gradients of fp16 parameters cannot be unscaled: refused before any step."""
    stepper = made("lora", "fp16", "llama")
    losses = [stepper.step([batch()], 1e-2) for _ in range(12)]
    assert losses[-1] < losses[0]
    with pytest.raises(ValueError, match=r"'fp16' with method 'full'.*Take 'fp32', or"):
        made("full", "fp16", "llama")


@pytest.mark.parametrize("family", FAMILIES)
def test_only_models_that_know_segments_are_given_them(family: str) -> None:
    """The decoders would hand them on to blocks that do not know what they are."""
    stepper = Stepper(classifier(family), cell())
    given = set(stepper.to_device(batch()))
    takes = family in ("bert", "roberta")
    assert given == set(batch()) - (set() if takes else {"token_type_ids"})


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_no_answer(family: str) -> None:
    """Rows of any length side by side are answered as each one alone."""
    stepper = Stepper(classifier(family).eval(), cell())
    rows = [
        Example(token_ids=[*range(5, 5 + n)], segment_ids=[0] * n, label=0)
        for n in (1, 4, 8)
    ]

    def answers(chosen: list[Example]) -> torch.Tensor:
        given = collate(chosen, stepper.model.config.pad_token_id)
        with torch.no_grad():
            logits: torch.Tensor = stepper.model(**stepper.to_device(given)).logits
        return logits

    together = answers(rows)
    torch.testing.assert_close(together, torch.cat([answers([row]) for row in rows]))
    assert not torch.allclose(together[0], together[1])


@pytest.mark.parametrize(
    ("dtype", "weights_dtype", "wanted"),
    [
        ("fp32", "fp32", None),
        ("bf16", "fp32", torch.bfloat16),
        ("fp16", "fp32", torch.float16),
        ("bf16", "bf16", None),
    ],
)
def test_a_forward_runs_in_the_compute_dtype(
    dtype: str, weights_dtype: str, wanted: torch.dtype | None
) -> None:
    """Under autocast, on the cell's device, unless the weights are of it already; only
    fp16 has a loss scale."""
    stepper = stepper_for(cell(dtype=dtype, weights_dtype=weights_dtype))
    with stepper.autocast():
        assert torch.is_autocast_enabled("cpu") == (wanted is not None)
        assert wanted in (None, torch.get_autocast_dtype("cpu"))
    assert stepper.scaler.is_enabled() == (dtype == "fp16")


def test_gradients_are_clipped_without_their_loss_scale(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """That of fp16 is 65536: its gradients would all be above the norm."""
    norms = {}
    for dtype in ("fp32", "fp16"):
        stepper = Stepper(classifier(hidden_dropout_prob=0.0), cell(dtype=dtype))
        clip = torch.nn.utils.clip_grad_norm_

        def keep(
            parameters: list[torch.Tensor],
            norm: float,
            dtype: str = dtype,
            clip: Callable[..., torch.Tensor] = clip,
        ) -> None:
            norms[dtype] = float(clip(parameters, norm))

        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", keep)
        stepper.model.eval()
        stepper.step([batch()], 1e-3)
        monkeypatch.undo()
    assert norms["fp16"] == pytest.approx(norms["fp32"], rel=0.05)


def test_a_run_is_repeated_by_its_seed() -> None:
    """Dropout included: every loss is equal to the last bit."""
    chosen = cell(max_steps=4)
    first, second = stepper_for(chosen), stepper_for(chosen)
    runs = []
    for stepper in (first, second):
        torch.manual_seed(3)
        runs.append(losses_of(stepper, chosen))
    assert runs[0] == runs[1]


def test_the_weights_with_the_best_score_are_kept() -> None:
    """The best of 2, 4, 6 steps was the second; ties and losers change nothing."""
    until_best = cell(max_steps=9, eval_every=2, patience=2)
    stepper = stepper_for(until_best)
    torch.manual_seed(3)
    losses = losses_of(stepper, until_best, scores=[0.5, 0.7, 0.7, 0.6])
    assert len(losses) == 8

    expected = stepper_for(until_best)
    torch.manual_seed(3)
    clock = StepClock(0, "cpu")
    run = train(expected, cell(max_steps=9), batches(until_best), clock, lambda: 0.0)
    list(itertools.islice(run, 4))
    trained = zip(stepper.model.parameters(), expected.model.parameters(), strict=True)
    assert all(torch.equal(got, wanted) for got, wanted in trained)


def test_the_rows_with_the_best_score_are_kept() -> None:
    """Those of sparse adapters, which are no parameters, with the parameters."""
    chosen = cell(method="sparse", num_neurons=64, max_steps=3, eval_every=1)

    def rows_after(num_steps: int, scores: list[float]) -> list[torch.Tensor]:
        torch.manual_seed(3)
        stepper = Stepper(load(METHODS["sparse"])(classifier("llama"), chosen), chosen)
        given = iter(scores)
        clock = StepClock(0, "cpu")
        run = train(stepper, chosen, batches(chosen), clock, lambda: next(given))
        torch.manual_seed(4)
        # After its last step, a run validates and restores.
        list(itertools.islice(run, num_steps))
        stores = [a.rows.store for a in sparse_adapters(stepper.model).values()]
        trained = [p for p in stepper.model.parameters() if p.requires_grad]
        return [*(store.settled() for store in stores), *trained]

    restored, wanted = rows_after(4, [0.5, 0.7, 0.6]), rows_after(2, [0.5])
    assert all(map(torch.equal, restored, wanted))


@pytest.mark.parametrize(
    ("max_steps", "eval_every", "after"),
    [(5, 3, [3, 5]), (6, 3, [3, 6]), (7, 3, [3, 6, 7]), (2, 3, [2]), (3, 1, [1, 2, 3])],
)
def test_the_last_step_is_always_validated(
    max_steps: int, eval_every: int, after: list[int]
) -> None:
    """Else steps after the last full interval could never be selected."""
    chosen = cell(max_steps=max_steps, eval_every=eval_every)
    losses: list[float] = []
    found: list[int] = []

    def validate() -> float:
        found.append(len(losses))
        return 0.5

    stepper, clock = stepper_for(chosen), StepClock(0, "cpu")
    for loss in train(stepper, chosen, batches(chosen), clock, validate):
        losses.append(loss)
    assert found == after
    assert len(losses) == max_steps


def test_rows_of_a_batch_are_padded_with_the_models_own_token() -> None:
    """And what pads has no part in the loss."""
    stepper = stepper_for(cell())
    stepper.model.config.pad_token_id = 7
    seen = []
    stepper.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].tolist()),
        with_kwargs=True,
    )
    rows = [Example(token_ids=[5] * n, segment_ids=[0] * n, label=0) for n in (1, 3)]
    clock = StepClock(0, "cpu")
    list(train(stepper, cell(max_steps=1), iter([rows]), clock, lambda: 0.0))
    assert seen == [[[5, 7, 7], [5, 5, 5]]]


class _LengthTeller(torch.nn.Module):
    """A classifier that answers with the number of tokens it sees."""

    config = classifier().config

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, ...]] = []

    def forward(self, attention_mask: torch.Tensor, **others: object) -> object:
        self.seen.append(tuple(attention_mask.shape))
        lengths = attention_mask.sum(-1)
        return SimpleNamespace(logits=torch.nn.functional.one_hot(lengths, 10))


def test_predictions_come_in_the_order_of_the_rows() -> None:
    """Rows are predicted by length, with no more padding than there must be, so each
    label must find its way back; dropout is off."""
    stepper = stepper_for(cell())
    stepper.model = _LengthTeller()  # type: ignore[assignment]
    lengths = [7, 2, 5, 3, 6]
    examples = [
        Example(token_ids=[5] * n, segment_ids=[0] * n, label=0) for n in lengths
    ]
    assert predict(stepper, examples, batch_size=2) == lengths
    assert stepper.model.seen == [(2, 3), (2, 6), (1, 7)]
    assert not stepper.model.training


def test_a_seed_decides_every_random_number() -> None:
    """Python's, numpy's and torch's."""

    def draw() -> list[float]:
        return [random.random(), numpy.random.rand(), float(torch.rand(()))]  # noqa: NPY002

    drawn = []
    for seed in (3, 3, 4):
        seed_everything(seed)
        drawn.append(draw())
    assert drawn[0] == drawn[1]
    assert all(a != b for a, b in zip(drawn[0], drawn[2], strict=True))
