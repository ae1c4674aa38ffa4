"""Two processes against one: the same gradients, weights and log; a wish to stop; a rank that dies.

Most tests start the ranks themselves, with train.py imported. Two go through torchrun.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import train
from spin import step
from spin.infra import distributed, shards
from spin.infra.cli import run_script
from spin.infra.distributed import GradientReducer, check_same_weights
from spin.infra.run import Run
from spin.infra.shards import LatentShards
from spin.pairs import PairLoader, missing_batches

ROOT = Path(__file__).parent.parent.parent
UNET = "checkpoint/unet/diffusion_pytorch_model.safetensors"

# A step's batch of 8 is 3 + 3 + 2 pairs for one process, and 3 + 1 for each of two.
FLAGS = """
    --iterations 2 --steps 2 --batch-size 8 --micro-batch 3 --num-prompts 12 --warmup 0
    --sampler-steps 2 --generation-batch 4 --grid-prompts 0 --score none --save-every 1
    --device cpu --seed 1 --guidance 1.5
"""
DIED = 9  # exit status of a rank that ends in the middle of a step


# ---- Ranks without torchrun ----------------------------------------------------------------------


def run_ranks(processes, num_ranks: int, work, *arguments) -> list[int]:
    """Call work(*arguments) in every one of `num_ranks` processes, and return their exit statuses.

    One that has not ended after ten minutes has the status None: on a slow core, compiling alone
    takes more than two.
    work: a function of this module, which the processes import.
    """
    with socket.socket() as unused:
        unused.bind(("localhost", 0))
        port = unused.getsockname()[1]
    ranks = []
    for rank in range(num_ranks):
        all_arguments = (rank, num_ranks, port, work, *arguments)
        process = processes.Process(target=run_rank, args=all_arguments, daemon=True)
        process.start()
        ranks.append(process)
    for process in ranks:
        process.join(timeout=600)
    return [process.exitcode for process in ranks]


def run_rank(rank: int, num_ranks: int, port: int, work, *arguments) -> None:
    """Call work(*arguments) as this rank. What torchrun says by environment is set here."""
    distributed.LAUNCHED = True
    distributed.RANK = rank
    distributed.WORLD_SIZE = num_ranks
    environment = {
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
    }
    os.environ.update(environment)
    torch.set_num_threads(1)
    shards.SHARD_ROWS = 5  # so that twelve images are three files
    work(*arguments)


def train_watched(out: Path, more: str = "", die_in_step: int = 0) -> None:
    """Run train.py, and write the first gradients to gradients.<rank>.

    die_in_step: the optimizer step, counted from 1 on, before which the process ends; 0: none.
    """
    clip_grad_norm_ = torch.nn.utils.clip_grad_norm_
    steps = []

    def watching(parameters, max_norm):
        parameters = list(parameters)
        steps.append(len(steps) + 1)
        if steps == [1]:
            gradients = [parameter.grad.clone() for parameter in parameters]
            torch.save(gradients, f"{out}.gradients.{distributed.RANK}")
        if steps[-1] == die_in_step:
            os._exit(DIED)
        return clip_grad_norm_(parameters, max_norm)

    torch.nn.utils.clip_grad_norm_ = watching
    train.main([*FLAGS.split(), *more.split(), "--out", str(out)])


def train_traced(out: Path, more: str) -> None:
    """Run train.py --compile, without inductor, which takes minutes."""
    step.compile_step = partial(torch.compile, backend="aot_eager", fullgraph=True)
    train_watched(out, f"--compile {more}")


def train_signaled(out: Path, number: int, rank: int) -> None:
    """Run train.py as its script does, but for a signal to one rank in the first step."""
    load = PairLoader.load

    def load_and_signal(loader, *arguments):
        if distributed.RANK == rank:
            os.kill(os.getpid(), number)
        return load(loader, *arguments)

    PairLoader.load = load_and_signal
    sys.stderr = open(f"{out}.stderr.{distributed.RANK}", "w")
    main = partial(train.main, [*FLAGS.split(), "--out", str(out)])
    sys.exit(run_script("train.py", main, advice=""))


@pytest.fixture(scope="module")
def alone(processes, tmp_path_factory) -> Path:
    """The run of one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    assert run_ranks(processes, 1, train_watched, out) == [0]
    return out


@pytest.fixture(scope="module")
def together(processes, tmp_path_factory) -> Path:
    """The run of two processes."""
    out = tmp_path_factory.mktemp("together") / "run"
    assert run_ranks(processes, 2, train_watched, out) == [0, 0]
    return out


