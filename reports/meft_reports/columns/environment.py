"""Columns of the environment of a cell."""

from meft_reports.columns.column import Column, derived, version, where

FOR_SCORES = ("weights_sha256", "data_origin")
"""Columns that have to agree where scores are compared: weights, and rows."""
ENVIRONMENT: tuple[Column, ...] = (
    version("python"),
    version("torch"),
    version("transformers"),
    version("peft"),
    version("numpy"),
    derived("versions", "string", "all versions, as a JSON object"),
    where("commit", "string", "commit of the checkout that ran"),
    where("dirty", "boolean", "whether tracked files differed from the commit"),
    where("code_sha256", "string", "digest of the sources that ran", True),
    derived("newest_code", "boolean", "whether no cell of the runs had newer code"),
    where("machine", "string", "class of machine: processor or GPU model", True),
    where("platform", "string", "operating system", True),
    where("cpu", "string", "processor", True),
    where("num_threads", "Int64", "threads each child may use", True),
    where("num_slots", "Int64", "cells run side by side", True),
    where("device_name", "string", "the accelerator; empty on cpu"),
    where("prediction", "string", "how a number was predicted; empty if measured"),
    where("weights_origin", "string", "package, directory, hub, or random weights"),
    where(
        "weights_sha256",
        "string",
        "digest of the weights, or of their config if random",
    ),
    where("data_origin", "string", "where the rows came from, and the splits"),
    where("project_commit", "string", "commit of the folder in which the command ran"),
    where(
        "project_dirty",
        "boolean",
        "whether tracked files of that folder's checkout differed from the commit",
    ),
    Column(
        name="is_forked",
        section="environment",
        dtype="boolean",
        default=False,
        meaning="whether its process was a fork of one with all imports done",
    ),
    Column(
        name="is_gpu_shared",
        section="environment",
        dtype="boolean",
        default=False,
        meaning="whether another cell was on its GPU, so that it has no times",
    ),
)
