"""Looks at a meter again and again in a thread, while the main thread works."""

import threading
from collections.abc import Callable


class Sampler:
    """Calls `look` at once, then every `seconds`, and at the end of a `with` block.

    An exception of `look` is raised at the end of the block.

    Args:
        look: function that reads a meter; calls do not overlap.
        seconds: time between the end of a call and the next one.
    """

    def __init__(self, look: Callable[[], object], seconds: float) -> None:
        self._look = look
        self._seconds = seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._error: BaseException | None = None

    def __enter__(self) -> "Sampler":
        self._look()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._error is not None:
            raise self._error
        self._look()

    def _run(self) -> None:
        try:
            while not self._stop.wait(self._seconds):
                self._look()
        except BaseException as error:
            self._error = error
