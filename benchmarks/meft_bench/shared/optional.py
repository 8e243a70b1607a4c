"""Libraries that only some methods and optimizers need, imported at their use."""

import importlib
import importlib.util
from typing import Any

from meft_bench.shared.source import MissingError


def library(module: str, package: str, needed_by: str) -> Any:
    """Import and return a library.

    Args:
        module: the module to import, `torchao.optim`.
        package: the distribution that has it, as `pip install` takes it.
        needed_by: what needs it, for the message: `method 'galore'`.

    Raises:
        MissingError: it, or a library that it imports, is not installed; the message
            has the command that installs it.
    """
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        raise MissingError(
            f"{needed_by} needs {package}, which is not installed: pip install "
            f"{package}"
        )
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingError(
            f"{needed_by} needs {package}, which cannot be imported: {error}; pip "
            f"install {error.name or package}"
        ) from error
