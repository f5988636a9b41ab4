"""SIGTERM as a wish: stop after the point at hand, with everything that is finished recorded.

What is no point but one piece of work stops at once, and leaves nothing half done (`ending`).
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from deltalab.terminal import console

_state = {"wanted": False, "working": False, "stopped": False}


class Stopped(BaseException):
    """The process was asked to stop, and nothing is half done."""


class Ended(BaseException):
    """No further point of a sweep can be run.

    Attributes:
        why: what stands in the way.
    """

    def __init__(self, why: Exception) -> None:
        self.why = why
        super().__init__(str(why))


@contextmanager
def working() -> Iterator[None]:
    """Do one unit of work, which SIGTERM does not interrupt; a second SIGTERM ends the process.

    Raises:
        Stopped: on entering, if the process was asked to stop.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _wish)
    if _state["wanted"]:
        raise Stopped
    _state["working"] = True
    try:
        yield
    finally:
        _state["working"] = False


@contextmanager
def ending() -> Iterator[None]:
    """Let SIGTERM, or the end of the terminal, stop the body at once, so that it can tidy up.

    A second signal ends the process. A signal that this process ignores (nohup) stays ignored.

    Raises:
        Stopped: in the body, wherever it is.
    """
    mine = [
        number
        for number in (signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) is signal.SIG_DFL
    ]
    for number in mine:
        signal.signal(number, _end)
    try:
        yield
    finally:
        for number in mine:
            signal.signal(number, signal.SIG_DFL)


def want() -> None:
    """Ask this process to stop before its next unit of work."""
    _state["wanted"] = True


def wanted() -> bool:
    """Whether this process was asked to stop."""
    return _state["wanted"]


def is_stop(error: BaseException) -> bool:
    """Whether an error is `Stopped`, or came in its place.

    In the midst of other people's code, what tidies up there may raise an error of its own instead
    (OmegaConf, copying a config).
    """
    return isinstance(error, Stopped) or _state["stopped"]


def busy() -> bool:
    """Whether a unit of work is at hand."""
    return _state["working"]


def _end(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)
    _state["stopped"] = True
    raise Stopped


def _wish(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _state["wanted"] = True
    if not _state["working"]:
        _state["stopped"] = True
        raise Stopped
    console.fail("stopping after this point; a second SIGTERM stops at once")
