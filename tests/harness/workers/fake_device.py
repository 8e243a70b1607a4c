"""A child that says which GPU it sees, and when."""

import json
import os
import time

from harness.workers.fake_child import Child

child = Child()
began = time.time()
time.sleep(0.5)
seen = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES")}
child.write(message=json.dumps(seen | {"began": began, "ended": time.time()}))
