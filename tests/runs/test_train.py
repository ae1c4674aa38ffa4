"""train.py end to end: what two small iterations change, what they leave alone, and going on."""

import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import evaluate
import train
from spin import toy
from spin.checkpoint import load_pipeline
from spin.data import CaptionedImages, batch_rows, noise_generator
from spin.infra.errors import InputError
from spin.infra.inspection import check_rows
from spin.infra.run import Run
from spin.infra.shards import LatentShards
from spin.pairs import rows_of_steps
from spin.sampler import SamplingOptions, sample
from spin.step import spin_step

UNET = "checkpoint/unet/diffusion_pytorch_model.safetensors"
BASE_UNET = toy.BASE / "unet" / "diffusion_pytorch_model.safetensors"
ONE_STEP = "--iterations 1 --steps 1 --grid-prompts 0"
STEPS = [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3)]  # (iteration, step) of the usual run


def read_files(folder: Path) -> dict[str, bytes]:
    """Return {relative path: content} of all files in a folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def modification_times(*folders: Path) -> dict[Path, int]:
    times = {}
    for folder in folders:
        for path in folder.rglob("*"):
            times[path] = path.stat().st_mtime_ns
    return times


def copy_run(finished: Path, tmp_path: Path) -> Path:
    """Return a copy of a finished run, to be changed."""
    return shutil.copytree(finished, tmp_path / "run")


def assert_same_models(run: Path, expected: Path) -> None:
    """Check that both iterations end with the same checkpoints, to the bit."""
    for k in (1, 2):
        checkpoint = f"iter{k}/checkpoint"
        assert read_files(run / checkpoint) == read_files(expected / checkpoint)


def largest_change(before: dict[str, Tensor], after: dict[str, Tensor]) -> float:
    assert before.keys() == after.keys()
    return max((before[name] - after[name]).abs().max().item() for name in before)


# ---- What a run leaves ---------------------------------------------------------------------------


def test_every_file_of_a_run(finished):
    files = ["config.json", "log.jsonl", "lock", "curves.png", "samples/grid.png"]
    for k in (1, 2):
        files.append(f"iter{k}/generated/shard-00000.safetensors")
        files.append(f"iter{k}/checkpoint/model_index.json")
        files.append(f"iter{k}/state/state.pt")
    for name in files:
        assert (finished / name).is_file(), name
    assert not list(finished.rglob("*.part")), "a temporary file was left"


def test_the_config_states_flags_hashes_and_versions(finished, tmp_path):
    config = json.loads((finished / "config.json").read_text())
    assert config["seed"] == 11
    assert config["steps"] == [3, 3]
    images = CaptionedImages(config["data"], 32)
    assert config["data_sha256"] == check_rows(images, tmp_path, skip=False)
    assert torch.__version__.startswith(config["versions"]["torch"])
    assert {"commit", "model_hash", "unet_hash", "guidance", "sampler"} <= config.keys()


def test_the_log_has_a_line_for_every_step(finished):
    log = Run(finished).read_log()
    assert [line["model"] for line in log] == ["spin-1"] * 3 + ["spin-2"] * 3
    assert [(line["iteration"], line["step"]) for line in log] == STEPS
    for line in log:
        margin = line["delta_gen"] - line["delta_data"]
        assert line["margin"] == pytest.approx(margin, abs=1e-6)
        assert 0 <= line["implicit_accuracy"] <= 1
        assert line["grad_norm"] > 0
        assert line["seconds"] > 0
    learning_rates = [line["lr"] for line in log[:3]]
    assert learning_rates == pytest.approx([1e-5, 1e-5, 0.5e-5])


def test_an_iteration_begins_at_log_2_and_leaves_it(finished):
    for line in Run(finished).read_log():
        if line["step"] == 1:
            assert line["loss"] == pytest.approx(math.log(2), abs=1e-6)
            assert line["delta_data"] == line["delta_gen"] == line["margin"] == 0
        else:
            assert line["loss"] < math.log(2) - 0.01
            assert line["margin"] > 0


def test_the_summary_has_a_row_for_each_model(finished, flags):
    rows = Run(finished).summarize()
    assert [row["model"] for row in rows] == ["spin-1", "spin-2"]
    for row in rows:
        assert row["steps"] == 3
        assert row["first_loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert row["loss"] < row["first_loss"]


def test_main_returns_the_folder_and_the_summary(flags, tmp_path, capsys):
    result = train.main(flags(tmp_path / "run", ONE_STEP))
    assert result["out"] == str(tmp_path / "run")
    assert result["models"] == Run(tmp_path / "run").summarize()
    assert result["results"] is None, "only the miniature world has scores"
    assert "model spin-1  steps 1" in capsys.readouterr().out


def test_the_grid_shows_every_model(finished):
    for model in ("base", "spin-1", "spin-2"):
        image = Image.open(finished / f"samples/{model}/1.png")
        assert image.size == (32, 32)
        assert "Seed: 1" in image.text["parameters"]
        assert f"Model: {model}" in image.text["parameters"]
    grid = Image.open(finished / "samples/grid.png")
    assert grid.size == (190 + 3 * 198, 25 + 2 * 198), "no ideal images, no differences from them"
    assert len(grid.getcolors(1 << 24)) > 1000


def test_grids_in_training_show_the_policy_at_that_step(flags, tmp_path):
    out = tmp_path / "run"
    more = "--iterations 1 --steps 5 --sample-every 2 --lr 1e-3"
    train.main(flags(out, more))
    names = ["base", "spin-1", "spin-1-step-00002", "spin-1-step-00004"]
    folders = [path for path in (out / "samples").iterdir() if path.is_dir()]
    assert sorted(folder.name for folder in folders) == names
    images = {(folder / "0.png").read_bytes() for folder in folders}
    assert len(images) == 4, "training changes the image"
    with_four_models = Image.open(out / "samples/grid.png").width
    assert with_four_models > 4 * 192


def test_two_runs_end_with_identical_models(finished, flags, tmp_path):
    train.main(flags(tmp_path / "again"))
    assert_same_models(tmp_path / "again", finished)


def test_a_tiny_stable_diffusion_trains_too(tiny_folder, flags, tmp_path):
    arguments = flags(tmp_path / "run", f"{ONE_STEP} --steps 2 --resolution 64")
    [summary] = train.main([*arguments, "--model", str(tiny_folder)])["models"]
    assert summary["first_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert summary["margin"] != 0


def test_so_does_one_that_predicts_the_velocity(tiny2_folder, flags, tmp_path):
    arguments = flags(tmp_path / "run", f"{ONE_STEP} --steps 2 --resolution 64")
    [summary] = train.main([*arguments, "--model", str(tiny2_folder)])["models"]
    assert summary["first_loss"] == pytest.approx(math.log(2), abs=1e-6)
    trained = load_pipeline(tmp_path / "run/iter1/checkpoint")
    assert trained.scheduler.prediction_type == "v_prediction"


# ---- What is trained, and on what ----------------------------------------------------------------


def test_the_unet_changes_and_nothing_else_does(finished):
    checkpoints = [toy.BASE, finished / "iter1/checkpoint", finished / "iter2/checkpoint"]
    for before, after in zip(checkpoints, checkpoints[1:]):
        old = load_pipeline(before)
        new = load_pipeline(after)
        old_unet = old.unet.state_dict()
        new_unet = new.unet.state_dict()
        unchanged = [name for name in old_unet if torch.equal(old_unet[name], new_unet[name])]
        assert len(unchanged) < 0.01 * len(old_unet)
        assert largest_change(old_unet, new_unet) < 4e-5  # three steps of at most 1e-5
        assert largest_change(old.vae.state_dict(), new.vae.state_dict()) == 0
        old_text = old.text_encoder.tower.state_dict()
        new_text = new.text_encoder.tower.state_dict()
        assert largest_change(old_text, new_text) == 0


def test_input_files_are_not_changed(flags, image_folder, tmp_path):
    before = read_files(toy.BASE) | read_files(image_folder)
    train.main(flags(tmp_path / "run", ONE_STEP))
    assert read_files(toy.BASE) | read_files(image_folder) == before


def test_training_changes_the_policy_and_no_other_network(flags, tmp_path, monkeypatch):
    players = []
    load_players = train.load_players

    def watching(args, stage, opponent, shared):
        policy, loss_step = load_players(args, stage, opponent, shared)
        frozen = [loss_step.constants["opponent"], shared.vae, shared.text_encoder]
        before = [copy_weights(network) for network in frozen]
        players.append((policy, copy_weights(policy), frozen, before))
        return policy, loss_step

    monkeypatch.setattr(train, "load_players", watching)
    train.main(flags(tmp_path / "run", "--steps 2 --grid-prompts 0"))
    assert len(players) == 2
    for policy, policy_before, frozen, frozen_before in players:
        assert largest_change(policy_before, policy.state_dict()) > 0
        for network, before in zip(frozen, frozen_before):
            assert largest_change(before, network.state_dict()) == 0
            assert all(parameter.grad is None for parameter in network.parameters())


def copy_weights(network: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def test_each_player_starts_from_the_one_before(flags, tmp_path):
    """With a learning rate of 0 nothing moves: all models are theta_0."""
    train.main(flags(tmp_path / "run", "--steps 1 --lr 0 --grid-prompts 0"))
    for k in (1, 2):
        trained = load_file(tmp_path / f"run/iter{k}" / UNET)
        assert largest_change(load_file(BASE_UNET), trained) == 0


def test_the_opponent_of_an_iteration_generates_its_images(finished, image_folder):
    """iter1's latents are theta_0's, iter2's theta_1's, each from noise that the row decides."""
    images = CaptionedImages(image_folder, 32)
    options = SamplingOptions(steps=3, guidance=7.5, height=32, width=32)
    for k, opponent in ((1, toy.BASE), (2, finished / "iter1/checkpoint")):
        pipe = load_pipeline(opponent)
        steps = [(k, step) for step in (1, 2, 3)]
        rows = rows_of_steps(11, steps, batch_size=4, num_rows=12)
        stored = LatentShards(finished / f"iter{k}/generated", rows)
        for row in rows[::5]:
            generator = noise_generator(11, k, row)
            prompts = [images.caption(row)]
            x0 = sample(pipe, prompts, generators=[generator], **vars(options))
            torch.testing.assert_close(stored.read("x0", [row]), x0, atol=0.02, rtol=2e-3)


def test_images_are_generated_only_for_prompts_that_are_drawn(flags, tmp_path):
    train.main(flags(tmp_path / "run", f"{ONE_STEP} --steps 2"))
    [shard] = (tmp_path / "run/iter1/generated").iterdir()
    assert len(load_file(shard)["x0"]) == 8  # two steps of four pairs, out of twelve rows


def test_the_loss_sees_each_pair_with_its_own_prompt_and_the_iterations_beta(
    flags, image_folder, tmp_path, monkeypatch
):
    calls = []

    def spying(policy, **arguments):
        calls.append(arguments)
        return spin_step(policy, **arguments)

    monkeypatch.setattr("spin.step.spin_step", spying)
    train.main(flags(tmp_path / "run", "--steps 1 --beta 100 200 --grid-prompts 0"))
    images = CaptionedImages(image_folder, 32)
    pipe = load_pipeline(toy.BASE).freeze()
    assert len(calls) == 4  # in each iteration a step of four pairs, as three and one
    for k in (1, 2):
        first, second = calls[2 * k - 2 : 2 * k]
        assert first["beta"] == second["beta"] == 100 * k
        captions = [images.caption(row) for row in batch_rows(11, k, 1, 4, 12)]
        assert len(set(captions)) > 1
        contexts = torch.cat([first["context"], second["context"]])
        torch.testing.assert_close(contexts, pipe.encode_prompts(captions))


# ---- The optimizer loop --------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batch", [3, 1])
def test_micro_batches_add_up_to_the_batch(micro_batch, flags, tmp_path):
    """A batch of 4 as 3 + 1, which weigh what they hold, or as 1 + 1 + 1 + 1."""
    logs = []
    for size in (4, micro_batch):
        out = tmp_path / f"{size}"
        train.main(flags(out, f"{ONE_STEP} --steps 2 --clip 0 --micro-batch {size}"))
        logs.append(Run(out).read_log())
    batch, parts = logs
    assert parts[0]["grad_norm"] == pytest.approx(batch[0]["grad_norm"], rel=1e-3)
    # from the second step on, Adam has made steps of full size from gradients that are rounding
    for name in ("loss", "delta_data", "delta_gen", "margin", "implicit_accuracy"):
        assert parts[1][name] == pytest.approx(batch[1][name], rel=0.05, abs=1e-5), name


@pytest.mark.parametrize(
    "step, expected",
    [
        (1, 5e-3),
        (100, 0.5),
        (200, 1.0),
        (201, 1.0),
        (351, 0.5),
        (500, 1 / 300),
    ],
)
def test_the_learning_rate_rises_then_falls(step, expected):
    assert train.learning_rate(1.0, step, 500, 200) == pytest.approx(expected)


def test_the_papers_first_iteration_ends_inside_its_warm_up():
    rates = [train.learning_rate(2e-5, step, 50, 200) for step in range(1, 51)]
    assert rates[-1] == max(rates) == pytest.approx(5e-6)


def test_without_warm_up_the_first_step_has_the_peak():
    assert train.learning_rate(2e-5, 1, 50, 0) == 2e-5


def change_in_one_step(flags, out: Path, more: str) -> float:
    """Return the largest change of a weight. Adam's first step is as long as the learning rate."""
    train.main(flags(out, f"{ONE_STEP} {more}"))
    return largest_change(load_file(BASE_UNET), load_file(out / "iter1" / UNET))


