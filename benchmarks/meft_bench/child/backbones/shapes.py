"""Random weights in the shapes of `backbones.toml`.

Memory and speed depend on the shape only. The model is created on the cell's device and
in the dtype of its weights, so that a large model needs no memory on the host.
"""

from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from meft_bench.child.backbones import any_family
from meft_bench.child.backbones.classifier import (
    model_class,
    options,
    set_depth_of_config,
    set_up_config,
)
from meft_bench.child.backbones.files import read_config
from meft_bench.shared.backbones import TABLE
from meft_bench.shared.cell import Cell
from meft_bench.shared.registry import PLANNED_BACKBONES, RANDOM_BACKBONES, nearest


def build(
    config: PreTrainedConfig, cell: Cell, num_labels: int | None
) -> PreTrainedModel:
    """Make a model with random weights.

    Args:
        config: config of the model; changed in place.
        cell: the cell that the model is for.
        num_labels: number of classes of the head; None for a language model.
    """
    if not any_family.is_known(config):
        made: PreTrainedModel = any_family.make(config, cell, num_labels)
        return made
    set_up_config(config, cell, num_labels)
    if cell.depth:
        set_depth_of_config(config, cell.depth)
    with torch.device(cell.device):
        model: PreTrainedModel = model_class(config, num_labels).from_config(
            config, **options(cell)
        )
    return model


def find_config(name: str, *, any_type: bool = False) -> PreTrainedConfig:
    """Return the config that `random:NAME` denotes.

    Args:
        name: a named shape, or the path of a config.json.
        any_type: whether a config of a family that is not supported will do.

    Raises:
        MissingError, ValueError: there is none, or its family is not supported.
    """
    shapes = RANDOM_BACKBONES | (PLANNED_BACKBONES if any_type else {})
    if name in shapes:
        model_type = shapes[name]
        fields = TABLE[model_type].shapes[name]
        config: PreTrainedConfig = CONFIG_MAPPING[model_type](**fields)
        return config
    if not name.endswith(".json"):
        valid = [*shapes, "PATH/config.json"]
        raise ValueError(f"unknown shape in random:{name}; {nearest(name, valid)}")
    return read_config(Path(name), any_type=any_type)
