"""The loop end to end: two tiny iterations, what they must change and what they must not, and going on after a stop."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import train
from spin import data, pairs
from spin.infra import run
from spin.checkpoint import pipeline as weights
from spin.infra.run import InputError
from spin.sampler import sample

UNET = "unet/diffusion_pytorch_model.safetensors"


def flags(model: Path, data: Path, out: Path, *more: str) -> list[str]:
    tiny = "--resolution 64 --iterations 2 --steps 3 --batch-size 4 --micro-batch 3 --lr 1e-5 --beta 100 --warmup 1"
    sampling = "--sampler-steps 3 --generation-batch 4 --grid-prompts 2 --device cpu --seed 11"
    return ["--model", str(model), "--data", str(data), "--out", str(out), *helpers.split(), *sampling.split(), *more]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def inputs(tiny_folder, pictures) -> dict[Path, dict[str, bytes]]:
    return {folder: contents(folder) for folder in (tiny_folder, pictures)}


@pytest.fixture(scope="module")
def finished(tiny_folder, pictures, inputs, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "finished"
    result = train.main(flags(tiny_folder, pictures, out))
    assert result["out"] == str(out) and [line["model"] for line in result["models"]] == ["spin-1", "spin-2"]
    return out


def test_input_files_are_untouched(finished, inputs):
    for folder, before in inputs.items():
        assert contents(folder) == before


def test_every_file_of_a_run(finished):
    for name in ("config.json", "log.jsonl", "samples/grid.png", "curves.png", "lock"):
        assert (finished / name).is_file(), name
    for k in (1, 2):
        for name in ("generated/shard-00000.safetensors", "checkpoint/model_index.json", "state/state.pt"):
            assert (finished / f"iter{k}" / name).is_file(), name
    assert not list(finished.rglob("*.part")), "something half written was left"
    config = json.loads((finished / "config.json").read_text())
    assert config["seed"] == 11 and config["steps"] == [3, 3]
    assert torch.__version__.startswith(config["versions"]["torch"])
    assert {"commit", "model_hash", "data_hash", "guidance", "sampler"} <= config.keys()


def test_the_log(finished):
    log = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    assert [(line["iteration"], line["step"]) for line in log] == [(k, s) for k in (1, 2) for s in (1, 2, 3)]
    for line in log:
        first = line["step"] == 1
        assert first == (line["delta_data"] == 0.0) == (line["delta_gen"] == 0.0) == (line["margin"] == 0.0)
        assert first == (abs(line["loss"] - math.log(2)) < 1e-6)
        assert line["margin"] == pytest.approx(line["delta_gen"] - line["delta_data"], abs=1e-6)
        assert 0 <= line["implicit_accuracy"] <= 1 and line["grad_norm"] > 0 and line["seconds"] > 0
    assert [line["lr"] for line in log[:3]] == pytest.approx([1e-5, 1e-5, 0.5e-5])


def test_the_policy_changes_and_nothing_else_does(finished, tiny_folder):
    theta = [tiny_folder, finished / "iter1/checkpoint", finished / "iter2/checkpoint"]
    for before, after in zip(theta, theta[1:]):
        old, new = load_file(before / UNET), load_file(after / UNET)
        changed = [name for name in old if not torch.equal(old[name], new[name])]
        assert len(changed) > 0.99 * len(old)
        assert all((old[name] - new[name]).abs().max() < 4e-5 for name in old)  # three Adam steps of 1e-5
        a, b = weights.load(before), weights.load(after)
        for ours, theirs in ((a.vae, b.vae), (a.text_encoder.tower, b.text_encoder.tower)):
            assert all(torch.equal(ours.state_dict()[name], t) for name, t in theirs.state_dict().items())


def test_training_leaves_opponent_vae_and_text_as_they_are(tiny_folder, pictures, tmp_path, monkeypatch):
    seen = []

    def watched(args, this_run, sd, *rest):
        frozen = [sd.unet, sd.vae, sd.text_encoder]
        before = [{name: t.clone() for name, t in network.state_dict().items()} for network in frozen]
        trained = train_one(args, this_run, sd, *rest)
        for network, state in zip(frozen, before):
            assert all(torch.equal(state[name], t) for name, t in network.state_dict().items())
            assert all(parameter.grad is None for parameter in network.parameters())
        assert any(not torch.equal(before[0][name], t) for name, t in trained.unet.state_dict().items())
        seen.append(trained)
        return trained

    train_one = train.train
    monkeypatch.setattr(train, "train", watched)
    train.main(flags(tiny_folder, pictures, tmp_path / "run", "--steps", "2"))
    assert len(seen) == 2


def test_each_player_starts_from_the_one_before(tiny_folder, pictures, tmp_path):
    """With a learning rate of 0 nothing moves: all models are theta_0, but for the order of the tensors' bytes."""
    train.main(flags(tiny_folder, pictures, tmp_path / "run", "--steps", "1", "--lr", "0"))
    for k in (1, 2):
        theta = load_file(tmp_path / f"run/iter{k}/checkpoint" / UNET)
        assert all(torch.equal(theta[name], tensor) for name, tensor in load_file(tiny_folder / UNET).items())