def test_the_optimizer_steps_with_the_schedules_learning_rate(flags, tmp_path):
    """In the first of four steps of warm-up that is a quarter of the peak."""
    change = change_in_one_step(flags, tmp_path, "--lr 4e-4 --warmup 4 --weight-decay 0")
    assert change == pytest.approx(1e-4, rel=0.01)


def test_gradients_are_clipped(flags, tmp_path):
    """A gradient of length 1e-12 is lost in Adam's epsilon of 1e-8."""
    assert change_in_one_step(flags, tmp_path, "--lr 1e-3 --clip 1e-12 --weight-decay 0") < 1e-6


def test_weights_decay_by_lr_times_weight_decay(flags, tmp_path):
    trained = []
    for decay in (0, 0.5):
        out = tmp_path / f"{decay}"
        train.main(flags(out, f"{ONE_STEP} --lr 1e-3 --weight-decay {decay}"))
        trained.append(load_file(out / "iter1" / UNET))
    plain, decayed = trained
    for name, before in load_file(BASE_UNET).items():
        expected = 1e-3 * 0.5 * before
        torch.testing.assert_close(plain[name] - decayed[name], expected, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize(
    "more",
    [
        "--sampler ddpm --flip 0 --prompt-dropout 0.5",
        "--sampler dpm++ --guidance 1 --dtype bfloat16",
        "--noise independent",
        "--checkpoint-activations --num-prompts 3 --clip 0",
    ],
)
def test_other_settings_train_too(more, flags, tmp_path):
    [summary] = train.main(flags(tmp_path / "run", f"{ONE_STEP} --steps 2 {more}"))["models"]
    assert summary["first_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert summary["margin"] != 0


def test_the_bounded_loss_begins_each_iteration_at_0_and_ends_below(flags, tmp_path):
    out = tmp_path / "run"
    summaries = train.main(flags(out, "--loss spin-bounded"))["models"]
    assert [summary["model"] for summary in summaries] == ["bounded-1", "bounded-2"]
    log = Run(out).read_log()
    assert [(line["iteration"], line["step"]) for line in log] == STEPS
    for line in log:
        if line["step"] == 1:
            assert line["loss"] == 0, "the policy is theta_k"
        else:
            assert line["loss"] < 0
    assert sorted(path.name for path in (out / "samples").iterdir() if path.is_dir()) == [
        "base",
        "bounded-1",
        "bounded-2",
    ]


def test_a_run_of_the_bounded_loss_is_no_run_of_spin(flags, tmp_path):
    out = tmp_path / "run"
    train.main(flags(out, f"{ONE_STEP} --loss spin-bounded"))
    with pytest.raises(InputError, match="started with --loss spin-bounded, now spin"):
        train.main(flags(out, f"{ONE_STEP} --loss spin"))


# ---- Resuming ------------------------------------------------------------------------------------


class Crash(Exception):
    """Stands for the death of the process."""


def crash_in_training(arguments: list[str], folder: Path, times: int, monkeypatch) -> None:
    """Run train.py until a file or folder is moved into `folder` for the `times`-th time."""
    replace = os.replace
    moves = []

    def crashing(source, destination):
        if destination.is_relative_to(folder):
            moves.append(destination)
            if len(moves) == times:
                raise Crash
        replace(source, destination)

    with monkeypatch.context() as patch:
        patch.setattr("spin.infra.files.os.replace", crashing)
        with pytest.raises(Crash):
            train.main(arguments)


@pytest.mark.parametrize(
    "folder, times",
    [
        ("cache", 1),
        ("iter2/generated", 1),
        ("iter2/state", 1),  # nothing of this iteration is saved
        ("iter2/state", 2),  # step 2 is saved; step 3 is logged, and lost
        ("iter2/checkpoint", 1),
        ("iter2/state", 3),  # the model is saved; its state still holds weights
        ("samples/spin-2", 2),
    ],
)
def test_after_a_crash_the_same_command_ends_with_the_same_models(
    folder, times, finished, flags, tmp_path, monkeypatch
):
    out = tmp_path / "run"
    arguments = flags(out, "--save-every 2")
    crash_in_training(arguments, out / folder, times, monkeypatch)
    train.main(arguments)
    assert_same_models(out, finished)
    assert read_files(out / "samples") == read_files(finished / "samples")
    log = Run(out).read_log()
    assert [(line["iteration"], line["step"]) for line in log] == STEPS


def test_a_finished_run_is_not_repeated(finished, flags, tmp_path):
    out = copy_run(finished, tmp_path)
    before = modification_times(out / "cache", out / "iter1", out / "iter2", out / "samples")
    del before[out / "samples/grid.png"]
    log = (out / "log.jsonl").read_bytes()
    train.main(flags(out))
    after = modification_times(out)
    assert {path: after[path] for path in before} == before
    assert (out / "log.jsonl").read_bytes() == log


def test_samples_that_were_deleted_are_sampled_again(finished, flags, tmp_path):
    out = copy_run(finished, tmp_path)
    shutil.rmtree(out / "samples")
    train.main(flags(out))
    assert read_files(out / "samples") == read_files(finished / "samples")


def test_a_finished_run_may_lose_its_first_iteration(finished, flags, tmp_path):
    out = copy_run(finished, tmp_path)
    shutil.rmtree(out / "iter1")
    train.main(flags(out))
    assert not (out / "iter1").exists()
    assert read_files(out / "iter2") == read_files(finished / "iter2")


def test_a_model_that_was_deleted_is_trained_again(finished, flags, tmp_path):
    """Its state is there, but holds no weights any more."""
    out = copy_run(finished, tmp_path)
    shutil.rmtree(out / "iter2/checkpoint")
    train.main(flags(out))
    assert_same_models(out, finished)


def test_a_copy_of_an_iterations_folder_is_no_iteration(finished, flags, tmp_path):
    out = copy_run(finished, tmp_path)
    shutil.copytree(out / "iter1", out / "iter7-old")
    assert Run(out).latest_iteration("spin") == 2
    train.main(flags(out))
    assert Run(out).latest_iteration("spin") == 2


def test_bounded_self_play_resumes_and_goes_on_for_more_iterations(flags, tmp_path, monkeypatch):
    """To the bit: killed in the second iteration, which was added to a run of one."""
    bounded = "--loss spin-bounded --save-every 2"
    expected = tmp_path / "expected"
    train.main(flags(expected, bounded))
    out = tmp_path / "run"
    train.main(flags(out, f"{bounded} --iterations 1"))
    crash_in_training(flags(out, bounded), out / "iter2/state", 2, monkeypatch)
    train.main(flags(out, bounded))
    assert_same_models(out, expected)


# ---- What a run folder must match ----------------------------------------------------------------


def change_config(out: Path, **changes) -> None:
    """Change values in config.json. None deletes a key."""
    path = out / "config.json"
    config = json.loads(path.read_text())
    for key, value in changes.items():
        config[key] = value
        if value is None:
            del config[key]
    path.write_text(json.dumps(config))


def test_another_value_is_refused_by_name(finished, flags):
    with pytest.raises(InputError, match="started with --lr 1e-05 1e-05, now 2e-05 2e-05"):
        train.main(flags(finished, "--lr 2e-5"))


def test_prompts_dropped_by_other_random_numbers_are_refused(finished, flags, tmp_path):
    """Those of a run that an earlier version started. Without dropped prompts it may go on."""
    out = copy_run(finished, tmp_path)
    change_config(out, drop_draws=None)
    train.main(flags(out))
    change_config(out, drop_draws=None, prompt_dropout=0.5)
    with pytest.raises(InputError, match="an earlier version's random numbers for --prompt-drop"):
        train.main(flags(out, "--prompt-dropout 0.5"))


def test_self_play_goes_on_for_more_iterations(finished, flags, tmp_path):
    """As if there had been as many from the beginning."""
    out = tmp_path / "run"
    train.main(flags(out, "--iterations 1"))
    train.main(flags(out, "--iterations 2"))
    assert_same_models(out, finished)


def test_only_iterations_that_have_not_begun_may_be_left_out(finished, flags, tmp_path):
    with pytest.raises(InputError, match="--iterations 2, now 1. Go back to that"):
        train.main(flags(finished, "--iterations 1"))
    out = copy_run(finished, tmp_path)
    shutil.rmtree(out / "iter2")
    train.main(flags(out, "--iterations 1"))
    train.main(flags(out, "--iterations 2"))
    assert_same_models(out, finished)


def test_a_model_that_is_trained_anew_is_sampled_anew(finished, flags, tmp_path):
    out = copy_run(finished, tmp_path)
    shutil.rmtree(out / "iter2")
    (out / "results.json").write_text("{}")
    before = read_files(out / "samples")
    train.main(flags(out, "--lr 1e-5 1e-3"))
    after = read_files(out / "samples")
    assert after["spin-1/0.png"] == before["spin-1/0.png"]
    assert after["spin-2/0.png"] != before["spin-2/0.png"]
    assert not (out / "results.json").exists()


def test_an_iteration_that_has_not_begun_may_have_other_settings(finished, flags, tmp_path):
    out = copy_run(finished, tmp_path)
    shutil.rmtree(out / "iter2")
    with pytest.raises(InputError, match="started with --beta 1000.0, now 1.0. Go back"):
        train.main(flags(out, "--beta 1 1"))
    train.main(flags(out, "--lr 1e-5 2e-5"))
    log = Run(out).read_log()
    assert [line["lr"] for line in log if line["iteration"] == 2][0] == 2e-5


@pytest.mark.parametrize("loss", ["sft", "dpo", "all"])
def test_a_baseline_takes_the_steps_of_all_iterations(loss, tmp_path):
    """So their number is settled when it begins."""
    started = train.parse_args(["--loss", loss, "--iterations", "2"])
    now = train.parse_args(["--loss", loss, "--iterations", "3"])
    run = Run(tmp_path)
    run.write_config(vars(started))
    must_match = set(train.settings_to_match(now, run)) & vars(now).keys()
    with pytest.raises(InputError, match="--iterations 2, now 3"):
        settled = train.settled_iterations(now, run)
        run.check_config(vars(now), must_match, {}, {}, settled)


def test_what_is_looked_at_may_change(finished, flags, tmp_path):
    out = copy_run(finished, tmp_path)
    train.main(flags(out, "--grid-prompts 1 --score-images 1 --score validation"))
    assert_same_models(out, finished)


def test_another_prediction_type_is_refused(finished, flags):
    reason = "started with --prediction-type epsilon, now v_prediction"
    with pytest.raises(InputError, match=reason):
        train.main(flags(finished, "--prediction-type v_prediction"))


def test_another_process_is_refused(finished, flags):
    with Run(finished).lock(), pytest.raises(InputError, match="another process is using it"):
        train.main(flags(finished))


def test_other_images_are_refused(finished, flags, image_folder, tmp_path):
    out = copy_run(finished, tmp_path)
    other = shutil.copytree(image_folder, tmp_path / "images")
    Image.new("RGB", (40, 40)).save(other / "0.jpg")
    with pytest.raises(InputError, match="started with other contents of --data"):
        train.main([*flags(out), "--data", str(other)])


def test_all_that_changes_a_number_must_match():
    """What may change is where files are, how much is computed at once, and what is looked at."""
    settings = vars(train.parse_args([]))
    assert set(settings) - set(train.MUST_MATCH) - set(train.all_loss_settings()) == {
        "iterations",  # must match, too, unless the loss is "spin"
        "num_prompts",  # the data's hash depends on it
        "grid_prompts",
        "score",
        "score_images",
        "score_guidance",
        "follow_links",
        "guidance",  # must match, with the two below, unless the loss is a baseline's
        "sampler",
        "sampler_steps",
        "prediction_type",  # "predicts" depends on it
        "model",
        "unet",
        "data",
        "out",
        "preset",
        "world",
        "device",
        "micro_batch",
        "generation_batch",
        "checkpoint_activations",
        "compile",
        "deterministic",
        "save_every",
        "sample_every",
        "skip_bad",
        "dry_run",
    }


def test_flags_that_change_only_rounding_may_change(finished, flags, tmp_path):
    out = copy_run(finished, tmp_path)
    train.main(flags(out, "--micro-batch 1 --checkpoint-activations"))
    assert json.loads((out / "config.json").read_text())["micro_batch"] == 1


def test_a_key_that_is_missing_means_the_default(finished, flags, tmp_path):
    """As in the config of a version that did not have this flag."""
    out = copy_run(finished, tmp_path)
    change_config(out, noise=None)
    train.main(flags(out))
    change_config(out, noise=None)
    with pytest.raises(InputError, match="started with --noise shared, now independent"):
        train.main(flags(out, "--noise independent"))


def test_a_removed_flag_is_accepted_at_the_value_that_is_left(finished, flags, tmp_path):
    out = copy_run(finished, tmp_path)
    change_config(out, link="logistic", generated="latents", opponent_dtype="bfloat16")
    train.main(flags(out))


@pytest.mark.parametrize("key, value", [("link", "hinge"), ("generated", "images")])
def test_a_removed_flag_is_refused_at_another_value(key, value, finished, flags, tmp_path):
    out = copy_run(finished, tmp_path)
    change_config(out, **{key: value})
    with pytest.raises(InputError, match=f"started with {key} '{value}', which this version"):
        train.main(flags(out))


def test_an_unknown_flag_is_refused(finished, flags, tmp_path):
    out = copy_run(finished, tmp_path)
    change_config(out, temperature=1.0)
    reason = "started with temperature 1.0, which this version does not support"
    with pytest.raises(InputError, match=reason):
        train.main(flags(out))


# what commit 0a7cbd9 wrote into config.json for OLD_FLAGS
OLD_FLAGS = """
    --loss spin --iterations 1 --steps 4 --batch-size 4 --micro-batch 4 --sampler-steps 2
    --generation-batch 16 --grid-prompts 0 --score none --save-every 2 --device cpu
    --lr 2e-5 --beta 10000 --guidance 3
"""
OLD_CONFIG = {
    "iterations": 1,
    "steps": [4],
    "lr": [2e-05],
    "beta": [10000.0],
    "sft_lr": 3e-05,
    "dpo_lr": 1e-06,
    "dpo_beta": 20000.0,
    "batch_size": 4,
    "micro_batch": 4,
    "warmup": 10,
    "weight_decay": 0.01,
    "clip": 1.0,
    "resolution": 32,
    "flip": 0.0,
    "prompt_dropout": 0.0,
    "guidance": 3.0,
    "sampler": "ddim",
    "sampler_steps": 2,
    "generation_batch": 16,
    "grid_prompts": 0,
    "seed": 0,
    "model": "/somewhere/spin/toy_base",
    "unet": None,
    "data": "/somewhere/spin/toy_set",
    "out": "runs/toy",
    "preset": "toy",
    "loss": "spin",
    "noise": "shared",
    "link": "logistic",
    "num_prompts": None,
    "skip_bad": False,
    "generated": "latents",
    "sample_every": 0,
    "score": "none",
    "score_images": 2,
    "device": "cpu",
    "dtype": "float32",
    "opponent_dtype": "float32",
    "compile": False,
    "save_every": 2,
    "checkpoint_activations": False,
    "dry_run": False,
    "world": True,
    "model_hash": "6f959b324ee7689c",  # today's miniature base instead of that commit's
    "unet_hash": None,
    "data_hash": "a43018df3e38fd4c",
    "commit": "0a7cbd914d5c539dfa87fdd3f5657f7d5dc25fc8",
    "versions": {"python": "3.11.7", "torch": "2.14.1"},
}


def test_a_stopped_run_of_an_earlier_version_goes_on(tmp_path, monkeypatch):
    """And ends with the models that it would have had if its config were today's."""
    today = tmp_path / "today"
    arguments = OLD_FLAGS.split()
    crash_in_training([*arguments, "--out", str(today)], today / "iter1/state", 2, monkeypatch)
    assert Run(today).saved_steps("spin-1") == 2
    old = shutil.copytree(today, tmp_path / "old")
    (old / "config.json").write_text(json.dumps(OLD_CONFIG, indent=2))

    for out in (today, old):
        train.main([*arguments, "--out", str(out)])
    assert read_files(old / "iter1/checkpoint") == read_files(today / "iter1/checkpoint")
    assert [line["step"] for line in Run(old).read_log()] == [1, 2, 3, 4]


# ---- Paths ---------------------------------------------------------------------------------------


def test_a_tilde_is_the_home_folder_wherever_the_shell_left_it(flags, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    args = train.parse_args(["--out=~/run", "--data=~/images", "--model=~", "--unet=~"])
    assert args.out == f"{tmp_path}/run"
    assert args.data == f"{tmp_path}/images"
    assert args.model == args.unet == str(tmp_path)
    train.main([*flags(Path("unused"), ONE_STEP), "--out=~/run"])
    assert (tmp_path / "run/iter1/checkpoint").exists()
    assert not (tmp_path / "~").exists()


def test_a_run_may_be_evaluated_from_another_folder(image_folder, flags, tmp_path, monkeypatch):
    """Its config has absolute paths, though the flags had relative ones."""
    monkeypatch.chdir(tmp_path)
    Path("model").symlink_to(toy.BASE)
    Path("images").symlink_to(image_folder)
    paths = ["--model", "model", "--unet", "model/unet", "--data", "images", "--out", "run"]
    train.main([*flags(Path("unused"), ONE_STEP), *paths])
    config = json.loads(Path("run/config.json").read_text())
    assert config["model"] == str(tmp_path / "model")
    assert config["unet"] == str(tmp_path / "model/unet")
    assert config["data"] == str(tmp_path / "images")

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    Path("prompts.txt").write_text(toy.SCENES[0].caption)
    few = "--prompts prompts.txt --metrics toy --num-images 1 --device cpu"
    results = evaluate.main(["../run", *few.split()])
    assert list(results["models"]) == ["base", "spin-1"]


# ---- What cannot be gone on with -----------------------------------------------------------------


def test_a_damaged_state_is_named(finished, flags, tmp_path):
    out = copy_run(finished, tmp_path)
    shutil.rmtree(out / "iter2/checkpoint")
    (out / "iter2/state/state.pt").write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"state\.pt: damaged; delete it"):
        train.main(flags(out))


def test_a_damaged_log_is_named(tmp_path):
    (tmp_path / "log.jsonl").write_text("nonsense\n")
    with pytest.raises(InputError, match=r"log\.jsonl: holds a line that is not JSON"):
        Run(tmp_path).summarize()


def test_a_run_without_a_log_has_no_summary(tmp_path):
    assert Run(tmp_path).summarize() == []


def test_a_run_that_diverges_says_what_to_do(flags, tmp_path):
    reason = "spin-1, step [23]: the loss or its gradient is not finite: training diverged; "
    with pytest.raises(InputError, match=f"{reason}.*Lower --lr and choose another --out"):
        train.main(flags(tmp_path / "run", "--lr 1e30"))


def test_weights_that_are_not_finite_are_not_promoted(flags, tmp_path):
    arguments = flags(tmp_path / "run", f"{ONE_STEP} --lr 1e38 --warmup 0")
    with pytest.raises(InputError, match="spin-1, step 1: a weight is not finite: training diverg"):
        train.main(arguments)
    assert not (tmp_path / "run/iter1/checkpoint").exists()


@pytest.mark.parametrize("more", ["--save-every 1", "--save-every 2 --sample-every 1"])
def test_a_good_state_is_not_replaced_by_weights_that_are_not_finite(
    more, flags, tmp_path, monkeypatch
):
    def diverge_in_step_2(optimizer, *args, **kwargs):
        step(optimizer, *args, **kwargs)
        [group] = optimizer.param_groups
        if optimizer.state[group["params"][0]]["step"] == 2:
            with torch.no_grad():
                group["params"][0].fill_(math.nan)

    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", diverge_in_step_2)
    run = Run(tmp_path / "run")
    with pytest.raises(InputError, match="spin-1, step 2: a weight is not finite"):
        train.main(flags(run.folder, more))
    assert run.saved_steps("spin-1") == (1 if more == "--save-every 1" else 0)
    assert not (run.folder / "samples/spin-1-step-00002").exists()


def test_a_baseline_does_not_depend_on_how_images_are_sampled(flags, tmp_path):
    args = train.parse_args(["--loss", "sft"])
    assert not {"guidance", "sampler", "sampler_steps"} & set(
        train.settings_to_match(args, Run(tmp_path))
    )
