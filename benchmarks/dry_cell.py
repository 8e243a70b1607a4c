"""A child that does nothing: what remains is what the harness itself takes.

`overhead.py` runs it in the place of `meft_bench.child.worker`.
"""

from meft_bench.child.watchdog import die_with_parent
from meft_bench.shared import outcome, request

if __name__ == "__main__":
    given = request.read()
    die_with_parent(given.parent_pid)
    outcome.leave(
        given.out,
        {
            "status": "ok",
            "message": "",
            "measurement": {},
            "environment": {},
            "memory_breakdown": None,
        },
    )
