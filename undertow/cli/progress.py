"""Progress of long work: a bar with rate and time left on a terminal, plain lines about every ten seconds elsewhere."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Self, final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

log = logging.getLogger(__name__)
PLAIN_INTERVAL_S = 10.0


@final
class Phases:
    """Progress of named phases, one after another; silent about a phase that has nothing to do. Used in a `with` block.

    A bar is on the screen only while its phase is under way, since two live displays erase each other's lines.
    """

    def __init__(self) -> None:
        self._screen = Console(stderr=True)
        self._phase = ""
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._began, self._first, self._spoke = 0.0, 0, 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._end()

    def __call__(self, phase: str, done: int, total: int) -> None:
        """`done` of `total` units of `phase`."""
        now = time.monotonic()
        if phase != self._phase:
            self._begin(phase, done, total, now)
        rate = (done - self._first) / (now - self._began) if now > self._began else 0.0
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total, rate=f"{rate:,.0f}/s")
        elif not self._screen.is_terminal and (now - self._spoke >= PLAIN_INTERVAL_S or done >= total):
            self._spoke = now
            left = f", about {(total - done) / rate:.0f} s left" if rate > 0 and done < total else ""
            log.info("%s: %s of %s, %.0f/s%s", phase, f"{done:,}", f"{total:,}", rate, left)
        if done >= total:
            self._end()

    def _begin(self, phase: str, done: int, total: int, now: float) -> None:
        self._end()
        self._phase, self._began, self._first, self._spoke = phase, now, done, now - PLAIN_INTERVAL_S
        if self._screen.is_terminal:
            self._bar = Progress(TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
                                 TextColumn("{task.fields[rate]}"), TimeRemainingColumn(), console=self._screen, transient=True)
            self._task = self._bar.add_task(phase, total=total, rate="")
            self._bar.start()

    def _end(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


@final
class StopRequest:
    """Whether Ctrl-C or SIGTERM has asked the command to stop, and which."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __call__(self) -> bool:
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """0 after SIGTERM (a clean stop was asked for), 130 after Ctrl-C."""
        return 0 if self.signal == signal.SIGTERM else 130


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Turn the first Ctrl-C or SIGTERM into a request; a second Ctrl-C breaks off at once."""
    request = StopRequest()

    def on_signal(number: int, _frame: FrameType | None) -> None:
        if request():
            raise KeyboardInterrupt
        request.signal = number
        log.info("stopping after this step and saving (once more to break off)")

    handler: Callable[[int, FrameType | None], None] = on_signal
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, old in before.items():
            signal.signal(number, old)
