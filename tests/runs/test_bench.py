"""tests/bench.py on the miniature world's networks, and how it counts operations."""

from types import SimpleNamespace

import bench
import helpers
import pytest
import torch

import train
from spin import step, toy
from spin.infra.shards import LatentShards
from spin.step import LossStep
from spin.unet import UNet

ON_CPU = ["--device", "cpu", "--pairs", "2", "--images", "2"]


@pytest.fixture(autouse=True)
def same_random_state():
    """A measurement may draw from the global generator."""
    with torch.random.fork_rng():
        yield


@pytest.fixture
def one_step(monkeypatch):
    """Makes every stage measure a single call, and counts no operations, which takes longer."""
    monkeypatch.setattr(bench, "MATMUL_SECONDS", 0.0)
    monkeypatch.setattr(bench, "TIMED_MATMULS", 1)
    monkeypatch.setattr(bench, "WARM_UP_STEPS", 0)
    monkeypatch.setattr(bench, "TIMED_STEPS", 1)
    monkeypatch.setattr(bench, "TIMED_SAMPLES", 1)
    monkeypatch.setattr(bench, "flop_of_a_pair", lambda unet: 1)


@pytest.fixture
def loss_calls(monkeypatch, one_step) -> list[SimpleNamespace]:
    """Lists how the loss is called: pairs, and whether activations are recomputed."""
    calls = []
    call = LossStep.__call__

    def recorded(self, policy, batch):
        checkpointed = policy.mid_block.recomputes
        calls.append(SimpleNamespace(pairs=len(batch["x0_data"]), checkpointed=checkpointed))
        return call(self, policy, batch)

    monkeypatch.setattr(LossStep, "__call__", recorded)
    return calls


# ---- the table -----------------------------------------------------------------------------------


def test_all_stages_that_need_no_compiler_are_measured_on_a_cpu(monkeypatch, capsys):
    monkeypatch.setattr(bench, "MATMUL_SECONDS", 0.0)
    monkeypatch.setattr(bench, "TIMED_STEPS", 3)
    rows = bench.main(ON_CPU)
    row_of = {row["stage"]: row for row in rows}
    stages = ["matmul", "public", "eager", "checkpointed", "sampling", "decoding"]
    assert list(row_of) == stages
    assert row_of["matmul"]["TFLOP/s"] > 0
    assert row_of["eager"]["pairs/s"] > row_of["public"]["pairs/s"] > 0
    assert row_of["eager"]["TFLOP/s"] > 0
    assert row_of["sampling"]["images/s"] > 0
    assert row_of["decoding"]["images/s"] > 0
    *table, _, last = capsys.readouterr().out.splitlines()
    assert len(table) == 2 + len(stages)
    assert last.startswith("toy, ") and "float32, 2 pairs a micro-batch, commit " in last


def test_stages_are_measured_alone_by_their_names(one_step):
    rows = bench.main(["decoding", "sampling", *ON_CPU])
    assert [row["stage"] for row in rows] == ["decoding", "sampling"]


def test_a_stage_that_does_not_exist_is_refused(capsys):
    with pytest.raises(SystemExit):
        bench.main(["eager", "training", *ON_CPU])
    assert "training: no stage" in capsys.readouterr().err


def test_a_row_is_printed_before_the_next_stage_begins(monkeypatch, capsys):
    printed = []

    def second(setup) -> dict:
        printed.extend(capsys.readouterr().out.splitlines())
        return {}

    stages = {"first": lambda setup: {"pairs/s": 7.0}, "second": second}
    monkeypatch.setattr(bench, "STAGES", stages)
    bench.main(ON_CPU)
    header, _, first = printed
    assert header.startswith("| stage")
    assert first.replace(" ", "") == "|first|7||||||"


def test_a_stage_without_enough_memory_says_so_and_the_next_goes_on(monkeypatch, capsys):
    def large(setup) -> dict:
        raise torch.OutOfMemoryError

    stages = {"large": large, "small": lambda setup: {"pairs/s": 7.0}}
    monkeypatch.setattr(bench, "STAGES", stages)
    rows = bench.main(ON_CPU)
    assert rows == [{"stage": "large: out of memory"}, {"stage": "small", "pairs/s": 7.0}]
    assert "| large: out of memory |" in capsys.readouterr().out


# ---- training ------------------------------------------------------------------------------------


def test_an_optimizer_step_is_two_micro_batches(loss_calls):
    bench.main(["eager", *ON_CPU])
    assert [call.pairs for call in loss_calls] == [2, 2]


def test_the_public_recipe_takes_the_same_pairs_one_by_one(loss_calls):
    bench.main(["public", *ON_CPU])
    assert [call.pairs for call in loss_calls] == [1, 1, 1, 1]


