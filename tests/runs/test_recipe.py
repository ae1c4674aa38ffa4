"""The recipe's choices one by one: rows that cannot be used, what a run costs, dropped prompts, warnings, presets."""

import math
import shutil
import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_data import bad_and_good_rows
from test_train import flags

import train
from spin import data, pairs
from spin.infra import run
from spin.checkpoint import pipeline as weights
from spin.infra.run import InputError
from spin.step import as_autocast_would

# ---- Data ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def spoiled(pictures, tmp_path) -> Path:
    """The twelve pictures, between six rows that cannot be used and three that can."""
    folder = bad_and_good_rows(Path(shutil.copytree(pictures, tmp_path / "spoiled")))
    rows = (folder / "metadata.jsonl").read_text() + (pictures / "metadata.jsonl").read_text()
    (folder / "metadata.jsonl").write_text(rows)
    return folder


SHORT = ["--iterations", "1", "--steps", "2", "--grid-prompts", "0"]


def test_bad_rows_are_listed_counted_and_shown(tiny_folder, spoiled, tmp_path, capsys):
    out = tmp_path / "run"
    with pytest.raises(InputError, match=r"6 of 21 rows cannot be used; .*bad_rows.txt names them all.*--skip-bad"):
        train.main(flags(tiny_folder, spoiled, out, *SHORT))
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    [listed] = out.rglob("bad_rows.txt")
    lines = listed.read_text().splitlines()
    assert len(lines) == 6 and [line.strip() for line in shown] == lines[:5]
    assert all("line" in line or "not a readable image" in line for line in lines)
    assert not (out / "config.json").exists() and not (out / "iter1").exists()
    with pytest.raises(InputError, match="6 of 21 rows"):  # nor does it pass the second time
        train.main(flags(tiny_folder, spoiled, out, *SHORT))


def test_skip_bad_goes_on_without_them(tiny_folder, spoiled, tmp_path):
    out = tmp_path / "run"
    train.main(flags(tiny_folder, spoiled, out, *SHORT, "--steps", "4", "--skip-bad"))
    [usable] = out.rglob("usable_rows.npy")
    assert np.load(usable).tolist() == [0, 6, 8, *range(9, 21)]
    assert data.LatentShards(usable.parent, range(15)).missing() == []
    with pytest.raises(InputError, match="6 of 21 rows"):  # without the flag the run does not go on
        train.main(flags(tiny_folder, spoiled, out, *SHORT, "--steps", "4"))


def test_mended_data_go_on_in_the_same_folder(tiny_folder, spoiled, pictures, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(InputError, match="rows cannot be used"):
        train.main(flags(tiny_folder, spoiled, out, *SHORT))
    shutil.copy(pictures / "metadata.jsonl", spoiled / "metadata.jsonl")
    assert train.main(flags(tiny_folder, spoiled, out, *SHORT))["models"][0]["steps"] == 2


@pytest.mark.parametrize("error", [struct.error, RuntimeError, NotImplementedError, AttributeError, EOFError])
def test_whatever_pillow_does_with_a_broken_image_it_is_a_bad_row(error, pictures, monkeypatch):
    def broken(picture):
        raise error("of one of its many readers,\r in two lines")

    monkeypatch.setattr(data, "to_rgb", broken)
    images = data.CaptionedImages(pictures, 8)
    found = [problem for _, problem in images.inspect(train.ranks.bar(disable=True))]
    assert len(found) == 12 and "metadata.jsonl line 1: " in found[0] and "0.jpg: not a readable image" in found[0]
    assert all(len(problem.splitlines()) == 1 for problem in found)


def test_no_usable_row_is_no_data(tiny_folder, pictures, tmp_path):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "gone.png", "text": "a"}\n')
    with pytest.raises(InputError, match="1 of 1 rows cannot be used") as refusal:
        train.main(flags(tiny_folder, tmp_path, tmp_path / "run", *SHORT, "--skip-bad"))
    assert "--skip-bad" not in str(refusal.value), "it would not help"


def test_the_cache_is_keyed_by_checkpoint_data_and_transform(tiny_folder, pictures, tmp_path):
    out, images = tmp_path / "run", data.CaptionedImages(pictures, 64)
    train.main(flags(tiny_folder, pictures, out, *SHORT))
    [cache] = (out / "cache").iterdir()
    assert cache.name == f"{weights.checkpoint_hash(tiny_folder)}-{images.hash()}-64px-mirrored"
    plain = flags(tiny_folder, pictures, tmp_path / "plain", *SHORT, "--flip", "0")
    train.main(plain)
    [other] = (tmp_path / "plain/cache").iterdir()
    assert other.name == cache.name.removesuffix("-mirrored")


# ---- Cost ------------------------------------------------------------------------------------------------------------


