import pytest
import torch
from transformers import BertForSequenceClassification

from harness.tiny import BLOCKS, HIDDEN, LABELS, batch, cell, classifier
from meft.backbone.bert import attention_half, mlp_half
from meft.testing import saved_bytes
from meft_bench.backbones import blocks_of
from meft_bench.methods.adapters import AdaptedOutput
from meft_bench.registry import METHODS, load

HEAD = HIDDEN * LABELS + LABELS
R = 4
BOTTLENECK = 2 * HIDDEN * R + HIDDEN + R


ALL = sum(p.numel() for p in classifier().parameters())
LORA = HEAD + BLOCKS * 2 * 2 * HIDDEN * R
ADAPTERS = HEAD + BLOCKS * 2 * BOTTLENECK
FORMULAS = {
    "full": ALL,
    "checkpointing": ALL,
    "head": HEAD,
    "lora": LORA,
    "lora-checkpointing": LORA,
    "adapters": ADAPTERS,
    "meft1": ADAPTERS,
    "meft2": ADAPTERS,
    "meft3": ADAPTERS,
    "meft1-store": ADAPTERS,
    "meft2-store": ADAPTERS,
    "meft3-store": ADAPTERS,
    # Nothing would read a reversible adapter in the top block.
    "meft1-exact": ADAPTERS - BOTTLENECK,
    "meft2-exact": ADAPTERS,
    "meft3-exact": ADAPTERS,
    "meft1-exact-store": ADAPTERS - BOTTLENECK,
    "meft2-exact-store": ADAPTERS,
    "meft3-exact-store": ADAPTERS,
}


def made(method: str) -> BertForSequenceClassification:
    chosen = cell(method=method, bottleneck_size=R, lora_rank=R)
    model: BertForSequenceClassification = load(METHODS[method])(classifier(), chosen)
    return model


def num_trained(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_as_many_parameters_as_its_formula_says(method: str) -> None:
    """The head, and per block two bottlenecks or two LoRA pairs, and no more."""
    assert num_trained(made(method)) == FORMULAS[method]


@pytest.mark.parametrize("method", METHODS)
def test_a_step_gives_a_gradient_to_what_trains_and_to_nothing_else(
    method: str,
) -> None:
    """Every trained parameter is reached by backward; frozen ones get no gradient."""
    model = made(method).train()
    model(**batch()).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


@pytest.mark.parametrize("method", ["full", "head", "lora", "checkpointing"])
def test_a_method_starts_at_the_function_of_the_backbone(method: str) -> None:
    """Nothing is added, or what is added starts as exactly zero."""
    with torch.no_grad():
        expected = classifier().eval()(**batch()).logits
        got = made(method).eval()(**batch()).logits
    assert torch.equal(got, expected)


def test_adapters_that_output_zero_leave_the_backbone_as_it_was() -> None:
    """The wrapped outputs compute what they replaced, plus the adapter."""
    model = made("adapters").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adapter.up" in name:
                parameter.zero_()
        expected = classifier().eval()(**batch()).logits
        assert torch.equal(model(**batch()).logits, expected)


def test_adapters_sit_where_meft3_has_them() -> None:
    """A block equals MEFT3's two halves, G after F, given the same adapters."""
    model = made("adapters").eval()
    plain = classifier().eval()
    hidden = torch.randn(2, 5, HIDDEN)
    for adapted, block in zip(blocks_of(model), blocks_of(plain), strict=True):
        output = adapted.output
        assert isinstance(output, AdaptedOutput)
        attention = adapted.attention.output.get_submodule("adapter")
        expected = mlp_half(
            block, attention_half(block, hidden, attention), output.adapter
        )
        assert torch.equal(adapted(hidden), expected)


@pytest.mark.parametrize(
    ("plain", "checkpointed"),
    [("full", "checkpointing"), ("lora", "lora-checkpointing")],
)
def test_checkpointing_changes_no_gradient(plain: str, checkpointed: str) -> None:
    """The recomputed blocks draw the same dropout masks: every gradient is equal."""
    gradients = []
    for method in (plain, checkpointed):
        model = made(method).train()
        torch.manual_seed(1)
        model(**batch()).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for expected, got in zip(*gradients, strict=True):
        assert expected is not None
        assert got is not None
        assert torch.equal(got, expected)


def saved_at(method: str, depth: int) -> int:
    model = load(METHODS[method])(
        classifier(num_hidden_layers=depth), cell(method=method)
    ).train()
    model(**batch()).loss.backward()  # the first step of a rebuilt stack is watched
    data = batch()
    exclude = [*model.parameters(), *model.buffers(), *data.values()]
    with saved_bytes(exclude) as counter:
        loss = model(**data).loss
        total = counter.total
    del loss
    return total


@pytest.mark.parametrize(
    ("method", "streams_per_block"),
    [("checkpointing", 1), ("lora-checkpointing", 1), ("meft1", 0), ("meft2", 0)],
)
def test_a_block_more_keeps_its_input_or_nothing(
    method: str, streams_per_block: int
) -> None:
    """Checkpointing keeps one `batch seq hidden` tensor a block, MEFT none."""
    stream_bytes = 4 * 8 * HIDDEN * torch.float32.itemsize
    grown = saved_at(method, 5) - saved_at(method, 3)
    assert grown == 2 * streams_per_block * stream_bytes
