"""Ctrl-C, SIGTERM and SIGHUP: training finishes its step, saves, and stops."""

import os
import signal
import threading
import time

from spin.infra import distributed

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# torchrun forwards a Ctrl-C that its processes also receive from the terminal, so that under it
# signals within this many seconds count as one request
SAME_REQUEST = 1.0

ANNOUNCEMENT = "\nfinishing this step, then saving; a second signal stops at once\n"


class Interrupted(KeyboardInterrupt):
    """Training was stopped by a signal. The message says where the same command resumes."""


def raise_on_stop_signals() -> None:
    """Let SIGTERM and SIGHUP raise KeyboardInterrupt, as Ctrl-C does.

    A signal that is ignored stays ignored: nohup ignores SIGHUP for what it starts.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)


class StopRequest:
    """Within `with StopRequest() as stop:`, the first stop signal only sets `stop.requested`.

    A second signal raises Interrupted at once, with `stop.advice` as its message. Outside the main
    thread, where Python delivers no signals, nothing happens.

    announce: whether to write a line to stderr at the first signal.
    """

    def __init__(self, announce: bool = True):
        self.announce = announce
        self.requested = False
        self.requested_at = 0.0
        self.advice = ""
        self.previous_handlers = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                handler = signal.getsignal(number)
                if handler is not signal.SIG_IGN:
                    self.previous_handlers[number] = handler
                    signal.signal(number, self.handle)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)

    def handle(self, number, frame) -> None:
        now = time.monotonic()
        if not self.requested:
            self.requested = True
            self.requested_at = now
            if self.announce:
                # sys.stderr may be in the middle of a write, which must not be entered twice
                os.write(2, ANNOUNCEMENT.encode())
        elif not distributed.LAUNCHED or now - self.requested_at > SAME_REQUEST:
            raise Interrupted(self.advice)
