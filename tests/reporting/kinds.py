"""What the fixtures of this folder give to a test."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

Record = dict[str, Any]
MakeRecord = Callable[..., Record]
Write = Callable[..., Path]
Cli = Callable[..., "subprocess.CompletedProcess[str]"]
Draw = Callable[[str], Figure]
