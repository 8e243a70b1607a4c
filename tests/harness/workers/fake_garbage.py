"""A child whose outcome is no outcome: the text the test put into a variable."""

import os

from harness.workers.fake_child import Child

Child().out.write_text(os.environ["FAKE_OUTCOME"])
