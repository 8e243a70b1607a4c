"""`meft_bench.virtual_gpu` around training code as people write it."""

import gc
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import find_executable_batch_size
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

import meft_bench
from harness.tiny import classifier
from marks import slow_but_for
from meft_bench.parent import cli
from meft_bench.shared.source import MissingError
from meft_bench.virtual.device import gpu
from meft_bench.virtual.emulation.virtual_gpu import VirtualGpu
from meft_bench.virtual.recording.replay import replay

pytestmark = [
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="there is a real GPU, which is left alone"
    ),
    # People's code has the names of transformers before 5.23.
    pytest.mark.filterwarnings("ignore:.* will be removed in v6:FutureWarning"),
]
GIB = 2**30


def llama(**changes: Any) -> Any:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=512,
            **changes,
        )
    )


class Block(nn.Module):
    """A block of a small GPT."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the next hidden states."""
        split = self.mix(self.norm(x)).chunk(3, dim=-1)
        query, key, value = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in split)
        mixed = functional.scaled_dot_product_attention(
            query, key, value, is_causal=True
        )
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        out: Tensor = x + self.mlp(self.norm_2(x))
        return out


def gpt_with_a_loss_scaler() -> None:
    """A loop of one's own: FP16 autocast, accumulation, clipping, a schedule."""
    torch.backends.cuda.matmul.allow_tf32 = True
    model = nn.Sequential(
        nn.Embedding(256, 64), Block(64), Block(64), nn.Linear(64, 256)
    ).to("cuda")
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups: list[dict[str, Any]] = [
        {"params": decayed},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, fused=True)
    scaler = torch.amp.GradScaler("cuda")
    for step in range(3):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * 0.5 * (1 + math.cos(math.pi * step / 3))
        for _ in range(2):
            text = torch.randint(256, (4, 33)).pin_memory()
            text = text.to("cuda", non_blocking=True)
            with torch.autocast("cuda", torch.float16):
                logits = model(text[:, :-1])
                loss = functional.cross_entropy(
                    logits.flatten(0, 1), text[:, 1:].flatten(), ignore_index=-1
                )
            scaler.scale(loss / 2).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        assert math.isfinite(loss.item())


