"""Prepare any model of transformers for a plan, from its config alone.

For models whose family the library does not know, and for the methods of PEFT: the
class of the model is that of its config, the method is full fine-tuning, LoRA, or a
config of PEFT, each with or without gradient checkpointing, and inputs are what the
model reads: tokens, images or audio features.
"""

import contextlib
import dataclasses
import inspect
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto

import meft
from meft_bench.child.backbones.classifier import WEIGHTS_DTYPES, num_positions, options
from meft_bench.child.tasks.batches import Batch
from meft_bench.child.training import execution
from meft_bench.child.training.steps import Stepper, base_of
from meft_bench.shared import backbones, protocol
from meft_bench.shared.cell import Cell
from meft_bench.shared.registry import METHODS_OF_ANY_MODEL, PEFT
from meft_bench.shared.source import MissingError
from meft_bench.virtual.device import gpu
from meft_bench.virtual.device.allocator import settings_in_words
from meft_bench.virtual.emulation import assumed_selection, ordinary_code
from meft_bench.virtual.emulation.virtual_gpu import VirtualGpu
from meft_bench.virtual.prediction.predict import Ready, recorded, refuse_without_host

LANGUAGE_MODELS: dict[str, Mapping[str, object]] = {
    "AutoModelForSpeechSeq2Seq": (
        modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES
    ),
    "AutoModelForSeq2SeqLM": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForMaskedLM": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
}
"""Factories of language models, with the types they can make; the first one is taken.
"""
CLASSIFIERS: dict[str, Mapping[str, object]] = {
    "AutoModelForSequenceClassification": (
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    ),
    "AutoModelForImageClassification": (
        modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
    ),
}
"""Factories of classifiers, likewise."""
MASKED = "AutoModelForMaskedLM"
GENERATES = LANGUAGE_MODELS["AutoModelForSeq2SeqLM"]
KNOWN_LANGUAGE_MODELS = backbones.types_of("causal-lm", "seq2seq-lm")
NUM_LABELS = 2
HEADS = ("classifier", "score")
"""Names of the heads of classifiers, which are trained next to adapters."""
KNOWN_TARGETS = peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
QUERY_AND_VALUE = (
    {"q_proj", "v_proj"},
    {"query", "value"},
    {"query_proj", "value_proj"},
    {"qkv_proj"},
    {"Wqkv"},
)
"""Names of the projections that LoRA changes."""
IMAGE_SIZE = 224
"""Side of the images of a model whose config names none."""
FRAMES_OF_A_POSITION = 2
"""Number of frames of audio that become one position of an encoder."""


