"""Tiny models of every block class with every head, and a batch for each.

Weights are larger than transformers starts them and norms and biases are not 1 and 0:
every part of a block has an effect that is its own, so that a swap is noticed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    BartConfig,
    BertConfig,
    BloomConfig,
    CamembertConfig,
    CLIPConfig,
    CLIPTextConfig,
    CLIPVisionConfig,
    CohereConfig,
    DebertaConfig,
    DebertaV2Config,
    DeiTConfig,
    Dinov2Config,
    DistilBertConfig,
    ElectraConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MBartConfig,
    MistralConfig,
    MixtralConfig,
    ModernBertConfig,
    MPNetConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    RobertaConfig,
    SiglipConfig,
    SiglipTextConfig,
    SiglipVisionConfig,
    SmolLM3Config,
    StableLmConfig,
    T5Config,
    ViTConfig,
    WhisperConfig,
    XLMRobertaConfig,
)

import meft
from meft.reversible.blocks import find_stacks

DEPTH, HIDDEN, VOCAB, LABELS = 3, 16, 50, 2  # question answering asks for 2
ROWS, SEQ, IMAGE, PATCH = 3, 7, 8, 4
MELS, FRAMES = 4, 12
BOS, PAD, EOS = 0, 1, 2
DROPOUT, STD = 0.1, 0.2

Batch = dict[str, Tensor]
Model = TypeVar("Model", bound=PreTrainedModel)


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A class of model on a family of blocks."""

    family: str
    """As the library writes it, `BERT`."""
    kind: str
    """Of transformers' model class, `BertForMaskedLM`."""
    config: Callable[..., PreTrainedConfig]
    batch: Callable[[], Batch]
    is_slow: bool = False
    """Whether its block is described by the same names as that of another case."""
    form: str = ""
    """Of the blocks, where a family has several: `post-norm`."""

    @property
    def name(self) -> str:
        """Of the class, and of the form of its blocks."""
        return f"{self.kind} {self.form}" if self.form else self.kind

    @property
    def head(self) -> str:
        """The class, under the name that it would have in most families."""
        return self.kind.replace("LMHeadModel", "ForCausalLM")

    def build(self, depth: int = DEPTH, **options: Any) -> PreTrainedModel:
        """The plain model, in training mode; always with the same weights."""
        torch.manual_seed(0)
        # The first block before a convolution stays as it is.
        config = self.config(
            max(depth, 2 if self.form == "convolution" else 1), **options
        )
        model: PreTrainedModel = getattr(transformers, self.kind)(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.train()
        return model


def encoder_config(
    kind: Callable[..., PreTrainedConfig], depth: int, **options: Any
) -> PreTrainedConfig:
    """BERT and its relatives."""
    return kind(
        **text_options(depth),
        intermediate_size=2 * HIDDEN,
        hidden_dropout_prob=DROPOUT,
        attention_probs_dropout_prob=DROPOUT,
        initializer_range=STD,
        **options,
    )


def distilbert_config(depth: int, **options: Any) -> PreTrainedConfig:
    return DistilBertConfig(
        vocab_size=VOCAB,
        dim=HIDDEN,
        n_layers=depth,
        n_heads=2,
        hidden_dim=2 * HIDDEN,
        max_position_embeddings=32,
        dropout=DROPOUT,
        attention_dropout=DROPOUT,
        initializer_range=STD,
        pad_token_id=PAD,
        **{"num_labels": LABELS, **options},
    )


def opt_config(is_pre_norm: bool, depth: int, **options: Any) -> PreTrainedConfig:
    return OPTConfig(
        **text_options(depth),
        ffn_dim=2 * HIDDEN,
        word_embed_proj_dim=HIDDEN,
        do_layer_norm_before=is_pre_norm,
        dropout=DROPOUT,
        attention_dropout=DROPOUT,
        init_std=STD,
        **options,
    )


def bart_config(
    kind: Callable[..., PreTrainedConfig], depth: int, **options: Any
) -> PreTrainedConfig:
    """BART and MBart."""
    return kind(
        **encoder_decoder_options(depth),
        max_position_embeddings=32,
        **{"num_labels": LABELS, **options},
    )


def encoder_decoder_options(depth: int) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "d_model": HIDDEN,
        "encoder_layers": depth,
        "decoder_layers": depth,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 2 * HIDDEN,
        "decoder_ffn_dim": 2 * HIDDEN,
        "dropout": DROPOUT,
        "attention_dropout": DROPOUT,
        "activation_dropout": DROPOUT,
        "init_std": STD,
    }


