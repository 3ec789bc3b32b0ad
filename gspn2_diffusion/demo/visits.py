"""Who is doing what: one entry for each open page, so that visitors never meet."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

from .sight import Recording


class Visits:
    """What each open page is doing: its jobs' stop signs, and its recording for the tab "What the scan sees"."""

    def __init__(self, keep: int = 8) -> None:
        self.keep = keep
        self._guard = threading.Lock()
        self._jobs: dict[str, set[threading.Event]] = {}
        self._recordings: OrderedDict[str, Recording] = OrderedDict()

    @contextmanager
    def job(self, visit: str) -> Iterator[threading.Event]:
        """The stop sign of a new job of this page, known to `stop` until the job is over."""
        cancel = threading.Event()
        with self._guard:
            self._jobs.setdefault(visit, set()).add(cancel)
        try:
            yield cancel
        finally:
            with self._guard:
                jobs = self._jobs.get(visit, set())
                jobs.discard(cancel)
                if not jobs:
                    self._jobs.pop(visit, None)

    def stop(self, visit: str) -> bool:
        """Tells the page's jobs to stop; whether there were any."""
        with self._guard:
            jobs = list(self._jobs.get(visit, ()))
        for cancel in jobs:
            cancel.set()
        return bool(jobs)

    def keep_recording(self, visit: str, recording: Recording) -> None:
        """Remembered until `keep` other pages have made one."""
        with self._guard:
            self._recordings[visit] = recording
            self._recordings.move_to_end(visit)
            while len(self._recordings) > self.keep:
                self._recordings.popitem(last=False)

    def recording(self, visit: str) -> Recording | None:
        """The page's own recording."""
        with self._guard:
            return self._recordings.get(visit)

    def leave(self, visit: str) -> None:
        """The page was closed."""
        self.stop(visit)
        with self._guard:
            self._recordings.pop(visit, None)
