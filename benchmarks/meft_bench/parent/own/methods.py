"""Methods of the user: a config of PEFT, or a function.

peft:TYPE                  a type of PEFT with its usual values; no file
peft:FILE.json, peft:DIR   a config of PEFT, with training parameters in DIR
python:FILE.py:FUNCTION    `method(model, cell) -> model`
"""

import json
from pathlib import Path
from typing import Any

from meft_bench.parent.own import digests, peft_training, python_code
from meft_bench.shared.own import OF_THE_FILE, PEFT_CONFIG, PYTHON, Own
from meft_bench.shared.registry import PEFT

TRAINING = "training_params.json"
"""Name of training parameters next to a config of PEFT."""
REFUSED = {
    "ADALORA": "changes its ranks when it is told of every step, which no method is "
    "here, and would stay at the first ones",
    "XLORA": "mixes adapters that were trained before",
}
"""Types that would not do here what they do elsewhere, with the reason."""
NEEDS_DATA = ("eva", "corda", "lora_ga")
"""Ways to initialise LoRA that read data of the task first."""


def find(text: str, folder: Path) -> Own | None:
    """Return a method of the user; None if the text does not name one.

    Args:
        text: what the sweep says.
        folder: where relative paths start.

    Raises:
        ValueError: there is no such file or function, or it is not right.
    """
    if text.startswith(PYTHON):
        place, name, digest = python_code.find(text, folder, "method")
        return Own(value=digests.value(PYTHON, name, digest), place=place)
    if text.startswith(PEFT):
        return _peft(text, folder)
    return None


def _peft(text: str, folder: Path) -> Own:
    beginning, _, name = text.partition(":")
    path = (folder / name).resolve()
    settings: dict[str, Any] = {}
    if path.is_dir() and name:
        if (path / TRAINING).is_file():
            training = _object(path / TRAINING, text)
            settings = peft_training.settings(training, path / TRAINING)
    elif not name.endswith(".json"):
        if not name.replace("_", "").isalnum():
            raise ValueError(
                f"method {text!r} should be {beginning}:TYPE, such as {beginning}:ia3, "
                f"or {beginning}:FILE.json or {beginning}:DIR of an adapter's config"
            )
        whole = f"{beginning}:{name.lower()}"
        return Own(value=whole, place=whole)
    config = _config_in(path)
    fields = _object(config, text)
    kind = fields.get("peft_type")
    if not isinstance(kind, str):
        raise ValueError(
            f"method {text!r}: {config} is no config of PEFT: it names no `peft_type`"
        )
    content = {key: v for key, v in fields.items() if key not in OF_THE_FILE}
    if settings:  # two folders may differ in nothing else
        content = {"config": content, "training": settings}
    return Own(
        value=digests.value(f"{beginning}:", kind.lower(), digests.of_json(content)),
        place=f"{beginning}:{path}",
        settings=settings,
    )


def check_trains(one: Own, text: str) -> None:
    """Raise `ValueError` for a method that can be planned, but not trained here.

    Args:
        one: the method.
        text: what the sweep says.
    """
    if not one.place.startswith(PEFT):
        return
    name = one.place.partition(":")[2]
    fields = {"peft_type": name}
    if Path(name).is_absolute():
        fields = _object(_config_in(Path(name)), text)
    kind = fields["peft_type"].upper()
    if kind in REFUSED:
        raise ValueError(f"method {text!r}: {kind} {REFUSED[kind]}: take another type")
    if fields.get("init_lora_weights") in NEEDS_DATA:
        raise ValueError(
            f"method {text!r}: `init_lora_weights` = {fields['init_lora_weights']!r} "
            "reads data of the task before training, which no method does here: take "
            "true, or a function of your own, python:FILE.py:FUNCTION"
        )


def _config_in(path: Path) -> Path:
    return path / PEFT_CONFIG if path.is_dir() else path


def _object(path: Path, text: str) -> dict[str, Any]:
    """Return the JSON object in a file."""
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"method {text!r}: there is no file {str(path)!r}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"method {text!r}: {path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"method {text!r}: {path} is not a JSON object")
    return found