def llama_config(
    kind: Callable[..., PreTrainedConfig], depth: int, **options: Any
) -> PreTrainedConfig:
    """LLaMA and its relatives, with half as many heads for keys as for queries."""
    return kind(
        **text_options(depth),
        intermediate_size=2 * HIDDEN,
        num_key_value_heads=1,
        attention_dropout=DROPOUT,
        initializer_range=STD,
        **options,
    )


def t5_config(
    depth: int, kind: Callable[..., PreTrainedConfig] = T5Config, **options: Any
) -> PreTrainedConfig:
    return kind(
        vocab_size=VOCAB,
        d_model=HIDDEN,
        d_kv=HIDDEN // 2,
        d_ff=2 * HIDDEN,
        num_layers=depth,
        num_decoder_layers=depth,
        num_heads=2,
        relative_attention_num_buckets=6,
        relative_attention_max_distance=5,
        dropout_rate=DROPOUT,
        pad_token_id=PAD,
        eos_token_id=EOS,
        **{"num_labels": LABELS, "decoder_start_token_id": PAD, **options},
    )


def albert_config(depth: int, **options: Any) -> PreTrainedConfig:
    """Two groups of layers, of which the first is called in most of the layers."""
    groups = {"num_hidden_groups": min(2, depth), "embedding_size": HIDDEN // 2}
    return encoder_config(AlbertConfig, depth, **(groups | options))


def deberta_config(
    kind: Callable[..., PreTrainedConfig], depth: int, **options: Any
) -> PreTrainedConfig:
    """With embeddings of relative positions, to keys and to queries."""
    is_v2 = kind is DebertaV2Config
    own = {"position_buckets": 4, "norm_rel_ebd": "layer_norm"} if is_v2 else {}
    return encoder_config(
        kind,
        depth,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        max_relative_positions=8,
        position_biased_input=False,
        **(own | options),
    )


def image_config(
    kind: Callable[..., PreTrainedConfig], depth: int, **options: Any
) -> PreTrainedConfig:
    """ViT and DeiT."""
    return kind(
        hidden_size=HIDDEN,
        num_hidden_layers=depth,
        num_attention_heads=2,
        intermediate_size=2 * HIDDEN,
        image_size=IMAGE,
        patch_size=PATCH,
        encoder_stride=PATCH,
        hidden_dropout_prob=DROPOUT,
        attention_probs_dropout_prob=DROPOUT,
        initializer_range=STD,
        num_labels=LABELS,
        **options,
    )


def gpt2_config(depth: int, **options: Any) -> PreTrainedConfig:
    return GPT2Config(
        **text_options(depth),
        resid_pdrop=DROPOUT,
        attn_pdrop=DROPOUT,
        embd_pdrop=DROPOUT,
        initializer_range=STD,
        **options,
    )


def gpt_neox_config(is_parallel: bool, depth: int, **options: Any) -> PreTrainedConfig:
    return GPTNeoXConfig(
        **text_options(depth),
        intermediate_size=2 * HIDDEN,
        use_parallel_residual=is_parallel,
        rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5},
        hidden_dropout=DROPOUT,
        attention_dropout=DROPOUT,
        initializer_range=STD,
        **options,
    )


def bloom_config(depth: int, **options: Any) -> PreTrainedConfig:
    return BloomConfig(
        **text_options(depth),
        hidden_dropout=DROPOUT,
        attention_dropout=DROPOUT,
        initializer_range=STD,
        **options,
    )


