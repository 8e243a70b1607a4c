"""What a virtual GPU cannot model, refused by name before the first wrong step.

Without these refusals some of it would run and be counted as something else: compiled
code as eager code, one process as several, 16-bit weights as quantised ones, a
recurrent layer as the steps into which torch decomposes it where there is no cuDNN.
"""

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from meft_bench.virtual.emulation.early_imports import everywhere

EAGER = "leave it out to plan the step in eager mode"
ONE_PROCESS = "leave it out to plan the step of one process without it"
WHOLE_WEIGHTS = (
    "load the weights in the dtype in which they are computed to plan that, or give "
    "`meft-bench plan` the model and `--weights-dtype nf4`"
)
SEVERAL = f"{ONE_PROCESS}, or give `ranks` to plan one of several"
EAGER_ATTENTION = "call `scaled_dot_product_attention` to plan the step with that"
OWN_STREAM = "make a `torch.cuda.Stream` instead"
ONE_POOL = "leave it out to plan the step with the default pool"
NO_LINE_SEARCH = "how many steps it takes is a matter of values; take another optimizer"
OTHER_LOSS = "its lengths are values; plan the step with another loss of the logits"
NOT_COMPILED = "take an optimizer that does not compile its step"
NOT_PAGED = "take the optimizer of the same name that is not paged"


@dataclass(frozen=True, slots=True)
class Refusal:
    """A function that is refused.

    Attributes:
        module: the module in which it is found.
        function: its name there, with that of its class.
        remedy: what to do.
    """

    module: str
    function: str
    remedy: str

    @property
    def name(self) -> str:
        """Its name for the reader, by which it is called."""
        name = f"{self.module}.{self.function}"
        return NAMES.get(name) or name.removesuffix(".__init__").removesuffix(
            ".__new__"
        )


NAMES = {
    "torch.nn.attention.flex_attention.flex_attention": "flex_attention",
    "bitsandbytes.functional.get_paged": "paged optimizers of bitsandbytes",
    "torchao.optim.adam._AdamBase.__init__": "optimizers of torchao",
    "transformers.quantizers.auto.AutoHfQuantizer.from_config": (
        "quantised weights of transformers"
    ),
}
"""Names of those that are not called by their own."""
REFUSALS = (
    Refusal("torch", "compile", EAGER),
    Refusal("torch.nn", "Module.compile", EAGER),
    Refusal("torch.nn.attention.flex_attention", "flex_attention", EAGER_ATTENTION),
    Refusal("torch.cuda", "CUDAGraph.__new__", EAGER),
    Refusal("torch.cuda", "graph.__init__", EAGER),
    Refusal("torch.cuda", "make_graphed_callables", EAGER),
    Refusal("torch.cuda", "graph_pool_handle", EAGER),
    Refusal("torch.cuda", "ExternalStream.__new__", OWN_STREAM),
    Refusal("torch.cuda", "MemPool.__new__", ONE_POOL),
    Refusal("torch.nn", "DataParallel.__init__", ONE_PROCESS),
    Refusal("torch.nn.parallel", "data_parallel", ONE_PROCESS),
    Refusal("torch.nn.parallel", "DistributedDataParallel.__init__", SEVERAL),
    Refusal("torch.distributed", "init_process_group", SEVERAL),
    Refusal("torch.distributed.fsdp", "fully_shard", SEVERAL),
    Refusal("torch.distributed.fsdp", "FullyShardedDataParallel.__init__", ONE_PROCESS),
    Refusal("torch.optim", "LBFGS.step", NO_LINE_SEARCH),
    Refusal("torch", "ctc_loss", OTHER_LOSS),
    Refusal("bitsandbytes.functional", "get_paged", NOT_PAGED),
    Refusal("bitsandbytes.nn", "Params4bit.__new__", WHOLE_WEIGHTS),
    Refusal("bitsandbytes.nn", "Int8Params.__new__", WHOLE_WEIGHTS),
    Refusal("torchao.quantization", "quantize_", WHOLE_WEIGHTS),
    Refusal("torchao.optim.adam", "_AdamBase.__init__", NOT_COMPILED),
    Refusal(
        "transformers.quantizers.auto", "AutoHfQuantizer.from_config", WHOLE_WEIGHTS
    ),
)


def by_name(
    num_ranks: int = 1,
) -> Iterator[contextlib.AbstractContextManager[Any]]:
    """Yield the patches that refuse what is not modelled.

    Args:
        num_ranks: number of ranks that train together; with several, process groups
            and FSDP2 are modelled (`ranks`).
    """
    # All are imported first, as some call at their import what is refused then.
    for one in [one for one in REFUSALS if _is_there(one.module)]:
        if num_ranks > 1 and one.remedy is SEVERAL:
            continue
        owner: Any = importlib.import_module(one.module)
        *classes, last = one.function.split(".")
        for name in classes:
            owner = getattr(owner, name)
        refusal = _refuses(one.name, one.remedy)
        if classes:
            yield mock.patch.object(owner, last, refusal)
        else:
            yield from everywhere(getattr(owner, last), last, refusal)
    # What was compiled before runs through the compiler as well.
    yield torch.compiler.set_stance("fail_on_recompile")
    # It would warn that this build has no cuDNN when a recurrent layer is moved.
    yield mock.patch.object(torch.backends.cudnn, "is_acceptable", _no)
    for layer in (nn.RNN, nn.LSTM, nn.GRU):
        yield mock.patch.object(layer, "forward", _without_cudnn(layer))


def _is_there(module: str) -> bool:
    """Return whether a module is installed and can be imported."""
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        return False
    try:
        importlib.import_module(module)
    except Exception:  # what an installation that is broken raises
        return False
    return True


def _refuses(name: str, remedy: str) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(
            f"`{name}` is not modelled by `virtual_gpu`: {remedy}"
        )

    return refuse


def _without_cudnn(layer: Any) -> Callable[..., Any]:
    """Refuse a recurrent layer that cuDNN would run, whose reserve space is unknown."""
    plain = layer.forward
    refuse = _refuses(
        f"torch.nn.{layer.__name__} of cuDNN",
        "set `torch.backends.cudnn.enabled = False` there and on the GPU to plan the "
        "kernels of PyTorch",
    )

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        weights: list[Tensor] = [*self.parameters()]
        if torch.backends.cudnn.enabled and any(one.is_cuda for one in weights):
            refuse()
        return plain(self, *args, **kwargs)

    return forward


def _no(tensor: Tensor) -> bool:
    return False