def test_the_opponent_of_an_iteration_draws_its_images(finished, tiny_folder, pictures):
    """iter1's generated latents are theta_0's, iter2's theta_1's, each at noise that depends on the row."""
    captions = [json.loads(line)["text"] for line in (pictures / "metadata.jsonl").read_text().splitlines()]
    for k, player in ((1, tiny_folder), (2, finished / "iter1/checkpoint")):
        sd = weights.load(player)
        rows = sorted({row for s in (1, 2, 3) for row in data.batch_rows(11, k, s, 4, 12)})
        stored = data.LatentShards(finished / f"iter{k}/generated", rows)
        for row in rows[::5]:
            generators = [data.generator(11, k, row)]
            x0 = sample(sd, [captions[row]], 3, 7.5, generators=generators, height=64, width=64)
            torch.testing.assert_close(stored.read("x0", [row]), x0, atol=0.02, rtol=2e-3)  # kept in half precision


@torch.no_grad()
@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_pairs_are_what_they_should_be(flip, sd, pictures, tmp_path):
    """Row by row from the image files: encoded, mirrored or not, a sample of the posterior, scaled."""
    args = train.parse(flags(Path("unused"), pictures, tmp_path, "--flip", str(flip)))
    images = data.CaptionedImages(pictures, 64)
    real, generated = data.LatentShards(tmp_path / "cache", range(12)), data.LatentShards(tmp_path / "gen", [2, 7, 9])
    pairs.encode(args, sd, images, real)
    generated.write(0, {"x0": torch.stack([torch.full((4, 8, 8), float(row)) for row in (2, 7, 9)])})
    batch = pairs.read(args, sd, "spin", images, real, generated, [9, 2], (3, 5, 6))
    for i, row in enumerate([9, 2]):
        drawn = data.draw(11, 3, 5, 6 + i, (4, 8, 8), 1000)
        image = images.image(row)[None]
        mean, logvar = sd.vae.encode(image.flip(3) if flip else image)
        x0 = (mean + (0.5 * logvar).exp() * drawn["posterior"]) * 0.18215
        torch.testing.assert_close(batch["x0_data"][i], x0[0], atol=5e-3, rtol=2e-3)  # kept in half precision
        assert torch.equal(batch["x0_gen"][i], torch.full((4, 8, 8), float(row)))
        assert torch.equal(batch["eps"][i], drawn["eps"]) and batch["t"][i] == drawn["t"]


@torch.no_grad()
def test_independent_noise_and_places_on_the_path(sd, pictures, tmp_path):
    images = data.CaptionedImages(pictures, 64)
    real, generated = data.LatentShards(tmp_path / "cache", range(12)), data.LatentShards(tmp_path / "gen", [2, 7, 9])
    path = torch.arange(9.0).reshape(3, 3, 1, 1, 1).expand(3, 3, 4, 8, 8)  # entry 3 row + step
    generated.write(0, {"x0": torch.zeros(3, 4, 8, 8), "path": path})  # of a run, one or the other
    found = {}
    for more in (["--noise", "independent"], ["--loss", "spin-trajectory"]):
        args = train.parse(flags(Path("unused"), pictures, tmp_path, *more, "--flip", "0"))
        pairs.encode(args, sd, images, real)
        found[more[1]] = pairs.read(args, sd, args.loss, images, real, generated, [9, 2], (3, 5, 6))
    for i in (0, 1):
        drawn = data.draw(11, 3, 5, 6 + i, (4, 8, 8), 1000)
        batch = found["independent"]
        assert torch.equal(batch["eps"][i], drawn["eps"]) and torch.equal(batch["eps_gen"][i], drawn["eps_gen"])
        assert abs(np.corrcoef(drawn["eps"].ravel(), drawn["eps_gen"].ravel())[0, 1]) < 0.3
        batch, place = found["spin-trajectory"], data.draw(11, 3, 5, 6 + i, (4, 8, 8), 3)["t"].item()
        assert batch["t"][i] == sd.scheduler.timesteps(3)[place]
        assert torch.equal(batch["x_t_gen"][i], path[[2, 0][i], place])
        assert "x0_gen" not in batch and "eps_gen" not in batch


