"""Two processes against one, on the miniature world: the same gradients and weights; and one line when one dies."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spin import data, pairs
from spin.infra import run

ROOT = Path(__file__).parent.parent.parent
RUN = "--iterations 2 --steps 4 --warmup 0 --batch-size 8 --micro-batch 2 --num-prompts 300 --sampler-steps 2"
RUN += " --generation-batch 6 --grid-prompts 0 --score none --save-every 2 --device cpu --opponent-dtype float32"
LR, STEPS = 1e-5, 4
UNET = "checkpoint/unet/diffusion_pytorch_model.safetensors"

# train.py as it is, but that each rank keeps what its gradients are before they are clipped, that it may stop early,
# and that --compile traces the step and no more: inductor takes minutes
WATCHED = """
import os, sys, torch, train
real = torch.compile
torch.compile = lambda f, options, **given: real(f, backend="aot_eager", **given)
clip, out, stop = torch.nn.utils.clip_grad_norm_, sys.argv[1], int(sys.argv[2])
steps = 0

def watched(parameters, *rest):
    global steps
    parameters, steps = list(parameters), steps + 1
    if steps == 1:
        torch.save([p.grad.clone() for p in parameters], f"{out}.gradients.{os.environ.get('RANK', 0)}")
    if steps > stop:
        os._exit(9)
    return clip(parameters, *rest)

torch.nn.utils.clip_grad_norm_ = watched
train.main([*sys.argv[3:], "--out", out])
"""


def command(ranks: int, script: Path, *arguments: str) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    return [sys.executable, *launcher, str(script), *arguments]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def train_watched(tmp_path: Path, name: str, ranks: int, loss: str = "spin", stop: int = 99, *more: str) -> Path:
    script = tmp_path / "watched.py"
    script.write_text(WATCHED)
    rate = {"spin": "--lr", "sft": "--sft-lr", "dpo": "--dpo-lr"}[loss]
    given = [str(tmp_path / name), str(stop), *RUN.split(), "--loss", loss, rate, str(LR), *more]
    result = subprocess.run(
        command(ranks, script, *given), env=environment(), cwd=tmp_path, capture_output=True, text=True
    )
    assert (result.returncode == 0) == (stop == 99), result.stderr[-3000:]
    return tmp_path / name


def gradients(out: Path, rank: int = 0) -> list[torch.Tensor]:
    return torch.load(f"{out}.gradients.{rank}")


@pytest.fixture(scope="module")
def alone_and_together(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("ranks")
    return train_watched(folder, "alone", 1), train_watched(folder, "together", 2)


def test_first_gradients_are_equal_on_both_ranks_and_to_those_of_one(alone_and_together):
    assert_same_gradients(*alone_and_together)


@pytest.mark.parametrize("more", [[], ["--checkpoint-activations"]], ids=["plain", "checkpointed"])
def test_so_are_those_of_the_compiled_step(more, alone_and_together, tmp_path):
    """Compiled inside, shared among the ranks outside: one graph, in spite of DistributedDataParallel."""
    short = ["--steps", "1", "--iterations", "1", "--compile", *more]
    assert_same_gradients(alone_and_together[0], train_watched(tmp_path, "compiled", 2, "spin", 99, *short))


def assert_same_gradients(one: Path, two: Path) -> None:
    ours, theirs, others = gradients(one), gradients(two, 0), gradients(two, 1)
    assert all(torch.equal(a, b) for a, b in zip(theirs, others))
    norm = torch.stack([a.norm() for a in ours]).norm()
    difference = torch.stack([(a - b).norm() for a, b in zip(ours, theirs)]).norm()
    assert norm > 1e-3 and difference <= 1e-5 * norm


def assert_close(one: Path, two: Path, steps: int) -> None:
    """Adam's steps being of one size, a gradient that is rounding alone may turn round: then the weight is 2 lr off."""
    ours, theirs = load_file(one / UNET), load_file(two / UNET)
    difference = torch.cat([(ours[name] - theirs[name]).abs().flatten() for name in ours])
    assert (difference <= 1e-6).double().mean() >= 0.999 and difference.max() <= 2 * LR * steps


def test_weights_after_some_steps_are_those_of_one_rank(alone_and_together):
    one, two = alone_and_together
    assert_close(one / "iter1", two / "iter1", STEPS)
    assert_close(one / "iter2", two / "iter2", 2 * STEPS)
    moved = load_file(one / "iter1" / UNET), load_file(one / "iter2" / UNET)
    assert max((moved[0][name] - moved[1][name]).abs().max() for name in moved[0]) > LR