# ---- The same as one process ---------------------------------------------------------------------


def assert_same_gradients(one: Path, two: Path, tolerance: float) -> None:
    """Check that the first gradients are equal on both ranks, and close to those of one process.

    tolerance: of the distance, relative to the gradients' norm.
    """
    expected = torch.load(f"{one}.gradients.0")
    rank_0 = torch.load(f"{two}.gradients.0")
    rank_1 = torch.load(f"{two}.gradients.1")
    for gradient, other in zip(rank_0, rank_1, strict=True):
        assert torch.equal(gradient, other)
    norm = torch.cat([gradient.flatten() for gradient in expected]).norm()
    differences = [gradient - other for gradient, other in zip(rank_0, expected, strict=True)]
    distance = torch.cat([difference.flatten() for difference in differences]).norm()
    assert norm > 1e-3
    assert distance <= tolerance * norm


def assert_close_weights(one: Path, two: Path, lr: float, steps: int) -> None:
    """Check that two models are equal up to the rounding of their gradients.

    Where a gradient is rounding alone, Adam may step the other way, and all its steps are as long
    as the learning rate: the weight is 2 lr off.
    """
    expected = load_file(one / UNET)
    weights = load_file(two / UNET)
    differences = [(weights[name] - expected[name]).abs().flatten() for name in expected]
    difference = torch.cat(differences)
    assert (difference <= 1e-6).double().mean() >= 0.999
    assert difference.max() <= 2 * lr * steps


def test_the_first_gradients_are_those_of_one_process(alone, together):
    assert_same_gradients(alone, together, tolerance=1e-5)


def test_so_are_those_of_the_bounded_loss(processes, alone, tmp_path):
    """At theta_k they are those of (C.6). From the second step on, the weights would differ."""
    out = tmp_path / "run"
    bounded = "--loss spin-bounded --iterations 1"
    assert run_ranks(processes, 1, train_watched, tmp_path / "one", bounded) == [0]
    assert run_ranks(processes, 2, train_watched, out, bounded) == [0, 0]
    assert_same_gradients(alone, out, tolerance=1e-5)
    assert_close_weights(tmp_path / "one/iter1", out / "iter1", lr=2e-5, steps=2)


def test_so_are_those_of_sdxl(processes, tinyxl_folder, image_folder, tmp_path):
    """Pooled text and sizes are a row of the context: the ranks' shares hold their own."""
    model = f"--preset toy --loss spin --model {tinyxl_folder} --data {image_folder}"
    more = f"{model} --resolution 32 --prompt-dropout 0.3 --iterations 1"
    assert run_ranks(processes, 1, train_watched, tmp_path / "one", more) == [0]
    assert run_ranks(processes, 2, train_watched, tmp_path / "two", more) == [0, 0]
    assert_same_gradients(tmp_path / "one", tmp_path / "two", tolerance=1e-5)
    assert_close_weights(tmp_path / "one/iter1", tmp_path / "two/iter1", lr=5e-5, steps=2)


@pytest.mark.parametrize("more", ["", "--checkpoint-activations"], ids=["plain", "checkpointed"])
def test_so_are_those_of_the_compiled_step(more, processes, alone, tmp_path):
    out = tmp_path / "run"
    one_graph = f"--loss spin --iterations 1 --steps 1 --micro-batch 4 {more}"
    assert run_ranks(processes, 2, train_traced, out, one_graph) == [0, 0]
    assert_same_gradients(alone, out, tolerance=1e-5)
    names = load_file(out / "iter1" / UNET).keys()
    assert names == load_file(alone / "iter1" / UNET).keys(), "as eager code saves them"


@pytest.mark.parametrize(
    "model, lr, steps",
    [
        ("iter1", 2e-5, 2),
        ("iter2", 2e-5, 4),
        ("bounded-1", 2e-5, 2),
        ("bounded-2", 2e-5, 4),
        ("sft", 3e-5, 4),
        ("dpo", 1e-6, 4),
    ],
)
def test_trained_weights_are_those_of_one_process(model, lr, steps, alone, together):
    assert_close_weights(alone / model, together / model, lr, steps)


@pytest.mark.parametrize(
    "pattern, tolerance",
    [
        ("cache/*/shard-*", 0),
        ("iter1/generated/*", 0),
        ("iter2/generated/*", 0.05),  # generated by models that differ by rounding
    ],
)
def test_latents_do_not_depend_on_the_number_of_ranks(pattern, tolerance, alone, together):
    expected = sorted(alone.glob(pattern))
    files = sorted(together.glob(pattern))
    assert len(files) == 3
    assert [path.name for path in files] == [path.name for path in expected]
    for path, expected_path in zip(files, expected):
        tensors = load_file(path)
        for name, tensor in load_file(expected_path).items():
            torch.testing.assert_close(tensors[name], tensor, atol=tolerance, rtol=0)


