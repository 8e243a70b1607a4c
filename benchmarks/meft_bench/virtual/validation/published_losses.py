"""Losses over large vocabularies, whose memory benchmarks of fused kernels measured.

Predicted are the losses in plain PyTorch that the fused kernels are compared with:
`baseline` of cut-cross-entropy, and two of linear-cross-entropy-loss, one of which
computes the logits again in backward, for 4096 tokens at a time.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from meft_bench.shared.published import Published
from meft_bench.virtual.prediction.training_code import virtual_gpu

CHUNK = 4096
"""Tokens of a checkpointed piece."""
BENCH_BUFFER_BYTES = 256_000_000
"""What `triton.testing.do_bench` makes to clear the cache of the GPU."""

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def capped_cross_entropy(rows: Sequence[Published]) -> Iterator[int]:
    """Yield the prediction of the baseline of cut-cross-entropy.

    Logits in BF16 are limited by a tanh and cast to float32. Forward, backward or both
    are measured by the peak less what was allocated before.
    """
    row = rows[0]
    cap = row.settings["softcap"]
    kind = row.program.split()[-1]
    with virtual_gpu(row.gpu):
        x, head, target = _inputs(
            row.size, row.settings["hidden"], row.settings["vocabulary"], torch.bfloat16
        )
        for _ in range(2):
            x.grad = head.grad = None
            before = _reset()
            logits = x @ head.T
            logits = torch.tanh(logits / cap) * cap
            loss = functional.cross_entropy(logits.float(), target)
            del logits
            if kind == "loss-bw":
                before = _reset()
            if kind != "loss-fw":
                loss.backward()
            num_bytes = int(torch.cuda.max_memory_allocated()) - before
            del loss
        yield num_bytes


def head_and_cross_entropy(rows: Sequence[Published]) -> Iterator[int]:
    """Yield the predictions of a loss of linear-cross-entropy-loss.

    By default 16,384 tokens with 2048 features, and 131,072 words; one of them is a
    row's size. Gradients of earlier calls are kept, so that later ones are added.
    """
    method, dtype, _, varied = rows[0].program.split()
    is_mixed = dtype == "fp16-mixed"
    loss_of = LOSSES[method]
    for row in rows:
        tokens, vocabulary = 16_384, 131_072
        if varied == "N":
            tokens = row.size
        else:
            vocabulary = row.size
        with virtual_gpu(row.gpu):
            inputs = _inputs(
                tokens, 2048, vocabulary, torch.float32 if is_mixed else torch.bfloat16
            )

            def call(inputs: tuple[Tensor, Tensor, Tensor] = inputs) -> None:
                with torch.autocast("cuda") if is_mixed else nullcontext():
                    loss = loss_of(*inputs)
                loss.backward()

            for _ in range(2):
                call()
            before = _reset()
            buffer = torch.empty(BENCH_BUFFER_BYTES, dtype=torch.int8, device="cuda")
            for _ in range(2):
                call()
            num_bytes = int(torch.cuda.max_memory_allocated()) - before
            del buffer
        yield num_bytes


def _inputs(
    tokens: int, hidden: int, vocabulary: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    x, head = (
        torch.randn(size, hidden, requires_grad=True, dtype=dtype, device="cuda")
        for size in (tokens, vocabulary)
    )
    return x, head, torch.randint(vocabulary, (tokens,), device="cuda")


def _reset() -> int:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return int(torch.cuda.memory_allocated())


def _plain(x: Tensor, head: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(functional.linear(x, head).float(), target)


def _in_pieces(x: Tensor, head: Tensor, target: Tensor) -> Tensor:
    pieces = x.split(CHUNK)
    total = torch.zeros((), device=x.device)
    for piece, some in zip(pieces, target.split(CHUNK), strict=True):
        total = total + checkpoint(_piece, piece, some, head, use_reentrant=False)
    return total / len(pieces)


def _piece(x: Tensor, target: Tensor, head: Tensor) -> Tensor:
    return functional.cross_entropy(functional.linear(x, head), target)


LOSSES: dict[str, Loss] = {"torch-baseline": _plain, "torch-checkpoint": _in_pieces}
"""By the first word of a program of linear-cross-entropy-loss."""
