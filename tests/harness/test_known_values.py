"""Integers of the host have values on the virtual GPU too, and so what they decide."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import meft_bench
from marks import slow_but_for
from meft_bench.virtual.emulation import known_values
from meft_bench.virtual.recording.ledger import Ledger

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="there is a real GPU, which is left alone"
)
IMAGE = 5
"""The token in whose place an image's features go."""
EAGER: Any = {"attn_implementation": "eager"}


def ids_of(*rows: list[int]) -> Tensor:
    return torch.tensor([*rows])


def answers(device: str) -> dict[str, Any]:
    """What code may ask of lengths, masks and token ids that it has moved."""
    sizes = torch.tensor([[1, 4, 4], [1, 2, 6]]).to(device)
    mask = torch.tensor([True, False, True], device=device)
    rows = torch.zeros(3, 5, device=device)
    positions = torch.zeros(4, dtype=torch.long, device=device)
    positions[1:] = torch.arange(3, device=device)
    positions[0] += 7
    lengths = torch.repeat_interleave(sizes[:, 1] * sizes[:, 2], sizes[:, 0])
    return {
        "list": sizes.tolist(),
        "number": sizes.prod(-1).max().item(),
        "condition": bool((sizes > 3).all()),
        "selected": (rows[mask].shape, rows[~mask].shape),
        "masked_select": rows.masked_select(mask[:, None]).shape,
        "places": torch.where(mask)[0].tolist(),
        "lengths": lengths.cumsum(0).tolist(),
        "pieces": [t.shape for t in torch.zeros(28, 2, device=device).split([16, 12])],
        "written": positions.tolist(),
        "different": sizes.unique().tolist(),
        "on the host": (sizes.cpu() + 1).tolist(),
        "of both": torch.cat([sizes, sizes.new_ones(1, 3)]).sum().item(),
        "mean": sizes.float().mean().item(),
        "of numbers": torch.tensor([sizes[0, 1], 3], device=device).tolist(),
        "equal": torch.equal(sizes, sizes.clone()),
        "counted": torch.bincount(sizes.flatten()).tolist(),
    }


def test_code_gets_the_answers_that_it_gets_on_the_host() -> None:
    plain = answers("cpu")
    with meft_bench.virtual_gpu("T4") as memory:
        found = answers("cuda")
    assert found == plain
    assert "assumed: " not in memory.plan().prediction


def test_what_depends_on_anything_else_has_no_value() -> None:
    """Also a tensor with values, as soon as something else is written into it."""
    with meft_bench.virtual_gpu("T4"):
        x = torch.randn(4, device="cuda")
        ids = torch.tensor([3, 4, 5, 6]).cuda()
        assert torch.empty_like(ids).tolist() == ids.new_empty(4).tolist() == [0] * 4
        assert torch.randint_like(ids, 1, 9).tolist() == [0] * 4
        assert (ids * x.long()).tolist() == [0] * 4
        view = ids[1:]
        ids[2] = x.sum().long()
        assert ids.tolist() == [0] * 4
        assert view.tolist() == [0] * 3
        scale = torch.ones((), device="cuda")
        torch.add(x.sum(), 1, out=scale)
        assert scale.item() == 0
        found = torch.zeros((), device="cuda")
        grads = [torch.randn(4, device="cuda")]
        inverse = torch.ones((), device="cuda")
        torch._amp_foreach_non_finite_check_and_unscale_(grads, found, inverse)
        assert found.item() == 0
        many = torch.ones(known_values.MOST_ELEMENTS + 1, dtype=torch.long).cuda()
        assert many.sum().item() == 0


def test_values_are_as_they_were_when_they_were_moved() -> None:
    with meft_bench.virtual_gpu("T4"):
        host = torch.tensor([1, 2])
        ids = host.pin_memory().to("cuda", non_blocking=True)
        host += 1
        assert host.tolist() == [2, 3]
        assert ids.tolist() == [1, 2]


