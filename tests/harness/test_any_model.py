"""Plans of any model that transformers can build from a config."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import meft_bench
from marks import slow_but_for
from meft_bench.child.backbones import any_family, shapes
from meft_bench.parent import cli
from meft_bench.shared.cell import Cell
from meft_bench.shared.registry import MODEL_TYPES, PLANNED_BACKBONES
from meft_bench.shared.source import Source
from meft_bench.virtual.device import attention, gpu
from meft_bench.virtual.prediction.plan import MemoryPlan, plan

pytestmark = [
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="there is a real GPU, which is left alone"
    ),
    # peft 0.21 on transformers 5.23.
    pytest.mark.filterwarnings("ignore:.* will be removed in v6:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.* is deprecated .* v6:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Accessing the data pointer:UserWarning"),
]
SIZES = {
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-8b-1m": 8_190_735_360,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "phi-3-mini": 3_821_079_552,
    "phi-4": 14_659_507_200,
    "smollm3-3b": 3_075_098_624,
    "deberta-v3-base": 184_423_682,
    "deberta-v3-large": 435_063_810,
    "t5-base": 222_903_552,
    "t5-large": 737_668_096,
    "whisper-small": 241_734_912,
    "whisper-large-v3": 1_543_490_560,
    "dinov2-base": 86_580_480 + 2 * 2 * 768 + 2,
    "dinov2-large": 304_368_640 + 2 * 2 * 1024 + 2,
    "siglip-base": 92_884_224 + 2 * 768 + 2,
}
"""Parameters of the published checkpoints; of encoders, with a head for two classes."""
TINY: dict[str, dict[str, Any]] = {
    "olmo": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 100,
    },
    "t5": {
        "d_model": 64,
        "d_ff": 128,
        "d_kv": 16,
        "num_layers": 2,
        "num_heads": 4,
        "vocab_size": 100,
    },
    "deit": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 14,
    },
    "whisper": {
        "d_model": 64,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 128,
        "decoder_ffn_dim": 128,
        "vocab_size": 100,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
        "max_source_positions": 50,
    },
    "mixtral": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "vocab_size": 128,
    },
    "gemma2": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 100,
    },
}


def planned(backbone: str, **fields: Any) -> MemoryPlan:
    usual: dict[str, Any] = {"task": "", "method": "full"}
    usual |= {"batch_size": 2, "seq_len": 16, "device": "virtual-H200"}
    one = Cell(backbone=backbone, **usual | fields)
    return plan(one, Source(allow_download=False), 0.05)


def config_file(tmp_path: Path, model_type: str) -> str:
    path = tmp_path / f"{model_type}.json"
    path.write_text(json.dumps({"model_type": model_type} | TINY[model_type]))
    return f"random:{path}"


@pytest.mark.parametrize("name", sorted({*SIZES, *PLANNED_BACKBONES}))
def test_shapes_have_their_published_size(name: str) -> None:
    config = shapes.find_config(name, any_type=True)
    task = any_family.task_of(config.model_type)
    one = Cell(backbone=f"random:{name}", method="full", device="meta", task=task)
    num_labels = None if task == "synthetic-lm" else 2
    model = any_family.make(config, one, num_labels)
    assert sum(p.numel() for p in model.parameters()) == SIZES[name]


@pytest.mark.parametrize(
    "model_type",
    slow_but_for([name for name in TINY if name not in MODEL_TYPES], "olmo", "deit"),
)
def test_a_config_is_enough(tmp_path: Path, model_type: str) -> None:
    """For all weights, LoRA and any config of PEFT; fewer are trained, less is held."""
    backbone = config_file(tmp_path, model_type)
    full = planned(backbone)
    assert full.verdict == "fits", full.message
    is_encoder = model_type == "deit"
    assert full.task == ("synthetic" if is_encoder else "synthetic-lm")
    lora = planned(backbone, method="lora")
    assert lora.verdict == "fits", lora.message
    assert lora.num_trainable_parameters is not None
    assert full.num_trainable_parameters is not None
    assert lora.num_trainable_parameters < full.num_trainable_parameters / 2
    assert "LORA on" in lora.prediction
    path = tmp_path / "adapter_config.json"
    targets = lora.prediction.rpartition("LORA on ")[2].split(";")[0].split(", ")
    fields = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": targets}
    path.write_text(json.dumps(fields))
    same = planned(backbone, method=f"peft:{path}")
    assert same.num_trainable_parameters == lora.num_trainable_parameters
    assert same.allocated_bytes == lora.allocated_bytes
    if model_type == "olmo":
        less = planned(backbone, method=f"peft-checkpointing:{path}", seq_len=64)
        more = planned(backbone, method=f"peft:{path}", seq_len=64)
        assert less.by_kind is not None
        assert more.by_kind is not None
        assert less.by_kind["saved"] < more.by_kind["saved"]


@pytest.mark.parametrize(
    ("dtype", "weights_dtype"), [("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "bf16")]
)
def test_experts_are_planned_in_every_dtype(
    tmp_path: Path, dtype: str, weights_dtype: str
) -> None:
    """Gradients of all experts, whichever tokens they get."""
    backbone = config_file(tmp_path, "mixtral")
    found = planned(backbone, dtype=dtype, weights_dtype=weights_dtype)
    assert found.verdict == "fits", found.message
    config = transformers.MixtralConfig(**TINY["mixtral"])
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    number = sum(p.numel() for p in model.parameters())
    assert found.num_trainable_parameters == number
    assert found.by_kind is not None
    width = 2 if weights_dtype == "bf16" else 4
    assert abs(found.by_kind["optimizer"] - 2 * width * number) < 64 * 1024


def test_a_step_is_that_of_code_of_ones_own(tmp_path: Path) -> None:
    """The same model and optimizer in `virtual_gpu`, but for tensors of the batch."""
    found = planned(config_file(tmp_path, "olmo"), batch_size=8, seq_len=256)
    config = transformers.OlmoConfig(**TINY["olmo"])
    with meft_bench.virtual_gpu("H200", padding=False) as memory:
        with torch.device("cuda"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        optimizer = torch.optim.AdamW(model.parameters())
        for step in range(2):
            if step:
                torch.cuda.reset_peak_memory_stats()
            ids = torch.zeros(8, 256, dtype=torch.long, device="cuda")
            mask = torch.ones_like(ids)
            out = model(input_ids=ids, attention_mask=mask, labels=ids.clone())
            out.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        own = memory.plan()
        del out
    assert found.by_kind is not None
    assert own.by_kind is not None
    assert found.where == own.where
    for kind in ("parameters", "optimizer", "saved", "gradients"):
        difference = found.by_kind.get(kind, 0) - own.by_kind.get(kind, 0)
        assert abs(difference) <= 2 * 8 * 256 * 8, kind


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("meft1", "needs a family that sweeps know"),
        ("peft:nothing", "has no type 'NOTHING'; did you mean"),
        ("peft:ia3", "PEFT refuses 'peft:ia3' for this model"),
    ],
)
def test_what_cannot_be_planned_is_refused(
    tmp_path: Path, method: str, words: str
) -> None:
    found = planned(config_file(tmp_path, "deit"), method=method)
    assert found.verdict == "unknown"
    assert words in found.message


def with_fields(tmp_path: Path, model_type: str, **fields: Any) -> str:
    path = tmp_path / f"{model_type}-changed.json"
    path.write_text(json.dumps({"model_type": model_type} | TINY[model_type] | fields))
    return f"random:{path}"


def test_what_the_config_asks_for_is_not_passed_over(tmp_path: Path) -> None:
    quantised = {"quantization_config": {"quant_method": "bitsandbytes"}}
    found = planned(with_fields(tmp_path, "olmo", **quantised))
    assert "quantised weights are not modelled" in found.message
    path = tmp_path / "swin.json"
    path.write_text('{"model_type": "swin", "image_size": 32, "window_size": 2}')
    assert "leave out `--depth`" in planned(f"random:{path}", depth=3).message
    path.write_text('{"model_type": "detr"}')
    assert (
        "neither a classifier nor a language model" in planned(f"random:{path}").message
    )
    odd = planned(with_fields(tmp_path, "olmo", hidden_act="none such"))
    assert "transformers cannot make a model of this config: KeyError" in odd.message


def test_what_a_model_freezes_itself_stays_frozen(tmp_path: Path) -> None:
    """Whisper's positions of the encoder are fixed waves."""
    found = planned(config_file(tmp_path, "whisper"))
    config = transformers.WhisperConfig(**TINY["whisper"])
    model = transformers.WhisperForConditionalGeneration(config)
    own = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found.num_trainable_parameters == own


