"""How training ends before its time: on its own account, or because somebody asks it to."""

from __future__ import annotations

import contextlib
import signal as unix_signals
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType


class TrainingStopped(RuntimeError):
    """Training ended before its time; the message says why, and what is left to go on from."""


class TrainingInterrupted(TrainingStopped):
    """Somebody asked it to stop, by ``signal``: SIGTERM or SIGINT (Ctrl-C). The state is saved."""

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal


@dataclass
class StopRequest:
    """Whether somebody has asked for an end, and how.

    Args:
        signal: number of the signal; 0 while nobody has.
    """

    signal: int = 0


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """SIGTERM and Ctrl-C ask for an end instead of making one; a second Ctrl-C does end everything at once.

    Only the main thread hears signals; in another one nothing changes.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def note(number: int, frame: FrameType | None) -> None:
        if request.signal and number == unix_signals.SIGINT:
            raise KeyboardInterrupt
        request.signal = number

    before = {number: unix_signals.signal(number, note) for number in (unix_signals.SIGTERM, unix_signals.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            unix_signals.signal(number, handler)


@contextlib.contextmanager
def exit_on_termination() -> Iterator[None]:
    """SIGTERM becomes ``SystemExit`` with code 143, so that whoever started other processes can end them first."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = unix_signals.signal(unix_signals.SIGTERM, leave)
    try:
        yield
    finally:
        unix_signals.signal(unix_signals.SIGTERM, before)
