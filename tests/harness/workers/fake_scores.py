"""A child whose score is better the nearer a learning rate is to that of its method."""

import json
import math

from harness.workers.fake_child import Child
from meft_bench.shared.measurement import Measurement

BEST = {"head": 1e-2, "lora": 1e-3}

child = Child()
distance = abs(math.log(child.cell.learning_rate / BEST[child.cell.method]))
child.out.write_text(
    json.dumps(
        {
            "status": "ok",
            "message": "",
            "measurement": Measurement(
                score=-distance, score_name="accuracy"
            ).to_json(),
            "environment": {},
            "memory_breakdown": None,
        }
    )
)