def test_only_the_checkpointed_stage_recomputes_activations(loss_calls):
    bench.main(["eager", "checkpointed", *ON_CPU])
    assert [call.checkpointed for call in loss_calls] == [False, False, True, True]


def test_latents_are_read_from_files(monkeypatch, one_step):
    names = []
    read = LatentShards.read

    def recorded(self, name, rows):
        names.append(name)
        return read(self, name, rows)

    monkeypatch.setattr(LatentShards, "read", recorded)
    bench.main(["eager", *ON_CPU])
    assert {"mean", "logvar", "x0"} <= set(names)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_players_are_those_that_train_loads(tmp_path, dtype):
    args = bench.parse_args(ON_CPU)
    setup = bench.make_setup(args, tmp_path)
    setup.args.dtype = dtype
    players = bench.make_players(setup)
    stage = train.Stage("spin-1", "spin", [(1, 1)], lr=0.0, beta=bench.BETA)
    expected_players = train.load_players(setup.args, stage, toy.BASE, setup.pipe)

    policy, loss_step = players
    expected_policy, expected_loss_step = expected_players
    assert_same_network(policy, expected_policy)
    assert_same_network(loss_step.constants["opponent"], expected_loss_step.constants["opponent"])
    assert loss_step.constants["beta"] == expected_loss_step.constants["beta"] == 2000
    assert loss_step.constants["autocast"] == expected_loss_step.constants["autocast"]


def assert_same_network(network: UNet, expected: UNet) -> None:
    expected_of = dict(expected.named_parameters())
    for name, parameter in network.named_parameters():
        assert parameter.dtype == expected_of[name].dtype
        assert parameter.requires_grad == expected_of[name].requires_grad
        assert torch.equal(parameter, expected_of[name])


def test_every_loss_is_log_2_where_the_players_are_equal(monkeypatch, one_step):
    monkeypatch.setattr(bench, "TIMED_STEPS", 2)  # after the first, they still are
    rows = bench.main(["public", "eager", "checkpointed", *ON_CPU])
    assert [row["off log 2"] for row in rows] == [0, 0, 0]


def test_the_table_shows_a_loss_that_is_not_log_2(monkeypatch, one_step):
    make_players = bench.make_players

    def unequal_players(*args):
        policy, loss_step = make_players(*args)
        policy.conv_out.bias.data += 0.01
        return policy, loss_step

    monkeypatch.setattr(bench, "make_players", unequal_players)
    (row,) = bench.main(["eager", *ON_CPU])
    assert row["off log 2"] > 1e-3


# ---- compiled stages, without a compiler ---------------------------------------------------------


@pytest.fixture
def compilers(monkeypatch, one_step) -> list[str]:
    """Lists which compiler was called, and with which setting of cuDNN. None compiles."""
    calls = []

    def pretend(name: str):
        def compiler(function, **options):
            calls.append(f"{name}, benchmark {torch.backends.cudnn.benchmark}")
            return function

        return compiler

    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(step, "compile_step", pretend("compile_step"))
    monkeypatch.setattr(bench, "compile_unet", pretend("compile_unet"))
    monkeypatch.setattr(torch, "compile", pretend("torch.compile"))
    return calls


def test_compiled_stages_are_added_by_a_flag():
    assert bench.parse_args(["--compile", *ON_CPU]).stages == list(bench.STAGES)


def test_compiled_stages_compile_as_train_does(compilers):
    bench.main(["compiled", "compiled-sampling", *ON_CPU])
    assert compilers == ["compile_step, benchmark True", "compile_unet, benchmark True"]


def test_one_stage_compiles_without_exact_rounding(compilers):
    bench.main(["compiled-loose", *ON_CPU])
    assert compilers[-1] == "torch.compile, benchmark True"


def test_stages_after_a_compiled_one_are_not_compiled(compilers):
    bench.main(["compiled", *ON_CPU])
    compilers.clear()
    bench.main(["eager", "sampling", *ON_CPU])
    assert compilers == []
    assert torch.backends.cudnn.benchmark is False


# ---- the count -----------------------------------------------------------------------------------


def test_flop_of_a_pair_is_that_of_two_images_for_both_players():
    """The numbers, of SD-1.5 at 512 px, were counted elsewhere."""
    with torch.device("meta"):
        unet = UNet(helpers.MANIFEST["sd15.config"]["unet"])
    forward_and_backward = 2.407e12  # of one image
    forward = 0.803e12
    expected = 2 * (forward_and_backward + forward)
    assert bench.flop_of_a_pair(unet) == pytest.approx(expected, rel=1e-3)
