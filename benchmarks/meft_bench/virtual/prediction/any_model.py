"""Prepare any model of transformers for a plan, from its config alone.

For models whose family the library does not know, and for the methods of PEFT: the
class of the model is that of its config, the method is full fine-tuning, LoRA, or a
config of PEFT, each with or without gradient checkpointing, and inputs are what the
model reads: tokens, images or audio features.
"""

import contextlib
import dataclasses
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedConfig

from meft_bench.child.backbones import any_family
from meft_bench.child.backbones.classifier import WEIGHTS_DTYPES
from meft_bench.child.backbones.unwrapped import base_of
from meft_bench.child.methods import own
from meft_bench.child.tasks.batches import Batch
from meft_bench.child.training import execution, prepare
from meft_bench.shared.cell import Cell
from meft_bench.virtual.device import gpu
from meft_bench.virtual.device.allocator import settings_in_words
from meft_bench.virtual.emulation import assumed_selection, ordinary_code
from meft_bench.virtual.emulation.virtual_gpu import VirtualGpu
from meft_bench.virtual.prediction.predict import Ready, recorded, refuse_without_host

IMAGE_SIZE = 224
"""Side of the images of a model whose config names none."""
FRAMES_OF_A_POSITION = 2
"""Number of frames of audio that become one position of an encoder."""


@contextlib.contextmanager
def ready(
    cell: Cell,
    config: PreTrainedConfig,
    num_labels: int | None,
    origins: dict[str, str | None] | None = None,
) -> Iterator[Ready]:
    """Make a model on its virtual GPU, which exists while the context is active.

    Args:
        cell: the cell to plan; its method is one of `METHODS_OF_ANY_MODEL`, of PEFT, or
            of the user.
        config: config of the model.
        num_labels: number of classes of the head; None for a language model.
        origins: fields of `Environment`.

    Raises:
        MissingError: PEFT or an operator that needs values is missing.
        ValueError: the model, the method or the shape are incompatible.
    """
    any_family.require(cell, config)
    device = VirtualGpu(gpu.find(gpu.name_in(cell.device)))
    device.has_padding = cell.padding != "none"
    device.mode.makes_real_integers = True
    with (
        device,
        ordinary_code.supported(),
        assumed_selection.all_selected() as selections,
        execution.attention(cell),
        contextlib.ExitStack() as stack,
    ):
        refuse_without_host(cell, device)
        on_it = dataclasses.replace(cell, device=device.backend.device)
        model, ledger, of_weights = stack.enter_context(
            recorded(
                device,
                on_it,
                lambda: any_family.make(config, on_it, num_labels),
                lambda model: model,
            )
        )
        ledger.watch_all()
        stepper = prepare.with_method(model, on_it, own.any_function_of(on_it))
        model = stepper.model
        words = [device.backend.how, device.gpu.basis]
        words += [note] if (note := settings_in_words()) else []
        words += of_weights
        words.append(_description(model))
        yield Ready(
            cell=on_it,
            device=device,
            ledger=ledger,
            stepper=stepper,
            num_blocks=any_family.num_blocks(config),
            batches_of=lambda length: _batches(
                config, model, dataclasses.replace(on_it, seq_len=length), num_labels
            ),
            how="; ".join(words),
            origins=origins or {},
            selections=selections,
        )


def _description(model: Any) -> str:
    """Return the class, the attention if it has but one, and what LoRA changes."""
    base = base_of(model)
    words = f"assumed: a {type(base).__name__}"
    if not base._supports_sdpa:
        words += ", which has eager attention only"
    others = [n for n in ("vision_config", "audio_config") if hasattr(base.config, n)]
    if others and base.main_input_name == "input_ids":
        words += ", which reads text only: no images, no audio"
    if base.main_input_name == "pixel_values" and not others:
        if not hasattr(base.config, "image_size"):
            words += f", with images of {IMAGE_SIZE} x {IMAGE_SIZE}"
    for config in getattr(model, "peft_config", {}).values():
        if targets := getattr(config, "target_modules", None):
            named = targets if isinstance(targets, str) else ", ".join(sorted(targets))
            words += f", {config.peft_type.value} on {named}"
    return words


def _batches(
    config: PreTrainedConfig, model: Any, cell: Cell, num_labels: int | None
) -> list[Batch]:
    return [_batch(config, model, cell, num_labels) for _ in range(cell.accumulation)]


def _batch(
    config: PreTrainedConfig, model: Any, cell: Cell, num_labels: int | None
) -> Batch:
    """Return what the model reads, of one micro-batch, with arbitrary contents."""
    base = base_of(model)
    rows = cell.batch_size
    tokens = torch.zeros((rows, cell.seq_len), dtype=torch.long)
    dtype = WEIGHTS_DTYPES[cell.unquantised_dtype]
    labels = tokens.clone()
    if num_labels is not None:
        labels = tokens[:, 0].to(torch.float32 if num_labels == 1 else torch.long)
    match base.main_input_name:
        case "pixel_values":
            vision = getattr(config, "vision_config", config)
            height, width = _pair(getattr(vision, "image_size", IMAGE_SIZE))
            channels = getattr(vision, "num_channels", 3)
            images = torch.zeros(rows, channels, height, width, dtype=dtype)
            return {"pixel_values": images, "labels": labels}
        case "input_features":
            frames = FRAMES_OF_A_POSITION * config.max_source_positions
            features = torch.zeros(rows, config.num_mel_bins, frames, dtype=dtype)
            return {"input_features": features, "labels": labels}
        case "input_ids":
            found = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
            if "token_type_ids" in inspect.signature(base.forward).parameters:
                found["token_type_ids"] = torch.zeros_like(tokens)
            return found | {"labels": labels}
    raise ValueError(
        f"{type(base).__name__} reads `{base.main_input_name}`: tokens, images and "
        "audio features can be planned; plan others as code of your own (`--script`)"
    )


def _pair(size: Any) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    height, width = size
    return height, width
