"""Errors for operations that a virtual GPU does not support, for authors of models.

Fake tensors have shapes and no values. A single value that Python reads is made up
(`virtual_gpu`), but the number of rows that a mask selects cannot be; and the output of
an operator that torch does not know cannot be derived.
"""

import contextlib
import traceback
from collections.abc import Iterator

from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)

from meft_bench.shared.source import MissingError

NEEDS_VALUES = (
    "{what} needs values, and on a virtual GPU there are none: write it so that shapes "
    "do not depend on values (`torch.where` or a product with a mask, not an index by "
    "it), or run it on `cpu` or `cuda`"
)
IS_UNKNOWN = (
    "{what} does not tell what it makes of tensors without values: register that with "
    "`register_fake` of torch's module `library`, or run it on `cpu` or `cuda`"
)
NOT_MODELLED = "{what} is not modelled by a virtual GPU: {remedy}"
SAYINGS = {
    ".numpy() is not supported": ("`Tensor.numpy`", NEEDS_VALUES),
    "There was no fake impl registered for": ("an operator of your own", IS_UNKNOWN),
    "its data is not allocated yet": ("an operator that reads memory", IS_UNKNOWN),
    "with arguments from the 'CUDA' backend": (
        "an operator on `cuda` where no virtual GPU is, as in another thread,",
        NOT_MODELLED.replace("{remedy}", "run it in the thread of the context"),
    ),
    "torch.compile stance is 'fail_on_recompile'": (
        "a function that was compiled before,",
        NOT_MODELLED.replace("{remedy}", "leave `torch.compile` out"),
    ),
    "Couldn't swap RecursiveScriptModule": (
        "a move of a module of `torch.jit.script`",
        NOT_MODELLED.replace("{remedy}", "plan the module that was scripted"),
    ),
    "Cannot get CUDA generator": (
        "`Generator` as it was imported before",
        NOT_MODELLED.replace("{remedy}", "write `torch.Generator`"),
    ),
    "Storage device not recognized": (
        "a storage that is made on `cuda`",
        NOT_MODELLED.replace("{remedy}", "make a tensor, and take its storage"),
    ),
    "Callable map_location not supported": (
        "a function as `map_location`",
        NOT_MODELLED.replace("{remedy}", "give the name of a device"),
    ),
    "shape_env must not be None": (
        "a nested tensor with the layout `torch.jagged`",
        NOT_MODELLED.replace("{remedy}", "pad its rows"),
    ),
    "NVTX profiler": (
        "`emit_nvtx`",
        NOT_MODELLED.replace("{remedy}", "leave it out"),
    ),
}
"""Beginnings or parts of torch's other error messages."""


@contextlib.contextmanager
def error_translation() -> Iterator[None]:
    """Translate errors of fake tensors; all code on a virtual GPU runs in this context.

    Raises:
        MissingError: an operator needs values; the message names it and its module.
    """
    try:
        yield
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        what = f"operator `{error.func}`{_place(error)}"
        raise MissingError(NEEDS_VALUES.format(what=what)) from error
    except UnsupportedOperatorException as error:
        what = f"operator `{error.func}`{_place(error)}"
        raise MissingError(IS_UNKNOWN.format(what=what)) from error
    except (RuntimeError, AssertionError) as error:
        first = str(error).partition("\n")[0]
        for saying, (what, sentence) in SAYINGS.items():
            if saying in first:
                text = sentence.format(what=f"{what}{_place(error)}")
                raise MissingError(f"{text} ({first})") from error
        raise


def _place(error: BaseException) -> str:
    """Return ` of NAME`, the module whose forward raised the error; "" without one."""
    called = [
        frame.f_locals["self"]
        for frame, _ in traceback.walk_tb(error.__traceback__)
        if isinstance(frame.f_locals.get("self"), nn.Module)
    ]
    if not called:
        return ""
    names = {id(module): name for name, module in called[0].named_modules()}
    kind = type(called[-1]).__name__
    return f" of {names.get(id(called[-1])) or 'the model'} ({kind})"
