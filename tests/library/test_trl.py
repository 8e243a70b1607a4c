"""TRL's `SFTTrainer` on a reversible model, with a tokenizer and texts made here."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

import meft
from library.sparse import VOCAB, plain_model
from marks import slow_but_for
from meft.reversible.blocks import find_stacks

trl = pytest.importorskip("trl", reason="trl is not installed")
peft = pytest.importorskip("peft")
datasets = pytest.importorskip("datasets")
pytestmark = [
    # Of trl and peft about transformers, and of transformers about trl.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

NUM_WORDS = VOCAB - 3


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(NUM_WORDS))]
    inner = Tokenizer(
        WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    inner.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def texts() -> Any:
    lengths = (3 + i % 5 for i in range(12))
    rows = [
        {"text": " ".join(f"w{(7 * i + 3 * j) % NUM_WORDS}" for j in range(length))}
        for i, length in enumerate(lengths)
    ]
    return datasets.Dataset.from_list(rows)


def lora() -> Any:
    return peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "up_proj"])


def model(with_lora: bool = False, backward: str = "rebuild") -> Any:
    inner: Any = plain_model(2)
    if with_lora:
        inner = peft.get_peft_model(inner, lora())
    torch.manual_seed(1)
    return meft.make_reversible(
        inner,
        meft.ReversibleConfig(variant="meft1", bottleneck_size=3, backward=backward),
    )


def trainer(of: Any, directory: Path, peft_config: Any = None, **options: Any) -> Any:
    fields: dict[str, Any] = {
        "output_dir": str(directory),
        "max_steps": 4,
        "per_device_train_batch_size": 3,
        "learning_rate": 2e-2,
        "logging_steps": 1,
        "max_length": 32,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return trl.SFTTrainer(
        model=of,
        args=trl.SFTConfig(**fields | options),
        train_dataset=texts(),
        eval_dataset=texts(),
        processing_class=tokenizer(),
        peft_config=peft_config,
    )


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "packed": {"packing": True},
    "packed and wrapped": {"packing": True, "packing_strategy": "wrapped"},
    "without padding": {"padding_free": True, "max_length": None},
    "dft": {"loss_type": "dft"},
    "smoothed": {"label_smoothing_factor": 0.1},
    "bf16": {"bf16": True},
}


@pytest.mark.parametrize("name", slow_but_for(OPTIONS, "plain"))
@pytest.mark.parametrize("with_lora", [False, True], ids=["alone", "lora"])
def test_sft_gives_the_twins_numbers(
    name: str, with_lora: bool, tmp_path: Path
) -> None:
    """Losses, norms and the evaluation in every digit, with TRL's own loss; with LoRA
    inside, both train."""
    seen = []
    for backward in ("rebuild", "store"):
        reversible = model(with_lora, backward)
        before = {n: p.detach().clone() for n, p in reversible.named_parameters()}
        sft = trainer(reversible, tmp_path, **OPTIONS[name])
        sft.train()
        loss = sft.evaluate()["eval_loss"]
        log = [entry for entry in sft.state.log_history if "loss" in entry]
        seen.append(([(entry["loss"], entry["grad_norm"]) for entry in log], loss))
        moved = {
            n for n, p in reversible.named_parameters() if not torch.equal(p, before[n])
        }
        assert any(".adapters." in n for n in moved)
        assert with_lora == any("lora_" in n for n in moved)
        assert all(".adapters." in n or "lora_" in n for n in moved)
    assert seen[0] == seen[1]
    assert len(seen[0][0]) == 4


def test_documents_without_padding_do_not_see_each_other(tmp_path: Path) -> None:
    """Rows laid end to end have the loss of padded rows, up to the order of sums."""
    losses = []
    for options in (OPTIONS["plain"], OPTIONS["without padding"]):
        losses.append(trainer(model(), tmp_path, **options).evaluate()["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_checkpointing_is_switched_off_under_both_names(
    name: str, tmp_path: Path
) -> None:
    """As `docs/composition.md` says; in TRL it is on by default."""
    options: dict[str, Any] = {name: False}
    config = trl.SFTConfig(output_dir=str(tmp_path), bf16=False, **options)
    assert not config.gradient_checkpointing


def test_the_default_names_gradient_checkpointing(tmp_path: Path) -> None:
    """`SFTConfig` switches it on by default; the error says how it is switched off."""
    assert trl.SFTConfig(output_dir=str(tmp_path), bf16=False).gradient_checkpointing
    sft = trainer(model(), tmp_path, gradient_checkpointing=True)
    with pytest.raises(
        meft.UnsupportedCallError, match=r"`gradient_checkpointing=False`.*`SFTConfig`"
    ):
        sft.train()


def test_a_peft_config_comes_last_and_says_so(tmp_path: Path) -> None:
    """`SFTTrainer` calls `get_peft_model` on what it is given: the first step says that
    the adapters are frozen, and how both are trained."""
    sft = trainer(model(), tmp_path, peft_config=lora())
    with pytest.warns(meft.FrozenWarning, match="peft was applied after"):
        sft.train()


def test_what_sft_saves_comes_back_whole(tmp_path: Path) -> None:
    """The best of TRL's checkpoints, with LoRA inside: restored in memory, and loaded
    from its directory, the same bits."""
    reversible = model(with_lora=True)
    sft = trainer(
        reversible,
        tmp_path,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
    )
    sft.train()
    best = Path(sft.state.best_model_checkpoint)
    loaded = peft.PeftModel.from_pretrained(plain_model(2), best)
    meft.load_adapters(loaded, best)
    assert find_stacks(loaded)
    parameters = dict(reversible.named_parameters())
    assert all(torch.equal(p, parameters[n]) for n, p in loaded.named_parameters())
