"""A cell of every type of model that cells can have: exact, measured and predicted."""

from typing import Any

import pytest
import transformers

from harness.tiny import cell
from meft_bench.child import backbones
from meft_bench.child.backbones.classifier import num_image_tokens
from meft_bench.child.backbones.shapes import find_config
from meft_bench.child.measuring.measure import measure
from meft_bench.child.measuring.partial_result import PartialResult
from meft_bench.shared.backbones import TABLE
from meft_bench.shared.cell import Cell
from meft_bench.shared.source import Source
from meft_bench.virtual.prediction.predict import predict

SOURCE = Source(allow_download=False)
TINY = [
    (model_type, shape, kind)
    for model_type, it in TABLE.items()
    for shape in it.shapes
    if shape.endswith("-tiny")
    for kind in it.models
]
NOT_SLOW = ("albert", "deberta-v2", "dinov2", "t5", "qwen3_moe")
"""Those whose structure no other test of the harness has."""


def a_cell(model_type: str, shape: str, kind: str, **changes: Any) -> Cell:
    """A cell of this shape, with the attention that it has."""
    fields: dict[str, Any] = {
        "backbone": f"random:{shape}",
        "max_steps": 3,
        "attention": "eager" if TABLE[model_type].has_eager_attention_only else "sdpa",
        "task": "synthetic-lm" if kind.endswith("lm") else "synthetic",
        "bottleneck_size": 4,
    }
    if kind == "image-classifier":
        config = find_config(shape)
        image = backbones.image_shape(config)
        assert image is not None
        fields["seq_len"] = num_image_tokens(config, image)
    return cell(**(fields | changes))


@pytest.mark.parametrize("method", ["meft1-exact", "lora-exact"])
@pytest.mark.parametrize(
    ("model_type", "shape", "kind"),
    [
        pytest.param(*one, marks=() if one[0] in NOT_SLOW else pytest.mark.slow)
        for one in TINY
    ],
)
def test_a_step_is_exact_and_its_bytes_are_predicted(
    model_type: str, shape: str, kind: str, method: str
) -> None:
    """Every gradient is the stored twin's; the state has the bytes that are planned."""
    one = a_cell(model_type, shape, kind, method=method)
    measured, predicted = PartialResult(), PartialResult()
    measure(one, SOURCE, measured)
    found = measured.measurement
    assert found.gradient_error
    assert set(found.gradient_error) == {0.0}
    virtual = a_cell(model_type, shape, kind, method=method, device="virtual-H200")
    predict(virtual, SOURCE, predicted)
    expected = predicted.measurement
    assert expected.model_state_bytes == found.model_state_bytes
    assert expected.peak_allocated_bytes is not None


def test_the_table_knows_who_has_eager_attention_only() -> None:
    """As transformers says of its classes."""
    names = transformers.models.auto.modeling_auto.MODEL_MAPPING_NAMES
    for model_type, kind in TABLE.items():
        name = names[model_type]
        base = getattr(transformers, name if isinstance(name, str) else name[0])
        assert kind.has_eager_attention_only is not base._supports_sdpa, model_type


@pytest.mark.parametrize("shape", ["mpnet-tiny", "gemma2-tiny"])
def test_attention_that_there_is_not_is_refused(shape: str) -> None:
    """With what to set."""
    with pytest.raises(ValueError, match="set it to 'eager'"):
        backbones.load(cell(backbone=f"random:{shape}"), 2, SOURCE)


def test_every_type_has_a_tiny_shape() -> None:
    """But those that are described as another one."""
    without = {name for name, kind in TABLE.items() if kind.models}
    without -= {model_type for model_type, _, _ in TINY}
    assert without == {"xlm-roberta", "camembert", "electra", "distilbert"}
