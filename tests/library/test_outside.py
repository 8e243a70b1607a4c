"""What a branch uses besides its own parameters, and what of it is kept by others."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import meft
from library.models import batch, gradients, only_stack
from library.models import reversible as reversible_model

HIDDEN = 16
VARIANTS = ["meft1", "meft2", "meft3"]


def reversible(depth: int, **options: Any) -> Any:
    return reversible_model(depth, **{"variant": "meft1", **options})


def blocks_of(model: Any) -> Any:
    return only_stack(model).blocks


def twin(build: Callable[..., Any], **options: Any) -> tuple[Any, Any]:
    """The same model with both backward passes."""
    return build(**options), build(**options, backward="store")


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def all_gradients(model: Any, loose: nn.Parameter | None = None) -> dict[str, Tensor]:
    """Of one step: by name, and that of a parameter that belongs to no module."""
    if loose is not None:
        loose.grad = None
    found = gradients(model, batch())
    if loose is not None:
        assert loose.grad is not None
        found["loose"] = loose.grad
    return found


def add_to(module: nn.Module, function: Callable[..., Tensor]) -> Any:
    """A forward hook that adds a function of the input to the output."""
    return module.register_forward_hook(lambda _, args, out: out + function(out))


def with_reft(**options: Any) -> tuple[Any, nn.Parameter]:
    """Hooks in two blocks use a module of the model, a loose parameter, and a module of
    another block that is trained."""
    model = reversible(3, dropout=0.1, **options)
    torch.manual_seed(5)
    model.reft = nn.Linear(HIDDEN, HIDDEN)
    loose = nn.Parameter(torch.randn(HIDDEN))
    lowest = blocks_of(model)[0].output.dense.requires_grad_(True)
    for block in blocks_of(model)[1:]:
        add_to(block.attention.output.dense, model.reft)
        add_to(block.output.dense, lambda x: loose * model.reft(x))
        add_to(block.intermediate.dense, lambda x: 0.1 * x * lowest.weight.sum())
    return model, loose


@pytest.mark.parametrize("options", [{}, {"mlp_chunks": 3}, {"on_mismatch": "redo"}])
@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_from_elsewhere_get_their_gradients(
    variant: str, options: dict[str, Any]
) -> None:
    """In the first step and later, in the bits of the twin."""
    model, loose = with_reft(variant=variant, **options)
    expected = all_gradients(*with_reft(variant=variant, **options, backward="store"))
    assert expected["reft.weight"].abs().max() > 0
    for _ in range(2):
        assert_same(all_gradients(model, loose), expected)


def test_in_streams_of_floats_too() -> None:
    scales = {"arithmetic": "float", "scale_1": 1.0, "scale_2": 1.0}
    found = all_gradients(*with_reft(**scales))
    expected = all_gradients(*with_reft(**scales, backward="store"))
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_only_the_first_batch_runs_again() -> None:
    """A forward that finds such a parameter runs once more, and no other does; hooks
    on the parameter see the whole gradient, once."""
    model, seen, calls = reversible(2), [], []
    model.reft = nn.Linear(HIDDEN, HIDDEN)
    dense = blocks_of(model)[1].output.dense
    add_to(dense, model.reft)
    dense.register_forward_hook(lambda *_: calls.append(1))
    model.reft.weight.register_hook(lambda gradient: seen.append(gradient.clone()))
    for expected in (4, 2):  # trial twice, again, recompute; forward, recompute
        calls.clear()
        seen.clear()
        found = gradients(model, batch())
        assert len(calls) == expected
        assert len(seen) == 1
        assert torch.equal(seen[0], found["reft.weight"])


def test_a_copy_finds_out_for_itself() -> None:
    """The hook of a copied model still uses the original's module."""
    model, loose = with_reft()
    expected = all_gradients(model, loose)
    copied, rows = copy.deepcopy(model), batch()
    model.zero_grad()
    torch.manual_seed(3)
    copied(**rows).loss.backward()
    assert torch.equal(model.reft.weight.grad, expected["reft.weight"])
    assert copied.reft.weight.grad is None


