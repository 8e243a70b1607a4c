"""Hidden states, heads and causal models for tests of the loss in chunks."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from library.models import gradient

TOKENS, HIDDEN, VOCAB = 37, 16, 301
divisors = pytest.mark.parametrize("num_items", [None, 1, 17, torch.tensor(23)])


def some_labels(tokens: int = TOKENS) -> Tensor:
    """Classes, every fifth of them ignored."""
    torch.manual_seed(1)
    labels = torch.randint(0, VOCAB, (tokens,))
    labels[::5] = -100
    return labels


def leaves(
    dtype: torch.dtype = torch.float32, with_bias: bool = False, tokens: int = TOKENS
) -> list[Tensor]:
    """Hidden states, weight and perhaps a bias, which want gradients."""
    torch.manual_seed(0)
    shapes = [(tokens, HIDDEN), (VOCAB, HIDDEN), (VOCAB,)]
    tensors = [torch.randn(shape, dtype=torch.float64).mul(0.6) for shape in shapes]
    return [t.to(dtype).requires_grad_() for t in tensors[: 3 if with_bias else 2]]


def results(
    function: Callable[..., Tensor],
    inputs: list[Tensor],
    labels: Tensor,
    upstream: float = 1.0,
    **options: Any,
) -> list[Tensor]:
    """Loss and gradients."""
    hidden, weight, *bias = inputs
    loss = function(hidden, weight, labels, *bias, **options)
    gradients = torch.autograd.grad(loss * upstream, inputs)
    return [loss.detach(), *gradients]


def relative_error(got: Tensor, expected: Tensor) -> float:
    got, expected = got.double(), expected.double()
    return float((got - expected).norm() / expected.norm())


class Seen(TorchDispatchMode):
    """Which operations ran, and how large their results were, in elements."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.largest = 0
        self.shapes: set[tuple[int, ...]] = set()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.names.add(func.overloadpacket.__name__)
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // 4)
                self.shapes.add(tuple(tensor.shape))
        return out


def llama(kind: type[LlamaForCausalLM | MistralForCausalLM] = LlamaForCausalLM) -> Any:
    torch.manual_seed(0)
    configs = {LlamaForCausalLM: LlamaConfig, MistralForCausalLM: MistralConfig}
    sizes: dict[str, int] = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 32,
        "max_position_embeddings": 64,
    }
    return kind(configs[kind](**sizes))


def rows(count: int = 3, seq: int = 7) -> dict[str, Tensor]:
    """Tokens, padded in the first row; labels leave the padding out."""
    torch.manual_seed(2)
    ids = torch.randint(3, VOCAB, (count, seq))
    mask = torch.ones(count, seq, dtype=torch.long)
    mask[0, seq // 2 :] = 0
    labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def loss_and_gradients(model: Any, **inputs: Any) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(3)
    loss = model(**inputs).loss
    loss.backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return {"loss": loss.detach()} | {n: gradient(p) for n, p in trained.items()}