def falcon_config(depth: int, **options: Any) -> PreTrainedConfig:
    """Without dropout on a sum of two halves."""
    return FalconConfig(
        **text_options(depth),
        ffn_hidden_size=2 * HIDDEN,
        attention_dropout=DROPOUT,
        initializer_range=STD,
        **options,
    )


def modernbert_config(depth: int, **options: Any) -> PreTrainedConfig:
    """Every other block attends to one token on each side."""
    return ModernBertConfig(
        **text_options(depth),
        intermediate_size=2 * HIDDEN,
        local_attention=2,
        layer_types=in_turn("full_attention", "sliding_attention", depth=depth),
        mlp_dropout=DROPOUT,
        attention_dropout=DROPOUT,
        embedding_dropout=DROPOUT,
        initializer_range=STD,
        initializer_cutoff_factor=3.0,
        cls_token_id=BOS,
        sep_token_id=EOS,
        **options,
    )


def sliding_config(
    kind: Callable[..., PreTrainedConfig], depth: int, **options: Any
) -> PreTrainedConfig:
    """Decoders of which every other block attends to three tokens."""
    return llama_config(
        kind,
        depth,
        sliding_window=3,
        layer_types=in_turn("sliding_attention", "full_attention", depth=depth),
        **options,
    )


def moe_config(
    kind: Callable[..., PreTrainedConfig], depth: int, **options: Any
) -> PreTrainedConfig:
    """Mixtures of 4 experts, of which each token is given 2."""
    return llama_config(
        kind, depth, num_experts_per_tok=2, head_dim=HIDDEN // 2, **options
    )


def whisper_config(depth: int, **options: Any) -> PreTrainedConfig:
    return WhisperConfig(
        **encoder_decoder_options(depth),
        num_mel_bins=MELS,
        max_source_positions=FRAMES // 2,
        max_target_positions=32,
        bos_token_id=BOS,
        pad_token_id=PAD,
        eos_token_id=EOS,
        decoder_start_token_id=EOS,
        suppress_tokens=[],
        begin_suppress_tokens=[],
        **{"num_labels": LABELS, **options},
    )


def tower_options(depth: int) -> dict[str, Any]:
    """What a text tower and an image tower have in common."""
    return {
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": depth,
        "num_attention_heads": 2,
        "attention_dropout": DROPOUT,
        "initializer_range": STD,
    }


def text_tower_config(
    kind: Callable[..., PreTrainedConfig], depth: int, **options: Any
) -> PreTrainedConfig:
    return kind(
        **tower_options(depth),
        vocab_size=VOCAB,
        max_position_embeddings=SEQ,
        bos_token_id=BOS,
        pad_token_id=PAD,
        eos_token_id=EOS,
        projection_size=HIDDEN,
        **options,
    )


def image_tower_config(
    kind: Callable[..., PreTrainedConfig], depth: int, **options: Any
) -> PreTrainedConfig:
    return kind(**tower_options(depth), image_size=IMAGE, patch_size=PATCH, **options)


def towers_config(
    kind: Callable[..., PreTrainedConfig],
    text_kind: Callable[..., PreTrainedConfig],
    image_kind: Callable[..., PreTrainedConfig],
    depth: int,
    **options: Any,
) -> PreTrainedConfig:
    return kind(
        text_config=text_tower_config(text_kind, depth).to_dict(),
        vision_config=image_tower_config(image_kind, depth).to_dict(),
        projection_dim=HIDDEN,
        **{"num_labels": LABELS, **options},
    )


def dinov2_config(depth: int, **options: Any) -> PreTrainedConfig:
    return Dinov2Config(
        hidden_size=HIDDEN,
        num_hidden_layers=depth,
        num_attention_heads=2,
        mlp_ratio=2,
        image_size=IMAGE,
        patch_size=PATCH,
        hidden_dropout_prob=DROPOUT,
        attention_probs_dropout_prob=DROPOUT,
        initializer_range=STD,
        **{"num_labels": LABELS, "drop_path_rate": 0.3, **options},
    )


