"""`Family`: all that the library knows about one class of blocks and its models.

`meft.backbone.families` has one module per structure of blocks, and lists all families.
Classes of transformers are named and not imported, so that importing this package does
not import the code of every model.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from meft.backbone.layout import Adapter, Layout
from meft.errors import UnsupportedModelError
from meft.shapes import Hidden

_ACTIVATIONS = (
    *("act_fn", "activation_fn", "intermediate_act_fn", "act", "activation"),
)
"""Names under which modules of transformers hold their activation."""
_DROPOUTS = (*("hidden_dropout_prob", "hidden_dropout", "resid_pdrop", "dropout"),)
"""Names of the dropout of the residual stream in configs."""
_STDS = ("initializer_range", "init_std")
"""Names of the standard deviation of initial weights in configs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterShape:
    """The properties that an adapter takes from its backbone."""

    hidden_size: int
    activation: Callable[[Tensor], Tensor]
    dropout: float
    std: float


@dataclass(frozen=True, kw_only=True, slots=True)
class CausalLM:
    """transformers' causal language model of a family.

    Its logits are the last hidden states times `lm_head`, without further changes.
    """

    model_class: str
    """Name of its class, in the module of the blocks."""
    body: str = "model"
    """Name, in the model, of the module whose forward computes the last hidden states.
    """


def no_reason(block: Any) -> str | None:
    """Refuse no block."""
    return None


def no_prefix(config: Any) -> int:
    """Leave no block to the loop."""
    return 0


def each_once(config: Any, number: int) -> tuple[int, ...]:
    """Call each block once."""
    return tuple(range(number))


ExtraOutputs = Callable[
    [Any, Hidden, dict[str, Any]], tuple[dict[str, Any], tuple[Any, ...]]
]
"""Of a block, hidden states and the other arguments by name: these arguments, with what
the block would compute for others too, and what it returns in addition to the hidden
states.
"""


