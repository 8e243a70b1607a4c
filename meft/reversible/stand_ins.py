"""What a loop in a `forward` receives in place of the blocks of a reversible stack.

The loop of a model passes the hidden states through its blocks one by one, and may give
each of them arguments of its own, such as the mask of a sliding window to some. A stack
runs all blocks as one. The loop therefore receives one `StandIn` per block, which
records the arguments and computes nothing. The last one runs the stack with all that
was recorded, and returns its output.

Until then the loop holds a `HiddenBetween` in place of the hidden states: it has their
shape, dtype and device, and no values. An operation on it raises an error, so a loop
that changes or reads hidden states between two blocks, or leaves out the last blocks,
cannot give a wrong result.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from meft.errors import UnsupportedCallError
from meft.shapes import Hidden


class BlockArguments(NamedTuple):
    """The arguments that a loop passes to one block, other than the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


Run = Callable[[Hidden, Sequence[BlockArguments]], Hidden]
"""Runs a stack: hidden states and the arguments of every block to hidden states."""
ExtraOutputs = Callable[
    [nn.Module, Hidden, BlockArguments], tuple[BlockArguments, tuple[Any, ...] | None]
]
"""Of a block, hidden states and its arguments: these arguments, and what it returns
in addition to the hidden states, None if it returns no tuple.
"""


class HiddenBetween(Tensor):
    """Hidden states between two blocks of a reversible stack, which have no values.

    Args:
        hidden: the input of the stack, whose shape, dtype and device it has.
        place: between which blocks of which model it is, for error messages.
    """

    _place: str

    @staticmethod
    def __new__(cls, hidden: Tensor, place: str) -> "HiddenBetween":
        """Create a tensor without memory."""
        between: HiddenBetween = Tensor._make_wrapper_subclass(
            cls, hidden.shape, dtype=hidden.dtype, device=hidden.device
        )
        between._place = place
        return between

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]  # without contents
        return f"HiddenBetween({self._place}, shape={tuple(self.shape)})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # a class method in use
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> NoReturn:
        """Raise an error: no operation can use hidden states between two blocks."""
        found = (a for a in (*args, *(kwargs or {}).values()) if isinstance(a, cls))
        place = getattr(next(found, None), "_place", "between two blocks")
        raise UnsupportedCallError(
            f"`{func.name()}` was called on the hidden states {place} of a reversible "
            "stack. They do not exist there: a stack runs all its blocks as one, with "
            "two streams in place of the hidden states. A loop over the blocks may "
            "only pass on what each block returns, through all of them"
        )


class StandIn:
    """Take the place of one block in a loop.

    Attributes are those of the block.

    Args:
        blocks: all blocks of the stack, lowest first.
        index: the block that it stands for.
        run: runs the stack.
        extra_outputs: what a block returns in addition to the hidden states.
        recorded: what the stand-ins of one loop share.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        index: int,
        run: Run,
        extra_outputs: ExtraOutputs,
        recorded: "_Recorded",
    ) -> None:
        vars(self).update(
            _blocks=blocks,
            _index=index,
            _run=run,
            _extra_outputs=extra_outputs,
            _recorded=recorded,
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_blocks"][self._index], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._blocks[self._index], name, value)

    def __repr__(self) -> str:
        return f"StandIn({self._blocks[self._index]!r})"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Record the arguments; the last stand-in runs the stack.

        Args:
            *args: the positional arguments of the block, hidden states first.
            **kwargs: its keyword arguments.

        Returns:
            Hidden states without values, or the output of the stack; in a tuple, if the
            block returns one.

        Raises:
            UnsupportedCallError: the loop leaves blocks out, runs them in another
                order, or changes the hidden states between them.
        """
        hidden, arguments = _separated(args, kwargs)
        context = _context(hidden)
        recorded, index, last = self._recorded, self._index, len(self._blocks) - 1
        if index == 0:
            recorded.start(hidden, context)
        else:
            recorded.refuse_other_context(context, index)
            recorded.refuse_other(hidden, index)
        arguments, rest = self._extra_outputs(self._blocks[index], hidden, arguments)
        recorded.arguments.append(arguments)
        del args, hidden  # the stack alone decides how long its input is kept
        if index < last:
            out = recorded.between(f"between blocks {index} and {index + 1}")
        else:
            out = self._run(*recorded.taken())
        return out if rest is None else (out, *rest)


class _Recorded:
    """What the stand-ins of one loop have been given."""

    def __init__(self) -> None:
        self.arguments: list[BlockArguments] = []
        self._hidden: Tensor | None = None
        self._returned: HiddenBetween | None = None
        self._context: tuple[Any, ...] = ()

    def start(self, hidden: Tensor, context: tuple[Any, ...]) -> None:
        """Begin with the hidden states that the first block was given."""
        self.arguments, self._hidden, self._returned = [], hidden, None
        self._context = context

    def refuse_other_context(self, context: tuple[Any, ...], index: int) -> None:
        """Refuse a block that is called in another context than the first one.

        Raises:
            UnsupportedCallError: it is another.
        """
        if context != self._context:
            raise UnsupportedCallError(
                f"block {index} of a reversible stack was called with gradients or "
                "autocast switched differently than for the first block. A stack runs "
                "all its blocks as one, in one context: to freeze some of them, set "
                "`requires_grad` of their parameters, or `span` in the config"
            )

    def between(self, place: str) -> HiddenBetween:
        """Return what the next block has to be given."""
        assert self._hidden is not None  # a loop has started
        between = HiddenBetween(self._hidden, place)
        self._returned = between
        return between

    def refuse_other(self, hidden: Tensor, index: int) -> None:
        """Refuse hidden states other than those that the block before returned.

        Raises:
            UnsupportedCallError: they are others.
        """
        if len(self.arguments) == index and hidden is self._returned:
            return
        given = f"block {index} of a reversible stack was given "
        given += (
            "hidden states that the block before it did not return"
            if len(self.arguments) == index
            else f"hidden states after {len(self.arguments)} blocks were called"
        )
        raise UnsupportedCallError(
            f"{given}. A stack runs all its blocks as one: a loop over them has to "
            "call each once, in order, and to pass on what it returns unchanged"
        )

    def taken(self) -> tuple[Hidden, list[BlockArguments]]:
        """Return the hidden states and all arguments, and forget them."""
        hidden, arguments = self._hidden, self.arguments
        assert hidden is not None  # a loop has started
        self.arguments, self._hidden, self._returned = [], None, None
        return hidden, arguments


def stand_ins(
    blocks: Sequence[nn.Module], run: Run, extra_outputs: ExtraOutputs
) -> list[StandIn]:
    """Return one stand-in per block, for one loop.

    Args:
        blocks: all blocks of a stack, lowest first.
        run: runs the stack.
        extra_outputs: what a block returns in addition to the hidden states.
    """
    recorded = _Recorded()
    indices = range(len(blocks))
    return [StandIn(blocks, index, run, extra_outputs, recorded) for index in indices]


def _separated(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, BlockArguments]:
    """Separate the hidden states from the other arguments of a block."""
    if args:
        return args[0], BlockArguments(args[1:], kwargs)
    rest = dict(kwargs)
    return rest.pop("hidden_states"), BlockArguments((), rest)


def _context(hidden: Tensor) -> tuple[Any, ...]:
    """Return what decides how operations on a tensor are computed and recorded."""
    kind = hidden.device.type
    autocast = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if autocast else None
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast, dtype
