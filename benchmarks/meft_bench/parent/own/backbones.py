"""Backbones of the user: a directory of weights, or the file of a config.

dir:PATH            weights in transformers' layout, of any model type
random:FILE.json    random weights in the shape of a config, likewise
trained             any backbone, fully fine-tuned by the sweep before its cells
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from meft_bench.parent.own import digests
from meft_bench.shared import configs
from meft_bench.shared.own import Own
from meft_bench.shared.source import MissingError

PATTERNS = (
    *("config.json", "*.safetensors", "model.safetensors.index.json", "*.gguf"),
    *("tokenizer*", "vocab*", "merges.txt", "special_*", "spiece.model"),
)
"""Files of a directory that are read, and decide what it is."""
TRAINED = "trained:"
SET_HERE = {
    "method": "every weight is trained",
    "backbone": "it is that of `from`",
    "device": "it is that of the cells",
    "reference": "nothing is compared",
    "scored_on": "it is scored as usual",
    "depth": "cells choose their own",
}
"""Fields that the training of a backbone cannot name, with the reason."""


def find(text: str, folder: Path) -> Own | None:
    """Return a backbone of the user; None if the text does not name one.

    Args:
        text: what the sweep says.
        folder: where relative paths start.

    Raises:
        ValueError: there is no such directory or file, or it has no config.
    """
    kind, _, name = text.partition(":")
    if kind == "dir" and name:
        path = (folder / name).resolve()
        if not path.is_dir():
            raise ValueError(f"backbone {text!r}: no directory {name!r}")
        files = sorted({file for one in PATTERNS for file in path.glob(one)})
        content = digests.of_files(path, filter(Path.is_file, files))
        config = path / configs.FILE
    elif kind == "random" and name.endswith(".json"):
        path = config = (folder / name).resolve()
        if not path.is_file():
            return None  # which `fields` refuses, with the names of shapes
        content = digests.of_file(path)
    else:
        return None
    try:
        fields = configs.read(config, any_type=True)
    except (MissingError, ValueError) as error:
        raise ValueError(f"backbone {text!r}: {error}") from error
    return Own(
        value=digests.value(f"{kind}:", fields["model_type"], content),
        place=f"{kind}:{path}",
        model_type=fields["model_type"],
    )


def trained(base: str, train: Mapping[str, Any], own: Mapping[str, Own]) -> Own:
    """Return a backbone that the sweep trains before the cells that use it.

    Args:
        base: what it is trained from, as cells hold it.
        train: fields of the cell that trains it.
        own: things of the user, by what cells hold.

    Raises:
        ValueError: a field cannot be named here, or the task is missing.
    """
    if base.startswith(TRAINED):
        raise ValueError("`from` is trained by the sweep, too: name what it is from")
    for name, reason in SET_HERE.items():
        if name in train:
            raise ValueError(f"`train`: leave out `{name}`: {reason}")
    if "task" not in train:
        raise ValueError("`train`: no `task`; name what it is trained on")
    digest = digests.of_json({"from": base, "train": dict(train)})
    name = base.rpartition(":")[2]
    is_own = base in own
    name = name.rpartition("-")[0] if is_own else name
    return Own(
        value=digests.value(TRAINED, name, digest),
        place=own[base].place if is_own else base,
        model_type=own[base].model_type if is_own else "",
        training={"method": "full", "backbone": base, **train},
    )