def test_a_dry_run_says_what_is_to_do_and_stops(tiny_folder, pictures, tmp_path, capsys):
    out = tmp_path / "run"
    told = train.main(flags(tiny_folder, pictures, out, "--dry-run"))
    lines = capsys.readouterr().out.splitlines()
    assert told["seconds"] > 0 and set(told) == {"out", "seconds"}
    # two iterations of 3 steps of 4 pairs, each drawing all 12 rows; a grid of 2 pictures for each of two models
    for line, count in zip(lines, ("12 real images", "24 images for the opponent", "24 pairs for spin", "4 pictures")):
        assert line.startswith(count) and " s each: 0:0" in line
    assert lines[4].startswith("in all, about 0:0") and len(lines) == 5
    assert not (out / "config.json").exists() and not (out / "iter1").exists() and not (out / "samples").exists()
    train.main(flags(tiny_folder, pictures, out, "--seed", "12", *SHORT))  # another run may have the folder


def test_the_estimate_is_what_was_measured_times_what_is_left(tiny_folder, pictures, tmp_path, capsys, monkeypatch):
    """With a clock that says that everything takes a second."""
    monkeypatch.setattr(train.cost, "time", SimpleNamespace(perf_counter=iter(range(1000)).__next__))
    told = train.main(flags(tiny_folder, pictures, tmp_path / "run", "--dry-run"))
    each = {
        "12 real images": 2 / 4,  # four at once, and mirrored once more
        "24 images for the opponent": 1.5 / 4,  # four at once; two of the three steps are measured
        "24 pairs for spin": 1 / 3,  # three at once
        "4 pictures for grids": 1.5 / 4,
    }
    lines = capsys.readouterr().out.splitlines()
    for line, (what, seconds) in zip(lines, each.items()):
        count = int(what.split()[0])
        assert line.startswith(what) and f", {seconds:.2g} s each: 0:00:{round(count * seconds):02d}" in line
    assert told["seconds"] == pytest.approx(sum(int(what.split()[0]) * seconds for what, seconds in each.items()))


def test_only_what_is_left_is_counted(tiny_folder, pictures, tmp_path, capsys):
    out = tmp_path / "run"
    train.main(flags(tiny_folder, pictures, out))
    shutil.rmtree(out / "iter2/checkpoint")
    capsys.readouterr()
    train.main(flags(tiny_folder, pictures, out, "--dry-run"))
    counts = [line.split(",")[0] for line in capsys.readouterr().out.splitlines()]
    assert counts == ["12 pairs for spin", "2 pictures for grids and scores", "in all"]  # its latents are still there


def test_steps_that_a_kill_lost_are_counted_again(tiny_folder, pictures, tmp_path, capsys, monkeypatch):
    out, log = tmp_path / "run", run.Run.log

    def dying(self, line):
        log(self, line)
        if line["step"] == 5:
            raise OSError("died")

    short = ["--iterations", "1", "--steps", "6", "--save-every", "4", "--grid-prompts", "0"]
    with monkeypatch.context() as patch:
        patch.setattr(run.Run, "log", dying)
        with pytest.raises(OSError, match="died"):
            train.main(flags(tiny_folder, pictures, out, *short))
    capsys.readouterr()
    train.main(flags(tiny_folder, pictures, out, *short, "--dry-run"))
    assert capsys.readouterr().out.startswith("8 pairs for spin, "), "the fifth step is logged, but not saved"
    with pytest.raises(InputError, match="begun with beta"):
        train.main(flags(tiny_folder, pictures, out, *short, "--dry-run", "--beta", "3"))


def test_measuring_changes_nothing(tiny_folder, pictures, tmp_path, monkeypatch):
    found = []
    for measured in (True, False):
        if not measured:
            monkeypatch.setattr(train.cost, "estimate", lambda *_: [])
        out = tmp_path / str(measured)
        train.main(flags(tiny_folder, pictures, out, *SHORT))
        found.append((out / "iter1/checkpoint/unet/diffusion_pytorch_model.safetensors").read_bytes())
    assert found[0] == found[1]


# ---- Training --------------------------------------------------------------------------------------------------------


def test_dropped_prompts_are_empty_and_as_many_as_said(sd, pictures, tmp_path):
    images = data.CaptionedImages(pictures, 64)
    real = data.LatentShards(tmp_path / "cache", range(12))
    seen = {}
    for share in ("0", "0.5", "1"):
        args = train.parse(flags(Path("unused"), pictures, tmp_path, "--prompt-dropout", share, "--flip", "0"))
        with torch.no_grad():
            pairs.encode(args, sd, images, real)
            empty = sd.encode_prompts([""])
        generated = data.LatentShards(tmp_path / "gen", range(12))
        generated.write(0, {"x0": torch.zeros(12, 4, 8, 8)})
        drawn = [pairs.read(args, sd, "spin", images, real, generated, list(range(12)), (1, s, 0)) for s in range(9)]
        dropped = torch.cat([(batch["context"] - empty).abs().amax((1, 2)) < 1e-4 for batch in drawn])
        seen[share] = dropped.double().mean().item()
        same = torch.cat([batch["eps"] for batch in drawn])
        assert torch.equal(same, seen.setdefault("eps", same)), "the noise of a pair is the same, dropped or not"
    assert seen["0"] == 0 and seen["1"] == 1 and abs(seen["0.5"] - 0.5) < 4 * 0.5 / 108**0.5


