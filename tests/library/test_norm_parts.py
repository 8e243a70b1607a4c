"""Norms that run in parts of the tokens: the same values, fewer bytes."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import meft
from library.families import HIDDEN, VOCAB, text_options
from meft.backbone.norm_parts import norms_in_parts
from meft.testing import saved_bytes, tolerance


class Block(nn.Module):
    """A norm, and what comes after it."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.linear = norm, nn.Linear(HIDDEN, HIDDEN)

    def forward(self, hidden: Tensor) -> Tensor:
        output: Tensor = self.linear(self.norm(hidden))
        return output


def run(
    block: Block, parts: int, tokens: Tensor, **autocast: Any
) -> tuple[list[Tensor], int]:
    """Output and gradients of a block, and the bytes that it keeps for backward."""
    tokens = tokens.clone().requires_grad_()
    block.zero_grad()
    with (
        norms_in_parts(block, parts),
        saved_bytes(block.parameters()) as counter,
        torch.autocast("cpu", torch.bfloat16, **{"enabled": False, **autocast}),
    ):
        output = block(tokens)
    weights = torch.linspace(-1, 1, output.numel()).view_as(output)
    output.backward(weights.to(output.dtype))
    found = [output.detach(), tokens.grad, block.norm.weight.grad]
    return [x for x in found if x is not None], counter.total


def a_norm() -> LlamaRMSNorm:
    norm = LlamaRMSNorm(HIDDEN)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    return norm


@pytest.mark.parametrize("parts", [2, 3, 50])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_are_the_whole(parts: int, autocast: bool, dtype: torch.dtype) -> None:
    """Values and gradients of tokens in every bit; those of weights are sums in another
    order. Fewer bytes are kept."""
    torch.manual_seed(0)
    block = nn.Module.to(Block(a_norm()), dtype)
    tokens = torch.randn(2, 7, HIDDEN, dtype=dtype)
    (out, d_tokens, d_weight), kept = run(block, parts, tokens, enabled=autocast)
    whole, kept_whole = run(block, 1, tokens, enabled=autocast)
    assert torch.equal(out, whole[0])
    assert torch.equal(d_tokens, whole[1])
    distance = float((d_weight - whole[2]).norm())
    assert distance <= tolerance(dtype, depth=1) * float(whole[2].norm())
    assert kept < kept_whole


def test_a_frozen_norm_gets_no_gradient() -> None:
    """The tokens alone do; and nothing, where nothing wants a gradient."""
    block = Block(a_norm())
    block.norm.requires_grad_(False)
    tokens = torch.randn(2, 7, HIDDEN)
    (_, d_tokens), _ = run(block, 3, tokens)
    assert torch.equal(d_tokens, run(block, 1, tokens)[0][1])
    with norms_in_parts(block, 3), torch.no_grad():
        assert torch.equal(block(tokens), block.linear(block.norm(tokens)))


def test_norms_that_run_as_a_whole() -> None:
    """Those of torch, with hooks, and inside a compiled module; each runs once."""
    norm, hooked, calls = nn.LayerNorm(HIDDEN), a_norm(), []
    hooked.register_forward_hook(lambda *_: calls.append(1))
    compiled = Block(a_norm())
    compiled.compile(backend="eager")
    for block in (Block(norm), Block(hooked), compiled):
        with norms_in_parts(block, 3):
            assert "forward" not in vars(block.norm)
    with norms_in_parts(Block(hooked), 3):
        hooked(torch.randn(2, 7, HIDDEN))
    assert calls == [1]


def test_a_hook_of_a_weight_sees_the_whole_gradient() -> None:
    """Once, and not one part after the other."""
    block, seen = Block(a_norm()), []
    weight: Any = block.norm.weight
    weight.register_hook(lambda gradient: seen.append(gradient.clone()))
    _, _, d_weight = run(block, 3, torch.randn(2, 7, HIDDEN))[0]
    assert len(seen) == 1
    assert torch.equal(seen[0], d_weight)


@pytest.mark.parametrize(
    ("kind", "config", "norms"),
    [(LlamaForCausalLM, LlamaConfig, 1), (Qwen3ForCausalLM, Qwen3Config, 3)],
    ids=["llama", "qwen3"],
)
def test_chunks_of_a_stack_run_its_norms_in_parts(
    kind: Any, config: Any, norms: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the half that mixes tokens, inside attention too."""
    from meft.backbone import norm_parts

    ran = []
    run_one = norm_parts._run

    def note(norm: nn.Module, parts: int, *args: Any, **kwargs: Any) -> Any:
        ran.append(parts)
        return run_one(norm, parts, *args, **kwargs)

    monkeypatch.setattr(norm_parts, "_run", note)
    heads = {"num_key_value_heads": 2, "head_dim": HIDDEN // 2}
    model = kind(config(**text_options(1), **heads, intermediate_size=HIDDEN))
    meft.make_reversible(model, meft.ReversibleConfig(adapter=None, mlp_chunks=3))
    with torch.no_grad():
        model(torch.arange(10)[None] % VOCAB)
    assert ran == [3] * norms


class OwnRMSNorm(LlamaRMSNorm):
    """A norm of one's own, of which nothing is known."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states - hidden_states.mean(1, keepdim=True)


def test_only_norms_of_transformers_run_in_parts() -> None:
    """Another may mix tokens, or read what its gradient would be lost for."""
    block = Block(OwnRMSNorm(HIDDEN))
    with norms_in_parts(block, 3):
        assert "forward" not in vars(block.norm)


def test_second_derivatives_are_refused() -> None:
    """Where a norm runs in parts: they would be wrong."""
    block, tokens = Block(a_norm()), torch.randn(2, 7, HIDDEN).requires_grad_()
    with norms_in_parts(block, 3):
        output = block(tokens).pow(2).sum()
    (first,) = torch.autograd.grad(output, tokens, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_hooks_of_all_modules_run_as_for_a_whole() -> None:
    """Those that change outputs are not run again in the backward."""
    block, tokens = Block(a_norm()), torch.randn(2, 7, HIDDEN)

    def change(module: nn.Module, args: Any, output: Any) -> Any:
        return output * 1.5 if isinstance(module, LlamaRMSNorm) else None

    with nn.modules.module.register_module_forward_hook(change):
        (out, d_tokens, _), _ = run(block, 3, tokens)
        (expected, d_expected, _), _ = run(block, 1, tokens)
    assert torch.equal(out, expected)
    torch.testing.assert_close(d_tokens, d_expected)


def test_threads_share_a_norm() -> None:
    """Each gets its own gradients, and the norm is as it was."""
    block = Block(a_norm())
    inputs = [torch.randn(2, 7, HIDDEN) for _ in range(8)]

    def gradient(tokens: Tensor) -> Tensor:
        tokens = tokens.clone().requires_grad_()
        with norms_in_parts(block, 3):
            output = block(tokens).pow(2).sum()
        return torch.autograd.grad(output, tokens)[0]

    expected = [gradient(tokens) for tokens in inputs]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(gradient, inputs * 5))
    assert all(
        torch.equal(one, other) for one, other in zip(found, expected * 5, strict=True)
    )
    assert "forward" not in vars(block.norm)