def test_the_log_is_written_once_and_is_that_of_the_whole_batch(alone, together):
    expected = Run(alone).read_log()
    log = Run(together).read_log()
    assert len(log) == 4 * 4  # spin, bounded, sft and dpo have four steps each
    for line, expected_line in zip(log, expected, strict=True):
        assert line.keys() == expected_line.keys()
        for name in ("model", "iteration", "step", "lr"):
            assert line[name] == expected_line[name]
    metrics = ("loss", "delta_data", "delta_gen", "margin", "implicit_accuracy", "grad_norm")
    for i in (0, 1):  # later, Adam has made long steps of gradients that are rounding
        for name in metrics:
            assert log[i][name] == pytest.approx(expected[i][name], rel=1e-2, abs=1e-7), name


@pytest.mark.parametrize("first, second", [(1, 2), (2, 1)])
def test_a_run_resumes_with_another_number_of_ranks(first, second, processes, alone, tmp_path):
    """It dies in its second step, and resumes from the state of the first."""
    out = tmp_path / "run"
    spin_1 = "--loss spin --iterations 1"
    assert run_ranks(processes, first, train_watched, out, spin_1, 2) == [DIED] * first
    assert Run(out).saved_steps("spin-1") == 1
    assert run_ranks(processes, second, train_watched, out, spin_1) == [0] * second
    assert_close_weights(alone / "iter1", out / "iter1", lr=2e-5, steps=2)


def test_ranks_share_one_list_of_missing_files(tmp_path, monkeypatch):
    """A rank that comes late must not see a shorter list, of which it would take another part."""
    monkeypatch.setattr(shards, "SHARD_ROWS", 2)
    monkeypatch.setattr(distributed, "WORLD_SIZE", 2)
    latents = LatentShards(tmp_path, range(10))
    barriers = []

    def other_rank():
        """What rank 1 does at a barrier: at the second, it writes its files."""
        barriers.append(latents.missing())
        if len(barriers) == 2:
            for shard, rows in barriers[0][1::2]:
                latents.write(shard, [{"x0": torch.tensor(rows)}])

    monkeypatch.setattr(distributed, "barrier", other_rank)
    written = []
    for shard, batches in missing_batches(latents, 2, title=""):
        rows = next(batches)
        written.append(shard)
        latents.write(shard, [{"x0": torch.tensor(rows)}])
    assert len(barriers) == 2
    assert written == [0, 2, 4]
    assert latents.read("x0", range(10)).tolist() == list(range(10))


# ---- One sum a step, the same start --------------------------------------------------------------


class Layers(nn.Module):
    """Three weights, of which the middle one is not used."""

    def __init__(self):
        super().__init__()
        self.first = nn.Parameter(torch.tensor([1.0, 2.0]))
        self.unused = nn.Parameter(torch.tensor([3.0]))
        self.last = nn.Parameter(torch.tensor([[4.0], [5.0]]))

    def forward(self, scale: float) -> Tensor:
        return scale * (self.first @ self.last).sum()


def reduce_twice(folder: Path) -> None:
    """Take two steps, of which rank r contributes (r + 1) and 10 (r + 1) times the gradient."""
    network = Layers()
    with distributed.process_group("cpu"):
        reducer = GradientReducer(network)
        results = []
        for step_scale in (1, 10):
            network(step_scale * (distributed.RANK + 1)).backward()
            sums = reducer.all_reduce(torch.tensor([1.0, float(distributed.RANK)]))
            buffer_start = reducer.buffer.data_ptr()
            buffer_end = buffer_start + reducer.buffer.nbytes
            inside = []
            for parameter in (network.first, network.last):
                inside.append(buffer_start <= parameter.grad.data_ptr() < buffer_end)
            result = {
                "first": network.first.grad.clone(),
                "unused": network.unused.grad,
                "last": network.last.grad.clone(),
                "sums": sums.clone(),
                "inside": inside,
                "numel": reducer.buffer.numel(),
            }
            results.append(result)
            reducer.zero()
    torch.save(results, folder / f"{distributed.RANK}")