def in_turn(*kinds: str, depth: int) -> list[str]:
    """As many of these as there are blocks, over and over."""
    return [kinds[index % len(kinds)] for index in range(depth)]


def text_options(depth: int) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "num_hidden_layers": depth,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
        "bos_token_id": BOS,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "num_labels": LABELS,
    }


def text() -> Batch:
    """Rows of tokens that end in EOS; the first is padded on the right."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(EOS + 1, VOCAB, (ROWS, SEQ), generator=generator)
    mask = torch.ones(ROWS, SEQ, dtype=torch.long)
    mask[0, 4:] = 0
    ids[:, -1] = EOS
    ids[0, 3] = EOS
    return {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask}


def text_pair() -> Batch:
    """A padded text for the encoder, another and shorter one for the decoder."""
    rows = text()
    return rows | {f"decoder_{name}": x.roll(1, 0)[:, :5] for name, x in rows.items()}


def labelled_text() -> Batch:
    return text() | {"labels": torch.tensor([0, 1, 1])}


def labelled_tokens() -> Batch:
    rows = text()
    labels = rows["input_ids"] % LABELS
    return rows | {"labels": labels.masked_fill(rows["attention_mask"] == 0, -100)}


def continued_text() -> Batch:
    rows = text()
    ids = rows["input_ids"]
    return rows | {"labels": ids.masked_fill(rows["attention_mask"] == 0, -100)}


def questions() -> Batch:
    positions = torch.tensor([1, 2, 3])
    return text() | {"start_positions": positions, "end_positions": positions}


def choices() -> Batch:
    """Two texts to choose from in every row."""
    rows = {name: torch.stack([x, x.roll(1, 0)], 1) for name, x in text().items()}
    return rows | {"labels": torch.tensor([0, 1, 1])}


def images() -> Batch:
    generator = torch.Generator().manual_seed(2)
    return {"pixel_values": torch.randn(ROWS, 3, IMAGE, IMAGE, generator=generator)}


def labelled_images() -> Batch:
    return images() | {"labels": torch.tensor([0, 1, 1])}


def texts_and_images() -> Batch:
    """As many texts as images."""
    return text() | images()


def sounds() -> Batch:
    """Spectra of sounds for the encoder, a padded text for the decoder."""
    generator = torch.Generator().manual_seed(2)
    spectra = torch.randn(ROWS, MELS, FRAMES, generator=generator)
    rows = {f"decoder_{name}": tokens for name, tokens in text().items()}
    return {"input_features": spectra} | rows


def transcribed_sounds() -> Batch:
    return sounds() | {"labels": continued_text()["labels"]}


def masked_images() -> Batch:
    return images() | {"bool_masked_pos": torch.tensor([[True, False, False, True]])}


ENCODER_HEADS = {
    "Model": text,
    "ForMaskedLM": continued_text,
    "ForSequenceClassification": labelled_text,
    "ForTokenClassification": labelled_tokens,
    "ForQuestionAnswering": questions,
    "ForMultipleChoice": choices,
}
OPT_HEADS = {
    "Model": text,
    "ForCausalLM": continued_text,
    "ForSequenceClassification": labelled_text,
    "ForQuestionAnswering": questions,
}
BART_HEADS = {
    "Model": text_pair,
    "ForConditionalGeneration": continued_text,
    "ForSequenceClassification": labelled_text,
    "ForQuestionAnswering": questions,
    "ForCausalLM": continued_text,
}
FEW_ENCODER_HEADS = {
    "Model": text,
    "ForMaskedLM": continued_text,
    "ForSequenceClassification": labelled_text,
}
FEW_DECODER_HEADS = {
    "Model": text,
    "ForCausalLM": continued_text,
    "ForSequenceClassification": labelled_text,
}
GRANITE_HEADS = {"Model": text, "ForCausalLM": continued_text}
LLAMA_HEADS = OPT_HEADS | {"ForTokenClassification": labelled_tokens}
VIT_HEADS = {
    "Model": images,
    "ForImageClassification": labelled_images,
    "ForMaskedImageModeling": masked_images,
}
DEIT_HEADS = VIT_HEADS | {"ForImageClassificationWithTeacher": images}

CASES = [
    Case(
        family=family,
        kind=prefix + head,
        config=config,
        batch=batch,
        form="".join(form),
    )
    for family, prefix, config, heads, *form in (
        ("BERT", "Bert", partial(encoder_config, BertConfig), ENCODER_HEADS),
        ("RoBERTa", "Roberta", partial(encoder_config, RobertaConfig), ENCODER_HEADS),
        ("OPT", "OPT", partial(opt_config, True), OPT_HEADS),
        ("OPT", "OPT", partial(opt_config, False), OPT_HEADS, "post-norm"),
        ("BART", "Bart", partial(bart_config, BartConfig), BART_HEADS),
        ("LLaMA", "Llama", partial(llama_config, LlamaConfig), LLAMA_HEADS),
        (
            "Mistral",
            "Mistral",
            partial(llama_config, MistralConfig, sliding_window=None),
            LLAMA_HEADS,
        ),
        ("ViT", "ViT", partial(image_config, ViTConfig), VIT_HEADS),
        ("DeiT", "DeiT", partial(image_config, DeiTConfig), DEIT_HEADS),
    )
    for head, batch in heads.items()
]
"""Every head of the families of the papers and their relatives."""

AS_BERT = (
    ("XLM-RoBERTa", "XLMRoberta", XLMRobertaConfig),
    ("CamemBERT", "Camembert", CamembertConfig),
    ("ELECTRA", "Electra", ElectraConfig),
)
AS_LLAMA: tuple[tuple[str, str, Any, dict[str, Any]], ...] = (
    ("Qwen2", "Qwen2", Qwen2Config, {}),
    ("Gemma", "Gemma", GemmaConfig, {"head_dim": HIDDEN // 2}),
    ("SmolLM3", "SmolLM3", SmolLM3Config, {}),
)
OTHERS: tuple[tuple[str, str, Any, dict[str, Callable[[], Batch]], bool], ...] = (
    *(
        (name, prefix, partial(encoder_config, kind), FEW_ENCODER_HEADS, True)
        for name, prefix, kind in AS_BERT
    ),
    ("DistilBERT", "DistilBert", distilbert_config, FEW_ENCODER_HEADS, False),
    *(
        (name, prefix, partial(llama_config, kind, **own), FEW_DECODER_HEADS, True)
        for name, prefix, kind, own in AS_LLAMA
    ),
    (
        "Qwen3",
        "Qwen3",
        partial(llama_config, Qwen3Config, head_dim=HIDDEN // 2),
        FEW_DECODER_HEADS,
        False,
    ),
    (
        "Phi-3",
        "Phi3",
        partial(llama_config, Phi3Config, resid_pdrop=DROPOUT),
        FEW_DECODER_HEADS,
        False,
    ),
    (
        "OLMo 2",
        "Olmo2",
        partial(llama_config, Olmo2Config),
        FEW_DECODER_HEADS,
        False,
    ),
    (
        "Granite",
        "Granite",
        partial(llama_config, GraniteConfig, residual_multiplier=0.5),
        GRANITE_HEADS,
        False,
    ),
)
CASES += [
    Case(family=family, kind=prefix + head, config=config, batch=batch, is_slow=is_slow)
    for family, prefix, config, heads, is_slow in OTHERS
    for head, batch in heads.items()
]
"""Some heads of the others: in transformers, heads are the same code for all."""

MBART_HEADS = {
    "Model": text_pair,
    "ForConditionalGeneration": continued_text,
    "ForCausalLM": continued_text,
}
T5_HEADS = {
    "Model": text_pair,
    "EncoderModel": text,
    "ForConditionalGeneration": continued_text,
    "ForSequenceClassification": labelled_text,
}
WHISPER_HEADS = {"Model": sounds, "ForConditionalGeneration": transcribed_sounds}
SOME_IMAGE_HEADS = {"Model": images, "ForImageClassification": labelled_images}
DECODER_HEADS = {"Model": text, "ForCausalLM": continued_text}
GPT2_HEADS = {
    "Model": text,
    "LMHeadModel": continued_text,
    "ForSequenceClassification": labelled_text,
}
CLIP = CLIPConfig, CLIPTextConfig, CLIPVisionConfig
SIGLIP = SiglipConfig, SiglipTextConfig, SiglipVisionConfig

Form = tuple[
    str, str, Callable[..., PreTrainedConfig], dict[str, Callable[[], Batch]], str
]
"""Family, start and config of the class, its heads, and the form of the blocks."""

FORMS: tuple[Form, ...] = (
    (
        "Gemma 2",
        "Gemma2",
        partial(sliding_config, Gemma2Config, head_dim=HIDDEN // 2),
        FEW_DECODER_HEADS,
        "",
    ),
    ("ModernBERT", "ModernBert", modernbert_config, FEW_ENCODER_HEADS, ""),
    (
        "GPT-NeoX",
        "GPTNeoX",
        partial(gpt_neox_config, True),
        FEW_DECODER_HEADS,
        "parallel",
    ),
    (
        "GPT-NeoX",
        "GPTNeoX",
        partial(gpt_neox_config, False),
        DECODER_HEADS,
        "pre-norm",
    ),
    (
        "Phi",
        "Phi",
        partial(llama_config, PhiConfig, resid_pdrop=DROPOUT, embd_pdrop=DROPOUT),
        FEW_DECODER_HEADS,
        "",
    ),
    ("Cohere", "Cohere", partial(llama_config, CohereConfig), DECODER_HEADS, ""),
    *(
        (
            "StableLM",
            "StableLm",
            partial(
                llama_config,
                StableLmConfig,
                hidden_dropout=DROPOUT,
                use_parallel_residual=is_parallel,
            ),
            DECODER_HEADS,
            form,
        )
        for is_parallel, form in ((False, "pre-norm"), (True, "parallel"))
    ),
    *(
        ("Falcon", "Falcon", partial(falcon_config, **own), heads, form)
        for form, heads, own in (
            ("one norm", FEW_DECODER_HEADS, {}),
            (
                "two norms",
                DECODER_HEADS,
                {"new_decoder_architecture": True, "num_kv_heads": 1},
            ),
            (
                "pre-norm",
                DECODER_HEADS,
                {"parallel_attn": False, "alibi": True, "hidden_dropout": DROPOUT},
            ),
        )
    ),
    ("GPT-2", "GPT2", gpt2_config, GPT2_HEADS, ""),
    ("BLOOM", "Bloom", bloom_config, FEW_DECODER_HEADS, ""),
    ("MBart", "MBart", partial(bart_config, MBartConfig), MBART_HEADS, ""),
    ("T5", "T5", t5_config, T5_HEADS, ""),
    *(
        (
            "DeBERTa-v2",
            "DebertaV2",
            partial(deberta_config, DebertaV2Config, **own),
            heads,
            form,
        )
        for form, heads, own in (
            ("", FEW_ENCODER_HEADS, {}),
            ("convolution", {"Model": text}, {"conv_kernel_size": 3}),
        )
    ),
    (
        "MPNet",
        "MPNet",
        partial(encoder_config, MPNetConfig),
        FEW_ENCODER_HEADS,
        "",
    ),
    ("ALBERT", "Albert", albert_config, FEW_ENCODER_HEADS, ""),
    ("DINOv2", "Dinov2", dinov2_config, SOME_IMAGE_HEADS, ""),
    (
        "Qwen3-MoE",
        "Qwen3Moe",
        partial(
            moe_config,
            Qwen3MoeConfig,
            moe_intermediate_size=HIDDEN,
            num_experts=4,
            mlp_only_layers=[1],
        ),
        FEW_DECODER_HEADS,
        "",
    ),
    (
        "CLIP",
        "CLIP",
        partial(towers_config, *CLIP),
        {"Model": texts_and_images},
        "",
    ),
    (
        "CLIP",
        "CLIPText",
        partial(text_tower_config, CLIPTextConfig),
        {"Model": text},
        "",
    ),
)
"""Those whose blocks are described by other names than those above."""

ALIKE: tuple[Form, ...] = (
    (
        "Gemma 3",
        "Gemma3",
        partial(sliding_config, Gemma3TextConfig, head_dim=HIDDEN // 2),
        {
            "TextModel": text,
            "ForCausalLM": continued_text,
            "TextForSequenceClassification": labelled_text,
        },
        "",
    ),
    *(
        (
            family,
            family,
            partial(
                sliding_config,
                kind,
                use_sliding_window=True,
                max_window_layers=1,
                **own,
            ),
            DECODER_HEADS,
            "sliding",
        )
        for family, kind, own in (
            ("Qwen2", Qwen2Config, {}),
            ("Qwen3", Qwen3Config, {"head_dim": HIDDEN // 2}),
        )
    ),
    ("Whisper", "Whisper", whisper_config, WHISPER_HEADS, ""),
    (
        "DeBERTa",
        "Deberta",
        partial(deberta_config, DebertaConfig),
        FEW_ENCODER_HEADS,
        "",
    ),
    (
        "Mixtral",
        "Mixtral",
        partial(moe_config, MixtralConfig, num_local_experts=4),
        FEW_DECODER_HEADS,
        "",
    ),
    (
        "CLIP",
        "CLIPVision",
        partial(image_tower_config, CLIPVisionConfig),
        {"Model": images},
        "",
    ),
    (
        "CLIP",
        "CLIP",
        partial(towers_config, *CLIP),
        {"ForImageClassification": labelled_images},
        "",
    ),
    (
        "SigLIP",
        "Siglip",
        partial(towers_config, *SIGLIP),
        {
            "Model": texts_and_images,
            "ForImageClassification": labelled_images,
        },
        "",
    ),
)
"""Those whose blocks are described by the names of another case."""

CASES += [
    Case(
        family=family,
        kind=prefix + head,
        config=config,
        batch=batch,
        form=form,
        is_slow=is_slow,
    )
    for forms, is_slow in ((FORMS, False), (ALIKE, True))
    for family, prefix, config, heads, form in forms
    for head, batch in heads.items()
]


def some_cases(*heads: str) -> list[Case]:
    """All cases, or those whose class ends in one of `heads`."""
    return [case for case in CASES if case.head.endswith(heads or "")]


def cases(*heads: str) -> pytest.MarkDecorator:
    """Run a test for each of `some_cases`."""
    return pytest.mark.parametrize(
        "case",
        [
            pytest.param(case, marks=pytest.mark.slow if case.is_slow else ())
            for case in some_cases(*heads)
        ],
        ids=lambda case: case.name,
    )


def reversible(
    case: Case, depth: int = DEPTH, dtype: torch.dtype = torch.float32, **config: Any
) -> PreTrainedModel:
    """The reversible model of a case, in training mode."""
    model = case.build(depth)
    nn.Module.to(model, dtype)
    torch.manual_seed(1)
    options = {"variant": "meft1", "bottleneck_size": 3, **config}
    return meft.make_reversible(model, meft.ReversibleConfig(**options))


def twin_of(model: Model) -> Model:
    """The same model, storing its activations."""
    for stack in find_stacks(model).values():
        stack.backward_pass = "store"
    return model


def objective(output: Any) -> Tensor:
    """The loss; without one, a weighted sum of the first output."""
    if getattr(output, "loss", None) is not None:
        loss: Tensor = output.loss
        return loss
    first: Tensor = output[0]
    weights = torch.linspace(-1, 1, first.numel()).view_as(first)
    return (first * weights).sum()


def gradients(model: PreTrainedModel, batch: Batch, seed: int = 3) -> Batch:
    """Loss and gradients by name, of every parameter that the model reads."""
    model.zero_grad()
    torch.manual_seed(seed)
    loss = objective(model(**batch))
    loss.backward()
    named = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach()} | {n: g.clone() for n, g in named.items()}


def assert_same_bits(one: Batch, other: Batch) -> None:
    """Same names, and every tensor equal."""
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different