def classifier_by_accelerate() -> None:
    """GLUE without a Trainer: padded batches, evaluation with gathered answers."""
    accelerator = Accelerator(mixed_precision="bf16")
    model: Any = classifier("bert")
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
    rows = [{"input_ids": [1] * n, "label": n % 2} for n in (3, 9, 5, 7) * 4]

    def collate(some: list[Any]) -> dict[str, Tensor]:
        most = max(len(row["input_ids"]) for row in some)
        ids = [row["input_ids"] + [0] * (most - len(row["input_ids"])) for row in some]
        inputs = torch.tensor(ids)
        labels = torch.tensor([row["label"] for row in some])
        return {"input_ids": inputs, "attention_mask": inputs != 0, "labels": labels}

    loader: Any = DataLoader(rows, batch_size=4, shuffle=True, collate_fn=collate)  # type: ignore[arg-type]
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for batch in loader:
        accelerator.backward(model(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    for batch in loader:
        with torch.no_grad():
            answers = model(**batch).logits.argmax(-1)
        accelerator.gather_for_metrics((answers, batch["labels"]))


def lora_with_checkpointing() -> None:
    """LoRA on a language model in BF16, with recomputed activations."""
    model: Any = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj"]))
    model = model.to("cuda", torch.bfloat16)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    for length in (8, 12, 10):
        ids = torch.ones(2, length, dtype=torch.long, device="cuda")
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    "train",
    slow_but_for(
        [gpt_with_a_loss_scaler, classifier_by_accelerate, lora_with_checkpointing],
        gpt_with_a_loss_scaler,
    ),
)
def test_code_runs_as_it_is(train: Callable[[], None]) -> None:
    """Weights, gradients and optimizer state are distinguished without a `watch`."""
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        with meft_bench.virtual_gpu("RTX3090-24GB") as memory:
            train()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    plan = memory.plan()
    assert plan.verdict == "fits"
    assert plan.by_kind is not None
    assert {"parameters", "optimizer"} <= set(plan.by_kind)
    assert plan.process_bytes > plan.reserved_bytes >= plan.allocated_bytes > 0  # type: ignore[operator]
    assert plan.num_trainable_parameters
    assert set(plan.by_phase or ()) >= {"forward", "backward", "update"}
    text = memory.summary()
    assert "NVIDIA GeForce RTX 3090" in text
    assert "at the peak, by kind" in text


@pytest.mark.filterwarnings("ignore:.* writes nothing inside:UserWarning")
def test_the_trainer_runs_as_it_is(tmp_path: Path) -> None:
    """With its own pinned loader, logs, checkpoints and batches of different length."""
    rows = [{"input_ids": [1] * n, "labels": [1] * n} for n in (3, 9, 5, 7) * 4]
    with meft_bench.virtual_gpu("L4") as memory:
        trainer = transformers.Trainer(
            model=llama(),
            args=transformers.TrainingArguments(
                output_dir=str(tmp_path),
                per_device_train_batch_size=2,
                max_steps=3,
                bf16=True,
                gradient_checkpointing=True,
                logging_steps=1,
                report_to=[],
                save_steps=2,
                disable_tqdm=True,
            ),
            train_dataset=rows,
            data_collator=lambda some: {
                name: nn.utils.rnn.pad_sequence(
                    [torch.tensor(row[name]) for row in some], batch_first=True
                )
                for name in ("input_ids", "labels")
            },
        )
        trainer.train()
    assert trainer.args.device.type == "cuda"
    assert (memory.plan().by_phase or {})["recompute"] > 0


@pytest.mark.slow
def test_trls_trainer_runs_as_it_is(tmp_path: Path) -> None:
    """Its loss selects tokens by their labels, and launches kernels of Triton."""
    trl = pytest.importorskip("trl")
    tokenizers = pytest.importorskip("tokenizers")
    datasets = pytest.importorskip("datasets")
    words = tokenizers.models.WordLevel({"?": 0, "a": 1, "b": 2, "end": 3}, "?")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(words),
        eos_token="end",
        pad_token="end",
        unk_token="?",
    )
    texts = datasets.Dataset.from_dict({"text": ["a b " * n for n in (3, 6, 5) * 8]})
    with meft_bench.virtual_gpu("A100-80GB") as memory:
        trl.SFTTrainer(
            model=llama(),
            args=trl.SFTConfig(
                output_dir=str(tmp_path),
                per_device_train_batch_size=4,
                max_steps=2,
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=texts,
            processing_class=tokenizer,
            peft_config=LoraConfig(r=4),
        ).train()
    plan = memory.plan()
    assert plan.verdict == "fits"
    assert "selections by a mask" not in plan.prediction


def test_a_selection_that_nothing_tells_keeps_all_elements_and_is_said() -> None:
    with meft_bench.virtual_gpu("T4") as memory:
        rows = torch.randn(4, 8, device="cuda")
        assert rows[rows[:, 0] > 0].shape == (4, 8)
    assert "selections by a mask keep all elements" in memory.plan().prediction
    assert "selections by a mask keep all elements" in memory.summary()


def test_a_plan_is_that_of_the_ledger() -> None:
    """A step takes the same under a ledger that is given what to watch."""

    def train() -> tuple[Any, Any]:
        model: Any = classifier("bert").to("cuda")
        optimizer = torch.optim.AdamW(model.parameters())
        return model, optimizer

    def step(model: Any, optimizer: Any) -> None:
        ids = torch.ones(4, 16, dtype=torch.long, device="cuda")
        model(input_ids=ids, labels=ids[:, 0]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    with meft_bench.virtual_gpu("H200") as memory:
        both = train()
        step(*both)
        torch.cuda.reset_peak_memory_stats()
        step(*both)
        del both
    with VirtualGpu(gpu.find("H200")) as device, device.new_ledger() as ledger:
        both = train()
        ledger.watch(*both)
        step(*both)
        start = ledger.mark()
        step(*both)
        trace = ledger.trace()
        del both
    plan, plain = memory.plan(), replay(trace, start=start)
    assert plan.allocated_bytes == plain.allocated_bytes
    assert plan.reserved_bytes == plain.reserved_bytes
    assert plan.by_kind == trace.peak(start=start).by_kind


def test_no_room_is_an_error_where_it_occurs() -> None:
    """Code that catches it goes on with what is left, as on a GPU."""
    with meft_bench.virtual_gpu("RTX3090-24GB") as memory:
        kept = torch.empty(GIB, device="cuda")  # 4 GiB
        with pytest.raises(torch.OutOfMemoryError, match=r"CUDA out of memory\. Pred"):
            torch.empty(8 * GIB, device="cuda")
        assert torch.cuda.memory_allocated() == 4 * GIB
        more = torch.empty(3 * GIB, device="cuda")
        assert torch.cuda.max_memory_allocated() == 16 * GIB
        assert torch.cuda.memory_stats()["num_ooms"] == 1
        del kept, more
    assert memory.plan().allocated_bytes == 16 * GIB


def test_accelerate_finds_a_batch_that_fits() -> None:
    """It recognises the error by its message."""

    @find_executable_batch_size(starting_batch_size=64)  # type: ignore[untyped-decorator]
    def train(batch_size: int) -> int:
        torch.empty(batch_size, GIB // 4, device="cuda")  # 1 GiB a row
        return batch_size

    with meft_bench.virtual_gpu("RTX3090-24GB"):
        assert 8 <= train() <= 23


def test_an_error_that_ends_the_code_is_in_the_plan() -> None:
    with (
        pytest.raises(torch.OutOfMemoryError),
        meft_bench.virtual_gpu("T4") as memory,
    ):
        torch.empty(8 * GIB, device="cuda")
    plan = memory.plan()
    assert plan.verdict == "too large"
    assert "no room for a segment of 32,768.0 MiB" in plan.message


def test_the_largest_batch_fits_and_the_next_does_not() -> None:
    def train(batch_size: int) -> None:
        model = nn.Linear(1024, 1024, device="cuda")
        for _ in range(2):
            rows = torch.empty(batch_size, GIB // 4096, 1024, device="cuda")
            model(rows).sum().backward()

    found = meft_bench.largest_batch(train, "RTX3090-24GB", at_most=100, margin=0.0)
    room = gpu.find("RTX3090-24GB").memory_bytes
    assert 1 < found.largest < 100
    assert found.probes[found.largest] <= room < found.probes[found.largest + 1]


def test_every_memory_function_of_torch_answers() -> None:
    """Sums over the segments of a snapshot are the statistics."""
    with meft_bench.virtual_gpu("H200"):
        kept = [torch.empty(n, 1000, device="cuda") for n in (1, 300, 4000, 20)]
        del kept[1]
        stats = torch.cuda.memory_stats()
        segments = torch.cuda.memory_snapshot()
        blocks = [b for s in segments for b in s["blocks"] if len(s["blocks"]) > 1]
        assert sum(s["total_size"] for s in segments) == torch.cuda.memory_reserved()
        used = sum(s["allocated_size"] for s in segments)
        assert (
            used
            == torch.cuda.memory_allocated()
            == torch.accelerator.memory_allocated()
        )
        free = sum(b["size"] for b in blocks if b["state"] == "inactive")
        assert free == stats["inactive_split_bytes.all.current"]
        requested = 4 * (1000 + 4_000_000 + 20_000)
        assert stats["requested_bytes.all.current"] == requested
        assert stats["allocation.all.current"] == 3
        assert stats["allocation.all.freed"] == 1
        by_pool = [stats[f"segment.{p}_pool.current"] for p in ("small", "large")]
        assert sum(by_pool) == stats["segment.all.current"] == len(segments)
        assert "GPU reserved memory" in torch.cuda.memory_summary()
        free_bytes, total_bytes = torch.accelerator.get_memory_info()
        assert (free_bytes, total_bytes) == torch.cuda.mem_get_info()
        with pytest.raises(NotImplementedError, match="is not modelled"):
            torch.cuda.memory._record_memory_history()


class ReadsInBackward(torch.autograd.Function):
    """Needs a value in its backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Return a copy."""
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Count the different values of the gradient."""
        return grad * len(grad.unique())


def test_what_needs_values_is_refused_also_in_backward() -> None:
    def train() -> None:
        with meft_bench.virtual_gpu("H200"):
            rows = torch.randn(4, device="cuda", requires_grad=True)
            ReadsInBackward.apply(rows).sum().backward()  # type: ignore[no-untyped-call]

    with pytest.raises(MissingError, match=r"operator `aten._unique2.default` needs"):
        train()


SCRIPT = """
import torch
from torch import nn
import neighbour

def step(batch=2):
    model = nn.Linear(neighbour.WIDTH, neighbour.WIDTH).cuda()
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        model(torch.randn(batch, neighbour.WIDTH, device="cuda")).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """A file with a function, which imports a module next to it."""
    (tmp_path / "neighbour.py").write_text("WIDTH = 1024")
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    return path


def test_a_function_of_a_file_is_planned(
    script: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plan", "--script", f"{script}:step", "--gpu", "T4"]
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert out.startswith("Tesla T4 (14.6 GiB)\n")
    assert "step    fits" in out
    # 4 MiB of weights, as many of gradients, and twice as many of the optimizer.
    assert "optimizer   8.01 MiB" in out
    assert "not compared with a real Tesla T4" in out


@pytest.mark.slow
def test_the_largest_batch_of_a_function_is_found(
    script: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["fit", "--script", f"{script}:step", "--gpu", "T4"]
    assert cli.main(words) == 0
    assert "batch 65536 fits, and is the most tried" in capsys.readouterr().out


@pytest.mark.slow
def test_an_error_of_a_function_names_its_line(
    script: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script.write_text("def step():\n    raise OSError('no disk')\n")
    words = ["plan", "--script", f"{script}:step", "--gpu", "T4"]
    assert cli.main(words) == 2
    assert "step: OSError: no disk (train.py, line 2)" in capsys.readouterr().err
    assert cli.main([*words[:2], f"{script}:stop", *words[3:]]) == 2
    assert "no function 'stop'; did you mean 'step'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--script", "SCRIPT:step", "--batch", "3"],
            "decides, not --batch",
        ),
        (
            ["bert-base", "--script", "SCRIPT:step"],
            "decides, not the backbone",
        ),
        (["--script", "SCRIPT"], "should be FILE:FUNCTION"),
        (["--script", "nowhere.py:step"], "there is no file 'nowhere.py'"),
        ([], "give a backbone, or --script"),
    ],
)
def test_what_cannot_be_planned_is_refused_at_once(
    script: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    words = [word.replace("SCRIPT", str(script)) for word in words]
    assert cli.main(["plan", *words, "--gpu", "T4"]) == 2
    assert said in capsys.readouterr().err


# Ordinary code around a step.


def test_a_model_that_is_dropped_frees_its_memory() -> None:
    """Trained again and again, as in a search: weights, gradients, state and all."""
    seen = []
    with meft_bench.virtual_gpu("H200"):
        for _ in range(3):
            model = nn.Linear(1024, 1024, bias=False).cuda()
            optimizer = torch.optim.AdamW(model.parameters())
            for _ in range(2):
                model(torch.randn(8, 1024, device="cuda")).sum().backward()
                optimizer.step()
            seen.append(torch.cuda.memory_allocated())
            del model, optimizer
            gc.collect()
    assert seen[0] == seen[1] == seen[2]


def test_integers_of_the_host_have_values() -> None:
    """A shuffled loader sees every row, and lengths are those that were drawn."""
    rows = [torch.zeros(n, dtype=torch.long) for n in [8] + [128] * 7]
    with meft_bench.virtual_gpu("H200"):
        loader: Any = DataLoader(
            rows,  # type: ignore[arg-type]
            batch_size=8,
            shuffle=True,
            num_workers=2,
            collate_fn=lambda some: nn.utils.rnn.pad_sequence(some, batch_first=True),
        )
        shapes = [tuple(batch.cuda().shape) for batch in loader]
        assert sorted(torch.randperm(5).tolist()) == [0, 1, 2, 3, 4]
        assert torch.arange(3).tolist() == [0, 1, 2]
        assert 3 <= int(torch.randint(3, 9, (1,))) < 9
        assert torch.ones(4, dtype=torch.long).sum().item() == 4
        assert torch.arange(3, device="cuda").device.type == "cuda"
    assert shapes == [(8, 128)]


def test_a_guard_against_nan_does_not_fire() -> None:
    with meft_bench.virtual_gpu("H200") as memory:
        loss = torch.randn(3, device="cuda", requires_grad=True).sum()
        assert not torch.isnan(loss)
        assert not torch.isinf(loss).any()
        assert torch.isfinite(loss)
        assert not (torch.isnan(loss) | torch.isinf(loss))
        assert bool(~torch.isnan(loss))
        assert loss > 0
        assert f"{loss:.1f}" == "0.0"
        assert loss.detach().cpu().numpy().shape == ()
    assert "conditions that were read hold" in memory.plan().prediction


def test_a_text_is_generated_to_its_end() -> None:
    """So that the cache of keys and values is as long as it can be."""
    with meft_bench.virtual_gpu("H200"):
        model: Any = llama().to("cuda")
        ids = torch.ones(2, 5, dtype=torch.long, device="cuda")
        for _ in range(2):
            assert model.generate(ids, max_new_tokens=12).shape == (2, 17)


def test_nothing_is_saved_and_that_is_said(tmp_path: Path) -> None:
    """Not even half a file; the Trainer's own save at its end is one."""
    with meft_bench.virtual_gpu("H200"):
        model: Any = llama().to("cuda")
        with pytest.warns(UserWarning, match="save_pretrained` writes nothing"):
            model.save_pretrained(tmp_path)
        with pytest.warns(UserWarning, match="`save` writes nothing"):
            torch.save(model.state_dict(), tmp_path / "weights.pt")
    assert list(tmp_path.iterdir()) == []


def test_real_checkpoints_stay(tmp_path: Path) -> None:
    """A Trainer that keeps the last one removes none, and leaves no empty one."""
    before = tmp_path / "checkpoint-2" / "model.safetensors"
    before.parent.mkdir()
    before.write_bytes(b"real")
    ids = torch.ones(8, dtype=torch.long)
    rows = [{"input_ids": ids, "labels": ids}] * 16
    with meft_bench.virtual_gpu("H200"):
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=3,
            save_steps=1,
            save_total_limit=1,
            report_to=[],
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(
            model=llama(), args=arguments, train_dataset=rows
        )
        with pytest.warns(UserWarning, match="_save_checkpoint` writes nothing"):
            trainer.train()
    assert [*tmp_path.rglob("*")] == [before.parent, before]


@pytest.mark.parametrize(
    ("refused", "named"),
    [
        (lambda: torch.compile(nn.Linear(2, 2)), "torch.compile"),
        (lambda: nn.DataParallel(nn.Linear(2, 2)), "torch.nn.DataParallel"),
    ],
)
def test_what_is_not_modelled_is_refused_by_name(
    refused: Callable[[], object], named: str
) -> None:
    def train() -> None:
        with meft_bench.virtual_gpu("H200"):
            refused()

    with pytest.raises(NotImplementedError, match=f"`{named}` is not modelled"):
        train()
    torch.compile(nn.Linear(2, 2), backend="eager")  # is as it was


def test_there_is_one_device() -> None:
    def train() -> None:
        with meft_bench.virtual_gpu("H200"):
            torch.empty(2, device="cuda:1")

    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        train()


def test_a_second_context_inside_is_refused() -> None:
    with meft_bench.virtual_gpu("H200"):
        with pytest.raises(RuntimeError, match="a virtual GPU is active"):
            meft_bench.virtual_gpu("T4").__enter__()
        assert torch.cuda.get_device_name() == "NVIDIA H200"


def test_defaults_that_code_sets_are_restored() -> None:
    with meft_bench.virtual_gpu("H200"):
        torch.set_default_device("cuda")
        torch.set_default_dtype(torch.bfloat16)
    assert torch.get_default_device().type == "cpu"
    assert torch.get_default_dtype() is torch.float32
    assert torch.ones(1).tolist() == [1.0]


def test_a_resized_tensor_takes_its_new_size() -> None:
    with meft_bench.virtual_gpu("H200"):
        rows = torch.empty(2**20, device="cuda")
        rows.resize_(2**22)
        assert torch.cuda.memory_allocated() == 16 * 2**20


def test_code_that_uses_no_gpu_does_not_fit() -> None:
    """It has no verdict, as there is nothing to judge."""
    with meft_bench.virtual_gpu("T4") as memory:
        nn.Linear(4, 4)(torch.ones(2, 4)).sum().backward()
    plan = memory.plan()
    assert (plan.verdict, plan.message[:11]) == ("unknown", "nothing was")
    with pytest.raises(ValueError, match="nothing was put on the GPU"):
        meft_bench.largest_batch(torch.ones, "T4")


def test_a_batch_that_was_too_large_before_a_reset_does_not_fit() -> None:
    def train(batch_size: int) -> None:
        torch.empty(batch_size, GIB, device="cuda")  # 4 GiB a row
        torch.cuda.reset_peak_memory_stats()
        torch.empty(8, device="cuda")

    assert meft_bench.largest_batch(train, "T4", at_most=64).largest == 3


def test_settings_of_the_allocator_are_modelled_or_said_to_be_ignored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By whatever name of the variable."""
    both = "expandable_segments:True,max_split_size_mb:128"
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", both)
    with meft_bench.virtual_gpu("T4") as memory:
        torch.empty(8, device="cuda")
    for said in (
        "assumed: expandable segments, as the environment says",
        "not modelled: max_split_size_mb:128 of the allocator",
    ):
        assert said in memory.plan().prediction
        assert said in memory.summary()


@pytest.mark.parametrize("margin", [-1, 1, 2.0])
def test_a_margin_is_a_share(margin: float) -> None:
    with pytest.raises(ValueError, match="`margin` is"):
        meft_bench.virtual_gpu("T4", margin=margin).__enter__()
    with pytest.raises(ValueError, match="`at_most` is 0"):
        meft_bench.largest_batch(torch.ones, "T4", at_most=0)


@pytest.mark.slow
def test_a_device_that_a_file_chooses_at_its_top_is_the_gpu(
    script: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And an end by `sys.exit` is an end."""
    text = script.read_text().replace(".cuda()", ".to(device)")
    text = text.replace("import neighbour", "import neighbour, sys\ndevice = CHOICE")
    choice = "'cuda' if torch.cuda.is_available() else 'cpu'"
    script.write_text(text.replace("CHOICE", choice) + "    sys.exit(0)\n")
    words = ["plan", "--script", f"{script}:step", "--gpu", "T4", "--json"]
    assert cli.main(words) == 0
    assert '"verdict": "fits"' in capsys.readouterr().out