class Biased(nn.Module):
    """Attention with a learned factor, kept outside of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.linspace(0.5, 1.5, HIDDEN // 2))

    def forward(self, module: Any, q: Tensor, *rest: Any, **kwargs: Any) -> Any:
        return sdpa_attention_forward(module, q * self.factor, *rest, **kwargs)


def biased(backward: str) -> tuple[Any, nn.Parameter]:
    attention = Biased()
    AttentionInterface.register(f"biased_{backward}", attention)
    model = reversible(3, variant="meft3", backward=backward)
    model.set_attn_implementation(f"biased_{backward}")
    return model, attention.factor


def without_mask(model: Any, factor: nn.Parameter) -> dict[str, Tensor]:
    factor.grad = None
    found = gradients(model, batch(padded=False))
    assert factor.grad is not None
    return {**found, "factor": factor.grad}


def test_an_attention_function_with_a_learned_bias() -> None:
    expected = without_mask(*biased("store"))
    assert expected["factor"].abs().max() > 0
    assert_same(without_mask(*biased("rebuild")), expected)


def test_a_parameter_that_is_unfrozen_later() -> None:
    """Where a hook uses it, the next forward finds it. Where none does, the next
    backward refuses, and the step after it is right."""
    model, loose = with_reft()
    model.reft.requires_grad_(False)
    gradients(model, batch())
    model.reft.requires_grad_(True)
    assert_same(
        all_gradients(model, loose), all_gradients(*with_reft(backward="store"))
    )

    model, factor = biased("rebuild")
    factor.requires_grad_(False)
    gradients(model, batch(padded=False))
    factor.requires_grad_(True)
    with pytest.raises(meft.UnsupportedCallError, match=r"of shape \(8,\) that is not"):
        gradients(model, batch(padded=False))
    assert factor.grad is None
    assert_same(without_mask(model, factor), without_mask(*biased("store")))


@pytest.mark.parametrize("is_late", [False, True])
def test_a_tensor_computed_elsewhere_is_refused(is_late: bool) -> None:
    """In the forward, also if the hook was added after the first batch. The remedies:
    compute it in the hook, or detach it."""
    model = reversible(2)
    dense = blocks_of(model)[1].output.dense
    if is_late:
        gradients(model, batch())
    weight = nn.Parameter(torch.randn(HIDDEN))
    outside = 2 * weight
    handle = add_to(dense, lambda _: outside)
    with pytest.raises(meft.UnsupportedCallError, match="block 1 uses a tensor that"):
        model(**batch())
    handle.remove()
    handle = add_to(dense, lambda _: outside.detach())
    model(**batch()).loss.backward()
    assert weight.grad is None
    handle.remove()
    add_to(dense, lambda _: 2 * weight)
    model(**batch()).loss.backward()
    assert weight.grad is not None


@pytest.mark.parametrize("backward", ["rebuild", "store"])
def test_an_activation_of_another_block(backward: str) -> None:
    """A hook in block 2 adds what a hook in block 1 has kept: a gradient from block to
    block which no stream carries."""
    model, kept = reversible(3, backward=backward), {}

    def keep(module: nn.Module, args: Any, out: Tensor) -> None:
        kept["activation"] = out

    blocks_of(model)[1].output.dense.register_forward_hook(keep)
    add_to(blocks_of(model)[2].output.dense, lambda _: kept["activation"])
    if backward == "store":
        model(**batch()).loss.backward()
        return
    with pytest.raises(meft.UnsupportedCallError, match="block 2 uses a tensor that"):
        model(**batch())


class Rotary(nn.Module):
    """A rotary embedding whose frequencies are trained."""

    def __init__(self) -> None:
        super().__init__()
        self.frequencies = nn.Parameter(1.0 / 100 ** (torch.arange(4) / 4))

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        half = position_ids[..., None].float() * self.frequencies
        angles = torch.cat([half, half], -1)
        return angles.cos(), angles.sin()


def llama(**options: Any) -> Any:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            num_hidden_layers=3,
            hidden_size=HIDDEN,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=32,
        )
    )
    model.model.rotary_emb = Rotary()
    meft.make_reversible(model, meft.ReversibleConfig(bottleneck_size=3, **options))
    model.model.rotary_emb.requires_grad_(True)
    return model.train()


@pytest.mark.parametrize("options", [{}, {"span": (0, 2)}, {"mlp_chunks": 2}])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_trained_rotary_embedding(variant: str, options: dict[str, Any]) -> None:
    """Its output reaches the blocks as a tuple of two tensors with one graph."""
    rows = {"input_ids": batch(padded=False)["input_ids"]}
    rows["labels"] = rows["input_ids"]
    model, store = twin(llama, variant=variant, **options)
    found = gradients(model, rows)
    assert found["model.rotary_emb.frequencies"].abs().max() > 0
    assert_same(found, gradients(store, rows))
    with torch.no_grad():
        assert torch.equal(model.eval()(**rows).logits, store.eval()(**rows).logits)


@pytest.mark.parametrize("which", ["cos", "sin"])
def test_one_trained_tensor_of_a_tuple(which: str) -> None:
    """Each argument of a block gets a gradient if it itself wants one."""
    rows = {"input_ids": batch(padded=False)["input_ids"]}
    rows["labels"] = rows["input_ids"]
    model, store = twin(llama, variant="meft1")
    for its in (model, store):
        rotary = its.model.rotary_emb

        def one(
            x: Tensor, position_ids: Tensor, of: Any = rotary
        ) -> tuple[Tensor, Tensor]:
            cos, sin = Rotary.forward(of, x, position_ids)
            return (cos, sin.detach()) if which == "cos" else (cos.detach(), sin)

        rotary.forward = one
    found = gradients(model, rows)
    assert found["model.rotary_emb.frequencies"].abs().max() > 0
    assert_same(found, gradients(store, rows))


class Remembers(nn.Module):
    """Keeps its output, as layers with an auxiliary loss do."""

    def __init__(self, inside: nn.Module, kept: list[Tensor] | None) -> None:
        super().__init__()
        self.inside, self.everywhere = inside, kept

    def forward(self, x: Tensor) -> Any:
        out = self.inside(x)
        if self.everywhere is None:
            self.last = out
        else:
            self.everywhere[:] = [out]
        return out


def keeping(how: str, **options: Any) -> tuple[Any, Callable[[], Tensor]]:
    """A model that keeps an activation of block 1, and a function that returns it."""
    model = reversible(3, variant="meft1", **options)
    kept: list[Tensor] = []
    output = blocks_of(model)[1].output
    if how == "hook":

        def keep(module: nn.Module, args: Any, out: Tensor) -> None:
            kept[:] = [out]

        output.dense.register_forward_hook(keep)
        return model, lambda: kept[0]
    output.dense = Remembers(output.dense, kept if how == "list" else None)
    return model, lambda: output.dense.last if how == "attribute" else kept[0]


@pytest.mark.parametrize("is_added", [True, False])
@pytest.mark.parametrize("how", ["hook", "attribute", "list"])
def test_a_loss_of_a_kept_activation_is_refused(how: str, is_added: bool) -> None:
    """With another loss or alone, in every step; the twin gives its gradient, and one
    that is detached does no harm."""
    model, activation = keeping(how)
    expected = gradients(model, batch())
    for _ in range(2):
        loss = model(**batch()).loss
        assert activation().requires_grad
        auxiliary = activation().pow(2).mean()
        with pytest.raises(meft.UnsupportedCallError, match="kept by a hook or a mod"):
            (loss + auxiliary if is_added else auxiliary).backward()
    stored, activation = keeping(how, backward="store")
    loss = stored(**batch()).loss
    (loss + activation().pow(2).mean()).backward()
    name = "bert.encoder.layer.adapters.0.feed_forward.up.weight"
    weight = stored.get_parameter(name)
    assert weight.grad is not None
    assert not torch.equal(weight.grad, expected[name])
    assert_same(gradients(model, batch()), expected)


def test_a_kept_activation_is_refused_for_chosen_parameters() -> None:
    """`torch.autograd.grad` runs only what leads to the tensors it is given: also then
    the gradient of the kept activation is not left out."""
    model, activation = keeping("hook")
    model.get_input_embeddings().requires_grad_(True)
    stack = only_stack(model)
    for tensor in (
        stack.adapters_of(0)["feed_forward"].get_parameter("up.weight"),
        model.get_input_embeddings().weight,
    ):
        loss = model(**batch()).loss
        auxiliary = activation().pow(2).mean()
        for total in (auxiliary, loss + auxiliary):
            with pytest.raises(meft.UnsupportedCallError, match="kept by a hook"):
                torch.autograd.grad(total, tensor, retain_graph=True)


def test_a_kept_activation_without_saved_tensors_is_refused() -> None:
    """The sum of a residual needs no saved tensor to be differentiated: the path to the
    streams ends in an error all the same."""
    model = reversible(2, variant="meft1")
    kept: list[Tensor] = []
    norm = blocks_of(model)[1].attention.output.LayerNorm
    norm.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    loss = model(**batch()).loss
    with pytest.raises(meft.UnsupportedCallError, match="kept by a hook or a module"):
        (loss * 0 + kept[0].sum()).backward()