def the_first(block: Any) -> int:
    """Choose the first of several layouts."""
    return 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """The structure of the blocks of one class, and of the models that have them."""

    name: str
    """Name of the family for users, `BERT`."""
    model_type: str
    """`model_type` of transformers' configs."""
    order: int
    """Position in lists, such as those of error messages."""
    block: str
    """Name of the class of the blocks, `BertLayer`."""
    layouts: tuple[Layout, ...]
    """The halves of a block of this class, for each form that it has."""
    choose: Callable[[Any], int] = the_first
    """Which of `layouts` a block has, which may depend on its attributes."""
    refuse: Callable[[Any], str | None] = no_reason
    """Reason why this block cannot be run in halves; None if it can."""
    new_heads: tuple[str, ...]
    """Attributes of transformers' models that hold a task head without pre-trained
    weights, which must be trained. Poolers and language-model heads are pre-trained and
    stay frozen.
    """
    query_and_value: tuple[str, ...]
    """Last parts of the names of the query and value projections, as LoRA takes them.
    """
    extra_outputs: ExtraOutputs | None = None
    """What a block returns in addition to the hidden states, for models that pass it on
    to the next block.
    """
    prefix: Callable[[Any], int] = no_prefix
    """Number of the lowest blocks, by the config of the model, after which its loop
    changes hidden states: they stay as they are, and are called by the loop.
    """
    calls: Callable[[Any, int], tuple[int, ...]] = each_once
    """The positions in the list of blocks that the loop calls, one after the other, by
    the config of the model and the length of the list.
    """
    takes_parallel_adapter: bool = False
    """Whether a model has one list of blocks, whose class can be changed to add a
    parallel adapter (`meft.add_sparse_adapters`).
    """
    causal_lm: CausalLM | None = None
    """The causal language model whose loss can be chunked (`meft.chunk_loss`)."""
    defined_in: str = ""
    """Name of the module with the class of the blocks, if it is not the one of
    transformers that `model_type` implies.
    """
    is_guess: bool = False
    """Whether the class of the blocks is not listed, and `layouts` are those with
    modules of the same names, of which none may be right (`meft.backbone.proof`).
    """

    @property
    def module(self) -> str:
        """Name of the module that has the class of the blocks."""
        return self.defined_in or module_of(self.model_type)

    @property
    def is_opaque(self) -> bool:
        """Whether blocks are called themselves, of whatever class they are."""
        return all(layout.is_opaque for layout in self.layouts)

    def has(self, block: object) -> bool:
        """Return whether a module is one of the blocks, or of a class derived."""
        if self.is_opaque:
            return True
        names = [(kind.__module__, kind.__qualname__) for kind in type(block).__mro__]
        return (self.module, self.block) in names

    def layout(self, block: Any) -> Layout:
        """Return the halves of a block."""
        return self.layouts[self.choose(block)]

    def with_layout(self, layout: Layout) -> "Family":
        """Return this family with a layout that has been compared with a block."""
        extra = None if layout.is_opaque else self.extra_outputs
        return replace(
            self,
            layouts=(layout,),
            choose=the_first,
            extra_outputs=extra,
            is_guess=False,
        )

    def whole(
        self,
        block: Any,
        hidden: Hidden,
        adapter: Adapter | None = None,
        after: Adapter | None = None,
        after_mlp: Adapter | None = None,
        **call: Any,
    ) -> Hidden:
        """Run both halves of a block (`Layout.whole`).

        Args:
            block: the block.
            hidden: `batch seq hidden`.
            adapter: runs in parallel with the position-wise layers, if given.
            after: runs after self-attention, if given.
            after_mlp: runs after the position-wise layers, if given.
            **call: the other arguments that the model's loop passes to the block.

        Returns:
            The result, of the shape of `hidden`.
        """
        adapters = adapter, after, after_mlp
        return self.layout(block).whole(block, hidden, call, *adapters)

    def attention_half(
        self, block: Any, hidden: Hidden, adapter: Adapter | None = None, **call: Any
    ) -> Hidden:
        """Run the part of a block that mixes tokens (`Layout.attention_half`).

        Args:
            block: the block.
            hidden: `batch seq hidden`.
            adapter: runs after self-attention, if given.
            **call: the other arguments that the model's loop passes to the block.

        Returns:
            The result, of the shape of `hidden`.
        """
        return self.layout(block).attention_half(block, hidden, adapter, call)

    def mlp_half(
        self,
        block: Any,
        hidden: Hidden,
        adapter: Adapter | None = None,
        after: Adapter | None = None,
    ) -> Hidden:
        """Run the position-wise layers of a block (`Layout.mlp_half`).

        Args:
            block: the block.
            hidden: `batch seq hidden`.
            adapter: runs in parallel with them, on the same input, if given.
            after: runs after them, before their input is added, if given.

        Returns:
            The result, of the shape of `hidden`.
        """
        return self.layout(block).mlp_half(block, hidden, adapter, after)

    def _width(self, block: nn.Module, config: Any) -> int:
        """Return the width of the stream: that of a norm's weight, if it has one."""
        weight = getattr(block.get_submodule(self.layout(block).norm), "weight", None)
        if isinstance(weight, Tensor):
            return weight.shape[0]
        size = next(_sizes(config), None)
        if size is None:
            raise UnsupportedModelError(
                f"how wide the hidden states of a {type(block).__name__} are is "
                "unknown: its norms have no weight, and the config of the model no "
                "`hidden_size`. Set `model.config.hidden_size`"
            )
        return size

    def adapter_shape(self, block: nn.Module, config: Any) -> AdapterShape:
        """Return width, activation, dropout and initial size of an adapter in a block.

        Args:
            block: the block.
            config: the config of the model that loops over it.
        """
        found = (
            getattr(module, name, None)
            for module in block.modules()
            for name in _ACTIVATIONS
        )
        activation = next((act for act in found if callable(act)), functional.gelu)
        return AdapterShape(
            hidden_size=self._width(block, config),
            activation=activation,
            dropout=_first_of(config, _DROPOUTS, 0.0),
            std=_first_of(config, _STDS, 0.02),
        )


def _sizes(config: Any) -> Iterator[int]:
    """Yield the widths that a config may give."""
    for name in ("hidden_size", "d_model", "n_embd", "dim"):
        size = getattr(config, name, None)
        if isinstance(size, int):
            yield size


def module_of(model_type: str) -> str:
    """Return the name of the module of transformers with the models of a type."""
    name = model_type.replace("-", "_")
    return f"transformers.models.{name}.modeling_{name}"


def _first_of(config: Any, names: tuple[str, ...], default: float) -> float:
    """Return the first of several numbers that a config has."""
    found = (getattr(config, name, None) for name in names)
    return next((number for number in found if number is not None), default)
