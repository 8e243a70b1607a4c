"""Any method of PEFT, from its config: `peft:TYPE`, `peft:PATH.json`, `peft:FOLDER`.

The model is wrapped as PEFT's users wrap it, by `get_peft_model`, and the new head of a
classifier is trained in addition, as by every method. `peft-checkpointing:` does the
same with gradient checkpointing, as transformers does it.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import peft
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils.other import AuxiliaryTrainingWrapper

from meft_bench.child.backbones import any_family
from meft_bench.child.backbones.unwrapped import base_of
from meft_bench.child.methods import any_checkpointing
from meft_bench.shared import protocol
from meft_bench.shared.cell import Cell
from meft_bench.shared.own import OF_THE_FILE, PEFT_CONFIG
from meft_bench.shared.registry import PEFT, nearest
from meft_bench.shared.source import MissingError

KNOWN_TARGETS = peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
QUERY_AND_VALUE = (
    {"q_proj", "v_proj"},
    {"query", "value"},
    {"query_proj", "value_proj"},
    {"qkv_proj"},
    {"Wqkv"},
)
"""Names of the projections that LoRA changes."""


def apply(model: Any, cell: Cell) -> Any:
    """Apply the config of PEFT that a cell's method names.

    Raises:
        MissingError: there is no such file.
        ValueError: PEFT refuses the config for this model; the message states why.
    """
    wrapped = wrap(model, cell, read(cell.method))
    if any_checkpointing.is_checkpointed(cell):
        any_checkpointing.checkpoint(wrapped)
    return wrapped


def lora(model: Any, cell: Cell) -> Any:
    """Apply LoRA to the queries and values of a model of any family."""
    fields: dict[str, Any] = {
        "peft_type": "LORA",
        "r": cell.lora_rank,
        "lora_alpha": protocol.LORA_ALPHA_PER_RANK * cell.lora_rank,
    }
    if targets := _query_and_value(model):
        fields["target_modules"] = targets
    return wrap(model, cell, fields)


def wrap(model: Any, cell: Cell, fields: dict[str, Any]) -> Any:
    """Return the model with adapters of PEFT, in float32 as PEFT makes them.

    Args:
        model: the model.
        cell: the cell.
        fields: those of the config of PEFT, by name.

    Raises:
        ValueError: PEFT refuses the config for this model; the message states why.
    """
    fields = {name: v for name, v in fields.items() if name not in OF_THE_FILE}
    is_classifier = getattr(model.config, "problem_type", None) is not None
    its = _task_type(model, is_classifier)
    if fields.get("task_type") is None:
        fields["task_type"] = its
    elif its is not None and fields["task_type"] != its:
        raise ValueError(
            f"{cell.method!r} has `task_type` = {fields['task_type']!r}, and for task "
            f"{cell.task!r} it should be {its!r}: change it, or remove it from the file"
        )
    heads = any_family.heads_of(model) if is_classifier else {}
    saved = [*(fields.get("modules_to_save") or [])]
    if "modules_to_save" in _fields_of(fields["peft_type"], cell):
        saved += [name for name in heads if name not in saved]
    if saved:
        fields["modules_to_save"] = saved
    try:
        config = peft.get_peft_config({**fields, "inference_mode": False})
        wrapped = peft.get_peft_model(model, config)
    except (ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        reason = " ".join(str(error).split())
        reason = f"{type(error).__name__}: {reason}"
        raise ValueError(
            f"PEFT refuses {cell.method!r} for this model: {reason}"
        ) from error
    # Found again: PEFT has put some of them into wrappers, with a frozen copy.
    for head in any_family.heads_of(base_of(wrapped)).values() if heads else ():
        if not any(isinstance(m, AuxiliaryTrainingWrapper) for m in head.modules()):
            head.requires_grad_(True)
    return wrapped


def read(method: str) -> dict[str, Any]:
    """Return the fields of a method `peft:TYPE`, `peft:PATH.json` or `peft:FOLDER`.

    Raises:
        MissingError: there is no such file.
        ValueError: it is not a JSON object with a `peft_type`.
    """
    name = method.partition(":")[2]
    if Path(name).is_absolute() and Path(name).is_dir():
        name = str(Path(name, PEFT_CONFIG))
    if not name.endswith(".json"):
        return {"peft_type": name.upper()}
    try:
        fields = json.loads(Path(name).read_bytes())
    except OSError as error:
        raise MissingError(f"{name}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON: {error}") from error
    if not isinstance(fields, dict) or not isinstance(fields.get("peft_type"), str):
        raise ValueError(f"{name} is no config of PEFT: it names no `peft_type`")
    return fields


def refuse_quantised(cell: Cell) -> None:
    """Raise `ValueError` for quantised layers of PEFT that are not modelled."""
    kind = read(cell.method)["peft_type"].upper()
    if cell.is_quantised and kind != "LORA":
        raise ValueError(
            f"`weights_dtype` = {cell.weights_dtype!r} with {cell.method!r}: of PEFT's "
            "layers for quantised weights, those of LoRA are modelled: take a config "
            f"of LoRA, or {cell.dtype!r}"
        )


def _fields_of(peft_type: str, cell: Cell) -> set[str]:
    """Return the names of the fields of the config of a type.

    Raises:
        ValueError: PEFT has no such type.
    """
    kinds = {str(kind.value): of for kind, of in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if peft_type.upper() not in kinds:
        raise ValueError(
            f"{cell.method!r}: PEFT {peft.__version__} has no type "
            f"{peft_type!r}; {nearest(peft_type.upper(), kinds)}"
        )
    return {field.name for field in dataclasses.fields(kinds[peft_type.upper()])}


def _query_and_value(model: Any) -> list[str] | None:
    """Return the names of the projections of queries and values.

    None is returned where PEFT has names of its own for a model with others.

    Raises:
        ValueError: none of the usual names occurs in the model.
    """
    names = {name.rpartition(".")[-1] for name, _ in model.named_modules()}
    for usual in QUERY_AND_VALUE:
        if usual <= names:
            return sorted(usual)
    model_type = model.config.model_type
    if model_type in KNOWN_TARGETS:
        return None
    raise ValueError(
        f"which modules of model_type {model_type!r} LoRA should change is not known: "
        f"name them as `target_modules` of a config, `--method {PEFT[0]}PATH.json`"
    )


def _task_type(model: Any, is_classifier: bool) -> str | None:
    """Return PEFT's name of what the model does; it has names for text only."""
    if model.main_input_name != "input_ids":
        return None
    if is_classifier:
        return "SEQ_CLS"
    if getattr(model.config, "is_encoder_decoder", False):
        return "SEQ_2_SEQ_LM"
    is_causal = model.config.model_type in any_family.LANGUAGE_MODELS[any_family.CAUSAL]
    is_masked = model.config.model_type in any_family.LANGUAGE_MODELS[any_family.MASKED]
    return "CAUSAL_LM" if is_causal and not is_masked else None
