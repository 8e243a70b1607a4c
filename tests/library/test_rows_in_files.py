"""Rows of sparse adapters in files that are mapped into memory."""

import copy
import gc
import io
from pathlib import Path
from typing import Any

import pytest
import torch

import meft
from library.sparse import all_rows, batches, config, plain_model, sparse_model, train
from meft import mapped_memory
from meft.errors import ConfigError, HostMemoryError
from meft.sparse.adapter import sparse_adapters


def mapped(folder: Path) -> list[str]:
    """Lines of this process's memory map that are of files in a folder."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [line for line in lines if str(folder) in line]


@pytest.mark.parametrize("wire", ["float32", "bfloat16"])
@pytest.mark.parametrize("cache", ["steps", "off", "home"])
def test_rows_in_files_give_the_bits_of_rows_in_memory(
    wire: str, cache: str, tmp_path: Path
) -> None:
    fields: dict[str, Any] = {"transfer_dtype": wire, "cache": cache}
    here = sparse_model(**fields)
    away = sparse_model(**fields, folder=tmp_path)
    assert train(here) == train(away)
    assert torch.equal(all_rows(here), all_rows(away))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
def test_files_have_no_names_and_go_with_the_model(tmp_path: Path) -> None:
    model = sparse_model(folder=tmp_path, cache="off")
    train(model)
    store = next(iter(sparse_adapters(model).values())).rows.store
    for tensor in (store.rows, *store.moments):
        assert tensor.data_ptr() in {
            int(line.partition("-")[0], 16) for line in mapped(tmp_path)
        }
    assert not list(tmp_path.iterdir())
    del model, store, tensor
    gc.collect()  # a model is a cycle
    assert not mapped(tmp_path)


def test_copies_are_in_files_too(tmp_path: Path) -> None:
    """Also pickled ones, in the folder, which has to be there."""
    model = sparse_model(folder=tmp_path)
    train(model)
    saved = io.BytesIO()
    torch.save(model, saved)
    copies = [copy.deepcopy(model)]
    saved.seek(0)
    copies.append(torch.load(saved, weights_only=False))
    for each in copies:
        assert torch.equal(all_rows(each), all_rows(model))
        store = next(iter(sparse_adapters(each).values())).rows.store
        assert any(
            int(line.partition("-")[0], 16) == store.rows.data_ptr()
            for line in mapped(tmp_path)
        )
    tmp_path.rmdir()
    saved.seek(0)
    with pytest.raises(HostMemoryError, match="Create it"):
        torch.load(saved, weights_only=False)


def test_the_folder_is_not_saved(tmp_path: Path) -> None:
    """Another machine has another."""
    model = sparse_model(folder=tmp_path)
    saved = tmp_path / "saved"
    meft.save_adapters(model, saved)
    assert not any(str(tmp_path) in path.read_text() for path in saved.glob("*.json"))
    again = meft.load_adapters(plain_model(), saved)
    assert torch.equal(all_rows(again), all_rows(model))


def test_a_folder_that_is_not_there_is_refused_before_anything_changes(
    tmp_path: Path,
) -> None:
    model = plain_model()
    (inputs,) = batches(1)
    before = model(**inputs).loss
    with pytest.raises(HostMemoryError, match=r"nowhere'.*Create it"):
        meft.add_sparse_adapters(model, config(folder=tmp_path / "nowhere"))
    assert torch.equal(model(**inputs).loss, before)


def test_a_disk_without_room_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "shutil.disk_usage", lambda folder: type("Usage", (), {"free": 10_000})
    )
    with pytest.raises(HostMemoryError, match=r"bytes of the disk of .* lower"):
        meft.add_sparse_adapters(plain_model(), config(folder=tmp_path))

    def full(*arguments: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(HostMemoryError, match="the disk is full"):
        mapped_memory.zeros((4, 4), torch.float32, str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_too_many_rows_for_memory_are_told_of_files(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("meft.host_memory.available_bytes", lambda: 1000)
    with pytest.raises(HostMemoryError, match=r"or keep rows in files by"):
        meft.add_sparse_adapters(plain_model(), config())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"folder": ""}, "`folder` must be a path"),
        ({"folder": 3}, "`folder` must be a path"),
        ({"folder": "/tmp", "placement": "resident"}, "only rows in host memory"),
    ],
)
def test_what_is_no_folder_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**fields)
