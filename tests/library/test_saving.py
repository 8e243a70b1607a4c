"""A converted model goes through every way of saving whole, or the way is refused.

The measure is the logits: the bits of the model that was saved.
"""

import copy
import json
import os
import resource
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    BertModel,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

import meft
from library.models import batch, classifier, reversible
from library.sparse import plain_model
from meft.reversible.blocks import find_stacks

FILES = {"adapters.json", "adapters.safetensors"}


def moved(model: nn.Module, seed: int = 5) -> Any:
    """The model with trainable parameters away from their start."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def trained(seed: int = 5, save_backbone: bool = False) -> Any:
    return moved(reversible(2, variant="meft2", save_backbone=save_backbone), seed)


def logits(model: nn.Module) -> Tensor:
    rows = batch()
    del rows["labels"]
    with torch.no_grad():
        out: Tensor = model.eval()(**rows).logits
    model.train()
    return out


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


# save_pretrained -------------------------------------------------------------------


def test_save_pretrained_writes_what_was_trained(tmp_path: Path) -> None:
    """And not the backbone, onto which it loads; without a warning, as often as wanted.
    The directory is no model of transformers, which would have a backbone at random."""
    model = trained()
    for _ in range(2):
        model.save_pretrained(tmp_path)
    assert names(tmp_path) == {"adapters.json", "config.json", "model.safetensors"}
    saved = load_file(tmp_path / "model.safetensors")
    trained_names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert saved.keys() == trained_names | {"bert.encoder.layer.adapters._extra_state"}
    other = reversible(2, variant="meft2", lost_bits=7)
    with pytest.raises(meft.AdapterFileError, match="lost_bits"):  # as `Trainer` loads
        other.load_state_dict(saved, strict=False)
    assert torch.equal(
        logits(meft.load_adapters(classifier(2), tmp_path)), logits(model)
    )
    for kind in (BertForSequenceClassification, BertModel):
        with pytest.raises(Exception, match=r"call meft.load_adapters\("):
            kind.from_pretrained(tmp_path)
    with pytest.raises(
        ValueError,
        match=r"model type `meft adapters, no model: call meft\.load_adapters",
    ):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize("shard", ["50GB", "5KB"])
def test_the_weights_of_another_model_are_not_replaced(
    shard: str, tmp_path: Path
) -> None:
    """A directory with a whole model is refused, and left as it is."""
    classifier(2).save_pretrained(tmp_path, max_shard_size=shard)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(meft.UnsupportedCallError, match="holds a whole model"):
        trained().save_pretrained(tmp_path)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    trained(save_backbone=True).save_pretrained(tmp_path)


def test_what_was_trained_and_then_frozen_is_saved(tmp_path: Path) -> None:
    """A head that is frozen after its training, and a block that was trained for a
    while; what was never trained is not."""
    model = trained()
    block = model.bert.encoder.layer[0].output.dense
    block.requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(**batch()).loss.backward()
    optimizer.step()
    model.requires_grad_(False)
    model.save_pretrained(tmp_path / "frozen")
    meft.save_adapters(model, tmp_path / "alone")
    saved = load_file(tmp_path / "frozen" / "model.safetensors")
    assert {
        "classifier.weight",
        "bert.encoder.layer.0.output.dense.weight",
    } < saved.keys()
    assert "bert.encoder.layer.0.intermediate.dense.weight" not in saved
    for name in ("frozen", "alone"):
        loaded = meft.load_adapters(classifier(2), tmp_path / name)
        assert torch.equal(logits(loaded), logits(model))


def test_nothing_is_saved_while_adapters_are_disabled(tmp_path: Path) -> None:
    """An earlier save stays whole."""
    model = trained()
    model.save_pretrained(tmp_path)
    with (
        meft.disable_adapter(model),
        pytest.raises(meft.UnsupportedCallError, match=r"inside of `meft.disable_adap"),
    ):
        model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    loaded = meft.load_adapters(classifier(2), tmp_path)
    assert torch.equal(logits(loaded), logits(model))


def test_a_loaded_model_trains_what_was_trained(tmp_path: Path) -> None:
    """Without adapters, the conversion freezes nothing, and the saved model says."""
    model = classifier(2)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "layer.1" in name or "classifier" in name
    meft.make_reversible(model, meft.ReversibleConfig(adapter=None))
    moved(model).save_pretrained(tmp_path)
    loaded = meft.load_adapters(classifier(2), tmp_path)
    flags = [
        {n for n, p in m.named_parameters() if p.requires_grad} for m in (model, loaded)
    ]
    assert flags[0] == flags[1]
    assert torch.equal(logits(loaded), logits(model))


def test_a_whole_save_says_once_how_to_load(tmp_path: Path) -> None:
    """The advice, run as it is written, gives the model back; `from_pretrained` alone
    gives the backbone. A second save says nothing."""
    model = trained(save_backbone=True)
    with pytest.warns(meft.SavingWarning) as seen:
        model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path)
    assert {"adapters.json", "model.safetensors", "config.json"} <= names(tmp_path)
    assert "adapters.safetensors" not in names(tmp_path)  # all is in the model's file
    kind, directory = BertForSequenceClassification, tmp_path
    assert not torch.equal(logits(kind.from_pretrained(directory)), logits(model))
    advice = str(seen[0].message).split("`")[-2]
    scope = {"meft": meft, kind.__name__: kind, "directory": directory}
    assert torch.equal(logits(eval(advice, scope)), logits(model))


def test_a_model_that_trains_whole_is_saved_whole(tmp_path: Path) -> None:
    """Without adapters, `from_pretrained` gives the plain model back."""
    model = classifier(2)
    meft.make_reversible(model, meft.ReversibleConfig(adapter=None, lost_bits=16))
    moved(model).save_pretrained(tmp_path)
    plain = BertForSequenceClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(plain), logits(model), rtol=0, atol=1e-3)
    meft.load_adapters(plain, tmp_path)
    assert torch.equal(logits(plain), logits(model))


@pytest.mark.parametrize("shard", ["50GB", "5KB"])
def test_the_backbone_keeps_its_names_in_a_full_save(
    shard: str, tmp_path: Path
) -> None:
    """`from_pretrained` finds every tensor of the backbone, in one file or in shards;
    adapters load onto it and onto the original backbone."""
    model = trained(save_backbone=True)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    kind: Any = BertForSequenceClassification
    loaded, report = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert all(".adapters." in name for name in report["unexpected_keys"])
    plain = classifier(2).state_dict()
    for name, tensor in loaded.state_dict().items():
        assert "classifier" in name or torch.equal(tensor, plain[name]), name
    for target in (loaded, classifier(2)):
        assert torch.equal(logits(meft.load_adapters(target, tmp_path)), logits(model))


def test_the_model_inside_saves_its_adapters_too(tmp_path: Path) -> None:
    """`model.bert.save_pretrained`, for whoever wants the encoder alone."""
    model = trained(save_backbone=True)
    model.bert.save_pretrained(tmp_path)
    encoder = BertModel.from_pretrained(tmp_path)
    meft.load_adapters(encoder, tmp_path)
    expected = model.bert.state_dict()
    assert encoder.state_dict().keys() == expected.keys()
    assert all(torch.equal(t, expected[n]) for n, t in encoder.state_dict().items())


def test_tied_and_trained_weights_come_back(tmp_path: Path) -> None:
    """A tied head that was unfrozen, and a norm: saved once, loaded, still tied."""
    config = plain_model(1).config
    config.tie_word_embeddings = True
    model = meft.make_reversible(
        LlamaForCausalLM(config),
        meft.ReversibleConfig(variant="meft1", bottleneck_size=3),
        save_backbone=True,
    )
    model.lm_head.weight.requires_grad_(True)
    model.model.norm.weight.requires_grad_(True)
    moved(model).save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    meft.load_adapters(loaded, tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(logits(loaded), logits(model))


def test_a_state_dict_of_averages_is_saved_whole(tmp_path: Path) -> None:
    """`state_dict` represents the model: both files take its values. One without any
    adapter saves the backbone alone; one with some of them is refused."""
    model, averages = trained(), trained(seed=6)
    model.save_pretrained(tmp_path / "whole", state_dict=averages.state_dict())
    loaded = meft.load_adapters(classifier(2), tmp_path / "whole")
    assert torch.equal(logits(loaded), logits(averages))
    state = model.state_dict()
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    some = {n: t for n, t in state.items() if n != trainable[0]}
    with pytest.raises(meft.AdapterFileError, match=trainable[0]):
        model.save_pretrained(tmp_path / "some", state_dict=some)
    assert not (tmp_path / "some").exists()
    backbone = {n: t for n, t in state.items() if n not in trainable}
    model.save_pretrained(tmp_path / "backbone", state_dict=backbone)
    assert not FILES & names(tmp_path / "backbone")


def test_what_is_pushed_to_the_hub_is_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`push_to_hub` uploads the adapters' files as well; `save_pretrained` with
    `push_to_hub=True` would upload before they are written, and is refused."""
    from transformers.utils import hub

    class Api:
        def create_repo(self, repo_id: str, **options: Any) -> Any:
            return type("Repo", (), {"repo_id": repo_id})

    class Card:
        def save(self, path: str) -> None:
            Path(path).write_text("card")

    uploaded: set[str] = set()
    model = trained()
    monkeypatch.setattr(hub, "hf_api", Api)
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *a, **k: Card())
    monkeypatch.setattr(
        type(model),
        "_upload_modified_files",
        lambda self, directory, *a, **k: uploaded.update(names(Path(directory))),
    )
    model.push_to_hub("someone/something")
    assert {"adapters.json", "model.safetensors"} <= uploaded
    with pytest.raises(meft.UnsupportedCallError, match=r"model.push_to_hub\(repo_id"):
        model.save_pretrained("anywhere", push_to_hub=True)
    assert not Path("anywhere").exists()