def test_the_opponents_path_is_kept_for_the_trajectory_loss(tiny_folder, pictures, tmp_path):
    more = ["--loss", "spin-trajectory", "--iterations", "1", "--steps", "2"]
    [summary] = train.main(flags(tiny_folder, pictures, tmp_path / "run", *more))["models"]
    assert summary["first_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert summary["delta_gen"] > 0  # a squared distance
    rows = sorted({row for s in (1, 2) for row in data.batch_rows(11, 1, s, 4, 12)})
    stored, path = data.LatentShards(tmp_path / "run/iter1/generated", rows), []
    captions = [json.loads(line)["text"] for line in (pictures / "metadata.jsonl").read_text().splitlines()]
    generators = [data.generator(11, 1, rows[1])]
    sample(
        weights.load(tiny_folder),
        [captions[rows[1]]],
        3,
        7.5,
        generators=generators,
        height=64,
        width=64,
        trajectory=path,
    )
    torch.testing.assert_close(stored.read("path", rows[1:2])[0], torch.cat(path), atol=0.02, rtol=2e-3)
    for entry in range(3):
        assert torch.equal(stored.read("path", rows[1:2], [entry]), stored.read("path", rows[1:2])[:, entry])


def test_compiling_changes_no_name_and_no_number(tiny_folder, pictures, tmp_path, monkeypatch):
    """With a compiler that only traces: inductor takes minutes for the tiny UNet."""
    compiled = []

    def traced(step):
        compiled.append(step.__name__)
        return torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=False)

    torch._dynamo.reset()
    monkeypatch.setattr(train, "compiled", traced)
    found = []
    for more in ("--no-compile", "--compile"):
        out = tmp_path / more
        train.main(flags(tiny_folder, pictures, out, "--iterations", "1", "--steps", "1", "--micro-batch", "4", more))
        found.append((run.Run(out).read_log()[0], load_file(out / "iter1/checkpoint" / UNET)))
    (eager, plain), (traced_line, traced_weights) = found
    assert compiled == ["spin_step"] * 2 and plain.keys() == traced_weights.keys()
    assert traced_line["grad_norm"] == pytest.approx(eager["grad_norm"], rel=1e-3)
    assert largest_change(plain, traced_weights) <= 2e-5  # 2 lr: where a gradient is rounding alone, Adam may turn back


@pytest.mark.parametrize("device, flags_given, wanted", [("cuda", [], True), ("cuda:1", ["--no-compile"], False)])
def test_the_step_is_compiled_on_cuda_unless_told_otherwise(device, flags_given, wanted):
    assert train.parse(["--device", device, *flags_given]).compile is wanted
    assert train.parse(["--device", "cpu"]).compile is False
    assert train.parse(["--device", "cpu", "--compile"]).compile is True


def test_micro_batches_make_no_difference(tiny_folder, pictures, tmp_path):
    logs = []
    for size in ("4", "1"):
        out = tmp_path / size
        train.main(flags(tiny_folder, pictures, out, "--micro-batch", size, "--iterations", "1", "--clip", "0"))
        logs.append(run.Run(out).read_log())
    whole, parts = logs
    assert parts[0]["grad_norm"] == pytest.approx(whole[0]["grad_norm"], rel=1e-3)
    for i in (1, 2):  # later on Adam has turned rounding of tiny gradients into steps of its full size
        for name in ("loss", "delta_data", "delta_gen", "margin"):
            assert parts[i][name] == pytest.approx(whole[i][name], rel=0.05, abs=1e-5), name


