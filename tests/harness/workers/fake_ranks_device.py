"""Ranks of which each says which GPUs they see."""

import json
import os

from harness.workers.fake_child import Child
from meft_bench.shared import outcome

child = Child()
seen = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES")}
place = child.out.with_suffix(".ranks") / f"{os.environ['RANK']}.json"
outcome.write(place, child.outcome("ok", json.dumps(seen)))