def test_gradients_and_numbers_are_summed_in_one_buffer_that_holds_the_gradients(
    processes, tmp_path
):
    assert run_ranks(processes, 2, reduce_twice, tmp_path) == [0, 0]
    for rank in (0, 1):
        first_step, second_step = torch.load(tmp_path / f"{rank}")
        for step, scale in ((first_step, 1 + 2), (second_step, 10 + 20)):
            assert step["first"].tolist() == [4 * scale, 5 * scale]
            assert step["last"].tolist() == [[1 * scale], [2 * scale]]
            assert step["unused"] is None, "the optimizer skips it on all ranks"
            assert step["sums"].tolist() == [2, 1]
            assert step["inside"] == [True, True], "there is no second copy"
            assert step["numel"] == 2 + 2 + 2


def check_weights(folder: Path, difference: float) -> None:
    """Write what check_same_weights says if a weight of rank 1 differs from rank 0's."""
    network = Layers()
    with torch.no_grad():
        network.last[1] += distributed.RANK * difference
    message = ""
    with distributed.process_group("cpu"):
        try:
            check_same_weights(network)
        except RuntimeError as error:
            message = str(error)
    (folder / f"{distributed.RANK}").write_text(message)


@pytest.mark.parametrize("difference", [0.0, 1e-6])
def test_ranks_that_begin_with_different_weights_are_refused(difference, processes, tmp_path):
    assert run_ranks(processes, 2, check_weights, tmp_path, difference) == [0, 0]
    for rank in (0, 1):
        message = (tmp_path / f"{rank}").read_text()
        if difference:
            assert message.startswith("the ranks begin with different weights")
        else:
            assert message == ""


# ---- Stopping ------------------------------------------------------------------------------------


@pytest.mark.parametrize("number, rank", [(signal.SIGINT, 0), (signal.SIGTERM, 1)])
def test_a_signal_to_one_rank_stops_all_at_the_same_step(
    number, rank, processes, together, tmp_path
):
    out = tmp_path / "run"
    assert run_ranks(processes, 2, train_signaled, out, number, rank) == [130, 130]
    line = "train.py: stopped; spin-1: 1 of 2 steps are saved; the same command resumes from there"
    for other in (0, 1):
        assert Path(f"{out}.stderr.{other}").read_text().splitlines()[-1] == line
    assert Run(out).saved_steps("spin-1") == 1
    assert [logged["step"] for logged in Run(out).read_log()] == [1]

    assert run_ranks(processes, 2, train_watched, out) == [0, 0]
    for model in ("iter1", "iter2", "sft", "dpo"):
        assert (out / model / UNET).read_bytes() == (together / model / UNET).read_bytes()


def start_torchrun(out: Path) -> subprocess.Popen:
    """Start a run of two ranks that does not end by itself, and wait for its first state."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", "train.py", *FLAGS.split()]
    command += ["--loss", "spin", "--steps", "5000", "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    job = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (out / "iter1/state/state.pt").exists():
        assert job.poll() is None
        time.sleep(0.05)
    return job


def script_lines(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("train.py: ")]


def test_torchrun_passes_a_signal_on_and_no_step_is_lost(tmp_path):
    out = tmp_path / "run"
    job = start_torchrun(out)
    job.send_signal(signal.SIGTERM)
    _, stderr = job.communicate(timeout=60)
    assert job.returncode != 0
    done = Run(out).saved_steps("spin-1")
    assert Run(out).read_log()[-1]["step"] == done
    for line in script_lines(stderr):
        assert line.startswith(f"train.py: stopped; spin-1: {done} of 5000 steps are saved; ")
    assert len(script_lines(stderr)) == 2


def test_a_rank_that_dies_ends_the_job_with_a_line(tmp_path):
    out = tmp_path / "run"
    job = start_torchrun(out)
    os.kill(find_rank_1(job.pid), signal.SIGKILL)
    _, stderr = job.communicate(timeout=60)
    assert job.returncode != 0
    [line] = script_lines(stderr)
    lost = "train.py: error: rank 0 of 2: another rank has exited; the same command resumes "
    stopped_by_torchrun = "train.py: stopped; "
    assert line.startswith((lost, stopped_by_torchrun)), stderr
    assert Run(out).saved_steps("spin-1") >= 1


def find_rank_1(launcher: int) -> int:
    """Return the process id of the launcher's child that is rank 1."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    for child in children:
        if b"\0RANK=1\0" in Path(f"/proc/{child}/environ").read_bytes():
            return int(child)
    raise AssertionError("there is no rank 1")


def test_a_batch_that_cannot_be_shared_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(distributed, "WORLD_SIZE", 2)
    with pytest.raises(SystemExit):
        train.parse_args(["--batch-size", "3"])
    assert "--batch-size 3: not a multiple of the 2 processes" in capsys.readouterr().err