@torch.no_grad()
def test_the_loss_sees_each_pair_with_its_own_prompt_and_the_iterations_beta(
    sd, tiny_folder, pictures, tmp_path, monkeypatch
):
    seen = []

    def spy(*networks, **inputs):
        seen.append(inputs)
        return loss_step(*networks, **inputs)

    loss_step = train.spin_step
    monkeypatch.setattr(train, "spin_step", spy)
    with torch.enable_grad():
        train.main(flags(tiny_folder, pictures, tmp_path / "run", "--steps", "1", "--beta", "100", "200"))
    images = data.CaptionedImages(pictures, 64)
    captions = [images.caption(row) for row in range(12)]
    for k in (1, 2):
        micro = seen[2 * k : 2 * k + 2]  # 4 pairs as 3 and 1, after the two that were measured
        contexts = torch.cat([inputs["context"] for inputs in micro])
        rows = data.batch_rows(11, k, 1, 4, 12)
        assert len({captions[row] for row in rows}) > 1
        torch.testing.assert_close(contexts, sd.encode_prompts([captions[row] for row in rows]), atol=1e-5, rtol=1e-5)
        assert all(inputs["beta"].item() == 100 * k for inputs in micro)


def one_step(tiny_folder, pictures, out, *more) -> tuple[dict, dict]:
    """The UNet before and after. Adam's first step is the learning rate, whatever the gradient."""
    train.main(flags(tiny_folder, pictures, out, *"--iterations 1 --steps 1 --grid-prompts 0".split(), *more))
    return load_file(tiny_folder / UNET), load_file(out / "iter1/checkpoint" / UNET)


def largest_change(old: dict, new: dict) -> float:
    return max((old[name] - new[name]).abs().max().item() for name in old)


def test_the_learning_rate_is_the_schedules(tiny_folder, pictures, tmp_path):
    quarter = ["--lr", "4e-4", "--warmup", "4", "--weight-decay", "0"]
    assert largest_change(*one_step(tiny_folder, pictures, tmp_path, *quarter)) == pytest.approx(1e-4, rel=0.01)


def test_gradients_are_clipped(tiny_folder, pictures, tmp_path):
    """A gradient of length 1e-12 is lost in Adam's epsilon of 1e-8."""
    clipped = ["--lr", "1e-3", "--clip", "1e-12", "--weight-decay", "0"]
    assert largest_change(*one_step(tiny_folder, pictures, tmp_path, *clipped)) < 1e-6


def test_weights_decay(tiny_folder, pictures, tmp_path):
    old, plain = one_step(tiny_folder, pictures, tmp_path / "a", "--lr", "1e-3", "--weight-decay", "0")
    _, decayed = one_step(tiny_folder, pictures, tmp_path / "b", "--lr", "1e-3", "--weight-decay", "0.5")
    for name in old:
        torch.testing.assert_close(plain[name] - decayed[name], 1e-3 * 0.5 * old[name], atol=1e-6, rtol=1e-3)


def test_images_are_generated_only_for_prompts_that_are_drawn(tiny_folder, pictures, tmp_path):
    train.main(flags(tiny_folder, pictures, tmp_path / "run", "--iterations", "1", "--steps", "2"))
    [shard] = (tmp_path / "run/iter1/generated").iterdir()
    assert load_file(shard)["x0"].shape == (8, 4, 8, 8)  # 2 steps of 4 pairs, out of 12 rows


def test_pictures_of_a_run(finished):
    for model in ("base", "spin-1", "spin-2"):
        picture = Image.open(finished / f"samples/{model}/1.png")
        assert picture.size == (64, 64)
        assert "Seed: 1" in picture.text["parameters"] and f"Model: {model}" in picture.text["parameters"]
    grid, curves = Image.open(finished / "samples/grid.png"), Image.open(finished / "curves.png")
    assert grid.width > 3 * 192 and grid.height > 2 * 192 and len(grid.getcolors(1 << 24)) > 1000
    assert len(curves.getcolors(1 << 24)) > 10


def test_two_runs_give_identical_weights(finished, tiny_folder, pictures, tmp_path):
    train.main(flags(tiny_folder, pictures, tmp_path / "again"))
    for k in (1, 2):
        assert contents(tmp_path / f"again/iter{k}/checkpoint") == contents(finished / f"iter{k}/checkpoint")


