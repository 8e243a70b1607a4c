"""What identifies the backbone that saved adapters belong to.

It is the class of the model, the fields of its config that define its function, and the
digests of all values that are not saved.
"""

import json
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from meft.checkpoint.config_file import SavedConfig
from meft.checkpoint.digests import DIGEST_DTYPES, digests
from meft.checkpoint.files import CONFIG
from meft.checkpoint.trained import persistent_buffers
from meft.errors import AdapterFileError
from meft.trainable import has_peft_layers

_NO_PART_OF_THE_FUNCTION = {
    *("_name_or_path", "architectures", "auto_map", "tokenizer_class"),
    *("transformers_version", "dtype", "torch_dtype", "quantization_config"),
    *("id2label", "label2id", "num_labels", "problem_type"),
    *("finetuning_task", "task_specific_params", "prefix"),
    *("sep_token_id", "return_dict", "chunk_size_feed_forward"),
    *("initializer_range", "initializer_factor", "init_std"),
    *vars(GenerationConfig()),  # `use_cache` and `eos_token_id`, for example
}
"""Fields of transformers' configs that may differ; those of dropout may differ too."""


def backbone_fields(model: nn.Module, trained: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the entries of the config file that identify the backbone.

    Args:
        model: a converted model.
        trained: the tensors that are saved, by name.
    """
    frozen = _frozen(model, trained)
    return {
        "model_class": type(model).__name__,
        "backbone": _function(model),
        "frozen_dtype": _dtype_of(frozen),
        "frozen_sha256": {
            name: digests(frozen, dtype) for name, dtype in DIGEST_DTYPES.items()
        },
    }


def refuse_other_backbone(
    model: nn.Module,
    config: SavedConfig,
    trained: dict[str, Tensor],
    directory: Path,
) -> None:
    """Refuse adapters that were trained on another backbone.

    Args:
        model: the model to load into.
        config: the contents of the config file.
        trained: the saved tensors.
        directory: the directory that they were read from.

    Raises:
        AdapterFileError: the class, the function or a frozen value differs.
    """
    saved, given = config.backbone, _function(model)
    pairs = [("model class", config.model_class, type(model).__name__)]
    # Another version of transformers may have other fields.
    common = [name for name in given if name in saved]
    if given and not common:
        raise AdapterFileError(
            f"{directory / CONFIG} is damaged, restore it or save the adapters again: "
            f"`backbone` must contain fields of the config of a {config.model_class}, "
            f"got {reprlib.repr(saved)}"
        )
    pairs += [(name, saved[name], given[name]) for name in common]
    wrong = [
        f"{name} {want!r}, got {got!r}" for name, want, got in pairs if want != got
    ]
    if wrong:
        # A PeftModel has its own names and layers.
        peft = config.model_class.startswith("Peft") and not has_peft_layers(model)
        advice = ". Load `PeftModel.from_pretrained(model, directory)` first"
        raise AdapterFileError(
            f"{directory} belongs to another backbone: expected {'; '.join(wrong)}"
            f"{advice if peft else ''}"
        )
    _refuse_other_weights(_frozen(model, trained), config, directory)


def _refuse_other_weights(
    frozen: Mapping[str, Tensor], config: SavedConfig, directory: Path
) -> None:
    expected = config.frozen_sha256
    unequal = dict(frozen)
    saved, given = config.frozen_dtype, _dtype_of(frozen)
    names_of = ["exact"] if given == saved else ["bfloat16", "float16"]
    for name in names_of:
        dtype = DIGEST_DTYPES[name]
        found = digests(unequal, dtype)
        unequal = {
            n: unequal[n] for n, d in found.items() if d != expected[name].get(n)
        }
    names = [*unequal, *(expected["bfloat16"].keys() - frozen.keys())]
    if not names:
        return
    more = f" and {len(names) - 1} more differ" if len(names) > 1 else " differs"
    dtypes = (
        f", in {saved}: this model's weights are in {given}, and values that were "
        "rounded to one dtype cannot be compared with those rounded to another"
    )
    raise AdapterFileError(
        f"{directory} belongs to other frozen weights: {names[0]!r}{more}. Load the "
        "checkpoint that the adapters were trained on"
        f"{dtypes if given != saved else ''}"
    )


def _function(model: nn.Module) -> dict[str, Any]:
    """Return config fields that define the function of transformers' models inside."""
    found: dict[str, PreTrainedModel] = {}
    for name, module in model.named_modules():
        inside = any(f"{name}.".startswith(f"{outer}.") or not outer for outer in found)
        if isinstance(module, PreTrainedModel) and not inside:
            found[name] = module
    return {
        f"{name}.{field}" if len(found) > 1 else field: value
        for name, module in found.items()
        for field, value in _fields(module.config.to_dict()).items()
    }


def _fields(config: dict[str, Any]) -> dict[str, Any]:
    kept = {
        name: _fields(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if name not in _NO_PART_OF_THE_FUNCTION and "drop" not in str(name)
    }
    as_read: dict[str, Any] = json.loads(json.dumps(kept, default=str))
    return as_read


def _frozen(model: nn.Module, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return every parameter and persistent buffer that is not saved."""
    found: dict[str, Tensor] = dict(model.named_parameters())
    for name, module in model.named_modules():
        found |= persistent_buffers(name, module)
    return {name: tensor for name, tensor in found.items() if name not in trained}


def _dtype_of(tensors: Mapping[str, Tensor]) -> str:
    found = {str(t.dtype) for t in tensors.values() if t.is_floating_point()}
    return ", ".join(sorted(found))
