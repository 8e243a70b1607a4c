"""Every name that a message or a document mentions exists.

What looks like a name of something in a text (see texts.py) is looked up where that
thing is declared: flags in the parsers, files among those that git tracks, sweeps,
extras and environments in their own files, variables where the sources read them. Names
that belong to others are listed here, each with the reason. Names of modules, functions
and arguments are looked up in test_code_names.py.
"""

import argparse
import ast
import configparser
import fnmatch
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from _pytest.config.argparsing import Parser

from harness.texts import ROOT, mentions, strings, texts, tracked, unknown
from meft_bench.parent import arguments, planning, sweep
from meft_bench.parent.engines.isolate import child_environment
from meft_bench.pytest_plugin import options
from meft_bench.shared.options import ChildOptions
from meft_bench.virtual.device import gpu
from meft_reports import cli as reports_cli
from meft_reports.plots import PLOTS
from meft_reports.tables import TABLES

FOREIGN_FLAGS = {
    "--gpus": "docker",
    "--pid": "docker",
    "--no-deps": "pip",
    "--require-hashes": "pip",
    "--hash": "pip, in a file of requirements",
    "--group": "pip",
    "--index-url": "pip",
    "--quiet": "pip",
    "--upgrade": "pip",
    "--cpu": "accelerate launch",
    "--nproc-per-node": "torchrun",
    "--numprocesses": "pytest-xdist",
    "--dist": "pytest-xdist",
    "--no-loadscope-reorder": "pytest-xdist",
    "--slow": "pytest, by tests/conftest.py",
    "--doctest-modules": "pytest",
    "--doctest-glob": "pytest",
    "--pyargs": "pytest",
    "--strict-markers": "pytest",
    "--strict-config": "pytest",
    "--import-mode": "pytest",
    "--jaxtyping-packages": "jaxtyping's plugin of pytest",
    "--benchmark-disable": "pytest-benchmark",
    "--benchmark-enable": "pytest-benchmark",
    "--benchmark-only": "pytest-benchmark",
    "--benchmark-group-by": "pytest-benchmark",
    "--benchmark-columns": "pytest-benchmark",
    "--check": "ruff format",
    "--strict": "mkdocs",
    "--head": "ray start",
    "--generate": "ray get-auth-token",
    "--min-nodes": "ray symmetric-run",
    "--address": "ray start",
    "--num-cpus": "ray start",
    "--num-gpus": "ray start",
    "--nodes": "Slurm",
    "--ntasks-per-node": "Slurm",
    "--gpus-per-node": "Slurm",
    "--cpus-per-task": "Slurm",
    "--time": "Slurm",
    "--show-toplevel": "git",
    "--porcelain": "git",
    "--untracked-files": "git",
    "--out": "meft_bench.child.worker, which the harness itself starts",
    "--parent": "meft_bench.child.worker, likewise",
    "--worker": "meft_bench.child.fork_server, likewise",
    "--import": "meft_bench.child.fork_server, likewise",
    "--request": "meft_bench.child.worker, likewise",
}