@contextlib.contextmanager
def ready(cell: Cell, config: PreTrainedConfig) -> Iterator[Ready]:
    """Make a model on its virtual GPU, which exists while the context is active.

    Args:
        cell: the cell to plan; its method is one of
            `METHODS_OF_ANY_MODEL` or of PEFT.
        config: config of the model.

    Raises:
        MissingError: PEFT or an operator that needs values is missing.
        ValueError: the model, the method or the shape are incompatible.
    """
    if not cell.method.startswith(PEFT) and cell.method not in METHODS_OF_ANY_MODEL:
        raise ValueError(
            f"method {cell.method!r} needs a family that sweeps know, and "
            f"{cell.backbone} is of model_type {config.model_type!r}: take "
            f"{', '.join(METHODS_OF_ANY_MODEL)} or {PEFT[0]}CONFIG"
        )
    _check_length(config, cell)
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
            recorded(device, on_it, lambda: build(config, on_it), lambda model: model)
        )
        ledger.watch_all()
        model = _with_method(model, on_it)
        stepper = Stepper(model, on_it)
        words = [device.backend.how, device.gpu.basis]
        words += [note] if (note := settings_in_words()) else []
        words += of_weights
        words.append(_description(model))
        yield Ready(
            cell=on_it,
            device=device,
            ledger=ledger,
            stepper=stepper,
            num_blocks=0,
            batches_of=lambda length: _batches(
                config, model, dataclasses.replace(on_it, seq_len=length)
            ),
            how="; ".join(words),
            origins={},
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


def _factory(config: PreTrainedConfig, cell: Cell) -> Any:
    """Return the factory of the model of a config, for the head that a task wants."""
    tables = CLASSIFIERS if cell.task == "synthetic" else LANGUAGE_MODELS
    for name, types in tables.items():
        if config.model_type in types:
            return getattr(transformers, name)
    known = [*CLASSIFIERS.values(), *LANGUAGE_MODELS.values()]
    if not any(config.model_type in types for types in known):
        raise ValueError(
            f"transformers has neither a classifier nor a language model of model_type "
            f"{config.model_type!r}: plan it as code of your own, with `--script`"
        )
    head = "classifier" if cell.task == "synthetic" else "language model"
    other = "synthetic-lm" if cell.task == "synthetic" else "synthetic"
    raise ValueError(
        f"transformers has no {head} of model_type {config.model_type!r}: "
        f"`--set task={other}` plans another head"
    )


def task_of(model_type: str) -> str:
    """Return the task of the head that models of a type are usually fine-tuned with.

    It is that of a language model, but for encoders, whose language model is masked.
    """
    if model_type in backbones.TABLE and backbones.TABLE[model_type].models:
        return "synthetic-lm" if model_type in KNOWN_LANGUAGE_MODELS else "synthetic"
    usual = [types for name, types in LANGUAGE_MODELS.items() if name != MASKED]
    is_usual = any(model_type in types for types in usual)
    is_encoder = model_type in LANGUAGE_MODELS[MASKED] and model_type not in GENERATES
    return "synthetic-lm" if is_usual and not is_encoder else "synthetic"


def _check_length(config: PreTrainedConfig, cell: Cell) -> None:
    longest = num_positions(config)
    if longest is not None and longest < cell.seq_len:
        raise ValueError(
            f"`seq_len` is {cell.seq_len}, but {cell.backbone} has positions for "
            f"{longest} tokens: lower it to at most {longest}"
        )


def build(config: PreTrainedConfig, cell: Cell) -> Any:
    """Make a model with random weights on the cell's device.

    Args:
        config: config of the model; changed in place.
        cell: its task decides the head.

    Raises:
        ValueError: transformers has no such head for the model.
    """
    factory = _factory(config, cell)
    if cell.depth:
        _set_depth(config, cell.depth)
    if cell.task == "synthetic":
        config.num_labels = NUM_LABELS
        config.problem_type = "single_label_classification"
    text = config.get_text_config()
    for name in ("pad_token_id", "decoder_start_token_id"):
        if getattr(text, name, None) is None:
            setattr(text, name, 0)
    wants: dict[str, Any] = {"trust_remote_code": False, **options(cell)}
    config.architectures = config.architectures or []  # read where there are several
    kinds = factory._model_mapping[type(config)]
    kind = kinds[0] if isinstance(kinds, tuple | list) else kinds
    if not kind._supports_sdpa and wants["attn_implementation"] == "sdpa":
        wants["attn_implementation"] = "eager"
    try:
        with torch.device(cell.device):
            return factory.from_config(config, **wants)
    except (LookupError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        hint = "; leave out `--depth`" if cell.depth else ""
        raise ValueError(
            f"transformers cannot make a model of this config: {reason}{hint}"
        ) from error


def _with_method(model: Any, cell: Cell) -> Any:
    """Apply the method of a cell to a model, and move it to the cell's device."""
    if _is_checkpointed(cell):
        model.config.use_cache = False  # as transformers does by itself
    if cell.method.startswith(PEFT) or cell.method.startswith("lora"):
        model = _with_peft(model, cell)
    if _is_checkpointed(cell):
        _checkpoint(model, offload=cell.method.endswith("-offload"))
    if cell.loss_chunk_tokens:
        meft.chunk_loss(base_of(model), cell.loss_chunk_tokens)
    return model.to(cell.device)


def _set_depth(config: PreTrainedConfig, depth: int) -> None:
    """Change the number of layers, and cut or repeat the list of their kinds."""
    if not hasattr(config, "num_hidden_layers") or hasattr(config, "depths"):
        raise ValueError(
            f"the depth of model_type {config.model_type!r} is not one number: leave "
            "out `--depth`, and change its config.json"
        )
    try:
        config.num_hidden_layers = depth
        kinds = getattr(config, "layer_types", None)
        if kinds:
            config.layer_types = (list(kinds) * depth)[:depth]
    except AttributeError as error:
        raise ValueError(
            f"`--depth` cannot change the config of model_type {config.model_type!r}: "
            f"{error}; change its config.json"
        ) from error
    for name in ("decoder_layers", "num_decoder_layers"):
        if getattr(config, name, None) is not None:
            setattr(config, name, depth)


def _with_peft(model: Any, cell: Cell) -> Any:
    """Return the model with adapters of PEFT, in float32 as PEFT makes them.

    Raises:
        ValueError: PEFT refuses the config for this model; the message states why.
    """
    fields: dict[str, Any] = {
        "peft_type": "LORA",
        "r": cell.lora_rank,
        "lora_alpha": protocol.LORA_ALPHA_PER_RANK * cell.lora_rank,
    }
    if cell.method.startswith(PEFT):
        fields = read_peft(cell.method)
        if cell.is_quantised and fields["peft_type"].upper() != "LORA":
            raise ValueError(
                f"`weights_dtype` = {cell.weights_dtype!r} with {cell.method!r}: of "
                "PEFT's layers for quantised weights, those of LoRA are modelled: take "
                f"a config of LoRA, or {cell.dtype!r}"
            )
    elif targets := _query_and_value(model):
        fields["target_modules"] = targets
    fields.setdefault("task_type", _task_type(model, cell))
    if cell.task == "synthetic" and fields["task_type"] is None:
        heads = [name for name in HEADS if hasattr(model, name)]
        fields.setdefault("modules_to_save", heads)
    for name in ("peft_version", "auto_mapping", "base_model_name_or_path", "revision"):
        fields.pop(name, None)
    try:
        config = peft.get_peft_config({**fields, "inference_mode": False})
        return peft.get_peft_model(model, config)
    except (ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        reason = " ".join(str(error).split())
        reason = f"{type(error).__name__}: {reason}"
        raise ValueError(
            f"PEFT refuses {cell.method!r} for this model: {reason}"
        ) from error


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


def _task_type(model: Any, cell: Cell) -> str | None:
    """Return PEFT's name of what the model does; it has names for text only."""
    if model.main_input_name != "input_ids":
        return None
    if cell.task == "synthetic":
        return "SEQ_CLS"
    if getattr(model.config, "is_encoder_decoder", False):
        return "SEQ_2_SEQ_LM"
    is_causal = model.config.model_type in LANGUAGE_MODELS["AutoModelForCausalLM"]
    is_masked = model.config.model_type in LANGUAGE_MODELS[MASKED]
    return "CAUSAL_LM" if is_causal and not is_masked else None


def read_peft(method: str) -> dict[str, Any]:
    """Return the fields of a method `peft:TYPE` or `peft:PATH.json`.

    Raises:
        MissingError: there is no such file.
        ValueError: it is not a JSON object with a `peft_type`.
    """
    name = method.partition(":")[2]
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


def _is_checkpointed(cell: Cell) -> bool:
    kind = cell.method.partition(":")[0]
    return kind.removesuffix("-offload").endswith("checkpointing")


def _checkpoint(model: Any, *, offload: bool) -> None:
    base = base_of(model)
    if not base.supports_gradient_checkpointing:
        raise ValueError(
            f"{type(base).__name__} of transformers does not support gradient "
            "checkpointing"
        )
    # The first name is that of transformers 5.23 and later.
    name = "activation_checkpointing_enable"
    if not hasattr(base, name):
        name = "gradient_checkpointing_enable"
    getattr(base, name)({"use_reentrant": False})
    if offload:
        # As `offload=True` does from transformers 5.24 on.
        base._set_gradient_checkpointing(
            enable=True, gradient_checkpointing_func=_checkpoint_on_host
        )
    if model is not base:
        base.enable_input_require_grads()


def _checkpoint_on_host(function: Any, *args: Any, **kwargs: Any) -> Any:
    with save_on_cpu(pin_memory=True):
        return checkpoint(function, *args, use_reentrant=False, **kwargs)


def _batches(config: PreTrainedConfig, model: Any, cell: Cell) -> list[Batch]:
    return [_batch(config, model, cell) for _ in range(cell.accumulation)]


def _batch(config: PreTrainedConfig, model: Any, cell: Cell) -> Batch:
    """Return what the model reads, of one micro-batch, with arbitrary contents."""
    base = base_of(model)
    rows = cell.batch_size
    tokens = torch.zeros((rows, cell.seq_len), dtype=torch.long)
    dtype = WEIGHTS_DTYPES[cell.unquantised_dtype]
    labels = tokens[:, 0].clone() if cell.task == "synthetic" else tokens.clone()
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
