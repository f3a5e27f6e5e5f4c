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
    """Progress of named phases, one bar each; silent about a phase that has nothing to do. Used in a `with` block."""

    def __init__(self) -> None:
        screen = Console(stderr=True)
        self._bar = Progress(TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
                             TextColumn("{task.fields[rate]}"), TimeRemainingColumn(), console=screen,
                             disable=not screen.is_terminal, transient=True)
        self._plain = not screen.is_terminal
        self._tasks: dict[str, tuple[TaskID, float, int]] = {}  # task, when it began, what was done then
        self._spoke = -PLAIN_INTERVAL_S

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def __call__(self, phase: str, done: int, total: int) -> None:
        """`done` of `total` units of `phase`."""
        now = time.monotonic()
        if phase not in self._tasks:
            self._tasks[phase] = (self._bar.add_task(phase, total=total, rate=""), now, done)
            self._spoke = -PLAIN_INTERVAL_S
        task, began, first = self._tasks[phase]
        rate = (done - first) / (now - began) if now > began else 0.0
        self._bar.update(task, completed=done, total=total, rate=f"{rate:,.0f}/s")
        if self._plain and (now - self._spoke >= PLAIN_INTERVAL_S or done >= total):
            self._spoke = now
            left = f", about {(total - done) / rate:.0f} s left" if rate > 0 and done < total else ""
            log.info("%s: %s of %s, %.0f/s%s", phase, f"{done:,}", f"{total:,}", rate, left)


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
