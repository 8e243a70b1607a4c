"""Valid values of each field of a `Cell`.

A sweep is written by hand, so every value is checked before anything runs: its type,
its range, and, where it is a name, that it is in the registry. Whether the weights and
data of a name are on this machine is checked by the child.
"""

import dataclasses
import math
import sys
from collections.abc import Collection, Mapping
from pathlib import Path

from meft_bench.parent import several_ranks
from meft_bench.shared import backbones, methods, own, quantisations, registry
from meft_bench.shared.cell import Cell
from meft_bench.shared.own import Own
from meft_bench.virtual.device import gpu

FIELDS = {field.name: field for field in dataclasses.fields(Cell)}
"""The fields of a cell, by name."""

_NAMES: dict[str, Collection[str]] = {
    "method": registry.METHODS,
    "task": registry.TASKS,
    "dtype": registry.DTYPES,
    "device": registry.DEVICES,
    "weights_dtype": registry.WEIGHTS_DTYPES,
    "attention": registry.ATTENTIONS,
    "blocks": registry.BLOCKS,
    "padding": registry.PADDINGS,
    "side_buffer": registry.SIDE_BUFFERS,
    "gradient_dtype": registry.GRADIENT_DTYPES,
    "scored_on": registry.SCORED_ON,
    "parallel": registry.PARALLELS,
    "optimizer": registry.OPTIMIZERS,
    "reference": ("", *registry.METHODS),
}
_FROM_ONE = {
    "batch_size",
    "seq_len",
    "max_steps",
    "bottleneck_size",
    "lora_rank",
    "mlp_chunks",
    "num_neurons",
    "top_k_neurons",
    "top_k_experts",
    "row_budget_bytes",
    "accumulation",
    "ranks",
}
_AT_MOST = {"lost_bits": 16, "active_fraction": 1, "seed": 2**32 - 1}
_LARGEST = 2**63 - 1
"""Largest value of an integer column."""

CLASSIFIED = ("data:classification-", "data:regression-")
"""Beginnings of tasks of the user whose models are classifiers."""
OWN = ("method", "reference", "backbone", "task")
"""Fields that may be of the user, as digests (`meft_bench.shared.own`)."""
Value = str | int | float


def check_name(name: str) -> None:
    """Raise `ValueError` unless `name` is a field of a cell."""
    if name not in FIELDS:
        raise ValueError(f"unknown key {name!r}; {registry.nearest(name, FIELDS)}")


def check(name: str, value: object) -> Value:
    """Return the value as the cell stores it; integers of float fields become floats.

    Raises:
        ValueError: wrong type, out of range, or a name that is not in the registry.
    """
    check_name(name)
    if FIELDS[name].type is str:
        return _check_text(name, value)
    if FIELDS[name].type is float:
        return _check_float(name, value)
    return _check_count(name, value)


def check_together(cell: Cell) -> None:
    """Raise `ValueError` if fields of a cell contradict each other."""
    several_ranks.check(cell)
    _check_batches(cell)
    _check_task(cell)
    _check_parts_of_mlps(cell)
    _check_weights(cell)
    _check_backbone_of_task(cell)
    _check_weights_and_optimizer_of_methods(cell)
    _check_optimizer(cell)


def _check_batches(cell: Cell) -> None:
    """Check the numbers of steps and tokens."""
    if cell.warmup_steps >= cell.max_steps:
        raise ValueError(
            f"`warmup_steps` = {cell.warmup_steps} leaves no step to measure; "
            f"make it smaller than `max_steps` = {cell.max_steps}"
        )
    if cell.active_fraction != 1 and not cell.device.startswith(registry.VIRTUAL):
        raise ValueError(
            f"`active_fraction` = {cell.active_fraction} on device {cell.device!r}, "
            "where batches tell themselves: leave it out, or take a virtual GPU"
        )
    if cell.padding != "none" and cell.seq_len < 2:
        raise ValueError(
            f"`padding` = {cell.padding!r} with `seq_len` = {cell.seq_len}, of which "
            "nothing would be left: set `seq_len` to 2 or more, or take 'none'"
        )


def _check_task(cell: Cell) -> None:
    """Check what tasks of language models, and validations, are needed for."""
    if cell.loss_chunk_tokens and not _has_language_model(cell.task):
        raise ValueError(
            f"`loss_chunk_tokens` = {cell.loss_chunk_tokens} with `task` = "
            f"{cell.task!r}, whose models are classifiers: take a task of language "
            "models, such as 'synthetic-lm', or leave it out"
        )
    if cell.task in registry.MADE_TASKS and not cell.train_rows:
        raise ValueError(
            f"`task` = {cell.task!r} is made of as many facts as `train_rows` says, "
            "and that is 0: set it, such as to 250"
        )
    if cell.guard_texts and not _reads_language(cell.task):
        raise ValueError(
            f"`guard_texts` = {cell.guard_texts} with `task` = {cell.task!r}, whose "
            "models are no language models that read text: leave it out, or take a "
            "task such as 'facts-random'"
        )
    if cell.patience and not cell.eval_every:
        raise ValueError("`patience` counts validations; set `eval_every` above 0 too")


