"""Backbones of the user: a directory of weights, or the file of a config.

dir:PATH            weights in transformers' layout, of any model type
random:FILE.json    random weights in the shape of a config, likewise
"""

from pathlib import Path

from meft_bench.parent.own import digests
from meft_bench.shared import configs
from meft_bench.shared.own import Own
from meft_bench.shared.source import MissingError

PATTERNS = (
    *("config.json", "*.safetensors", "model.safetensors.index.json", "*.gguf"),
    *("tokenizer*", "vocab*", "merges.txt", "special_*", "spiece.model"),
)
"""Files of a directory that are read, and decide what it is."""


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
