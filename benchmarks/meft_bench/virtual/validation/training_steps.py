"""Peaks of whole training steps that no cell of a sweep describes.

The cases are padded decoders, whose mask decides the attention kernel, and consecutive
steps of different length, which leave memory in the allocator's cache.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from meft_bench.virtual.validation.place import CheckFigure, Place

LENGTHS = (512, 300, 1024, 128, 700, 900, 64, 1000, 450, 800)
"""Number of tokens per row in each of ten steps."""
SMALL: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
"""A shape of about a billion parameters; queries share keys and values."""
LLAMA_3B: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}
"""The shape of Llama-3.2-3B."""


def figures(place: Place) -> Iterator[CheckFigure]:
    """Yield the peaks of every case."""
    for name, run in CASES.items():
        with place.fresh():
            run(place)
            yield from peaks(name)


def peaks(case: str) -> Iterator[CheckFigure]:
    """Yield the memory statistics of `torch.cuda` since its counters were reset."""
    for quantity, value in {
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
        "end_allocated_bytes": torch.cuda.memory_allocated(),
        "end_reserved_bytes": torch.cuda.memory_reserved(),
    }.items():
        yield CheckFigure(case=case, quantity=quantity, value=int(value))


def lora(place: Place, *, padded: bool, checkpointing: bool = False) -> None:
    """Run three steps of LoRA, rank 8 on queries and values, with Llama-3.2-3B's shape.

    Args:
        place: the device to run on.
        padded: whether the first row of each batch is padded.
        checkpointing: whether gradient checkpointing is enabled.
    """
    from peft import LoraConfig, get_peft_model

    model: Any = _model(LLAMA_3B, place)
    if checkpointing:
        # The first name is that of transformers 5.23 and later.
        name = "activation_checkpointing_enable"
        if not hasattr(model, name):
            name = "gradient_checkpointing_enable"
        getattr(model, name)({"use_reentrant": False})
        model.enable_input_require_grads()
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    _train(get_peft_model(model, config), place, (1024,) * 3, batch=4, padded=padded)


def varying_lengths(place: Place, *, empty_cache: bool) -> None:
    """Run AdamW on all weights for ten steps of different lengths."""
    _train(_model(SMALL, place), place, LENGTHS, batch=8, empty_cache=empty_cache)


def _model(shape: dict[str, Any], place: Place) -> nn.Module:
    config = LlamaConfig(**shape, max_position_embeddings=4096, use_cache=False)
    with torch.device(place.device):
        model: nn.Module = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    return model


def _train(
    model: nn.Module,
    place: Place,
    lengths: tuple[int, ...],
    *,
    batch: int,
    padded: bool = False,
    empty_cache: bool = False,
) -> None:
    if place.virtual is not None:  # whose masks have no values
        place.virtual.has_padding = padded
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)
    for tokens in lengths:
        loss: Tensor = model(**_rows(batch, tokens, padded, place.device)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        del loss
        if empty_cache:
            torch.cuda.empty_cache()


def _rows(batch: int, tokens: int, padded: bool, device: str) -> dict[str, Tensor]:
    ids = torch.randint(0, 32000, (batch, tokens), device=device)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, : tokens // 4] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids}


CASES: dict[str, Callable[[Place], None]] = {
    "llama-3b lora 4 x 1024": functools.partial(lora, padded=False),
    "llama-3b lora 4 x 1024 padded": functools.partial(lora, padded=True),
    "llama-3b lora checkpointed 4 x 1024": functools.partial(
        lora, padded=False, checkpointing=True
    ),
    "llama-1b full 8 x ten lengths": functools.partial(
        varying_lengths, empty_cache=False
    ),
    "llama-1b full 8 x ten lengths, empty_cache": functools.partial(
        varying_lengths, empty_cache=True
    ),
}
"""Cases by name."""
