"""Tokens of rows on disk, so that many cells of a sweep tokenise the same rows once.

A file is named by the SHA-256 of all that decides its contents: the rows, the state of
the tokenizer, the maximum length, the code that encodes rows, and the versions of the
libraries it calls. A key that is there is therefore right, and nothing is ever updated.
Files are safetensors. A file is written under another name and then renamed, so that
cells that run at the same time see a whole file or none; one that is damaged is made
again. The least recently used files are removed when all of them together exceed
`MOST_BYTES`.

The folder is `$MEFT_TOKEN_CACHE`, by default `meft-bench/tokens` in `$XDG_CACHE_HOME`
or `~/.cache`. Where it cannot be written, rows are tokenised every time.

`datasets.Dataset.map` has a cache, too. It is not used here because a damaged file of
it raises an error, it has no bound, and its import takes longer than most rows.
"""

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import safetensors
import tokenizers
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from meft_bench.child.tasks.batches import Example

MOST_BYTES = 2**30
PART = "part-"
"""Beginning of the names of folders of files that are not whole yet."""
LONGEST_SECONDS = 3600
"""Time in which any file is whole."""
LEAST_ROWS = 200
"""Fewer rows are tokenised faster than they are found."""


def folder() -> Path:
    """Return the folder of the files."""
    own = os.environ.get("MEFT_TOKEN_CACHE")
    if own:
        return Path(own)
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home, "meft-bench", "tokens")


def cached(
    kind: str,
    texts: Sequence[tuple[object, ...]],
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
    code: Iterable[str],
    make: Callable[[], list[Example]],
) -> list[Example]:
    """Return the examples of rows from disk, or make them and store them.

    Args:
        kind: name of the way in which these rows are encoded.
        texts: all that is particular to each row: its texts and its label.
        tokenizer: the tokenizer; one without a backend in Rust has no state that can be
            compared, and its examples are not stored.
        seq_len: maximum number of tokens of a row.
        code: paths of the source files that decide how rows are encoded.
        make: encodes the rows.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if len(texts) < LEAST_ROWS or backend is None:
        return make()
    name = _key(kind, texts, tokenizer, seq_len, code)
    file = folder() / f"{name}.safetensors"
    found = _read(file, len(texts))
    if found is None:
        found = make()
        _write(file, found)
    return found


def _key(
    kind: str,
    texts: Sequence[tuple[object, ...]],
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
    code: Iterable[str],
) -> str:
    digest = hashlib.sha256()
    for file in (__file__, *code):
        digest.update(hashlib.sha256(Path(file).read_bytes()).digest())
    backend = tokenizer.backend_tokenizer
    # Calls before this one have set how rows are cut and padded.
    state = json.loads(backend.to_str()) | {"truncation": None, "padding": None}
    settings = (
        *(kind, transformers.__version__, tokenizers.__version__, seq_len),
        *(type(tokenizer).__name__, tokenizer.truncation_side),
        *(tokenizer.eos_token_id, tokenizer.model_input_names),
    )
    digest.update(repr(settings).encode())
    digest.update(json.dumps(state).encode())
    for row in texts:
        digest.update(repr(row).encode())
    return digest.hexdigest()


def _read(file: Path, num_rows: int) -> list[Example] | None:
    """Return the examples of a file; None if there is no file, or a damaged one."""
    try:
        with safe_open(file, "pt") as opened:
            columns = {name: opened.get_tensor(name) for name in opened.keys()}
            if opened.metadata() != _metadata(columns):
                raise ValueError("its values do not have the sha256 that it names")
        lengths = columns["lengths"].tolist()
        if len(lengths) != num_rows:
            raise ValueError(f"{len(lengths)} rows, expected {num_rows}")
        names = ("token_ids", "segment_ids", "targets")
        parts = {n: _split(columns[n], lengths) for n in names if n in columns}
        labels = parts.get("targets") or columns["labels"].tolist()
        found = [
            Example(token_ids=token_ids, segment_ids=segment_ids, label=label)
            for token_ids, segment_ids, label in zip(
                parts["token_ids"], parts["segment_ids"], labels, strict=True
            )
        ]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
        print(f"{file} is damaged and is made again: {error}", file=sys.stderr)
        return None
    with contextlib.suppress(OSError):
        os.utime(file)  # it was used now
    return found


def _split(values: Tensor, lengths: Sequence[int]) -> list[list[int]]:
    flat = values.tolist()
    if len(flat) != sum(lengths):
        raise ValueError(f"{len(flat)} tokens, expected {sum(lengths)}")
    ends = list(itertools.accumulate(lengths))
    return [flat[e - n : e] for e, n in zip(ends, lengths, strict=True)]


def _write(file: Path, examples: Sequence[Example]) -> None:
    """Store examples, unless there is no room or no permission."""
    columns = {
        "lengths": torch.tensor([len(example.token_ids) for example in examples]),
        "token_ids": _joined(example.token_ids for example in examples),
        "segment_ids": _joined(e.segment_ids for e in examples).to(torch.uint8),
    }
    if isinstance(examples[0].label, list):
        # As many as tokens: the target at each position.
        columns["targets"] = _joined(e.label for e in examples)  # type: ignore[misc]
    else:
        labels = [example.label for example in examples]
        is_float = any(isinstance(label, float) for label in labels)
        columns["labels"] = torch.tensor(
            labels, dtype=torch.float64 if is_float else torch.int64
        )
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent, prefix=PART) as place:
            part = Path(place, file.name)
            save_file(columns, part, _metadata(columns))
            part.replace(file)
        _make_room(file)
    except (OSError, safetensors.SafetensorError) as error:
        print(f"{file.parent}: tokens are not stored: {error}", file=sys.stderr)


def _metadata(columns: dict[str, Tensor]) -> dict[str, str]:
    digest = hashlib.sha256()
    for _, column in sorted(columns.items()):
        digest.update(column.numpy().tobytes())
    return {"sha256": digest.hexdigest()}


def _joined(lists: Iterable[Sequence[int]]) -> Tensor:
    return torch.tensor([*itertools.chain.from_iterable(lists)], dtype=torch.int32)


def _make_room(newest: Path) -> None:
    """Remove the least recently used files while all exceed `MOST_BYTES`.

    Parts of files that cells have left which were killed are removed after an hour.
    """
    for part in newest.parent.glob(f"{PART}*"):
        with contextlib.suppress(OSError):
            if time.time() - part.stat().st_mtime > LONGEST_SECONDS:
                shutil.rmtree(part)
    found = []
    for file in newest.parent.glob("*.safetensors"):
        with contextlib.suppress(FileNotFoundError):  # another cell has removed it
            state = file.stat()
            found.append((state.st_mtime, state.st_size, file))
    total = sum(size for _, size, _ in found)
    for _, size, file in sorted(found):
        if total <= MOST_BYTES:
            break
        if file != newest:
            file.unlink(missing_ok=True)
            total -= size
