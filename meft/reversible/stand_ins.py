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
from torch.utils._pytree import tree_leaves, tree_map

from meft.backbone.block_call import first_name
from meft.backbone.proof import plain_class
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


class NotComputed(Tensor):
    """What a block returns besides hidden states, which has no values and no shape.

    Args:
        place: what it is, for error messages.
    """

    _place: str

    @staticmethod
    def __new__(cls, place: str) -> "NotComputed":
        """Create a tensor without memory."""
        created: NotComputed = Tensor._make_wrapper_subclass(cls, ())
        created._place = place
        return created

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]  # without contents
        return f"NotComputed({self._place})"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> NoReturn:
        """Raise an error: no operation or attribute can use it."""
        found = (a for a in (*args, *(kwargs or {}).values()) if isinstance(a, cls))
        place = vars(next(found)).get("_place") if args else "another output"
        raise UnsupportedCallError(
            f"{place} was used ({getattr(func, '__name__', func)}), by the loop or by "
            "the next block, and a reversible stack does not compute it: it runs all "
            "its blocks as one, and returns hidden states alone"
        )

    __torch_dispatch__ = __torch_function__  # type: ignore[assignment]  # as torch asks


class HiddenBetween(Tensor):
    """Hidden states between two blocks of a reversible stack, which have no values.

    Args:
        loop: what the loop has passed so far.
        place: between which blocks of which model it is, for error messages.
    """

    loop: "_Loop"
    position: int
    """Number of blocks that the loop had called when it was returned."""
    _place: str

    @staticmethod
    def __new__(cls, loop: "_Loop", place: str) -> "HiddenBetween":
        """Create a tensor without memory."""
        hidden = loop.hidden
        between: HiddenBetween = Tensor._make_wrapper_subclass(
            cls, hidden.shape, dtype=hidden.dtype, device=hidden.device
        )
        between.loop, between.position = loop, len(loop.arguments)
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


class _Loop:
    """What one loop has passed to the blocks that it has called so far.

    Args:
        hidden: what it passed to the first block, `batch seq hidden`.
        run: runs the stack.
    """

    def __init__(self, hidden: Hidden, run: Run) -> None:
        self.arguments: list[BlockArguments] = []
        self._versions: list[tuple[Tensor, int, int]] = []
        self.run = run
        self.context = _context(hidden)
        self._hidden: Tensor | None = hidden

    @property
    def hidden(self) -> Hidden:
        """Return what the first block was given."""
        assert self._hidden is not None  # it has not been taken
        return self._hidden

    def add(self, arguments: BlockArguments) -> None:
        """Add the arguments of the next block, as they are now.

        Blocks run later than the loop calls them: lists and dictionaries are copied,
        and of tensors it is noted how often they were changed.
        """
        kept = BlockArguments(*tree_map(_itself, tuple(arguments)))
        tensors = (t for t in tree_leaves(tuple(kept)) if isinstance(t, Tensor))
        place = len(self.arguments)
        self._versions += [(t, t._version, place) for t in tensors if _counts(t)]
        self.arguments.append(kept)

    def refuse_changed(self) -> None:
        """Refuse tensors that the loop has changed in place since a block got them.

        Raises:
            UnsupportedCallError: there is one.
        """
        for tensor, version, place in self._versions:
            if tensor._version != version:
                raise UnsupportedCallError(
                    f"a tensor of shape {tuple(tensor.shape)} that block {place} of a "
                    "reversible stack was given has been changed in place since. A "
                    "stack runs its blocks when the last one is called: give each "
                    "block a tensor of its own"
                )

    def take(self) -> Hidden:
        """Return what the first block was given, and forget it."""
        hidden, self._hidden = self.hidden, None
        return hidden


class StandIn:
    """Take the place of one block in a loop.

    Attributes are those of the block.

    Args:
        blocks: all blocks of the stack, in the order in which the loop calls them.
        block: the one whose place it takes.
        run: runs the stack.
        extra_outputs: what a block returns in addition to the hidden states.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        block: nn.Module,
        run: Run,
        extra_outputs: ExtraOutputs,
    ) -> None:
        vars(self).update(
            _blocks=blocks, _block=block, _run=run, _extra_outputs=extra_outputs
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_block"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._block, name, value)

    def __repr__(self) -> str:
        return f"StandIn({self._block!r})"

    @property  # type: ignore[misc]  # read by `isinstance`
    def __class__(self) -> type[Any]:
        """Return the class of the block."""
        return type(self._block)

    def __eq__(self, other: object) -> bool:
        """Return whether something is this block, or a stand-in of it."""
        return getattr(other, "__dict__", {}).get("_block", other) is self._block

    def __hash__(self) -> int:
        return hash(self._block)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Do what a call does: a loop may call the method instead."""
        return self(*args, **kwargs)

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
        hidden, arguments = _separated(self._block, args, kwargs)
        loop = self._loop(hidden)
        arguments, rest = self._extra_outputs(self._block, hidden, arguments)
        loop.add(arguments)
        del args, hidden  # the stack alone decides how long its input is kept
        called = len(loop.arguments)
        if called < len(self._blocks):
            place = f"between blocks {called - 1} and {called}"
            out: Tensor = HiddenBetween(loop, place)
        else:
            loop.refuse_changed()
            out = self._run(loop.take(), loop.arguments)
        return out if rest is None else (out, *rest)

    def _loop(self, hidden: Tensor) -> _Loop:
        """Return the loop to which a call with these hidden states belongs.

        Raises:
            UnsupportedCallError: to none, or this block is not the next one.
        """
        loop, position = _Loop(hidden, self._run), 0
        if isinstance(hidden, HiddenBetween) and hidden.loop.run == self._run:
            loop, position = hidden.loop, hidden.position
        called = len(loop.arguments)
        if position != called or self._blocks[called] is not self._block:
            given = (
                "hidden states that the block before it did not return"
                if called == 0 or position != called
                else f"hidden states after {called} blocks were called"
            )
            raise UnsupportedCallError(
                f"block {self._blocks.index(self._block)} of a reversible stack was "
                f"given {given}. A stack runs all its blocks as one: a loop over them "
                "has to call each once, in order, and to pass on what it returns "
                "unchanged"
            )
        if loop.context != _context(hidden):
            raise UnsupportedCallError(
                f"block {called} of a reversible stack was called with gradients or "
                "autocast switched differently than for the first block. A stack runs "
                "all its blocks as one, in one context: to freeze some of them, set "
                "`requires_grad` of their parameters, or `span` in the config"
            )
        return loop


def _separated(
    block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, BlockArguments]:
    """Separate the hidden states from the other arguments of a block.

    Raises:
        UnsupportedCallError: there are none.
    """
    if args:
        return args[0], BlockArguments(args[1:], kwargs)
    rest = dict(kwargs)
    first = first_name(plain_class(block))
    if first not in rest:
        raise UnsupportedCallError(
            f"a {type(block).__name__} of a reversible stack was called without "
            f"`{first}`, its first argument: hidden states have to be that one"
        )
    return rest.pop(first), BlockArguments((), rest)


def _itself(leaf: Any) -> Any:
    return leaf


def _counts(tensor: Tensor) -> bool:
    """Return whether a tensor counts how often it is changed."""
    return not (isinstance(tensor, NotComputed) or tensor.is_inference())


def _context(hidden: Tensor) -> tuple[Any, ...]:
    """Return what decides how operations on a tensor are computed and recorded."""
    kind = hidden.device.type
    autocast = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if autocast else None
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast, dtype