def llava(device: str) -> None:
    """An image of four tokens in a text."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=text_config(),
        image_token_index=IMAGE,
        **EAGER,
    )
    model: Any = transformers.LlavaForConditionalGeneration(config)
    model = model.to(device)
    ids = ids_of([1, 2, *[IMAGE] * 4, *[3] * 10], [1, *[IMAGE] * 4, *[3] * 11])
    ids = ids.to(device)
    pixels = torch.zeros(2, 3, 16, 16, device=device)
    model(input_ids=ids, pixel_values=pixels, labels=ids).loss.backward()


def qwen(device: str) -> None:
    """Images of other sizes: 4 x 4 and 2 x 8 patches, of which four are a token."""
    config = transformers.Qwen2VLConfig(
        text_config={
            **text_config().to_dict(),
            "model_type": "qwen2_vl_text",
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": [2, 3, 3],
                "rope_theta": 10000.0,
            },
        },
        vision_config={
            "embed_dim": 32,
            "depth": 2,
            "num_heads": 2,
            "hidden_size": 64,
            "patch_size": 4,
        },
        image_token_id=IMAGE,
        vision_start_token_id=6,
        video_token_id=7,
        **EAGER,
    )
    model: Any = transformers.Qwen2VLForConditionalGeneration(config)
    model = model.to(device)
    rows = [[1, 6, *[IMAGE] * 4, *[3] * 10], [1, 1, 6, *[IMAGE] * 4, *[3] * 9]]
    ids = ids_of(*rows).to(device)
    model(
        input_ids=ids,
        pixel_values=torch.zeros(32, 3 * 2 * 4 * 4, device=device),
        image_grid_thw=torch.tensor([[1, 4, 4], [1, 2, 8]]).to(device),
        mm_token_type_ids=(ids == IMAGE).int(),
        labels=ids,
    ).loss.backward()


def longformer(device: str) -> None:
    """Its first token attends to all others, and the lengths are different."""
    config = transformers.LongformerConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=512,
        attention_window=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model: Any = transformers.LongformerForSequenceClassification(config)
    model = model.to(device)
    ids = torch.ones(2, 50, dtype=torch.long, device=device)
    mask = torch.tensor([[1] * 50, [1] * 40 + [0] * 10]).to(device)
    model(input_ids=ids, attention_mask=mask, labels=ids[:, 0]).loss.backward()


def led(device: str) -> None:
    config = transformers.LEDConfig(
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        vocab_size=512,
        attention_window=16,
        dropout=0.0,
    )
    model: Any = transformers.LEDForConditionalGeneration(config)
    model = model.to(device)
    ids = torch.ones(2, 32, dtype=torch.long, device=device)
    model(input_ids=ids, labels=ids).loss.backward()


def text_config() -> Any:
    return transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
    )


def saved_by_size(ledger: Ledger) -> dict[int, int]:
    """Number of storages that forward saves for backward, by bytes of FP32."""
    trace = ledger.trace()
    sizes = [
        s.num_bytes
        for s in trace.storages
        if trace.kind_of(s) == "saved" and s.dtype == "float32" and s.num_bytes > 1024
    ]
    return {size: sizes.count(size) for size in sizes}


@pytest.mark.parametrize(
    "train", slow_but_for([llava, qwen, longformer, led], qwen, longformer)
)
def test_models_whose_shapes_depend_on_values_save_what_they_do_on_the_host(
    train: Callable[[str], None],
) -> None:
    """Places of image tokens, sizes of images, tokens that attend to all others.

    Without dropout, whose masks have another dtype on a GPU.
    """
    with Ledger() as plain:
        plain.watch_all()
        train("cpu")
    with meft_bench.virtual_gpu("T4") as memory:
        train("cuda")
    ledger = memory._device.ledger
    assert ledger is not None
    assert saved_by_size(ledger) == saved_by_size(plain)


def generated(model: Any, **named: Any) -> tuple[Any, int]:
    ids = torch.ones(2, 8, dtype=torch.long, device="cuda")
    found = model.to("cuda").generate(ids, max_new_tokens=6, **named)
    return found.shape, torch.cuda.max_memory_allocated()


def test_beams_are_generated_to_their_end() -> None:
    """Three of them take more than one text, in a model with a decoder alone."""
    with meft_bench.virtual_gpu("T4"):
        model = transformers.LlamaForCausalLM(text_config())
        _, one = generated(model)
        torch.cuda.reset_peak_memory_stats()
        _, three = generated(model, num_beams=3)
    assert three > one


@pytest.mark.slow
@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("kind", ["Bart", "T5"])
def test_an_encoder_and_decoder_generates(kind: str, num_beams: int) -> None:
    """BART's end token is read on the GPU."""
    sizes: dict[str, dict[str, Any]] = {
        "Bart": {
            **{f"{part}_layers": 2 for part in ("encoder", "decoder")},
            **{f"{part}_attention_heads": 4 for part in ("encoder", "decoder")},
            **{f"{part}_ffn_dim": 128 for part in ("encoder", "decoder")},
        },
        "T5": {"d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4},
    }
    config = getattr(transformers, f"{kind}Config")(
        d_model=64, vocab_size=512, decoder_start_token_id=0, **sizes[kind]
    )
    with meft_bench.virtual_gpu("T4"):
        model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
        shape, _ = generated(model, num_beams=num_beams)
    assert num_beams > 1 or shape == (2, 7)


def test_a_pinned_batch_has_its_values() -> None:
    """Two worker processes are left out."""
    rows = torch.arange(16).view(8, 2)
    with meft_bench.virtual_gpu("T4"):
        loader = torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(rows),
            batch_size=4,
            num_workers=2,
            pin_memory=True,
            persistent_workers=True,
        )
        seen = [batch.to("cuda", non_blocking=True).tolist() for (batch,) in loader]
    assert seen == [rows[:4].tolist(), rows[4:].tolist()]


