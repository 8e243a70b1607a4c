"""Workspaces that cuBLAS and cuBLASLt keep, once for each thread.

The figures are the bytes allocated beyond the tensors of the program, after each kind
of product in sequence. `workspaces` runs with the harness's `CUBLAS_WORKSPACE_CONFIG`,
`workspaces-default` with torch's defaults.
"""

import os
from collections.abc import Iterator

import torch
from torch.nn import functional

from meft_bench.virtual.validation.place import CheckFigure, Place

SIDE = 1024


def figures(place: Place) -> Iterator[CheckFigure]:
    """Yield the workspaces after products of each kind."""
    with place.fresh():
        tensors = [torch.zeros(SIDE, SIDE, device=place.device)]
        tensors.append(torch.zeros(SIDE, SIDE, device=place.device))
        tensors.append(torch.zeros(SIDE, device=place.device))
        weight = torch.nn.Parameter(tensors[1].bfloat16())
        rows, bias = tensors[0].bfloat16(), tensors[2].bfloat16()
        own = (*tensors, weight, rows, bias)
        num_bytes = sum(t.numel() * t.element_size() for t in own)

        def figure(case: str) -> CheckFigure:
            beyond = int(torch.cuda.memory_allocated()) - num_bytes
            return CheckFigure(case=case, quantity="workspace_bytes", value=beyond)

        yield figure("nothing multiplied")
        tensors[0] @ tensors[1]
        yield figure("+ float32 product")
        with torch.no_grad():
            rows @ weight
            yield figure("+ bfloat16 product")
            functional.linear(rows, weight, bias)
        yield figure("+ bfloat16 linear with bias")
        functional.gelu(functional.linear(rows, weight, bias)).sum().backward()
        weight.grad = None
        yield figure("+ its backward, in autograd's thread")
        with torch.autocast("cuda", torch.bfloat16):
            functional.linear(tensors[0], weight).sum().backward()
        weight.grad = None
        yield figure("+ under autocast")
        torch.bmm(rows.view(4, 256, SIDE), rows.view(4, SIDE, 256))
        yield figure("+ batched product")


def default_figures(place: Place) -> Iterator[CheckFigure]:
    """Yield the same with torch's default configuration."""
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)  # read at the first product
    yield from figures(place)