def _check_parts_of_mlps(cell: Cell) -> None:
    """Check that both methods can run MLPs in parts."""
    for name in ("method", "reference"):
        method = methods.TABLE.get(getattr(cell, name))
        if cell.mlp_chunks > 1 and method and "mlp_chunks" not in method.options:
            able = [n for n, m in methods.TABLE.items() if "mlp_chunks" in m.options]
            raise ValueError(
                f"`mlp_chunks` = {cell.mlp_chunks} with `{name}` = "
                f"{getattr(cell, name)!r}, which cannot run MLPs in parts: leave it "
                f"out, or take a method such as {', '.join(able[:3])}"
            )


def _check_weights(cell: Cell) -> None:
    """Check the dtype of weights against that of computations."""
    if cell.unquantised_dtype not in ("fp32", cell.dtype):
        raise ValueError(
            f"`weights_dtype` = {cell.weights_dtype!r} with `dtype` = {cell.dtype!r}: "
            "take 'fp32', the compute dtype, or a quantisation: "
            f"{', '.join(quantisations.TABLE)}"
        )


def _check_backbone_of_task(cell: Cell) -> None:
    """Check that the backbone can read what the task consists of."""
    is_shape = cell.backbone.startswith("random:")
    without_tokens = (*registry.SYNTHETIC_TASKS, *registry.IMAGE_TASKS)
    if is_shape and cell.task not in without_tokens:
        raise ValueError(
            f"`task` = {cell.task!r} with `backbone` = {cell.backbone!r}: a random "
            "backbone has no tokenizer to read text with; take task "
            f"{' or '.join(map(repr, registry.SYNTHETIC_TASKS))}, or a backbone with "
            "real weights"
        )
    if cell.task in registry.IMAGE_TASKS and _reads_text(cell.backbone):
        raise ValueError(
            f"`task` = {cell.task!r} with `backbone` = {cell.backbone!r}, which reads "
            "text: take a backbone of images, such as 'random:vit-tiny'"
        )


def _check_weights_and_optimizer_of_methods(cell: Cell) -> None:
    """Check that both methods take the weights and the optimizer."""
    for name in ("method", "reference"):
        method = getattr(cell, name)
        if cell.is_quantised and method in registry.TRAIN_BACKBONE:
            raise ValueError(
                f"`weights_dtype` = {cell.weights_dtype!r} with `{name}` = {method!r}, "
                "which trains the backbone, and quantised weights cannot be trained: "
                f"take {cell.dtype!r}, or a method that freezes the backbone, such as "
                "'lora'"
            )
        if cell.is_quantised and method in registry.FLOATS_ONLY:
            raise ValueError(
                f"`weights_dtype` = {cell.weights_dtype!r} with `{name}` = {method!r}, "
                f"whose layers take no quantised weights: take {cell.dtype!r}, or a "
                "method whose layers do, such as 'lora'"
            )
        if cell.optimizer != "adamw" and method in registry.HAVE_ROWS:
            raise ValueError(
                f"`optimizer` = {cell.optimizer!r} with `{name}` = {method!r}, whose "
                "rows have an AdamW of their own: take 'adamw', or another method"
            )
        if cell.optimizer != "adamw" and method in registry.OWN_OPTIMIZER:
            raise ValueError(
                f"`optimizer` = {cell.optimizer!r} with `{name}` = {method!r}, which "
                "has an optimizer of its own: take 'adamw', or another method"
            )


def _check_optimizer(cell: Cell) -> None:
    """Check that an optimizer that works during backward can do so."""
    if cell.optimizer in registry.IN_BACKWARD and cell.accumulation > 1:
        raise ValueError(
            f"`optimizer` = {cell.optimizer!r}, which updates during backward, with "
            f"`accumulation` = {cell.accumulation}: gradients cannot be summed before "
            "an update; take 1, or 'adamw'"
        )
    if cell.optimizer in registry.READ_IN_BACKWARD and cell.dtype == "fp16":
        raise ValueError(
            f"`optimizer` = {cell.optimizer!r}, which reads gradients during backward, "
            "with `dtype` = 'fp16': a loss scale has to look at all gradients before "
            "an update; take 'bf16', or 'adamw'"
        )


def _has_language_model(task: str) -> bool:
    """Return whether the models of a task may be language models.

    What a function of the user loads is known to the child only.
    """
    is_own = task.startswith((own.DATA, own.PYTHON))
    if is_own:
        return not task.startswith(CLASSIFIED)
    return task in registry.LANGUAGE_MODEL_TASKS


def _reads_language(task: str) -> bool:
    """Return whether the models of a task may be language models with a tokenizer."""
    return _has_language_model(task) and task not in registry.SYNTHETIC_TASKS


