"""Backbones that see images: the same methods and meters on noise."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.tiny import cell
from marks import slow_but_for
from meft_bench.child import backbones
from meft_bench.child.backbones import shapes
from meft_bench.child.meters import memory
from meft_bench.child.tasks import synthetic
from meft_bench.child.tasks.batches import Image, PixelForm, collate, full_batches
from meft_bench.child.training.steps import Stepper
from meft_bench.child.worker import run
from meft_bench.shared.cell import Cell
from meft_bench.shared.options import ChildOptions
from meft_bench.shared.registry import HAVE_ROWS, METHODS, load
from meft_bench.shared.source import Source

HERE = Source()
TOKENS = 1 + (32 // 8) ** 2
SHAPE = (3, 32, 32)


def seen(**changes: object) -> Cell:
    """A cell of `vit-tiny`, 32 pixels a side in patches of 8."""
    fields = {"backbone": "random:vit-tiny", "seq_len": TOKENS, "max_steps": 3}
    return cell(**(fields | changes))


def made(chosen: Cell) -> Stepper:
    torch.manual_seed(0)
    model = backbones.load(chosen, 2, HERE).model
    return Stepper(load(METHODS[chosen.method])(model, chosen), chosen)


def test_noise_has_the_shape_that_the_backbone_asks_for() -> None:
    """The same by its seed; one batch, which repeats to fill a step."""
    config, _ = backbones.load_config(seen(), HERE)
    assert backbones.image_shape(config) == SHAPE
    config, _ = backbones.load_config(cell(backbone="random:bert-tiny"), HERE)
    assert backbones.image_shape(config) is None
    first, again, other = (
        collate(synthetic.images(seen(batch_size=3, seed=seed), SHAPE), 0)
        for seed in (0, 0, 1)
    )
    assert first["pixel_values"].shape == (3, *SHAPE)
    assert first["labels"].shape == (3,)
    assert torch.equal(first["pixel_values"], again["pixel_values"])
    assert not torch.equal(first["pixel_values"], other["pixel_values"])
    one = [Image(pixels=torch.zeros(SHAPE), label=1)]
    batches = full_batches(one, seen(batch_size=5, accumulation=2))
    sizes = [tuple(batch["pixel_values"].shape) for batch in batches]
    assert sizes == [(5, *SHAPE)] * 2


def test_vit_large_has_its_published_size() -> None:
    """As counted in the published checkpoint, with a head for two classes instead."""
    config = shapes.find_config("vit-large")
    model = shapes.build(config, cell(device="meta", seq_len=197), 2)
    num_parameters = sum(p.numel() for p in model.parameters())
    assert num_parameters == 303_301_632 + 2 * 1024 + 2


OF_TEXT = {"ia3", "prompt-tuning", "p-tuning", "prefix-tuning"}
ELSEWHERE = {"streamed-offload", "lora-streamed-offload", "galore", "badam"}
OF_IMAGES = [m for m in METHODS if m not in {*HAVE_ROWS, *OF_TEXT, *ELSEWHERE}]


@pytest.mark.parametrize("method", sorted(OF_TEXT))
def test_methods_of_text_refuse_images(method: str) -> None:
    """With a method to take instead."""
    with pytest.raises(ValueError, match=rf"method '{method}' with .*, or "):
        made(seen(method=method))


@pytest.mark.parametrize(
    "method",
    slow_but_for(OF_IMAGES, "full", "meft1-exact"),
)
def test_every_method_trains_on_images(method: str) -> None:
    """A step moves what trains and nothing else."""
    stepper = made(seen(method=method))
    before = {n: p.detach().clone() for n, p in stepper.model.named_parameters()}
    stepper.model.train()
    stepper.step([collate(synthetic.images(seen(), SHAPE), 0)], learning_rate=1e-2)
    for name, parameter in stepper.model.named_parameters():
        if not parameter.requires_grad:
            assert torch.equal(parameter, before[name]), name
        elif parameter.ndim > 1:  # decay moves every matrix
            assert not torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("weights_dtype", ["fp32", "bf16"])
def test_tokens_are_as_many_as_the_cell_says(weights_dtype: str) -> None:
    """The stack runs on `batch seq hidden`, in either dtype of the weights."""
    stepper = made(seen(dtype="bf16", weights_dtype=weights_dtype))
    (block, *_) = backbones.blocks_of(stepper.model)
    met = []

    def look(module: torch.nn.Module, args: Any, output: torch.Tensor) -> None:
        met.append(tuple(args[0].shape))

    block.register_forward_hook(look)
    batch = stepper.to_device(collate(synthetic.images(seen(), SHAPE), 0))
    assert memory.saved_by_forward(stepper.model, batch, stepper.loss) > 0
    assert met == [(4, TOKENS, 128)]


@pytest.mark.parametrize(
    ("method", "device"),
    [("full", "cpu"), ("meft1-exact", "cpu"), ("lora", "virtual-H200")],
)
def test_a_cell_of_images_is_measured(method: str, device: str) -> None:
    """Whole, by the worker: on a CPU, and on a GPU that is not there."""
    if device != "cpu" and torch.cuda.is_available():
        pytest.skip("there is a real GPU, which is left alone")
    outcome: dict[str, Any] = run(seen(method=method, device=device), ChildOptions())
    assert outcome["status"] == "ok", outcome["message"]
    measured = outcome["measurement"]
    assert measured["num_blocks"] == 2
    assert 0 < measured["saved_bytes"] < measured["peak_allocated_bytes"]
    if method == "meft1-exact":
        assert measured["reconstruction_error"] == [0.0, 0.0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seq_len": 128}, r"`seq_len` is 128.*makes 17 tokens.*set it to 17"),
        ({"task": "sst2"}, r"task 'sst2' has text and random:vit-tiny sees images"),
    ],
)
def test_what_images_do_not_go_with_is_refused(
    changes: dict[str, object], words: str
) -> None:
    """With what to do instead."""
    with pytest.raises(ValueError, match=words):
        made(seen(**changes))


def test_a_directory_may_hold_a_model_of_images(tmp_path: Path) -> None:
    """Its weights under a new head, and no tokenizer; sides may differ."""
    model = backbones.load(seen(), 2, HERE).model
    model.save_pretrained(tmp_path)
    loaded = backbones.load(seen(backbone=f"dir:{tmp_path}"), 3, HERE)
    assert loaded.tokenizer is None
    assert loaded.sha256 is not None
    state = loaded.model.state_dict()
    for name, weight in model.state_dict().items():
        if not name.startswith("classifier."):
            assert torch.equal(state[name], weight), name
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"image_size": [32, 16], "patch_size": [8, 8]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    name = f"random:{tmp_path / 'config.json'}"
    wide = backbones.load(seen(backbone=name, seq_len=1 + 4 * 2), 2, HERE)
    assert backbones.image_shape(wide.model.config) == (3, 32, 16)


def test_images_are_normalised_as_a_directory_says(tmp_path: Path) -> None:
    """By the numbers of its preprocessor, or by 0.5 if it has none."""
    backbones.load(seen(), 2, HERE).model.save_pretrained(tmp_path)
    name = f"dir:{tmp_path}"
    form = backbones.load(seen(backbone=name), 2, HERE).pixel_form
    assert form == PixelForm(shape=SHAPE, mean=(0.5,), std=(0.5,))
    assert backbones.load(seen(), 2, HERE).pixel_form == form
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3]}))
    form = backbones.load(seen(backbone=name), 2, HERE).pixel_form
    assert form == PixelForm(shape=SHAPE, mean=(0.1, 0.2, 0.3), std=(1, 2, 3))
    file.write_text(json.dumps({"image_mean": [0.1, 0.2]}))
    with pytest.raises(
        ValueError, match="`image_mean` has 2 numbers, expected one for"
    ):
        backbones.load(seen(backbone=name), 2, HERE)
