"""Memory that others measured on real GPUs and published, predicted.

`benchmarks/published-gpu-memory.csv` has one row per number, with its source. Each is
predicted by running the step that was measured inside `virtual_gpu`:

    liger-kernel   one operator, forward and backward, as its benchmark calls it
    peft           steps of its method comparison: Llama-3.2-3B in BF16, batches of four
                   padded rows, AdamW, clipping

    python -m meft_bench.virtual.validation.published            # prints a table
    python -m meft_bench.virtual.validation.published liger-kernel
"""

import csv
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from meft_bench.shared.tables import path_in_use
from meft_bench.virtual.prediction.training_code import virtual_gpu

FILE = "published-gpu-memory.csv"
NUM_CALLS = 3
"""Number of calls of an operator; all after the first are alike."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """One published number.

    Attributes:
        source: who measured it.
        url: where it is published.
        gpu: name of the GPU, as `virtual_gpu` takes it.
        program: what was run.
        size: the size that its benchmark varies, or the tokens of a row.
        metric: name of the function of `torch.cuda` that measured it.
        num_bytes: the number.
        note: how it was measured, and what is assumed.
    """

    source: str
    url: str
    gpu: str
    program: str
    size: int
    metric: str
    num_bytes: int
    note: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """A published number and its prediction, in bytes."""

    published: Published
    predicted: int

    @property
    def error(self) -> float:
        """The relative error of the prediction."""
        return self.predicted / self.published.num_bytes - 1


def read(path: Path) -> list[Published]:
    """Return the rows of a file."""
    with path.open(encoding="utf-8", newline="") as file:
        return [
            Published(
                **row  # type: ignore[arg-type]
                | {name: int(row[name]) for name in ("size", "num_bytes")}
            )
            for row in csv.DictReader(file)
        ]


def compare(rows: list[Published]) -> Iterator[Compared]:
    """Predict each number and yield it, in order."""
    for row in rows:
        predicted = PROGRAMS[row.source](row)
        yield Compared(published=row, predicted=predicted)


# Operators: what Liger's benchmark runs as the provider `huggingface`.


def _operator(row: Published) -> int:
    with virtual_gpu(row.gpu):
        call = OPERATORS[row.program](row.size)
        for _ in range(NUM_CALLS):
            torch.cuda.reset_peak_memory_stats()
            call()
        return int(torch.cuda.max_memory_allocated())


def _backward_of(module: Any, x: Tensor) -> Callable[[], None]:
    """Run a module and its backward with a gradient that is kept."""
    gradient = torch.randn_like(x)
    x.requires_grad_(True)
    return lambda: module(x).backward(gradient, retain_graph=True)


def _rms_norm(size: int) -> Callable[[], None]:
    x = torch.randn(2048, size, dtype=torch.bfloat16, device="cuda")
    return _backward_of(LlamaRMSNorm(size).to("cuda"), x)


def _layer_norm(size: int) -> Callable[[], None]:
    x = torch.randn(4096, size, device="cuda")
    return _backward_of(nn.LayerNorm(size).to("cuda"), x)


def _mlp(size: int, batch_size: int, activation: str) -> Callable[[], None]:
    config = transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=11008, hidden_act=activation
    )
    shape = (batch_size, size, 4096)
    x = torch.randn(*shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    layer = LlamaMLP(config).to("cuda").to(torch.bfloat16)

    def call() -> None:
        y = layer(x)
        y.backward(torch.randn_like(y), retain_graph=True)

    return call


def _cross_entropy(size: int) -> Callable[[], None]:
    logits = torch.randn(8 * 2048, size, requires_grad=True, device="cuda")
    target = torch.randint(size, (8 * 2048,), device="cuda")
    return lambda: functional.cross_entropy(logits, target).backward()


def _head_and_cross_entropy(size: int) -> Callable[[], None]:
    head, other = (
        nn.Linear(4096, 128256, bias=False, dtype=torch.bfloat16).to("cuda")
        for _ in range(2)  # the benchmark also holds the head of the fused kernel
    )
    shape = (size, 4096)
    x = torch.randn(*shape, requires_grad=True, dtype=torch.bfloat16, device="cuda")
    target = torch.randint(128256, (size,), device="cuda")

    def call() -> None:
        assert other is not head
        functional.cross_entropy(head(x), target).backward()

    return call


OPERATORS: dict[str, Callable[[int], Callable[[], None]]] = {
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "swiglu": lambda size: _mlp(size, 4, "silu"),
    "geglu": lambda size: _mlp(size, 8, "gelu_pytorch_tanh"),
    "cross_entropy": _cross_entropy,
    "fused_linear_cross_entropy": _head_and_cross_entropy,
}


# Steps of PEFT's method comparison.

CONFIGS: dict[str, dict[str, Any] | None] = {
    "full": None,
    "lora": {"peft_type": "LORA", "r": 32, "lora_alpha": 64},
    "dora": {"peft_type": "LORA", "r": 32, "lora_alpha": 64, "use_dora": True},
    "lora-mlp": {
        "peft_type": "LORA",
        "r": 10,
        "lora_alpha": 20,
        "target_modules": ["gate_proj", "up_proj", "down_proj"],
    },
    "ia3": {"peft_type": "IA3"},
    "ln_tuning": {"peft_type": "LN_TUNING"},
    "vera": {"peft_type": "VERA", "r": 256},
}
"""Configs of PEFT by the names of the file; None for full fine-tuning."""
LLAMA_3B = {
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}


def _peft(row: Published) -> int:
    given = CONFIGS[row.program]
    with virtual_gpu(row.gpu):
        config = transformers.LlamaConfig(**LLAMA_3B)  # type: ignore[arg-type]
        model: Any = transformers.LlamaForCausalLM(config)
        model = model.to("cuda", torch.bfloat16)
        if given is not None:
            model = peft.get_peft_model(model, peft.get_peft_config({**given}))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1)
        model.train()
        outputs = None
        for step in range(3):
            if step == 2:
                torch.cuda.empty_cache()  # as it does every few steps
            ids = torch.ones(4, row.size, dtype=torch.long, device="cuda")
            batch = {"input_ids": ids, "attention_mask": ids.clone()}
            batch["labels"] = ids.clone()
            optimizer.zero_grad()
            outputs = model(**batch, num_items_in_batch=4 * row.size)
            outputs.loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        held = int(getattr(torch.cuda, row.metric)())
        del outputs
    return held


PROGRAMS: dict[str, Callable[[Published], int]] = {
    "liger-kernel": _operator,
    "peft": _peft,
}


def table(found: list[Compared]) -> str:
    """Return a Markdown table per source and metric: number, errors, the worst.

    Args:
        found: the compared numbers.
    """
    lines = [
        "| measured by | GPU | metric | numbers | median error | mean error | worst |",
        "|---|---|---|---:|---:|---:|---|",
    ]
    groups: dict[tuple[str, str, str], list[Compared]] = {}
    for one in found:
        its = one.published
        groups.setdefault((its.source, its.gpu, its.metric), []).append(one)
    for (source, gpu, metric), of_group in groups.items():
        worst = max(of_group, key=lambda one: abs(one.error))
        errors = [one.error for one in of_group]
        lines.append(
            f"| {source} | {gpu} | `{metric}` | {len(errors)} "
            f"| {statistics.median(map(abs, errors)):.2%} "
            f"| {statistics.fmean(errors):+.2%} "
            f"| {worst.error:+.2%}: {worst.published.program} {worst.published.size} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Predict the numbers of the sources that the command line names, or all."""
    transformers.logging.set_verbosity_error()
    chosen = sys.argv[1:] or list(PROGRAMS)
    found = []
    for one in compare([r for r in read(path_in_use(FILE)) if r.source in chosen]):
        its = one.published
        print(
            f"{its.source} {its.program} {its.size} {its.metric}: {its.num_bytes:,} "
            f"measured, {one.predicted:,} predicted, {one.error:+.2%}",
            flush=True,
        )
        found.append(one)
    print(f"\n{table(found)}")


if __name__ == "__main__":
    main()
