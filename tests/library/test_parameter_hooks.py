"""Whatever users attach to a parameter's gradient sees one gradient: the whole."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import meft
from library.families import CASES
from library.families import reversible as reversible_case
from library.hooks import (
    BATCH,
    Change,
    Hooks,
    Inputs,
    assert_same,
    grads_of,
    loss_of,
    store,
    trainable,
    whole,
)
from library.models import batch, classifier, gradients, only_stack
from library.sparse import batches, config, plain_model
from marks import slow_but_for

MODES: dict[str, dict[str, Any]] = {
    "rebuild": {},
    "two chunks": {"mlp_chunks": 2},
    "four chunks": {"mlp_chunks": 4},
    "float": {"arithmetic": "float"},
    "float, four chunks": {"arithmetic": "float", "mlp_chunks": 4},
    "store": {"backward": "store"},
    "store, four chunks": {"backward": "store", "mlp_chunks": 4},
    "span": {"span": (1, 2)},
}

variants = pytest.mark.parametrize(
    "variant", slow_but_for(["meft1", "meft2", "meft3"], "meft1")
)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("change", [lambda g: 2 * g, lambda g: -g], ids=["2g", "-g"])
@variants
def test_a_hook_runs_once_on_the_whole_gradient(
    variant: str, change: Change, mode: str
) -> None:
    """With every parameter of the model trained: adapters, norms, biases, weights. The
    hook is given what `.grad` would be without it, and `.grad` is what it returns; for
    `fixed` streams, in the bits of the twin with the same hooks."""
    model = whole(variant, **MODES[mode])
    plain = gradients_of_trained(model)
    hooks = Hooks(trainable(model), change)
    changed = gradients_of_trained(model)
    assert_same(hooks.once(), plain)
    assert_same(changed, {n: change(g) for n, g in plain.items()})  # type: ignore[misc]
    if "float" not in mode:
        assert_same(changed, gradients_of_trained(store(model)))


def gradients_of_trained(model: Any) -> Inputs:
    """As `gradients`, without what has none (BERT's unused pooler of tokens)."""
    loss_of(model).backward()
    return {
        name: p.grad.clone()
        for name, p in model.named_parameters()
        if p.grad is not None
    }


def _two_uses_in_one_part(stack: Any) -> None:
    for block in stack.blocks:
        block.attention.self.key.weight = block.attention.self.query.weight


def _several_blocks(stack: Any) -> None:
    for block in stack.blocks[1:]:
        block.output.dense.weight = stack[0].output.dense.weight
        block.attention.self.query.weight = stack[0].attention.self.query.weight


def _both_halves(stack: Any) -> None:
    for block in stack.blocks:
        block.output.LayerNorm = block.attention.output.LayerNorm
        block.output.dense.bias = block.attention.self.query.bias


def _block_and_adapter(stack: Any) -> None:
    for index, block in enumerate(stack.blocks):
        stack.adapters_of(index).feed_forward.up.bias = block.output.dense.bias


def _everywhere(stack: Any) -> None:
    bias = stack[0].output.dense.bias
    for index, block in enumerate(stack.blocks):
        for linear in (
            block.attention.self.query,
            block.attention.self.key,
            block.attention.output.dense,
            block.output.dense,
            *(adapter.up for adapter in stack.adapters_of(index).values()),
        ):
            linear.bias = bias


@pytest.mark.parametrize("num_chunks", [1, 3])
@pytest.mark.parametrize(
    "share",
    [
        _two_uses_in_one_part,
        _several_blocks,
        _both_halves,
        _block_and_adapter,
        _everywhere,
    ],
)
@variants
def test_a_shared_parameter_has_one_gradient(
    variant: str, share: Callable[[Any], None], num_chunks: int
) -> None:
    """However often a stack uses it: summed in the twin's order, so in its bits, and
    handed to its hooks once."""
    model = whole(variant, mlp_chunks=num_chunks)
    share(only_stack(model))
    hooks = Hooks(trainable(model), lambda g: 2 * g)
    rebuilt = gradients_of_trained(model)
    hooks.once()
    assert_same(rebuilt, gradients_of_trained(store(model)))


def test_a_parameter_shared_with_another_part_of_the_model() -> None:
    """A block above the span uses a weight of a rebuilt one: one gradient, one call.
    The twin's, up to the order of the sum: the stack's own part comes as one number."""
    model = whole(span=(0, 2), mlp_chunks=2)
    stack = only_stack(model)
    _everywhere(stack)
    hooks = Hooks(trainable(model), lambda g: 2 * g)
    rebuilt = gradients_of_trained(model)
    hooks.once()
    stored = gradients_of_trained(store(model))
    for name, expected in stored.items():
        torch.testing.assert_close(rebuilt[name], expected, rtol=1e-5, atol=1e-6)


def test_two_forwards_of_one_graph_give_one_gradient() -> None:
    """As of a contrastive loss: the sum over both, handed to the hook once."""
    model, other = whole(), batch(rows=2, seq=5, padded=False)
    hooks = Hooks(trainable(model), lambda g: -g)

    def both() -> Inputs:
        model.zero_grad()
        torch.manual_seed(3)
        (model(**BATCH).loss + 2 * model(**other).loss).backward()
        return {
            n: p.grad.clone() for n, p in trainable(model).items() if p.grad is not None
        }

    rebuilt = both()
    hooks.once()
    store(model)
    assert_same(rebuilt, both())


@pytest.mark.parametrize("fault", ["redo", "skip"])
def test_after_a_mismatch(fault: str) -> None:
    """`redo`: hooks are given the gradient that was computed again, and only that one.
    `skip`: there is no gradient, so no hook of any kind is called."""
    model = whole(on_mismatch=fault)
    model.bert.embeddings.requires_grad_(False)
    hooks = Hooks(trainable(model), lambda g: 2 * g)
    posts: list[Tensor] = []
    for parameter in only_stack(model).parameters():
        parameter.register_post_accumulate_grad_hook(posts.append)
    loss = loss_of(model)

    def once(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        handle.remove()
        return out + 1

    handle = only_stack(model)[1].output.LayerNorm.register_forward_hook(once)
    with pytest.warns(meft.MismatchWarning):
        loss.backward()
    seen, found = hooks.once(), grads_of(model)
    in_stack = [name for name in found if "encoder" in name]
    if fault == "skip":
        assert (in_stack, posts) == ([], [])
        assert not [name for name in seen if "encoder" in name]
        return
    assert len(posts) == len(in_stack) > 0
    expected = gradients_of_trained(store(model))
    in_stack_only = {name: found[name] for name in in_stack}
    assert_same(in_stack_only, {name: expected[name] for name in in_stack})


def test_an_optimizer_step_in_the_backward() -> None:
    """A hook per parameter steps as soon as the gradient is there and lets it go; after
    three steps the weights are the twin's."""
    after = []
    for backward in ("rebuild", "store"):
        model = whole(backward=backward, mlp_chunks=2)
        adam = {
            p: torch.optim.AdamW([p], lr=1e-2, foreach=False)
            for p in trainable(model).values()
        }

        def step(parameter: Tensor, adam: Any = adam) -> None:
            adam[parameter].step()
            parameter.grad = None

        for parameter in adam:
            parameter.register_post_accumulate_grad_hook(step)
        torch.manual_seed(3)
        for _ in range(3):
            model(**BATCH).loss.backward()
            assert all(p.grad is None for p in model.parameters())
        after.append({n: p.detach() for n, p in model.named_parameters()})
    assert_same(*after)


def test_a_parameter_without_a_gradient_has_no_call() -> None:
    """Autograd itself would call hooks with None, as the stack has an edge to every
    parameter inside it, whether or not its block uses it."""
    model = whole()
    unused = nn.Parameter(torch.ones(3))
    only_stack(model)[1].register_parameter("unused", unused)
    calls: list[Any] = []
    unused.register_hook(calls.append)
    unused.register_post_accumulate_grad_hook(calls.append)
    loss_of(model).backward()
    assert unused.grad is None
    assert calls == []


def test_hooks_below_and_above_the_stack() -> None:
    """On the embeddings' output, and on the stack's: the twin's bits."""

    def run(model: Any) -> Inputs:
        seen: dict[str, list[Tensor]] = {"in": [], "out": []}

        def change(name: str, tensor: Tensor) -> None:
            tensor.register_hook(lambda g: seen[name].append(g.clone()) or 2 * g)  # type: ignore[func-returns-value]

        stack = only_stack(model)
        handles = [
            stack.register_forward_pre_hook(lambda _, args: change("in", args[0])),
            stack.register_forward_hook(lambda m, args, out: change("out", out)),
        ]
        found = gradients_of_trained(model)
        for handle in handles:
            handle.remove()
        ((below,), (above,)) = seen.values()
        return found | {"in": below, "out": above}

    model = whole(mlp_chunks=2)
    assert_same(run(model), run(store(model)))


def test_a_hook_between_two_stacks() -> None:
    """BART's decoder reads what its encoder gives, in every block: one gradient."""
    (case,) = (case for case in CASES if case.kind == "BartModel")

    def run(backward: str) -> Inputs:
        model: Any = reversible_case(case, backward=backward)
        model.requires_grad_(True)
        seen: list[Tensor] = []

        def change(module: nn.Module, args: Any, out: Any) -> None:
            out[0].register_hook(lambda g: seen.append(g.clone()) or -g)  # type: ignore[func-returns-value]

        model.encoder.register_forward_hook(change)
        torch.manual_seed(3)
        model(**case.batch())[0].sin().sum().backward()
        (only,) = seen
        return {"seen": only} | grads_of(model)

    assert_same(run("rebuild"), run("store"))


def test_a_hook_that_raises_leaves_nothing_behind() -> None:
    """The next backward is as if there had been none before it."""
    model = whole()
    expected = gradients_of_trained(model)
    hooks = Hooks(trainable(model), lambda g: 2 * g)

    def fail(module: nn.Module, gradient: Any) -> None:
        raise KeyError("mine")

    handle = only_stack(model)[1].output.dense.register_full_backward_pre_hook(fail)
    with pytest.raises(KeyError, match="mine"):
        loss_of(model).backward()
    handle.remove()
    for seen in hooks.seen.values():
        seen.clear()
    found = gradients_of_trained(model)
    hooks.once()
    assert_same(found, {name: 2 * g for name, g in expected.items()})


def test_a_backward_of_another_thread_calls_hooks() -> None:
    """Also while the stack computes a part of the gradient of the same parameter. To
    run it just then, a backward hook inside a block starts the thread and waits."""
    model = whole()
    stack = only_stack(model)
    weight = stack[0].output.dense.weight
    calls: list[int] = []
    weight.register_hook(lambda _: calls.append(threading.get_ident()))

    def elsewhere(module: nn.Module, gradient: Any) -> None:
        thread = threading.Thread(target=lambda: weight.sum().backward())
        thread.start()
        thread.join()

    stack[0].output.LayerNorm.register_full_backward_pre_hook(elsewhere)
    loss_of(model).backward()
    assert len(calls) == 2
    assert calls[0] != threading.get_ident()
    assert calls[1] == threading.get_ident()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_gradients_of_lora_inside() -> None:
    """Adapters of peft in the blocks: their hooks run once, in the twin's bits."""
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(
        r=2,
        target_modules=["query", "value", "output.dense"],
        modules_to_save=["classifier"],
    )
    model = peft.get_peft_model(classifier(3), lora)
    options = meft.ReversibleConfig(variant="meft1", bottleneck_size=3, mlp_chunks=2)
    meft.make_reversible(model, options).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    hooks = Hooks(trainable(model), lambda g: 2 * g)
    assert sum("lora" in name for name in hooks.seen) == 3 * 4 * 2
    assert sum(".adapters." in name for name in hooks.seen) > 0
    rebuilt = gradients(model, batch())
    hooks.once()
    assert_same(rebuilt, gradients(store(model), batch()))


def test_the_router_of_a_sparse_adapter() -> None:
    """Its gradient comes by way of an autograd function inside a rebuilt block."""

    def run(backward: str) -> Iterator[Tensor]:
        model = plain_model()
        torch.manual_seed(1)
        meft.add_sparse_adapters(model, config())
        options = meft.ReversibleConfig(
            variant="meft1", bottleneck_size=3, backward=backward
        )
        meft.make_reversible(model, options)
        routers = {n: p for n, p in trainable(model).items() if "router" in n}
        hooks = Hooks(routers, lambda g: 2 * g)
        torch.manual_seed(3)
        model(**next(batches(1))).loss.backward()
        seen = hooks.once()
        for name, router in routers.items():
            assert router.grad is not None
            assert torch.equal(router.grad, 2 * seen[name])
            yield router.grad

    rebuilt, stored = list(run("rebuild")), list(run("store"))
    assert len(rebuilt) == 3
    assert all(map(torch.equal, rebuilt, stored))
