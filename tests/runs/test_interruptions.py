"""SIGKILL at random moments, then the same command: the run ends as if nothing had happened, to the last bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

import train
from spin.infra import run
from spin.infra.run import InputError

ROOT = Path(__file__).parent.parent.parent
STORY = "--iterations 2 --steps 4 --save-every 2 --batch-size 4 --micro-batch 4 --num-prompts 12 --sampler-steps 2"
STORY += " --generation-batch 4 --grid-prompts 1 --score validation --score-images 1 --device cpu --out"
MODELS = ("iter1", "iter2", "sft", "dpo")
WEIGHTS = "checkpoint/unet/diffusion_pytorch_model.safetensors"


def start(out: Path, stderr: int = subprocess.DEVNULL) -> subprocess.Popen:
    command = [sys.executable, "train.py", *STORY.split(), str(out)]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": stderr}
    # what a shell starts in the background ignores Ctrl-C, and so would its children
    listen = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    return subprocess.Popen(command, cwd=ROOT, env=one_thread, preexec_fn=listen, **pipes)


def outcome(out: Path) -> dict:
    """Everything that a run computes: weights, latents, log without seconds, scores."""
    files = {f"{model}/{WEIGHTS}": (out / model / WEIGHTS).read_bytes() for model in MODELS}
    files |= {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.glob("*/generated/*"))}
    lines = [json.loads(line) | {"seconds": 0} for line in (out / "log.jsonl").read_text().splitlines()]
    results = json.loads((out / "results.json").read_text())
    return files | {"log": lines, "scores": [results["models"], results["differences"]]}


def progress(out: Path) -> int:
    """How far a run is: its files, but for the pictures it was given, and the lines of its log."""
    log = out / "log.jsonl"
    walks = [os.walk(out / name) for name in ("cache", "samples", *MODELS)]  # which minds no folder that goes meanwhile
    files = sum(len(below) + len(names) for walk in walks for _, below, names in walk)
    return files + (log.read_text().count("\n") if log.exists() else 0)


def test_ten_kills_change_nothing(tmp_path):
    assert start(tmp_path / "whole").wait() == 0
    whole, torn, chance, killed = tmp_path / "whole", tmp_path / "torn", random.Random(7), []
    for _ in range(10):
        process, until = start(torn), progress(torn) + chance.randint(1, progress(whole) // 12)
        while progress(torn) < until and process.poll() is None:
            time.sleep(0.005)
        time.sleep(chance.random() * 0.1)
        process.kill()
        if process.wait() == -signal.SIGKILL:
            killed.append(progress(torn))
    assert start(torn).wait() == 0, "the lock of a killed process does not hold"
    assert len(killed) == 10 and len(set(killed)) > 7, "killed in different stages"
    ours, theirs = outcome(torn), outcome(whole)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name] == theirs[name], name
    assert not list(torn.rglob("*.part"))


def test_ctrl_c_leaves_a_state_to_resume_from_and_says_so(tmp_path):
    process = start(tmp_path / "run", subprocess.PIPE)
    while not (tmp_path / "run/iter1/state/state.pt").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 130
    kept = "train.py: stopped; what is finished is kept, and the same command goes on from there"
    assert said.decode().splitlines()[-1] == kept
    assert start(tmp_path / "run").wait() == 0


def test_ctrl_c_keeps_every_step_that_was_done(tmp_path, monkeypatch):
    """Pressed in the middle of the third step, with no state saved before; and while the weights move: then none is."""
    given = [*STORY.split()[:2], *"--steps 4 --batch-size 4 --micro-batch 2 --num-prompts 12 --sampler-steps 2".split()]
    given += "--grid-prompts 0 --score none --device cpu --loss spin --save-every 0 --out".split()
    train.main([*given, str(tmp_path / "whole")])
    for where, at, kept in (("pairs.read", 8, 2), ("torch.optim.AdamW.step", 3, 2)):
        out, calls = tmp_path / where, [0]
        owner = train.pairs if where == "pairs.read" else torch.optim.AdamW
        real = getattr(owner, where.split(".")[-1])

        def pressed(*args, **more):
            calls[0] += 1
            result = real(*args, **more)
            if calls[0] == at:
                raise KeyboardInterrupt
            return result

        with monkeypatch.context() as patch:
            patch.setattr(owner, where.split(".")[-1], pressed)
            with pytest.raises(KeyboardInterrupt):
                train.main([*given, str(out)])
        state = run.Run(out).load_state("spin-1")
        if where == "pairs.read":  # twice measured, twice a step: the eighth is the second of the third step
            assert state["step"] == kept == len(run.Run(out).read_log())
        else:
            assert state == {}, "half a step is no state"
        train.main([*given, str(out)])
        for model in ("iter1", "iter2"):
            assert (out / model / WEIGHTS).read_bytes() == (tmp_path / "whole" / model / WEIGHTS).read_bytes()


@pytest.mark.parametrize("failing", ["torch.save", "safetensors"])
def test_a_full_disk_leaves_the_last_state_and_one_line(failing, tmp_path, monkeypatch):
    out = tmp_path / "run"
    flags = [*STORY.split(), str(out), "--loss", "spin"]
    real, count = torch.save, [0]

    def full(state, path):
        """The second state does not fit: torch says so with a RuntimeError of its own."""
        count[0] += 1
        if count[0] < 2:
            return real(state, path)
        Path(path).write_bytes(b"half of it")
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")

    def no_room(tensors, path, **_):
        Path(path).write_bytes(b"half of it")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    if failing == "torch.save":
        monkeypatch.setattr(torch, "save", full)
    else:
        monkeypatch.setattr("spin.checkpoint.pipeline.save_file", no_room)
    with pytest.raises(InputError, match="cannot be written"):
        train.main(flags)
    state = run.Run(out).load_state("spin-1")
    assert state["step"] == (2 if failing == "torch.save" else 4) and "optimizer" in state
    assert not list(out.rglob("*.part"))
    monkeypatch.undo()
    train.main(flags)
    assert (out / "iter2" / WEIGHTS).exists()