def test_adapters_train_copies_of_whole_layers(tmp_path: Path) -> None:
    """Which PEFT makes of `modules_to_save`, and which take memory."""
    path = tmp_path / "adapter_config.json"
    fields: dict[str, Any] = {"peft_type": "LORA", "target_modules": ["q_proj"]}
    sizes = {}
    for saved in ([], ["lm_head"]):
        path.write_text(json.dumps(fields | {"modules_to_save": saved}))
        backbone = config_file(tmp_path, "olmo")
        found = planned(backbone, method=f"peft:{path}")
        assert found.by_kind is not None
        assert found.num_trainable_parameters is not None
        sizes[len(saved)] = found
    more, less = sizes[1], sizes[0]
    head = TINY["olmo"]["vocab_size"] * TINY["olmo"]["hidden_size"]
    assert more.num_trainable_parameters == less.num_trainable_parameters + head
    kinds = (more.by_kind or {}, less.by_kind or {})
    assert kinds[0]["parameters"] - kinds[1]["parameters"] == 4 * head


def test_other_configs_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"model_type": "nonesuch"}')
    found = planned(f"random:{path}")
    assert "which transformers" in found.message
    assert "code that comes with a model is not run" in found.message
    path.write_text("{}")
    assert "names no `model_type` of transformers" in planned(f"random:{path}").message
    long = planned(config_file(tmp_path, "whisper"), method="full", seq_len=10**6)
    assert long.verdict in ("unknown", "too large")


