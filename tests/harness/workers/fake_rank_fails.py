"""Two ranks, of which the first fails because the second has failed."""

import os
import time

from harness.workers.fake_child import Child
from meft_bench.child import rank_launcher

child = Child()
is_first = os.environ["RANK"] == "0"
message = "connection closed by peer" if is_first else "division by zero"
while is_first and not child.out.with_suffix(".ranks").joinpath("1.json").exists():
    time.sleep(0.01)
rank_launcher.leave(child.out, child.outcome("error", message))