FOREIGN_FILES = {
    # Files of others.
    "aten/native/*": "PyTorch's sources",
    "native/*": "PyTorch's sources",
    "ATen/*": "PyTorch's sources",
    "c10/cuda/*": "PyTorch's sources",
    "evaluate-v1.1.py": "SQuAD's official script",
    "eval_utils.py": "ORQA's, of the authors of NQ-open",
    "triviaqa_evaluation.py": "TriviaQA's official script",
    "grade_school_math/dataset.py": "GSM8K's repository",
    "flash_api.cpp": "flash attention's sources",
    "sdp_utils.cpp": "PyTorch's sources",
    "sysexits.h": "the C library",
    "config.json": "transformers' file of a model",
    "PATH/config.json": "a user's",
    "train.py": "a user's",
    "test_model.py": "a user's",
    "*.checks.jsonl": "what a run writes",
    "model.safetensors.index.json": "transformers' file of a model",
    ".index.json": "the end of such names",
    "merges.txt": "transformers' file of a tokenizer",
    "*train.tsv": "data of a task",
    "dev.tsv": "data of a task",
    "dev_ids.tsv": "data of a task",
    "msr_paraphrase_train.txt": "data of a task",
    "topics.nq.dev.txt": "data of a task",
    "NQ-open.dev.jsonl": "data of a task",
    "topics.dpr.trivia.*.txt": "data of a task",
    "*xquad.en.json": "data of a task",
    "*train.json": "data of a task",
    "*test.json": "data of a task",
    "*train.jsonl": "data of a task",
    "train_subset_*.json": "data of a task",
    "dev*matched.tsv": "data of a task",
    "*valid.jsonl": "data of a task",
    "dev.jsonl": "data of a task",
    "*-v1.1.json": "data of a task",
    "preprocessor_config.json": "transformers' file of a model of images",
    "*test.jsonl": "data of a task",
    "meft_bench/sweeps": "inside a wheel",
    "meft_bench/methods.toml": "inside a wheel",
    "meft_bench/measurements.toml": "inside a wheel",
    "meft_bench/backbones.toml": "inside a wheel",
    "meft_bench/published-gpu-memory.csv": "inside a wheel",
    "meft_bench/published-estimates.csv": "inside a wheel",
    # Files that ours write, or that a user has.
    "adapters.json": "written by meft.save_adapters",
    "plans.json": "written by the planner for its parent",
    "runs/*.jsonl": "written by meft-bench run",
    "runs/*.html": "written by meft-report page",
    "*/runs/glue.jsonl": "written by meft-bench run",
    "many.*": "written by benchmarks/scale.py",
    "frame.parquet": "written by meft-report frame",
    "*/gate.jsonl": "written by meft-bench run",
    "report.html": "written by meft-report page",
    "page.html": "written by meft-report compare",
    "cells.parquet": "written by meft-report frame",
    "out.*": "written by meft-report",
    "depth.svg": "written by meft-report plot",
    "baseline.jsonl": "written by meft-report baseline",
    "moments.csv": "written by meft-bench plan",
    "FILE.jsonl": "a user's",
    "path/to/mine.toml": "a user's",
    "mine.json": "a user's",
    "virtual-mine.json": "a device, by a user's file",
    "virtual-PATH.json": "a device, by a user's file",
    "PATH.json": "of the user",
    "FILE.py": "of the user",
    "reviews.csv": "of the user",
    "bias_only.py": "of the user",
    "lora.json": "of the user",
    "own.*": "of the user, and what meft-bench and meft-report write for it",
    "tokenizer.json": "transformers' file of a tokenizer",
    "training_params.json": "of the user, as PEFT's comparison of methods has them",
    "dataset_info.json": "written by datasets",
    "state.json": "written by datasets",
    "dataset_dict.json": "written by datasets",
    "adapter_config.json": "of the user, written by PEFT",
    "runs/published-gpus.checks.jsonl": "written by meft-bench run",
}

FOREIGN_VARIABLES = {
    "PYTORCH_CUDA_ALLOC_CONF": "PyTorch",
    "PYTORCH_ALLOC_CONF": "PyTorch",
    "HF_DEACTIVATE_ASYNC_LOAD": "transformers",
    "HF_HOME": "huggingface_hub",
    "CUBLAS_STATUS_ALLOC_FAILED": "an error's name, no variable",
    "PIP_CONSTRAINT": "set in tox.ini, for pip",
    "PIP_DISABLE_PIP_VERSION_CHECK": "set in tox.ini, for pip",
}

VARIABLE = (
    r"\b(?:MEFT|HF|CUDA|CUBLAS|OMP|MKL|TOKENIZERS|PIP|PYTORCH|TRITON)_[A-Z0-9_]+\b"
)

