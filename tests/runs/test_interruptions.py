"""Killed, stopped by a signal, or out of room: the same command ends as if nothing had happened."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError

import train
from spin.infra import distributed
from spin.infra.cli import run_script
from spin.infra.errors import InputError
from spin.infra.interrupt import Interrupted
from spin.infra.run import Run
from spin.pairs import PairLoader

ROOT = Path(__file__).parent.parent.parent
UNET = "checkpoint/unet/diffusion_pytorch_model.safetensors"
STOP_SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
ADVICE = "the same command resumes"


def assert_same_models(run: Path, expected: Path) -> None:
    """Check that both iterations end with the same weights, to the bit."""
    for k in (1, 2):
        weights = (run / f"iter{k}" / UNET).read_bytes()
        assert weights == (expected / f"iter{k}" / UNET).read_bytes()


# ---- Killed --------------------------------------------------------------------------------------

NUM_KILLS = 10


def train_quietly(arguments: list[str]) -> None:
    sys.stdout = sys.stderr = open(os.devnull, "w")
    train.main(arguments)


def start(processes, arguments: list[str]):
    process = processes.Process(target=train_quietly, args=(arguments,))
    process.start()
    return process


def read_outcome(out: Path) -> dict:
    """Return all that a run computes: weights, latents, images, and the log without seconds."""
    outcome: dict = {}
    for pattern in (f"*/{UNET}", "*/generated/*", "cache/*/*.safetensors", "samples/**/*.png"):
        for path in out.glob(pattern):
            outcome[str(path.relative_to(out))] = path.read_bytes()
    log = Run(out).read_log()
    for line in log:
        del line["seconds"]
    outcome["log"] = log
    return outcome


def count_files_and_lines(out: Path) -> int:
    """Return how far a run is: the number of its files and of the lines of its log.

    Temporary files do not count: a killed run leaves them, and the next one removes them.
    """
    count = 0
    for folder, _, files in os.walk(out):
        for name in files:
            if ".part" not in f"{folder}/{name}":
                count += 1
    log = out / "log.jsonl"
    if log.exists():
        count += log.read_text().count("\n")
    return count


def test_ten_kills_change_nothing(processes, finished, flags, tmp_path):
    out = tmp_path / "run"
    arguments = flags(out, "--save-every 2")
    rng = random.Random(7)
    largest_advance = count_files_and_lines(finished) // NUM_KILLS
    stages = []
    for _ in range(NUM_KILLS):
        goal = count_files_and_lines(out) + rng.randint(1, largest_advance)
        process = start(processes, arguments)
        while count_files_and_lines(out) < goal and process.is_alive():
            time.sleep(0.002)
        time.sleep(rng.random() * 0.05)
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            stages.append(count_files_and_lines(out))
    assert len(stages) == NUM_KILLS
    assert len(set(stages)) > 7, "killed in different stages"

    process = start(processes, arguments)
    process.join()
    assert process.exitcode == 0, "the lock of a killed process does not hold"
    outcome = read_outcome(out)
    expected = read_outcome(finished)
    assert outcome.keys() == expected.keys()
    for name, value in expected.items():
        assert outcome[name] == value, name
    assert not list(out.rglob("*.part")), "a temporary file was left"


# ---- Stopped by a signal -------------------------------------------------------------------------


def send(number: int) -> None:
    """Send this process a signal, which Python handles before the next line."""
    os.kill(os.getpid(), number)


def before_loading(patch, step: int, act: Callable[[], None]) -> None:
    """Call `act` in the middle of a step of spin-1: before its second micro-batch is loaded."""
    load = PairLoader.load

    def acting(loader, iteration, step_of_iteration, start, end):
        if iteration == 1 and step_of_iteration == step and start == 3:
            act()
        return load(loader, iteration, step_of_iteration, start, end)

    patch.setattr(PairLoader, "load", acting)


def after_optimizer_step(patch, step: int, act: Callable[[], None]) -> None:
    """Call `act` when the weights of a step have moved, before the step is logged."""
    optimizer_step = torch.optim.AdamW.step
    calls = []

    def acting(optimizer):
        result = optimizer_step(optimizer)
        calls.append(optimizer)
        if len(calls) == step:
            act()
        return result

    patch.setattr(torch.optim.AdamW, "step", acting)


def assert_saved(out: Path, steps: int) -> None:
    """Check that the first `steps` steps of spin-1 are saved and logged, and no others."""
    assert Run(out).saved_steps("spin-1") == steps
    assert [line["step"] for line in Run(out).read_log()] == list(range(1, steps + 1))


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_lets_the_step_end_and_saves_it(number, finished, flags, tmp_path, monkeypatch):
    arguments = flags(tmp_path / "run", "--save-every 0")
    reason = "spin-1: 2 of 3 steps are saved; the same command resumes from there"
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match=reason):
        before_loading(patch, 2, partial(send, number))
        train.main(arguments)
    assert_saved(tmp_path / "run", steps=2)
    train.main(arguments)
    assert_same_models(tmp_path / "run", finished)


def test_a_signal_between_the_optimizers_step_and_the_log_loses_no_step(
    finished, flags, tmp_path, monkeypatch
):
    arguments = flags(tmp_path / "run", "--save-every 0")
    with monkeypatch.context() as patch, pytest.raises(Interrupted) as interruption:
        after_optimizer_step(patch, 1, partial(send, signal.SIGINT))
        train.main(arguments)
    saved = Run(tmp_path / "run").saved_steps("spin-1")
    assert saved in (1, 2), "the step itself, or the next"
    assert_saved(tmp_path / "run", saved)
    assert f"spin-1: {saved} of 3 steps are saved" in str(interruption.value)
    train.main(arguments)
    assert_same_models(tmp_path / "run", finished)


@pytest.mark.parametrize("when", [before_loading, after_optimizer_step])
def test_a_signal_in_a_models_last_step_stops_before_the_next_model(
    when, finished, flags, tmp_path, monkeypatch
):
    arguments = flags(tmp_path / "run", "--save-every 0")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        when(patch, 3, partial(send, signal.SIGTERM))
        train.main(arguments)
    assert not (tmp_path / "run/iter2").exists()
    assert [line["step"] for line in Run(tmp_path / "run").read_log()] == [1, 2, 3]
    train.main(arguments)
    assert_same_models(tmp_path / "run", finished)


def signal_twice(patch, seconds: float) -> None:
    """Send Ctrl-C twice by the clock of spin.infra.interrupt."""
    clock = SimpleNamespace(monotonic=iter([0.0, seconds]).__next__)
    patch.setattr("spin.infra.interrupt.time", clock)
    send(signal.SIGINT)
    send(signal.SIGINT)


@pytest.mark.parametrize("save_every, resumes_from", [(2, 3), (0, 1)])
def test_a_second_signal_stops_at_once_and_says_where_the_run_resumes(
    save_every, resumes_from, finished, flags, tmp_path, monkeypatch
):
    arguments = flags(tmp_path / "run", f"--save-every {save_every}")
    reason = f"^spin-1 resumes from step {resumes_from}$"
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match=reason):
        before_loading(patch, 3, partial(signal_twice, patch, 0.1))
        train.main(arguments)
    assert len(Run(tmp_path / "run").read_log()) == 2, "the third step did not end"
    assert Run(tmp_path / "run").saved_steps("spin-1") == resumes_from - 1
    train.main(arguments)
    assert_same_models(tmp_path / "run", finished)


def test_under_torchrun_two_signals_within_a_second_are_one(flags, tmp_path, monkeypatch):
    """torchrun passes on a Ctrl-C that its processes have received, too."""
    monkeypatch.setattr(distributed, "LAUNCHED", True)
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="2 of 3 steps are saved"):
        before_loading(patch, 2, partial(signal_twice, patch, 0.5))
        train.main(flags(tmp_path / "run"))
    assert_saved(tmp_path / "run", steps=2)


def test_the_first_signal_is_announced(flags, tmp_path, monkeypatch, capfd):
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        before_loading(patch, 1, partial(send, signal.SIGINT))
        train.main(flags(tmp_path / "run"))
    announcement = "finishing this step, then saving; a second signal stops at once"
    assert capfd.readouterr().err.count(announcement) == 1


def test_a_signal_that_nohup_ignores_stays_ignored(finished, flags, tmp_path, monkeypatch):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    before_loading(monkeypatch, 2, partial(send, signal.SIGHUP))
    arguments = flags(tmp_path / "run")
    assert run_script("train.py", partial(train.main, arguments), ADVICE) == 0
    assert_same_models(tmp_path / "run", finished)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_outside_training_a_signal_stops_at_once(number, flags, tmp_path, monkeypatch, capsys):
    """While the opponent generates, which keeps all of its files that are finished."""

    def send_instead(*arguments, **options):
        send(number)

    monkeypatch.setattr(train, "generate_images", send_instead)
    arguments = flags(tmp_path / "run", "--grid-prompts 0")
    assert run_script("train.py", partial(train.main, arguments), ADVICE) == 130
    assert capsys.readouterr().err.splitlines()[-1] == f"train.py: stopped; {ADVICE}"


def test_the_handlers_of_signals_are_as_before(flags, tmp_path):
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    train.main(flags(tmp_path / "run", "--iterations 1 --steps 1 --grid-prompts 0"))
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_ctrl_c_in_a_terminal(flags, tmp_path):
    """The whole script: its exit status, its last line, and the state that it leaves."""
    out = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "train.py", *flags(out, "--steps 5000 --iterations 1 --save-every 1")],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # what a shell starts in the background ignores Ctrl-C, and so would its children
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    while not (out / "iter1/state/state.pt").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    saved = Run(out).saved_steps("spin-1")
    assert_saved(out, saved)
    expected = f"train.py: stopped; spin-1: {saved} of 5000 steps are saved; "
    assert stderr.splitlines()[-1].startswith(expected)


# ---- Out of room ---------------------------------------------------------------------------------


def test_a_state_that_does_not_fit_leaves_the_last_one(flags, tmp_path, monkeypatch):
    out = tmp_path / "run"
    save = torch.save
    saved = []

    def save_once(state, path):
        if saved:
            path.write_bytes(b"half of it")
            raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64")
        saved.append(path)
        save(state, path)

    arguments = flags(out, "--save-every 2 --grid-prompts 0")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save_once)
        with pytest.raises(InputError, match=r"state\.pt: cannot be written"):
            train.main(arguments)
    assert Run(out).saved_steps("spin-1") == 2
    assert not list(out.rglob("*.part"))
    train.main(arguments)
    assert (out / "iter2" / UNET).exists()


def test_a_model_that_does_not_fit_leaves_the_last_state(flags, tmp_path, monkeypatch):
    out = tmp_path / "run"

    def save_half(tensors, path, metadata):
        Path(path).write_bytes(b"half of it")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    arguments = flags(out, "--grid-prompts 0")
    with monkeypatch.context() as patch:
        patch.setattr("spin.checkpoint.folder.save_file", save_half)
        with pytest.raises(InputError, match="cannot be written.*No space left on device"):
            train.main(arguments)
    assert Run(out).saved_steps("spin-1") == 3
    assert not (out / "iter1/checkpoint").exists()
    assert not list(out.rglob("*.part"))
    train.main(arguments)
    assert (out / "iter2" / UNET).exists()