@torch.no_grad()
def test_the_rounded_opponent_answers_to_the_bit(sd, tiny_folder):
    rounded = as_autocast_would(weights.load_unet(tiny_folder), torch.bfloat16)
    kept = {name for name, tensor in rounded.state_dict().items() if tensor.dtype == torch.float32}
    assert rounded.conv_in.weight.dtype == torch.bfloat16 and kept and all("norm" in name for name in kept)
    x_t, t = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(1)), torch.tensor([3, 900])
    context = sd.encode_prompts(["a red circle", ""])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(rounded(x_t, t, context), sd.unet(x_t, t, context))


@pytest.mark.parametrize("opponent", ["float32", "bfloat16"])
def test_bf16_autocast_is_log_2_at_theta_k_whatever_the_opponent_is_kept_in(opponent, tiny_folder, pictures, tmp_path):
    given = ["--dtype", "bfloat16", "--opponent-dtype", opponent, "--beta", "5000"]
    train.main(flags(tiny_folder, pictures, tmp_path / "run", *SHORT, *given))
    first, second = run.Run(tmp_path / "run").read_log()
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-7) and first["delta_data"] == first["delta_gen"] == 0
    assert second["margin"] != 0
    saved = weights.load_unet(tmp_path / "run/iter1/checkpoint")
    fine = saved.conv_in.weight != saved.conv_in.weight.bfloat16().float()
    assert fine.double().mean() > 0.9, "master weights are float32"


def test_grids_in_training(tiny_folder, pictures, tmp_path):
    out = tmp_path / "run"
    train.main(flags(tiny_folder, pictures, out, "--iterations", "1", "--steps", "5", "--sample-every", "2"))
    names = ["base", "spin-1", "spin-1-step-00002", "spin-1-step-00004"]
    assert sorted(path.name for path in (out / "samples").iterdir() if path.is_dir()) == names
    grids = {name: (out / f"samples/{name}/0.png").read_bytes() for name in names}
    assert len(set(grids.values())) > 2, "training moves the pictures"


@pytest.mark.parametrize(
    "deltas, warned",
    [
        ([(0.01, 0.015)] * 50, True),
        ([(0.01, 0.015)] * 49, False),  # not for long
        ([(0.01, 0.03)] * 50, False),  # the policy gains on generated images far more than it loses on real ones
        ([(-0.01, 0.03)] * 50, False),
        ([(-0.02, -0.01)] * 50, False),
        ([(0.0, 0.0)] * 50, False),  # SFT
        ([(0.03, 0.01)] * 25 + [(-0.02, 0.01)] * 25, False),  # on average no rise
    ],
)
def test_forgetting_is_both_errors_up_for_long(deltas, warned):
    assert bool(train.forgetting(train.deque(deltas, maxlen=50))) == warned


def test_the_known_failure_is_said_once(tmp_path, capsys):
    failing = "--lr 1e-3 --beta 200 --iterations 1 --steps 70 --num-prompts 40 --score none --grid-prompts 0".split()
    train.main([*failing, "--loss", "spin", "--device", "cpu", "--out", str(tmp_path / "run")])
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert len(said) == 1 and said[0].startswith("warning: spin-1, step 5")
    chapter = Path(train.__file__).parent / "tutorial/00_the_map.md"
    assert "tutorial/00_the_map.md" in said[0] and "## Reading the picture" in chapter.read_text()
    log = run.Run(tmp_path / "run").read_log()
    assert log[-1]["implicit_accuracy"] > 0.9, "while the log looks splendid"


def test_the_papers_recipe_is_the_papers_table():
    """Appendix A: AdamW with weight decay 1e-2, 200 warm-up steps, 2048 pairs as 8 x 32 x 8, guidance 7.5, 512 px."""
    args = train.parse("--preset paper --model m --data d".split())
    assert (args.steps, args.lr, args.beta) == ([50, 500, 200], [2e-5, 2e-5, 5e-8], [2000, 5000, 5000])
    assert (args.batch_size, args.micro_batch, args.warmup, args.weight_decay) == (2048, 8, 200, 1e-2)
    assert (args.resolution, args.guidance, args.seed) == (512, 7.5, 5775709)
    assert (args.dpo_lr, args.dpo_beta, args.sft_lr, args.loss) == (2e-5, 2000, 1e-5, "spin")
    changed = train.parse("--model m --data d --lr 1e-6 --sampler dpm++".split())
    assert changed.lr == [1e-6] * 3 and changed.sampler_steps == 20
    assert train.parse("--model m --data d --sampler dpm++ --sampler-steps 9".split()).sampler_steps == 9


def test_help_names_the_source_of_every_value(capsys):
    with pytest.raises(SystemExit):
        train.parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "paper: 50 500 200)" in text and "toy: 2e-05, tuned; paper: 2e-05 2e-05 5e-08)" in text
    for name in train.ASSUMED:
        value = np.ravel(train.PAPER[name])[0]
        assert (
            f"paper: {value:g}, assumed" in text if not isinstance(value, str) else f"paper: {value}, assumed" in text
        )
