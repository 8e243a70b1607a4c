"""A trained model as a folder that `files` reads like any other `dir:PATH`."""

import json
import shutil
from pathlib import Path

from meft_bench.child.backbones import files
from meft_bench.child.backbones.files import PREPROCESSOR
from meft_bench.child.backbones.names import Backbone
from meft_bench.shared.own import DIGEST_OF_WEIGHTS


def save(backbone: Backbone, folder: Path) -> None:
    """Write model, tokenizer and the form of images to a folder, or nothing.

    An existing folder is replaced once the new one is complete.

    Args:
        backbone: what was trained.
        folder: where it goes.
    """
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    backbone.model.save_pretrained(unfinished)
    if backbone.tokenizer is not None:
        backbone.tokenizer.save_pretrained(unfinished)
    form = backbone.pixel_form
    if form is not None:
        numbers = {"image_mean": list(form.mean), "image_std": list(form.std)}
        (unfinished / PREPROCESSOR).write_text(json.dumps(numbers))
    digest = files.find(unfinished, "").sha256()
    (unfinished / DIGEST_OF_WEIGHTS).write_text(f"{digest}\n", encoding="ascii")
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.replace(folder)
