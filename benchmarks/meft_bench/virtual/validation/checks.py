"""Run one program of this folder in the child process."""

import dataclasses
import sys
import time
import traceback
from typing import Any

import torch

from meft_bench.child.training.out_of_memory import is_out_of_memory
from meft_bench.shared.options import ChildOptions
from meft_bench.shared.published import PublishedFigure
from meft_bench.shared.record import Status
from meft_bench.shared.registry import CHECKS, load
from meft_bench.shared.source import MissingError
from meft_bench.virtual.device import gpu
from meft_bench.virtual.validation.place import CheckFigure, place


def run(request: dict[str, Any], options: ChildOptions) -> dict[str, Any]:
    """Run one check on one device.

    Args:
        request: `name`, one of `CHECKS` or the run of a published number, and `device`,
            `cuda` or a virtual GPU.
        options: options of the child.

    Returns:
        `status` and `message` as for a cell; `figures`, a list of JSON objects, all
        that were reported before the end; `seconds`; and the `device_name`.
    """
    torch.set_num_threads(options.num_threads)
    started = time.monotonic()
    found: list[CheckFigure | PublishedFigure] = []
    device_name, status, message = None, Status.OK, ""
    name, device = request["name"], request["device"]
    check = load(CHECKS[name.split("/")[0]])
    try:
        if "/" in name:  # a run that others measured; it enters its own virtual GPU
            device_name = gpu.find(gpu.name_in(device)).name
            for one in check(name, device):
                found.append(one)
        else:
            with place(device) as it:
                if it.virtual is not None:
                    device_name = it.virtual.gpu.name
                for figure in check(it):
                    found.append(figure)
                if it.virtual is None:
                    device_name = torch.cuda.get_device_name()
    except MissingError as error:
        status, message = Status.SKIPPED, str(error)
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        status = Status.OOM if is_out_of_memory(error) else Status.ERROR
        message = f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"
    return {
        "status": status,
        "message": message,
        "figures": [dataclasses.asdict(figure) for figure in found],
        "seconds": time.monotonic() - started,
        "device_name": device_name,
    }