def test_a_finished_run_is_not_repeated(finished, tiny_folder, pictures):
    stages = [path for folder in ("cache", "iter1", "iter2") for path in (finished / folder).rglob("*")]
    before = {path: path.stat().st_mtime_ns for path in stages}
    log = (finished / "log.jsonl").read_bytes()
    train.main(flags(tiny_folder, pictures, finished))
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert (finished / "log.jsonl").read_bytes() == log


@pytest.mark.parametrize(
    "place, times",
    [
        ("cache", 1),
        ("iter2/generated", 1),
        ("iter2/state", 1),  # nothing of the iteration is saved yet
        ("iter2/state", 2),  # step 2 is saved, step 3 is logged and lost
        ("iter2/checkpoint", 1),
        ("samples/spin-2", 2),
    ],
)
def test_going_on_after_a_stop_ends_at_the_same_weights(
    place, times, finished, tiny_folder, pictures, tmp_path, monkeypatch
):
    """The process dies as it begins to write into `place` for the `times`-th time; then the command is given again."""
    out, whole, writes = tmp_path / "stopped", run.whole, []
    command = flags(tiny_folder, pictures, out, "--save-every", "2")

    class Died(Exception):
        pass

    def dying(path: Path):
        writes.append(str(path))
        if sum(place in write for write in writes) == times and place in str(path):
            raise Died
        return whole(path)

    with monkeypatch.context() as patch:
        for module in ("infra.run", "data", "checkpoint.pipeline", "eval.plots"):
            patch.setattr(f"spin.{module}.whole", dying)
        with pytest.raises(Died):
            train.main(command)
    train.main(command)
    for k in (1, 2):
        assert contents(out / f"iter{k}/checkpoint") == contents(finished / f"iter{k}/checkpoint")
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [(line["iteration"], line["step"]) for line in log] == [(k, s) for k in (1, 2) for s in (1, 2, 3)]
    assert contents(out / "samples") == contents(finished / "samples")


def test_another_flag_or_another_process_is_refused(finished, tiny_folder, pictures):
    with pytest.raises(InputError, match=r"begun with lr \[1e-05, 1e-05\], now \[2e-05, 2e-05\]"):
        train.main(flags(tiny_folder, pictures, finished, "--lr", "2e-5"))
    with run.Run(finished).lock(), pytest.raises(InputError, match="another process works here"):
        train.main(flags(tiny_folder, pictures, finished))


def test_what_is_computed_may_not_change():
    assert not {"loss", "link", "noise", "beta", "lr", "seed", "guidance", "sampler"} & {*train.MAY_CHANGE}


def test_flags_that_only_change_rounding_may_change(finished, tiny_folder, pictures):
    train.main(flags(tiny_folder, pictures, finished, "--micro-batch", "1", "--checkpoint-activations"))
    assert json.loads((finished / "config.json").read_text())["micro_batch"] == 1


def test_a_finished_run_may_lose_its_first_iteration(finished, tiny_folder, pictures, tmp_path):
    out = Path(shutil.copytree(finished, tmp_path / "run"))
    shutil.rmtree(out / "iter1")
    train.main(flags(tiny_folder, pictures, out))
    assert not (out / "iter1").exists() and contents(out / "iter2") == contents(finished / "iter2")
    shutil.rmtree(out / "iter2/checkpoint")  # its state is there, but holds no weights any more
    shutil.copytree(finished / "iter1", out / "iter1")
    train.main(flags(tiny_folder, pictures, out))
    assert contents(out / "iter2/checkpoint") == contents(finished / "iter2/checkpoint")


def test_damaged_files_of_a_run_are_named(finished, tiny_folder, pictures, tmp_path):
    out = Path(shutil.copytree(finished, tmp_path / "run"))
    shutil.rmtree(out / "iter2/checkpoint")
    (out / "iter2/state/state.pt").write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"state\.pt: damaged"):
        train.main(flags(tiny_folder, pictures, out))
    (out / "log.jsonl").write_text("nonsense\n")
    with pytest.raises(InputError, match=r"log\.jsonl: holds a line that is not JSON"):
        run.Run(out).summary()


def test_other_pictures_are_refused(finished, tiny_folder, pictures, tmp_path):
    other = Path(shutil.copytree(pictures, tmp_path / "pictures"))
    Image.new("RGB", (40, 40)).save(other / "0.jpg")
    with pytest.raises(InputError, match="begun with data_hash"):
        train.main(flags(tiny_folder, other, finished))


