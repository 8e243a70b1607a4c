"""Operators whose memory Liger-Kernel's benchmark measured, as it calls them.

Those are its `huggingface` and `torch` providers, the operators that its kernels
replace. The benchmark calls a function several times and takes the peak of each.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from meft_bench.shared.published import Published
from meft_bench.virtual.prediction.training_code import virtual_gpu

NUM_CALLS = 3
"""Number of calls of an operator; all after the first are alike."""
VOCABULARY = 128_256
TOKENS = 2048


def predict(rows: Sequence[Published]) -> Iterator[int]:
    """Yield the predicted peak of each row's operator."""
    for row in rows:
        with virtual_gpu(row.gpu):
            call = OPERATORS[row.program](row.size)
            for _ in range(NUM_CALLS):
                torch.cuda.reset_peak_memory_stats()
                call()
            num_bytes = int(torch.cuda.max_memory_allocated())
        yield num_bytes


def _backward_of(module: Callable[..., Tensor], x: Tensor) -> Callable[[], None]:
    """Run a module and its backward with a gradient that is kept."""
    gradient = torch.randn_like(x)
    x.requires_grad_(True)
    return lambda: module(x).backward(gradient, retain_graph=True)


def _backward_with_new_gradient(
    module: Callable[..., Tensor], x: Tensor
) -> Callable[[], None]:
    """Run a module and its backward with a gradient that is made after forward."""
    x.requires_grad_(True)

    def call() -> None:
        y = module(x)
        y.backward(torch.randn_like(y), retain_graph=True)

    return call


def _loss(loss: Callable[[Tensor, Tensor], Tensor], x: Tensor, target: Tensor) -> None:
    loss(x, target).backward(retain_graph=True)


def _rms_norm(size: int) -> Callable[[], None]:
    x = torch.randn(2048, size, dtype=torch.bfloat16, device="cuda")
    return _backward_of(LlamaRMSNorm(size).to("cuda"), x)


def _layer_norm(size: int) -> Callable[[], None]:
    x = torch.randn(4096, size, device="cuda")
    return _backward_of(nn.LayerNorm(size).to("cuda"), x)


def _group_norm(size: int) -> Callable[[], None]:
    x = torch.randn(128, size, 512, device="cuda")
    return _backward_with_new_gradient(nn.GroupNorm(size // 4, size).to("cuda"), x)


def _mlp(tokens: int, batch_size: int, activation: str) -> Callable[[], None]:
    return _mlp_of(batch_size, tokens, 4096, 11008, activation)


def _small_mlp(tokens: int, activation: str) -> Callable[[], None]:
    return _mlp_of(2, tokens, 2048, 4096, activation)


def _mlp_of(
    batch_size: int, tokens: int, hidden: int, intermediate: int, activation: str
) -> Callable[[], None]:
    config = transformers.LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, hidden_act=activation
    )
    x = torch.randn(batch_size, tokens, hidden, device="cuda", dtype=torch.bfloat16)
    layer = LlamaMLP(config).to("cuda").to(torch.bfloat16)
    return _backward_with_new_gradient(layer, x)


def _cross_entropy(size: int) -> Callable[[], None]:
    logits = torch.randn(8 * TOKENS, size, requires_grad=True, device="cuda")
    target = torch.randint(size, (8 * TOKENS,), device="cuda")
    return lambda: functional.cross_entropy(logits, target).backward()


def _head_and_cross_entropy(size: int) -> Callable[[], None]:
    head, other = (
        nn.Linear(4096, VOCABULARY, bias=False, dtype=torch.bfloat16).to("cuda")
        for _ in range(2)  # the benchmark also holds the head of the fused kernel
    )
    shape = (size, 4096)
    x = torch.randn(*shape, requires_grad=True, dtype=torch.bfloat16, device="cuda")
    target = torch.randint(VOCABULARY, (size,), device="cuda")

    def call() -> None:
        assert other is not head
        functional.cross_entropy(head(x), target).backward()

    return call


def _kl_div(size: int) -> Callable[[], None]:
    x = torch.randn(8 * TOKENS, size, requires_grad=True, device="cuda")
    x = x.log_softmax(dim=-1)
    target = torch.randn(8 * TOKENS, size, device="cuda").softmax(dim=-1)
    return lambda: _loss(nn.KLDivLoss(reduction="batchmean"), x, target)


def _tvd(size: int) -> Callable[[], None]:
    x = torch.randn(8 * TOKENS, size, requires_grad=True, device="cuda")
    x = x.softmax(dim=-1)
    target = torch.randn(8 * TOKENS, size, device="cuda").softmax(dim=-1)
    return lambda: _loss(_total_variation, x, target)


def _total_variation(x: Tensor, target: Tensor) -> Tensor:
    return (torch.abs(x - target) / 2.0).sum() / len(x)


def _jsd(tokens: int, size: int) -> Callable[[], None]:
    x = torch.randn(tokens, size, requires_grad=True, device="cuda")
    x = x.log_softmax(dim=-1)
    target = torch.randn(tokens, size, device="cuda").log_softmax(dim=-1)
    return lambda: _loss(_jensen_shannon, x, target)


def _jensen_shannon(x: Tensor, target: Tensor) -> Tensor:
    divergence = nn.KLDivLoss(reduction="none", log_target=True)
    mean = torch.lerp(torch.exp(x), torch.exp(target), 0.5)
    of_target = 0.5 * divergence(torch.log(mean), target).sum(dim=-1)
    rows = of_target + 0.5 * divergence(torch.log(mean), x).sum(dim=-1)
    loss: Tensor = (rows / len(x)).sum()
    return loss


OPERATORS: dict[str, Callable[[int], Callable[[], None]]] = {
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "group_norm": _group_norm,
    "swiglu": lambda size: _mlp(size, 4, "silu"),
    "geglu": lambda size: _mlp(size, 8, "gelu_pytorch_tanh"),
    "tiled_swiglu": lambda size: _small_mlp(size, "silu"),
    "tiled_geglu": lambda size: _small_mlp(size, "gelu_pytorch_tanh"),
    "cross_entropy": _cross_entropy,
    "fused_linear_cross_entropy": _head_and_cross_entropy,
    "kl_div": _kl_div,
    "tvd": _tvd,
    "jsd, 8192 tokens": lambda size: _jsd(4 * TOKENS, size),
    "jsd, 128256 words": lambda size: _jsd(size, VOCABULARY),
}
"""The call of each operator for a size, by the name of its program."""
