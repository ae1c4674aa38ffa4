"""Fixtures that tests of whole runs share: a command of train.py, what it leaves, and processes."""

import gc
import multiprocessing
import signal
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest

import train
from spin.infra.interrupt import STOP_SIGNALS

SETTINGS = """
    --preset toy --loss spin --iterations 2 --steps 3 --batch-size 4 --micro-batch 3
    --lr 1e-5 --beta 1000 --warmup 1 --flip 0.5 --seed 11
    --sampler-steps 3 --generation-batch 4 --grid-prompts 2 --device cpu
"""


@pytest.fixture(scope="session")
def flags(image_folder) -> Callable[..., list[str]]:
    """Return a function that returns the arguments of a run of two seconds.

    It trains the miniature world's base on twelve captioned images. Flags in the second argument
    come last, and so override the usual ones.
    """

    def make_flags(out: Path, more: str = "") -> list[str]:
        paths = ["--data", str(image_folder), "--out", str(out)]
        return [*paths, *SETTINGS.split(), *more.split()]

    return make_flags


@pytest.fixture(scope="session")
def finished(flags, tmp_path_factory) -> Path:
    """The folder of a finished run with the usual flags. Copy it before you change it."""
    out = tmp_path_factory.mktemp("finished") / "run"
    train.main(flags(out))
    return out


@pytest.fixture(scope="session")
def processes() -> ForkServerContext:
    """Return a context of multiprocessing whose processes start with all packages imported.

    That takes seconds, which a server process spends once for all of them.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "open_clip", "pytest"])
    return context


@pytest.fixture(scope="session", autouse=True)
def frozen_modules() -> None:
    """Keep imported modules out of garbage collection.

    train.py collects garbage between two models, and most of that time goes into looking at them.
    """
    import open_clip  # noqa: F401  # the largest one, which the project imports late

    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def restored_signal_handlers() -> Iterator[None]:
    """Restore the handlers of stop signals, which a script run in this process replaces.

    Tests begin with the usual ones: a shell that starts pytest in the background has some ignored,
    and a script keeps ignoring them.
    """
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
