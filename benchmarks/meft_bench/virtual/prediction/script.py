"""Plan a function of a file of the user, for the option `--script` of `plan`."""

import dataclasses
import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from meft_bench.shared.registry import nearest
from meft_bench.shared.source import MissingError
from meft_bench.virtual.device import gpu as gpus
from meft_bench.virtual.prediction import progress
from meft_bench.virtual.prediction.fit import largest_that_fits
from meft_bench.virtual.prediction.plan import MemoryPlan
from meft_bench.virtual.prediction.training_code import need_of, virtual_gpu

HINT = "; on a virtual GPU a number that is read is 0, and a condition holds"


def plan_script(request: dict[str, Any]) -> dict[str, Any]:
    """Return the plan of a function as a JSON object.

    Args:
        request: `script`, with `file`, `function`, `gpu`, `padding` and `ranks`;
            `at_most`, the upper bound of the batch size, or None to call the function
            without one; `margin` and `timeline`, as for cells.

    Returns:
        The plan; with `at_most`, that of the `largest` batch size that fits.
    """
    script = request["script"]
    path, name = Path(script["file"]), script["function"]
    try:
        if request["at_most"] is None:
            try:  # code may catch an out-of-memory error and go on
                return _plan((), request, enforce_memory=True).to_json()
            except torch.OutOfMemoryError:
                return _plan((), request, enforce_memory=False).to_json()
        return _largest(request)
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        if not isinstance(error, SystemExit | MissingError):
            traceback.print_exc()
        refused = MemoryPlan(
            method=name, verdict="unknown", message=_words(error, path)
        )
        extra = {} if request["at_most"] is None else {"largest": 0}
        return refused.to_json() | extra


def _plan(
    given: tuple[int, ...], request: dict[str, Any], *, enforce_memory: bool
) -> MemoryPlan:
    script = request["script"]
    path, name = Path(script["file"]), script["function"]
    wants = {
        "padding": script["padding"],
        "ranks": script["ranks"],
        "margin": request["margin"],
        "enforce_memory": enforce_memory,
    }
    with virtual_gpu(script["gpu"], **wants) as memory:
        # Imported inside, as files choose a device at their top.
        function = _function(path, name)
        _check_parameters(function, path, name, given)
        try:
            function(*given)
        except SystemExit as end:
            if end.code:
                raise
    found = memory.plan(timeline=request["timeline"])
    return dataclasses.replace(found, method=name)


def _largest(request: dict[str, Any]) -> dict[str, Any]:
    plans: dict[int, MemoryPlan] = {}
    refusals: dict[int, str] = {}
    path = Path(request["script"]["file"])
    memory_bytes = gpus.find(request["script"]["gpu"]).memory_bytes
    room = (1 - request["margin"]) * memory_bytes

    def needed(batch_size: int) -> float:
        try:
            plans[batch_size] = _plan((batch_size,), request, enforce_memory=False)
        except Exception as error:
            if batch_size == 1:
                raise
            refusals[batch_size] = _words(error, path)
            return math.inf
        size = need_of(plans[batch_size])
        progress.tell(plans[batch_size].method, "batch", batch_size, size, room)
        return size

    found = largest_that_fits(needed, room, request["at_most"])
    beyond = plans.get(found.largest + 1)
    return plans[max(found.largest, 1)].to_json() | {
        "beyond_bytes": None if beyond is None else beyond.needed_bytes,
        "maximized": "batch_size",
        "largest": found.largest,
        "at_most": request["at_most"],
        "num_probes": len(found.probes),
        "beyond_message": refusals.get(found.largest + 1, ""),
    }


def _function(path: Path, name: str) -> Callable[..., object]:
    """Import the file as a module, and return its function.

    Raises:
        AttributeError: it has no such function.
    """
    sys.path.insert(0, str(path.parent))  # as Python does for a script
    sys.argv = [str(path)]
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise MissingError(f"{path.name} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # anew for each call
    spec.loader.exec_module(module)
    found = getattr(module, name, None)
    if not callable(found):
        functions = [n for n, it in vars(module).items() if inspect.isfunction(it)]
        raise MissingError(
            f"{path.name} has no function {name!r}; {nearest(name, functions)}"
        )
    return found  # type: ignore[no-any-return]


def _check_parameters(
    function: Callable[..., object], path: Path, name: str, given: tuple[int, ...]
) -> None:
    """Raise `MissingError` unless the function can be called with what is given."""
    if inspect.isgeneratorfunction(function) or inspect.iscoroutinefunction(function):
        raise MissingError(
            f"{path.name}: {name} is a generator or a coroutine, of which a call runs "
            "nothing; name a function that runs it"
        )
    try:
        inspect.signature(function).bind(*given)
    except ValueError:  # a callable without a signature
        return
    except TypeError:
        call = f"{name}({'batch_size' if given else ''})"
        needs = "one parameter, the batch size" if given else "no parameter to fill"
        raise MissingError(
            f"{path.name}: the function is called as {call}; give it {needs}"
        ) from None


def _words(error: BaseException, path: Path) -> str:
    """Return an error in one line, with the line of the user's file it came from."""
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename == str(path)
    ]
    place = f" ({path.name}, line {lines[-1]})" if lines else ""
    text = " ".join(str(error).split())
    if isinstance(error, MissingError):
        return f"{text}{place}"
    # A check of the user's may fail as there are no values.
    hint = HINT if isinstance(error, AssertionError | RuntimeError | ValueError) else ""
    return f"{type(error).__name__}: {text}{place}{hint}"
