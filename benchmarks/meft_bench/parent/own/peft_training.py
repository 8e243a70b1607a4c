"""Training parameters next to a config of PEFT, as its comparison of methods has them.

Each is a field of a cell, or has the value that every method is trained with here, or
is refused by its name: none is passed over.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from meft_bench.shared import protocol
from meft_bench.shared.registry import nearest

FIELDS: dict[str, str] = {
    "max_seq_length": "seq_len",
    "batch_size": "batch_size",
    "max_steps": "max_steps",
    "eval_steps": "eval_every",
    "seed": "seed",
}
"""Parameters that are a field of a cell, with its name."""
TABLES: dict[str, tuple[str, dict[Any, Any]]] = {
    "optimizer_type": ("optimizer", {"AdamW": "adamw", "SGD": "sgd"}),
    "compile": ("blocks", {False: "eager", True: "compiled"}),
    "attn_implementation": (
        "attention",
        {None: "sdpa", "sdpa": "sdpa", "eager": "eager"},
    ),
}
"""Parameters that are a field of a cell in other words, with the words."""
DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
FIXED: dict[str, Any] = {"grad_norm_clip": protocol.MAX_GRADIENT_NORM}
"""Parameters that have one value here."""
SCHEDULES = ("linear",)
OF_SCORING = ("batch_size_eval", "generation_kwargs", "max_generation_length")
OF_DATA = ("query_template", "model_id")
"""Parameters that a backbone or a task decides here."""
KNOWN = (
    *(*FIELDS, *TABLES, *FIXED, *OF_SCORING, *OF_DATA),
    *("dtype", "use_amp", "lr_scheduler", "optimizer_kwargs"),
    "autocast_adapter_dtype",
)


def settings(training: dict[str, Any], file: Path) -> dict[str, Any]:
    """Return the fields of a cell that training parameters set.

    Args:
        training: the parameters by name.
        file: where they are, for messages.

    Raises:
        ValueError: a parameter has no meaning here, or another value than all methods.
    """
    found: dict[str, Any] = {}
    for name, value in training.items():
        if name in FIELDS:
            found[FIELDS[name]] = value
        elif name in TABLES:
            field, words = TABLES[name]
            if not _is_in(value, words):
                given = ", ".join(map(repr, words))
                raise _refused(file, name, value, f"it can be {given} here")
            found[field] = words[value]
        elif name == "optimizer_kwargs":
            found |= _optimizer(value, file)
        elif name in FIXED and value != FIXED[name]:
            reason = f"every method is trained with {FIXED[name]:g} here"
            raise _refused(file, name, value, reason)
        elif name == "lr_scheduler" and value not in SCHEDULES:
            raise _refused(file, name, value, "the learning rate falls linearly here")
        elif name == "autocast_adapter_dtype" and value is not True:
            raise _refused(file, name, value, "adapters are float32 here")
        elif name in OF_DATA:
            reason = "the sweep names it as `backbone` or in its task"
            raise _refused(file, name, value, reason)
        elif name in OF_SCORING:
            raise _refused(file, name, value, "the task of the sweep decides it")
        elif name not in KNOWN:
            raise ValueError(
                f"{file}: unknown training parameter {name!r}; {nearest(name, KNOWN)}"
            )
    return found | _dtypes(training, file)


def _is_in(value: Any, words: dict[Any, Any]) -> bool:
    try:
        return value in words
    except TypeError:  # a list is in no table
        return False


def _optimizer(value: Any, file: Path) -> dict[str, Any]:
    name = "optimizer_kwargs"
    if not isinstance(value, dict):
        raise _refused(file, name, value, "it should be an object")
    fixed: dict[str, Callable[[Any], bool]] = {
        "weight_decay": lambda decay: decay == protocol.WEIGHT_DECAY,
        "betas": lambda betas: (*betas,) == protocol.ADAM_BETAS,
        "eps": lambda eps: eps == protocol.ADAM_EPSILON,
    }
    wanted = {
        "weight_decay": protocol.WEIGHT_DECAY,
        "betas": list(protocol.ADAM_BETAS),
        "eps": protocol.ADAM_EPSILON,
    }
    found = {}
    for key, given in value.items():
        if key == "lr":
            found["learning_rate"] = given
        elif key not in fixed:
            raise _refused(file, f"{name}.{key}", given, "no optimizer here has it")
        elif not fixed[key](given):
            reason = f"every method is trained with {wanted[key]} here"
            raise _refused(file, f"{name}.{key}", given, reason)
    return found


def _dtypes(training: dict[str, Any], file: Path) -> dict[str, Any]:
    """Return the dtypes: that of the weights, or that of autocast."""
    if "dtype" not in training:
        if training.get("use_amp"):
            raise _refused(file, "use_amp", True, "name the `dtype`, too")
        return {}
    value = training["dtype"]
    if not _is_in(value, DTYPES):
        given = ", ".join(DTYPES)
        raise _refused(file, "dtype", value, f"it can be {given} here")
    if training.get("use_amp") and value == "float32":
        return {"dtype": "bf16", "weights_dtype": "fp32"}
    return {"dtype": DTYPES[value], "weights_dtype": DTYPES[value]}


def _refused(file: Path, name: str, value: Any, reason: str) -> ValueError:
    return ValueError(
        f"{file}: `{name}` = {value!r:.60}, but {reason}; change it, or remove it"
    )