@pytest.mark.parametrize(
    ("model_type", "task"),
    [
        *(("llama", "synthetic-lm"), ("bert", "synthetic"), ("bart", "synthetic-lm")),
        *(("vit", "synthetic"), ("qwen3", "synthetic-lm"), ("t5", "synthetic-lm")),
        *(("modernbert", "synthetic"), ("whisper", "synthetic-lm")),
        *(("deberta-v2", "synthetic"), ("dinov2", "synthetic")),
    ],
)
def test_the_usual_head_is_planned(model_type: str, task: str) -> None:
    assert any_family.task_of(model_type) == task


@pytest.mark.slow
def test_a_known_family_is_planned_with_peft(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And the header says which head."""
    words = ["plan", "llama-tiny", "--method", "peft:ia3", "--gpu", "H200"]
    assert cli.main([*words, "--batch", "2", "--seq", "16"]) == 0
    out = capsys.readouterr().out
    assert "random:llama-tiny as a language model on NVIDIA H200" in out
    assert "peft:ia3  fits" in out
    assert "LlamaForCausalLM, IA3 on" in out


def test_a_mask_that_is_trained_keeps_cudnn_away() -> None:
    """As T5's bias of positions; cuDNN has no gradient for it (sdp_utils.cpp)."""
    query = torch.empty(1, 4, 8, 16, dtype=torch.bfloat16, requires_grad=True)
    chosen = {}
    for requires_grad in (False, True):
        mask = torch.empty(1, 4, 8, 8, dtype=torch.bfloat16)
        call = attention.Call(
            query=query,
            key=query,
            value=query,
            mask=mask.requires_grad_(requires_grad),
            dropout=0.0,
            is_causal=False,
            scale=None,
            enable_gqa=False,
        )
        chosen[requires_grad] = attention.chosen(gpu.find("H200"), call)
    assert chosen == {False: "cudnn", True: "efficient"}
