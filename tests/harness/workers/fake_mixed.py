"""A child that ends by its method: `head` runs out of memory, `lora` is skipped."""

from harness.workers.fake_child import Child

child = Child()
endings = {"head": ("oom", "too small"), "lora": ("skipped", "no such data")}
child.write(*endings.get(child.cell.method, ("ok", "")))