def _reads_text(backbone: str) -> bool:
    """Return whether a backbone is known to read text by its name alone."""
    shape = backbone.removeprefix("random:")
    if backbone.startswith("random:") and shape in registry.RANDOM_BACKBONES:
        kind = backbones.TABLE[registry.RANDOM_BACKBONES[shape]]
        return "image-classifier" not in kind.models
    return backbone in registry.PACKAGED_BACKBONES


def _check_image_tokens(cell: Cell, things: Mapping[str, Own]) -> None:
    one = things.get(cell.backbone)
    origin = one.training.get("backbone", "") if one else cell.backbone
    shape = str(origin).removeprefix("random:")
    num_tokens = backbones.num_image_tokens(shape)
    if num_tokens is not None and cell.seq_len != num_tokens:
        raise ValueError(
            f"`seq_len` = {cell.seq_len} with `backbone` = {cell.backbone!r}, which "
            f"makes {num_tokens} tokens of an image: set it to {num_tokens}"
        )


def check_family(cell: Cell, things: Mapping[str, Own]) -> None:
    """Raise `ValueError` if a method needs a family and the backbone's is not known.

    Args:
        cell: the cell.
        things: those of the user, by what cells hold.
    """
    is_own = cell.backbone in things
    _check_image_tokens(cell, things)
    kind = things[cell.backbone].model_type if is_own else ""
    if not kind or kind in registry.MODEL_TYPES:
        return
    for name in ("method", "reference"):
        method = getattr(cell, name)
        if method in registry.METHODS and method not in registry.METHODS_OF_ANY_MODEL:
            raise ValueError(
                f"`{name}` = {method!r} needs a family that sweeps know, and backbone "
                f"{cell.backbone!r} is of model_type {kind!r}: take "
                f"{', '.join(registry.METHODS_OF_ANY_MODEL)}, a config of PEFT, or a "
                "function of your own"
            )
    needs = {
        "mlp_chunks": cell.mlp_chunks > 1,
        "blocks": cell.blocks != "eager",
        "parallel": cell.parallel == "fsdp2",
    }
    for name in (name for name, is_needed in needs.items() if is_needed):
        raise ValueError(
            f"`{name}` = {getattr(cell, name)!r} needs a family that sweeps know, and "
            f"backbone {cell.backbone!r} is of model_type {kind!r}: leave it out"
        )


def _check_text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"`{name}` = {value!r} should be a string")
    if name in OWN and own.is_value(value):
        return value
    if name == "backbone":
        _check_backbone(value)
    elif name == "device" and value.endswith(".json"):
        gpu.find(gpu.name_in(value))
    elif value not in _NAMES[name]:
        hint = registry.nearest(value, _NAMES[name])
        raise ValueError(f"unknown {name} {value!r}; {hint}")
    return value


def _check_float(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"`{name}` = {value!r} should be a number")
    # Compared without conversion, because an integer may be too large for a float.
    if not 0 < value < math.inf or value > sys.float_info.max:
        raise ValueError(f"`{name}` = {value!r} should be finite and above 0")
    _check_most(name, value)
    return float(value)


def _check_count(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"`{name}` = {value!r} should be an integer")
    least = 1 if name in _FROM_ONE else 0
    if value < least:
        raise ValueError(f"`{name}` = {value!r} should be at least {least}")
    _check_most(name, value)
    return value


def _check_most(name: str, value: float) -> None:
    most = _AT_MOST.get(name, _LARGEST)
    if value > most:
        raise ValueError(f"`{name}` = {value!r} should be at most {most}")


def _check_backbone(value: str) -> None:
    if not value.isprintable():  # ids are shown in lines
        raise ValueError(f"backbone {value!r} has characters that cannot be printed")
    if value in registry.PACKAGED_BACKBONES:
        return
    kind, colon, place = value.partition(":")
    if colon and place:
        if kind == "hub":
            return
        if kind == "dir":
            if not Path(place).is_dir():
                raise ValueError(f"backbone {value!r}: no directory {place!r}")
            return
        if kind == "random":
            _check_random(value, place)
            return
    valid = [*registry.PACKAGED_BACKBONES, "dir:PATH", "hub:NAME", "random:CONFIG"]
    raise ValueError(f"unknown backbone {value!r}; {registry.nearest(value, valid)}")


def _check_random(value: str, place: str) -> None:
    is_config = place.endswith(".json") and Path(place).is_file()
    if place in registry.PLANNED_BACKBONES:
        raise ValueError(
            f"backbone {value!r} can be planned (`meft-bench plan`), but not run: "
            "methods of sweeps do not know its family"
        )
    if place not in registry.RANDOM_BACKBONES and not is_config:
        hint = registry.nearest(place, registry.RANDOM_BACKBONES)
        raise ValueError(
            f"backbone {value!r}: {place!r} is neither the path of a config.json nor a "
            f"known shape; {hint}"
        )