@pytest.mark.parametrize(
    "more",
    [
        ["--sampler", "ddpm", "--flip", "0", "--link", "hinge"],
        ["--generated", "images", "--dtype", "bfloat16", "--guidance", "1"],
        ["--noise", "independent", "--link", "correlation"],
        ["--loss", "spin-trajectory", "--guidance", "1"],
        ["--checkpoint-activations", "--num-prompts", "3", "--grid-prompts", "0", "--clip", "0"],
    ],
    ids=lambda more: more[0],
)
def test_other_settings(more, tiny_folder, pictures, tmp_path):
    result = train.main(flags(tiny_folder, pictures, tmp_path / "run", *more, "--iterations", "1", "--steps", "2"))
    [summary] = result["models"]
    assert summary["first_loss"] == pytest.approx(math.log(2) if "--link" not in more else 1.0, abs=1e-6)
    assert summary["margin"] != 0


def test_v_prediction(tiny2_folder, pictures, tmp_path):
    result = train.main(flags(tiny2_folder, pictures, tmp_path / "run", "--iterations", "1", "--steps", "2"))
    assert result["models"][0]["first_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert weights.load(tmp_path / "run/iter1/checkpoint").scheduler.prediction_type == "v_prediction"


def test_an_exploding_run_stops_in_one_line(tiny_folder, pictures, tmp_path):
    with pytest.raises(InputError, match="spin-1, step [23]: the loss or its gradient is not finite; last good"):
        train.main(flags(tiny_folder, pictures, tmp_path / "run", "--lr", "1e30"))


def test_what_explodes_in_the_last_step_is_not_promoted(tiny_folder, pictures, tmp_path):
    explode = ["--lr", "1e38", "--warmup", "0", "--steps", "1", "--unet", str(tiny_folder)]
    with pytest.raises(InputError, match="spin-1: its weights are not finite after the last step; nothing is promoted"):
        train.main(flags(tiny_folder, pictures, tmp_path / "run", *explode))
    assert not (tmp_path / "run/iter1/checkpoint").exists()


def test_the_last_good_model_is_the_one_started_from(tiny_folder, pictures, tmp_path):
    other = Path(shutil.copytree(tiny_folder, tmp_path / "other"))
    with pytest.raises(InputError, match=f"last good: {other}"):
        train.main(flags(tiny_folder, pictures, tmp_path / "run", "--lr", "1e30", "--unet", str(other)))


def test_a_copy_of_an_iterations_folder_is_no_iteration(finished, tiny_folder, pictures, tmp_path):
    out = Path(shutil.copytree(finished, tmp_path / "run"))
    shutil.copytree(out / "iter1", out / "iter7-old")
    assert run.Run(out).promoted() == 2
    train.main(flags(tiny_folder, pictures, out))


@pytest.mark.parametrize("step, expected", [(1, 5e-3), (100, 0.5), (200, 1.0), (201, 1.0), (351, 0.5), (500, 1 / 300)])
def test_learning_rate_rises_then_falls(step, expected):
    assert train.learning_rate(1.0, step, 500, 200) == pytest.approx(expected)


def test_the_papers_first_iteration_ends_inside_its_warm_up():
    rates = [train.learning_rate(2e-5, step, 50, 200) for step in range(1, 51)]
    assert rates[-1] == max(rates) == pytest.approx(5e-6)
    assert train.learning_rate(2e-5, 1, 50, 0) == 2e-5


def test_the_papers_table_is_the_default(tmp_path):
    args = train.parse(["--model", "m", "--data", "some/pictures"])
    assert (args.steps, args.beta) == ([50, 500, 200], [2000, 5000, 5000])
    assert args.lr == [2e-5, 2e-5, 5e-8] and args.batch_size == 2048 and args.out == "runs/pictures"
    args = train.parse(["--model", "m", "--data", "d", "--iterations", "4", "--lr", "1e-5", "2e-5"])
    assert args.lr == [1e-5, 2e-5, 2e-5, 2e-5] and args.steps == [50, 500, 200, 200]


def test_the_summary_of_a_log(finished):
    rows = run.Run(finished).summary()
    assert [row["steps"] for row in rows] == [3, 3]
    assert all(row["first_loss"] == pytest.approx(math.log(2), abs=1e-6) for row in rows)
    assert run.Run(finished / "iter1").summary() == []