SUFFIXES = "py|md|toml|txt|tsv|jsonl?|html|j2|csv|parquet|svg|ini|h|cpp"
FILE = rf"(?<![\w/.:<}}-])[\w.*/-]*[\w*]\.(?:{SUFFIXES})\b(?!\.\w)"
FOLDERS = r"\.ci|docs|meft|meft_bench|meft_reports|benchmarks|reports|tests"
FOLDER = rf"(?<![\w/.:<}}-])(?:{FOLDERS})/[\w./*-]*"


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """A parser and those of its subcommands."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                yield from parsers(sub)


COMMANDS = {"meft-bench": arguments.parser, "meft-report": reports_cli.parser}


def subcommands(program: str) -> set[str]:
    """The words that may follow the name of a program."""
    (action,) = (
        a
        for a in COMMANDS[program]()._actions
        if isinstance(a, argparse._SubParsersAction)
    )
    return set(action.choices)


def test_every_flag_exists() -> None:
    """Of our commands, or of a tool that is named with it."""
    flags = {
        flag
        for make in COMMANDS.values()
        for parser in parsers(make())
        for action in parser._actions
        for flag in action.option_strings
    }
    plugin = Parser(_ispytest=True)
    options.add(plugin)
    for group in plugin._groups:
        flags |= {name for option in group.options for name in option.names()}
    # A name with two dashes at its end is a phase of the meters.
    found = mentions(r"(?<![\w/-])--[a-z][a-z0-9]*(?:-[a-z0-9]+)*(?![\w-])")
    assert unknown(found, (flags | set(FOREIGN_FLAGS)).__contains__) == []
    assert set(FOREIGN_FLAGS) <= set(found), "allowed, and mentioned nowhere"


def test_every_subcommand_exists() -> None:
    """Behind the name of one of our programs, in code."""
    found = mentions(r"(?<=`)meft-(?:bench|report) [\w-]+|(?<=[$] )meft-\w+ [\w-]+")

    def is_known(words: str) -> bool:
        program, _, command = words.partition(" ")
        return command in subcommands(program)

    assert len(found) > 5
    assert unknown(found, is_known) == []


def examples() -> dict[str, str]:
    """Command lines that are shown whole, each with a file that shows it."""
    found = {}
    for place, text in texts():
        for line in re.sub(r"\\\n\s*", " ", text).splitlines():
            match = re.match(r"\s*(?:[$] )?(meft-(?:bench|report) [\w-]+.*)", line)
            if match is not None:
                # Behind it is a comment, or what it does.
                found[re.split(r"\s{3,}|\s#", match[1])[0]] = place
        # In a sentence, what the last argument is may be clear.
        for match in re.finditer(r"`(meft-(?:bench|report) \w+ [^`]+)`", text):
            is_short = re.fullmatch(r"meft-report table \w+", match[1])
            found[f"{match[1]} RUNS" if is_short else match[1]] = place
    return {line: place for line, place in found.items() if not _is_prose(line)}


def _is_prose(line: str) -> bool:
    """Whether a sentence happens to begin with the name of a program."""
    program, command, *_ = [*line.split(), ""]
    return command.isalpha() and command not in subcommands(program)


def test_every_example_can_be_typed() -> None:
    """The parser takes it, and sweeps, plots, tables, backbones and GPUs exist."""
    shown = examples()
    assert len(shown) > 25
    wrong = []
    for line, place in shown.items():
        program, *words = shlex.split(line.replace("{posargs}", ""))
        try:
            given = COMMANDS[program]().parse_args(words)
        except SystemExit:
            wrong.append(f"{line} in {place}")
            continue
        wrong += [f"{name} of {line} in {place}" for name in _unknown_names(given)]
    assert wrong == []


def _unknown_names(given: argparse.Namespace) -> Iterator[str]:
    """What an example names that is not there; capitals are for the reader to fill."""
    for name, known in [
        ("sweep", {*sweep.shipped(), "own.toml"}),
        ("name", {*PLOTS, *TABLES}),
        ("gpu", None),
        ("backbone", None),
    ]:
        value = getattr(given, name, None)
        if value is None or value.isupper():
            continue
        if known is not None and value not in known:
            yield value
        if name == "gpu" and not value.endswith(".json"):
            gpu.find(value)
        if name == "backbone":
            planning._backbone(value)
    if hasattr(given, "method"):
        ours = [n for n in given.method if not n.isupper() and ".json" not in n]
        planning._methods(ours, None)
        planning._set_fields(given.set)


def test_every_extra_exists() -> None:
    """In brackets behind the name of the distribution, or of a checkout."""
    declared = _pyproject()["project"]["optional-dependencies"]
    found = mentions(r"(?<=meft\[)[\w,]+(?=\])|(?<='\.\[)[\w,]+(?=\])")
    assert len(found) > 2
    assert unknown(found, lambda names: set(names.split(",")) <= set(declared)) == []


def test_every_environment_of_tox_exists() -> None:
    """And every keyword and marker that pytest is to choose tests by."""
    ini = configparser.ConfigParser(interpolation=None)
    ini.read(ROOT / "tox.ini")
    found = mentions(r"(?<=tox -e[ \n])[\w-]+")
    assert len(found) > 3
    assert unknown(found, lambda name: f"testenv:{name}" in ini) == []
    tests = " ".join(
        (ROOT / n).read_text() for n in tracked() if n.startswith("tests/")
    )
    names = " ".join(re.findall(r"def (test_\w+)", tests))
    keys = mentions(r"(?<= -k )\w+")
    assert len(keys) > 1
    assert unknown(keys, names.__contains__) == []
    markers = [
        m.split(":")[0]
        for m in _pyproject()["tool"]["pytest"]["ini_options"]["markers"]
    ]
    assert unknown(mentions(r"(?<=pytest -m )\w+"), markers.__contains__) == []


def test_every_file_exists() -> None:
    """In the repository, by its path or the end of it; a pattern finds one."""
    paths = tracked()
    folders = {str(parent) for path in paths for parent in Path(path).parents}

    def is_known(name: str) -> bool:
        name = name.removesuffix(".").removesuffix("/")
        if any(fnmatch.fnmatch(path, f"*/{name}") for path in (f"/{p}" for p in paths)):
            return True
        return any(fnmatch.fnmatch(f"/{folder}", f"*/{name}") for folder in folders)

    found = {**mentions(FILE), **mentions(FOLDER)}
    assert len(found) > 150
    foreign = {
        pattern: [name for name in found if fnmatch.fnmatch(name, pattern)]
        for pattern in FOREIGN_FILES
    }
    allowed = {name for names in foreign.values() for name in names}
    assert unknown(found, lambda name: is_known(name) or name in allowed) == []
    assert [pattern for pattern, names in foreign.items() if not names] == []


def test_every_variable_is_read() -> None:
    """One of ours by the sources; of others', those that we set for our children."""
    read, written = set[str](), set(child_environment(ChildOptions(), "virtual-H200"))
    for name in strings():
        for node in ast.walk(ast.parse((ROOT / name).read_text())):
            if isinstance(node, ast.Subscript) and _is_environ(node.value):
                (written if isinstance(node.ctx, ast.Store) else read).update(
                    _constant(node.slice)
                )
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                if node.func.attr == "get" and _is_environ(node.func.value):
                    read.update(_constant(node.args[0]))
    assert "MEFT_DATA_DIR" in read
    found = mentions(VARIABLE)

    def is_known(name: str) -> bool:
        if name.startswith("MEFT_"):
            return name in read
        return name in read | written | set(FOREIGN_VARIABLES)

    assert unknown(found, is_known) == []
    assert set(FOREIGN_VARIABLES) <= set(found)


def _is_environ(node: ast.expr) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "environ"


def _constant(node: ast.expr) -> list[str]:
    return [str(node.value)] if isinstance(node, ast.Constant) else []


def _pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())