@pytest.mark.parametrize("method", ["reversible", "sparse"])
def test_a_model_around_the_converted_one_says_what_it_does_not_save(
    method: str, tmp_path: Path
) -> None:
    """Once a model, in `Trainer` as well; the advice gives the model back. The inner
    model saves without that warning, and so does the outer one without a conversion."""
    model = classifier(2)
    if method == "sparse":
        config = meft.SparseConfig(num_neurons=16, top_k_neurons=2)
        meft.add_sparse_adapters(model.bert, config)
    else:
        meft.make_reversible(model.bert, meft.ReversibleConfig(variant="meft1"))
    model = moved(copy.deepcopy(model))
    arguments = TrainingArguments(str(tmp_path / "runs"), report_to="none")
    with pytest.warns(meft.SavingWarning, match="meft.save_adapters") as seen:
        Trainer(model, arguments).save_model(str(tmp_path))
    assert len(seen) == 1
    assert not FILES & names(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path)
        model.state_dict()
    advice = str(seen[0].message).split("`")[-2]
    eval(advice, {"meft": meft, "model": model, "directory": tmp_path})
    base = BertForSequenceClassification.from_pretrained(tmp_path)
    loaded = meft.load_adapters(base, tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    model.bert.save_pretrained(tmp_path / "inner")
    assert names(tmp_path / "inner") >= {"adapters.json", "model.safetensors"}


# Trainer ---------------------------------------------------------------------------


def run(directory: Path, resume: str | None = None, **options: Any) -> Trainer:
    """Four steps with a checkpoint after each two, at a rate that overshoots."""
    rows = batch(rows=12, padded=False)
    dataset = [{name: tensor[i] for name, tensor in rows.items()} for i in range(12)]
    arguments = TrainingArguments(
        output_dir=str(directory),
        max_steps=4,
        per_device_train_batch_size=3,
        learning_rate=0.5,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options,
    )
    trainer = Trainer(
        model=reversible(2, dropout=0.1, variant="meft2"),
        args=arguments,
        train_dataset=dataset,
        eval_dataset=dataset,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_a_trainers_checkpoints_hold_what_is_trained(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each directory loads onto the base model; a run resumed from the first ends in
    the bits of the uninterrupted one, and misses no tensor."""
    trainer = run(tmp_path)
    expected: Any = trainer.model
    trainer.save_model(str(tmp_path / "final"))
    for name in ("final", "checkpoint-4"):
        loaded = meft.load_adapters(classifier(2, dropout=0.1), tmp_path / name)
        assert torch.equal(logits(loaded), logits(expected))
        size = (tmp_path / name / "model.safetensors").stat().st_size
        trained_bytes = sum(p.nbytes for p in expected.parameters() if p.requires_grad)
        assert size < trained_bytes + 8192
    earlier = meft.load_adapters(classifier(2, dropout=0.1), tmp_path / "checkpoint-2")
    assert not torch.equal(logits(earlier), logits(expected))
    resumed: Any = run(tmp_path, str(tmp_path / "checkpoint-2")).model
    assert torch.equal(logits(resumed), logits(expected))
    assert "missing keys" not in caplog.text


@pytest.mark.parametrize("save_backbone", [True, False])
def test_a_trainers_checkpoints_may_be_whole(
    save_backbone: bool, tmp_path: Path
) -> None:
    """With the option, each is a model of transformers, too."""
    model = reversible(2, variant="meft2", save_backbone=save_backbone)
    arguments = TrainingArguments(str(tmp_path / "runs"), report_to="none")
    Trainer(model, arguments).save_model(str(tmp_path / "final"))
    config = json.loads((tmp_path / "final" / "config.json").read_text())
    assert (config["model_type"] == "bert") == save_backbone


def test_the_best_checkpoint_is_the_model_at_the_end(tmp_path: Path) -> None:
    """`load_best_model_at_end`, without optimizer states and with rotation: what is
    left in memory is what the best directory holds; the rotated one is named."""
    trainer = run(
        tmp_path,
        load_best_model_at_end=True,
        save_only_model=True,
        save_total_limit=1,
    )
    best = Path(str(trainer.state.best_model_checkpoint))
    loaded = meft.load_adapters(classifier(2, dropout=0.1), best)
    model: Any = trainer.model
    assert torch.equal(logits(loaded), logits(model))
    assert "optimizer.pt" not in names(best)
    gone = ({"checkpoint-2", "checkpoint-4"} - names(tmp_path)).pop()
    with pytest.raises(meft.AdapterFileError, match=f"{gone}: adapters.json cannot"):
        meft.load_adapters(classifier(2, dropout=0.1), tmp_path / gone)
    with pytest.raises(meft.AdapterFileError, match=f"some in {best.name} inside it"):
        meft.load_adapters(classifier(2, dropout=0.1), tmp_path)


@pytest.mark.slow
def test_another_process_computes_the_same_bits(tmp_path: Path) -> None:
    """A script that knows the base model and the directory, and nothing else."""
    classifier(2).save_pretrained(tmp_path / "base")
    model = trained()
    model.save_pretrained(tmp_path / "tuned")
    rows = batch()
    del rows["labels"]
    torch.save(rows, tmp_path / "batch.pt")
    script = (
        "import sys, torch, meft\n"
        "from transformers import AutoModelForSequenceClassification as Auto\n"
        "base, tuned, rows, out = sys.argv[1:]\n"
        "model = meft.load_adapters(Auto.from_pretrained(base), tuned).eval()\n"
        "with torch.no_grad():\n"
        "    torch.save(model(**torch.load(rows)).logits, out)\n"
    )
    paths = [str(tmp_path / name) for name in ("base", "tuned", "batch.pt", "out.pt")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run(
        [sys.executable, "-c", script, *paths], check=True, env=environment, timeout=200
    )
    assert torch.equal(torch.load(tmp_path / "out.pt"), logits(model))


# accelerate ------------------------------------------------------------------------


@pytest.fixture
def accelerator() -> Iterator[Any]:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_accelerate_saves_and_loads_all_weights(
    accelerator: Any, tmp_path: Path
) -> None:
    """`save_model` writes a state dict, which a model of the same config loads; and
    `save_state` and `load_state` restore what training has changed."""
    from accelerate import load_checkpoint_in_model

    model = trained()
    expected = logits(model)
    accelerator.save_model(model, tmp_path / "weights")
    other = trained(seed=6)
    load_checkpoint_in_model(other, tmp_path / "weights")
    assert torch.equal(logits(other), expected)
    model = accelerator.prepare(model)
    accelerator.save_state(tmp_path / "state")
    moved(model, seed=7)
    accelerator.load_state(tmp_path / "state")
    assert torch.equal(logits(model), expected)


# Files that are not what they should be ----------------------------------------------


def test_a_missing_adapter_is_refused(tmp_path: Path) -> None:
    """A file with some of the adapters would leave the others at random."""
    meft.save_adapters(trained(), tmp_path)
    tensors = load_file(tmp_path / "adapters.safetensors")
    gone = next(name for name in tensors if ".adapters." in name)
    del tensors[gone]
    save_file(tensors, tmp_path / "adapters.safetensors")
    model = classifier(2)
    with pytest.raises(meft.AdapterFileError, match=f"lacks '{gone}'"):
        meft.load_adapters(model, tmp_path)
    assert not find_stacks(model)
    assert "save_pretrained" not in vars(model)


def test_files_of_two_saves_are_refused(tmp_path: Path) -> None:
    """Interrupted between its two files, a save leaves the new tensors next to the old
    config; both are valid, but of two models."""
    meft.save_adapters(trained(seed=5), tmp_path / "old")
    meft.save_adapters(trained(seed=6), tmp_path / "new")
    shutil.copy(tmp_path / "new" / "adapters.safetensors", tmp_path / "old")
    with pytest.raises(meft.AdapterFileError, match="interrupted"):
        meft.load_adapters(classifier(2), tmp_path / "old")


@pytest.mark.parametrize("already", [False, True])
def test_a_disk_that_fills_up_leaves_the_earlier_save(
    already: bool, tmp_path: Path
) -> None:
    """With room for 1,000 bytes more per file, the save fails, and the directory holds
    what it held before: nothing, or a save that still loads."""
    before = trained(seed=6)
    if already:
        meft.save_adapters(before, tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=str(tmp_path)):
            meft.save_adapters(trained(), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == (FILES if already else set())
    if already:
        loaded = meft.load_adapters(classifier(2), tmp_path)
        assert torch.equal(logits(loaded), logits(before))


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """A file where a directory should be; as root, permissions would not stop it."""
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=str(tmp_path / "file")):
        meft.save_adapters(trained(), tmp_path / "file")
    with pytest.raises(OSError, match=str(tmp_path / "file")):
        meft.save_adapters(trained(), tmp_path / "file" / "inside")
