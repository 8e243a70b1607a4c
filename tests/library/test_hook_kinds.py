"""Hooks of every kind, and every way to ask for gradients: each does to a reversible
model what it does to its twin."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import register_multi_grad_hook

from library.hooks import (
    Hooks,
    Inputs,
    assert_same,
    grads_of,
    loss_of,
    store,
    trainable,
    whole,
)


def _autograd_grad(model: Any) -> Inputs:
    used = {n: p for n, p in trainable(model).items() if "encoder" in n}
    Hooks(used, lambda g: 2 * g)
    found = torch.autograd.grad(loss_of(model), list(used.values()))
    return dict(zip(used, found, strict=True))


def _some_inputs(model: Any) -> Inputs:
    used = {n: p for n, p in trainable(model).items() if "1.output" in n}
    hooks = Hooks(trainable(model), lambda g: 2 * g)
    loss_of(model).backward(inputs=list(used.values()))
    return grads_of(model) | {f"{n} seen": g for n, g in hooks.once().items()}


def _twice(model: Any) -> Inputs:
    hooks = Hooks(trainable(model), lambda g: -g)
    loss = loss_of(model)
    loss.backward(retain_graph=True)
    loss.backward()
    counts = {n: torch.tensor(len(seen)) for n, seen in hooks.seen.items()}
    assert set(map(int, counts.values())) == {2}
    return grads_of(model)


def _several_hooks(model: Any) -> Inputs:
    """They run in the order they came in; one that returns None changes nothing."""
    for parameter in trainable(model).values():
        parameter.register_hook(lambda g: g + 1)
        parameter.register_hook(lambda _: None)
        parameter.register_hook(lambda g: 3 * g)
    loss_of(model).backward()
    return grads_of(model)


def _removed(model: Any) -> Inputs:
    hooks = Hooks(trainable(model), lambda g: 2 * g)
    loss_of(model).backward()
    for handle in hooks.handles:
        handle.remove()
    loss_of(model).backward()
    assert hooks.once()
    return grads_of(model)


def _between_forward_and_backward(model: Any) -> Inputs:
    loss = loss_of(model)
    hooks = Hooks(trainable(model), lambda g: 2 * g)
    loss.backward()
    return grads_of(model) | {f"{n} seen": g for n, g in hooks.once().items()}


def _post_accumulate(model: Any) -> Inputs:
    seen: Inputs = {}
    for name, parameter in trainable(model).items():

        def note(p: Tensor, name: str = name) -> None:
            assert name not in seen
            assert p.grad is not None
            seen[name] = p.grad.clone()
            p.grad.mul_(2)

        parameter.register_post_accumulate_grad_hook(note)
    loss_of(model).backward()
    return grads_of(model) | {f"{n} seen": g for n, g in seen.items()}


def _accumulating_node(model: Any) -> Inputs:
    """Where DDP and others hang on."""
    seen: dict[str, list[Tensor]] = {}
    nodes = []
    for name, parameter in trainable(model).items():
        copy: Any = parameter.expand_as(parameter).grad_fn
        node = copy.next_functions[0][0]
        seen[name] = []
        node.register_prehook(lambda g, name=name: seen[name].append(g[0]))
        node.register_hook(lambda i, o, name=name: seen[name].append(o[0]))
        nodes.append(node)
    loss_of(model).backward()
    assert {len(gradients) for gradients in seen.values()} == {2}
    return grads_of(model) | {f"{n} seen": g[0] for n, g in seen.items()}


def _of_several_tensors(model: Any) -> Inputs:
    used = {n: p for n, p in trainable(model).items() if "encoder" in n}
    seen: list[Any] = []
    register_multi_grad_hook(list(used.values()), seen.append)
    register_multi_grad_hook(
        list(used.values()), lambda g: seen.append(None), mode="any"
    )
    loss_of(model).backward()
    assert seen.count(None) == 1
    (gradients,) = (each for each in seen if each is not None)
    return dict(zip(used, gradients, strict=True))


@pytest.mark.parametrize("num_chunks", [1, 4])
@pytest.mark.parametrize(
    "do",
    [
        _autograd_grad,
        _some_inputs,
        _twice,
        _several_hooks,
        _removed,
        _between_forward_and_backward,
        _post_accumulate,
        _accumulating_node,
        _of_several_tensors,
    ],
)
def test_as_the_twin_does(do: Callable[[Any], Inputs], num_chunks: int) -> None:
    """Hooks of every kind, and every way to ask for gradients."""
    rebuilt = do(whole(mlp_chunks=num_chunks))
    assert rebuilt
    assert_same(rebuilt, do(store(whole(mlp_chunks=num_chunks))))