def test_encoded_and_generated_latents_do_not_depend_on_the_ranks(alone_and_together):
    """The second iteration's come from models that differ by rounding."""
    one, two = alone_and_together
    for pattern, exact in (("cache/*/shard-*", True), ("iter1/generated/*", True), ("iter2/generated/*", False)):
        ours, theirs = sorted(one.glob(pattern)), sorted(two.glob(pattern))
        assert [path.name for path in ours] == [path.name for path in theirs] and ours
        for a, b in zip(ours, theirs):
            for name, tensor in load_file(a).items():
                torch.testing.assert_close(load_file(b)[name], tensor, atol=0 if exact else 0.05, rtol=0)


def test_the_log_is_the_whole_batchs_and_written_once(alone_and_together):
    one, two = (run.Run(out).read_log() for out in alone_and_together)
    assert [(line["iteration"], line["step"]) for line in two] == [(k, s) for k in (1, 2) for s in range(1, STEPS + 1)]
    assert two[0]["loss"] == pytest.approx(one[0]["loss"], abs=1e-6)
    for name in ("delta_data", "delta_gen", "margin", "implicit_accuracy"):
        assert two[1][name] == pytest.approx(one[1][name], rel=1e-2, abs=1e-7)


@pytest.mark.parametrize("first, then", [(1, 2), (2, 1)])
def test_a_run_goes_on_with_another_number_of_ranks(first, then, alone_and_together, tmp_path):
    """Stopped in its third step, it goes on from the state of the second."""
    out = train_watched(tmp_path, "run", first, stop=2)
    assert run.Run(out).load_state("spin-1")["step"] == 2
    train_watched(tmp_path, "run", then)
    assert_close(alone_and_together[0] / "iter1", out / "iter1", STEPS)


@pytest.mark.parametrize("loss", ["sft", "dpo"])
def test_baselines_too(loss, tmp_path):
    one, two = (train_watched(tmp_path, f"{ranks}", ranks, loss) for ranks in (1, 2))
    assert_close(one / loss, two / loss, 2 * STEPS)


def test_a_dead_rank_ends_the_job_with_a_line(tmp_path):
    out = tmp_path / "run"
    long = [*RUN.replace("--steps 4", "--steps 5000").split(), "--loss", "spin", "--out", str(out)]
    launch = command(2, ROOT / "train.py", *long)
    job = subprocess.Popen(launch, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    while not (out / "iter1/state/state.pt").exists():
        assert job.poll() is None
        time.sleep(0.05)
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    [victim] = [pid for pid in children if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()]
    os.kill(int(victim), signal.SIGKILL)
    _, said = job.communicate(timeout=60)
    assert job.returncode != 0
    lines = [line for line in said.splitlines() if line.startswith("train.py: ")]
    assert len(lines) == 1, said
    lost = "train.py: error: rank 0 of 2 has lost another, which ended; the same command goes on from the last state ("
    told = (
        "train.py: stopped; what is finished is kept, and the same command goes on from there"  # by torchrun, earlier
    )
    assert lines[0].startswith(lost) and "peer" in lines[0] or lines[0] == told
    assert run.Run(out).load_state("spin-1")["step"] >= 2


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path):
    wrong = command(2, ROOT / "train.py", "--batch-size", "3", "--device", "cpu", "--out", str(tmp_path / "run"))
    result = subprocess.run(wrong, env=environment(), capture_output=True, text=True)
    assert result.returncode != 0
    assert "train.py: error: --batch-size 3: no multiple of the 2 processes" in result.stderr


def test_ranks_share_one_list_of_what_is_missing(tmp_path, monkeypatch):
    """A rank that comes late, after another has written, must not see a shorter list, with its share elsewhere."""
    monkeypatch.setattr(data, "SHARD", 2)
    shards, seen = data.LatentShards(tmp_path / "latents", range(10)), []
    make = lambda rows: {"x0": torch.tensor(rows, dtype=torch.float32)}  # noqa: E731
    late = data.LatentShards(tmp_path / "latents", range(10))

    def meet():
        """What the other rank does at the first two meetings: it looks, and then it has written its share."""
        seen.append(shards.missing())
        if len(seen) == 2:
            for shard, rows in seen[0][1::2]:
                late.write(shard, make(rows))

    monkeypatch.setattr(pairs.ranks, "WORLD", 2)
    monkeypatch.setattr(pairs.ranks, "wait", meet)
    pairs.fill(shards, make, 2, "")
    assert len(seen) == 3 and seen[0] == seen[1] and seen[2] == []
    assert shards.read("x0", range(10)).tolist() == list(range(10))


def test_places_in_a_batch_have_their_own_noise():
    """What rank 1 draws for its half is what one process would draw there."""
    draws = [data.draw(0, 1, 1, place, (4, 8, 8), 1000)["eps"] for place in range(8)]
    assert len({tuple(eps.flatten()[:3].tolist()) for eps in draws}) == 8