def test_a_selection_by_a_mask_of_the_batch_keeps_what_it_does() -> None:
    """As a loss that is taken of the tokens of an answer alone."""
    labels = torch.full((4, 64), -100)
    labels[:, 48:] = 1
    with meft_bench.virtual_gpu("T4"):
        head = nn.Linear(32, 4096, bias=False, device="cuda")
        hidden = torch.randn(4, 64, 32, device="cuda")
        answered = labels.cuda() != -100
        before = torch.cuda.memory_allocated()
        logits = head(hidden[answered])
        assert logits.shape == (64, 4096)
        taken = torch.cuda.memory_allocated() - before
        libraries = 8_519_680  # of cuBLAS, from the first product on
        assert taken == 4 * 64 * 4096 + 4 * 64 * 32 + libraries


def test_values_are_of_the_memory_and_not_of_the_name() -> None:
    """What is put behind a tensor, or written through another, has no old values."""
    with meft_bench.virtual_gpu("H200"):
        x = torch.ones(3, dtype=torch.long).cuda()
        x.data = torch.tensor([1, 2, 3, 4, 5]).cuda()
        assert x.tolist() == [0] * 5
        y, z = torch.ones(3, dtype=torch.long).cuda(), torch.tensor([7, 8, 9]).cuda()
        torch.utils.swap_tensors(y, z)
        assert y.tolist() != [1, 1, 1]
        a = torch.ones(3, dtype=torch.long).cuda()
        torch.empty(0, dtype=torch.long, device="cuda").set_(a).fill_(7)  # type: ignore[call-overload]
        assert a.tolist() != [1, 1, 1]


def test_masks_of_the_host_and_bytes_select() -> None:
    with meft_bench.virtual_gpu("H200"):
        x = torch.randn(4, 5, device="cuda")
        mask = torch.tensor([True, False, True, False])
        for one in (mask, mask.cuda(), mask.byte(), mask.byte().cuda()):
            assert x[one].shape == (2, 5)
        assert x[:, torch.tensor([1, 2])].shape == (4, 2)


def test_constants_like_large_tensors_take_no_memory_of_the_host() -> None:
    with meft_bench.virtual_gpu("H200", enforce_memory=False):
        x = torch.empty(2**20, 2**20, device="cuda")
        assert torch.zeros_like(x, dtype=torch.bool).shape == x.shape
        assert x.new_zeros(16, dtype=torch.long).tolist() == [0] * 16
        out = torch.zeros(5, dtype=torch.long, device="cuda")
        assert torch.arange(5, out=out) is out


def test_the_default_device_holds_for_numbers() -> None:
    with meft_bench.virtual_gpu("H200"), torch.device("cuda"):
        assert torch.tensor([1, 2]).device.type == "cuda"
    with torch.device("meta"):
        assert torch.tensor([1, 2]).device.type == "meta"
