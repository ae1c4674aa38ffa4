"""Single options of train.py: faulty rows, estimates, half precision, warnings, presets."""

import math
import os
import shutil
import struct
from pathlib import Path
from types import SimpleNamespace

import helpers
import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

import train
from spin import toy
from spin.checkpoint import hash_checkpoint, load_unet
from spin.config import ASSUMED, PAPER, STORY_TIME, format_value
from spin.data import CaptionedImages
from spin.eval.watch import ForgettingWatch
from spin.infra.errors import InputError
from spin.infra.inspection import check_rows, find_faults
from spin.infra.run import Run
from spin.pairs import encode_images

ROOT = Path(__file__).parent.parent.parent
SHORT = "--iterations 1 --steps 2 --grid-prompts 0"


# ---- Faulty rows ---------------------------------------------------------------------------------


@pytest.fixture
def faulty(image_folder, tmp_path) -> Path:
    """Nine rows, of which only 0, 6 and 8 can be used, and then the usual twelve."""
    folder = helpers.write_faulty_rows(shutil.copytree(image_folder, tmp_path / "faulty"))
    metadata = folder / "metadata.jsonl"
    usual_rows = (image_folder / "metadata.jsonl").read_text()
    metadata.write_text(metadata.read_text() + usual_rows)
    return folder


def faulty_flags(flags, out: Path, folder: Path, more: str = "") -> list[str]:
    return [*flags(out, f"{SHORT} {more}"), "--data", str(folder)]


def test_faulty_rows_are_listed_counted_and_shown(faulty, flags, tmp_path, capsys):
    out = tmp_path / "run"
    reason = r"6 of 21 rows cannot be used; .*bad_rows.txt.*--skip-bad"
    with pytest.raises(InputError, match=reason):
        train.main(faulty_flags(flags, out, faulty))
    [listed] = out.rglob("bad_rows.txt")
    lines = listed.read_text().splitlines()
    assert len(lines) == 6
    for line in lines:
        assert "metadata.jsonl line" in line
    printed = capsys.readouterr().out.splitlines()
    shown = [line.strip() for line in printed if line.startswith("  ")]
    assert shown == lines[:5]


def test_with_faulty_rows_no_run_begins_however_often_one_tries(faulty, flags, tmp_path):
    out = tmp_path / "run"
    for _ in range(2):
        with pytest.raises(InputError, match="6 of 21 rows cannot be used"):
            train.main(faulty_flags(flags, out, faulty))
    assert not (out / "config.json").exists()
    assert not (out / "iter1").exists()


def test_skip_bad_trains_without_them(faulty, flags, tmp_path):
    out = tmp_path / "run"
    train.main(faulty_flags(flags, out, faulty, "--steps 4 --skip-bad"))
    records = (out / "data/rows.txt").read_text().splitlines()
    usable = [row for row, record in enumerate(records) if record]
    assert usable == [0, 6, 8, *range(9, 21)]
    [cache] = (out / "cache").iterdir()
    [shard] = cache.iterdir()
    assert len(load_file(shard)["mean"]) == 15
    with pytest.raises(InputError, match="6 of 21 rows"):
        train.main(faulty_flags(flags, out, faulty, "--steps 4"))


def test_mended_rows_are_used_in_the_same_run_folder(faulty, flags, image_folder, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(InputError, match="rows cannot be used"):
        train.main(faulty_flags(flags, out, faulty))
    shutil.copy(image_folder / "metadata.jsonl", faulty / "metadata.jsonl")
    [summary] = train.main(faulty_flags(flags, out, faulty))["models"]
    assert summary["steps"] == 2


def test_without_a_usable_row_skip_bad_is_not_advised(flags, tmp_path):
    helpers.write_metadata(tmp_path, [{"file_name": "missing.png", "text": "a"}])
    with pytest.raises(InputError, match="1 of 1 rows cannot be used") as refusal:
        train.main(faulty_flags(flags, tmp_path / "run", tmp_path, "--skip-bad"))
    assert "--skip-bad" not in str(refusal.value)


@pytest.mark.parametrize(
    "error", [struct.error, RuntimeError, NotImplementedError, AttributeError, EOFError]
)
def test_whatever_pillow_does_with_a_broken_image_the_row_is_faulty(
    error, image_folder, monkeypatch
):
    def fail(image):
        raise error("of one of Pillow's readers,\r in two lines")

    monkeypatch.setattr("spin.infra.images.to_rgb", fail)
    faults = list(find_faults(CaptionedImages(image_folder, 8)))
    assert len(faults) == 12
    assert "metadata.jsonl line 1: " in faults[0]
    assert "0.jpg: not a readable image" in faults[0]
    for fault in faults:
        assert len(fault.splitlines()) == 1


@pytest.mark.parametrize("flip, suffix", [(0.5, "-mirrored"), (0, "")])
def test_cached_latents_are_named_by_model_data_and_transform(
    flip, suffix, flags, image_folder, tmp_path
):
    train.main(flags(tmp_path / "run", f"{SHORT} --steps 1 --flip {flip}"))
    [cache] = (tmp_path / "run/cache").iterdir()
    data_sha256 = check_rows(CaptionedImages(image_folder, 32), tmp_path / "looks", skip=False)
    assert cache.name == f"{hash_checkpoint(toy.BASE)}-{data_sha256}-32px{suffix}"


def test_an_image_that_was_edited_in_place_ends_a_run(flags, tmp_path):
    """Neither its old latent nor its new one may go on with what was trained on the other."""
    folder = tmp_path / "images"
    folder.mkdir()
    rows = []
    for i in range(4):
        Image.new("RGB", (32, 32), (60 * i, 0, 0)).save(folder / f"{i}.bmp")
        rows.append({"file_name": f"{i}.bmp", "text": f"caption {i}"})
    helpers.write_metadata(folder, rows)
    arguments = [*flags(tmp_path / "run", SHORT), "--data", str(folder)]
    train.main(arguments)

    os.utime(folder / "1.bmp")
    train.main(arguments)
    [cache] = (tmp_path / "run/cache").iterdir()

    Image.new("RGB", (32, 32), "blue").save(folder / "1.bmp")
    with pytest.raises(InputError, match="started with other contents of --data"):
        train.main(arguments)
    train.main([*arguments, "--out", str(tmp_path / "other")])
    [other_cache] = (tmp_path / "other/cache").iterdir()
    assert other_cache.name != cache.name


def test_an_image_that_is_edited_between_the_look_and_its_encoding_ends_the_run(
    image_folder, flags, tmp_path, monkeypatch
):
    """Its latent would be kept under the name of what it was, and go on without a word."""
    folder = Path(shutil.copytree(image_folder, tmp_path / "images"))
    arguments = faulty_flags(flags, tmp_path / "run", folder)

    def edit_then_encode(*args, **kwargs):
        Image.new("RGB", (64, 64), "blue").save(folder / "0.jpg")
        encode_images(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr("train.encode_images", edit_then_encode)
        with pytest.raises(InputError, match="line 1: an image has changed since the data were"):
            train.main(arguments)
    assert not list(tmp_path.glob("run/cache/*/*"))
    with pytest.raises(InputError, match="started with other contents of --data"):
        train.main(arguments)


def test_small_images_are_noted_and_trained_on(flags, tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (514, 2), "red").save(folder / "0.png")
    Image.new("RGB", (32, 32), "blue").save(folder / "1.png")
    rows = [{"file_name": f"{i}.png", "text": "a caption"} for i in range(2)]
    helpers.write_metadata(folder, rows)
    arguments = faulty_flags(flags, tmp_path / "run", folder)
    for _ in range(2):
        train.main(arguments)
        note = "note: 1 of 2 rows have an image smaller than 32 pixels on its short side"
        assert capsys.readouterr().out.count(note) == 1


def test_a_snapshot_of_the_hub_is_trained_on_with_follow_links(flags, image_folder, tmp_path):
    folder = tmp_path / "snapshot"
    folder.mkdir()
    for path in image_folder.iterdir():
        (folder / path.name).symlink_to(path)
    arguments = faulty_flags(flags, tmp_path / "run", folder)
    reason = "12 of 12 rows cannot be used; .* 12 lead out of the folder through a link; --follow"
    with pytest.raises(InputError, match=reason):
        train.main(arguments)
    [summary] = train.main([*arguments, "--follow-links"])["models"]
    assert summary["steps"] == 2


# ---- Estimates -----------------------------------------------------------------------------------


def test_a_dry_run_prints_what_there_is_to_do(flags, tmp_path, capsys):
    """Two iterations of three steps of four pairs use all twelve rows; a grid has two prompts."""
    result = train.main(flags(tmp_path / "run", "--dry-run"))
    assert result.keys() == {"out", "seconds"}
    assert result["seconds"] > 0
    *works, total = capsys.readouterr().out.splitlines()
    assert [work.split(",")[0] for work in works] == [
        "12 real images to encode",
        "24 images for the opponent to generate",
        "24 pairs for spin",
        "4 images for grids and scores",
    ]
    assert total.startswith("in all, about 0:0")


def test_after_a_dry_run_another_run_may_have_the_folder(flags, tmp_path):
    out = tmp_path / "run"
    train.main(flags(out, "--dry-run"))
    for name in ("config.json", "log.jsonl", "iter1", "samples"):
        assert not (out / name).exists()
    train.main(flags(out, f"--seed 12 {SHORT}"))


def estimate(flags, out: Path, more: str, capsys, monkeypatch) -> dict[str, float]:
    """Return the seconds of each kind of work if the clock says that everything takes a second."""
    clock = SimpleNamespace(perf_counter=iter(range(1000)).__next__)
    monkeypatch.setattr("spin.eval.estimate.time", clock)
    total = train.main(flags(out, f"--dry-run {more}"))["seconds"]
    *works, _ = capsys.readouterr().out.splitlines()
    seconds = {}
    for work in works:
        name, rest = work.split(",")
        count = int(name.split()[0])
        seconds_each = float(rest.split()[0])
        seconds[name] = count * seconds_each
    assert total == pytest.approx(sum(seconds.values()), rel=0.01)  # two digits are printed
    return seconds


def test_an_estimate_is_what_was_measured_times_what_is_left(
    flags, tmp_path, capsys, monkeypatch
):
    """Of an image's three sampling steps, two are measured."""
    seconds = estimate(flags, tmp_path, "--micro-batch 4", capsys, monkeypatch)
    assert seconds == {
        "12 real images to encode": 12 * 2 / 4,  # four at once, plain and mirrored
        "24 images for the opponent to generate": pytest.approx(24 * 1.5 / 4, rel=0.02),
        "24 pairs for spin": 24 / 4,
        "4 images for grids and scores": pytest.approx(4 * 1.5 / 4, rel=0.02),
    }


def test_an_estimate_of_one_sampling_step_is_what_that_step_takes(
    flags, tmp_path, capsys, monkeypatch
):
    seconds = estimate(flags, tmp_path, "--sampler-steps 1", capsys, monkeypatch)
    assert seconds["24 images for the opponent to generate"] == 24 / 4
    assert seconds["4 images for grids and scores"] == 4 / 4


def test_only_what_is_left_is_counted(finished, flags, tmp_path, capsys):
    out = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(out / "iter2/checkpoint")
    train.main(flags(out, "--dry-run"))
    *works, _ = capsys.readouterr().out.splitlines()
    names = [work.split(",")[0] for work in works]
    assert names == ["12 pairs for spin", "2 images for grids and scores"]


def test_steps_that_a_crash_lost_are_counted_again(flags, tmp_path, capsys, monkeypatch):
    """The fifth of six steps is logged, but only four are saved."""
    out = tmp_path / "run"
    more = "--iterations 1 --steps 6 --save-every 4 --grid-prompts 0"
    append_log = Run.append_log

    def crash_after_step_5(run, line):
        append_log(run, line)
        if line["step"] == 5:
            raise ZeroDivisionError

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(Run, "append_log", crash_after_step_5)
        train.main(flags(out, more))
    capsys.readouterr()  # what the run said it would do
    train.main(flags(out, f"{more} --dry-run"))
    assert capsys.readouterr().out.startswith("8 pairs for spin, ")
    with pytest.raises(InputError, match="started with --beta"):
        train.main(flags(out, f"{more} --dry-run --beta 3"))


# ---- Training ------------------------------------------------------------------------------------


def test_in_bfloat16_the_loss_at_theta_k_is_log_2_and_trained_weights_are_float32(
    flags, tmp_path
):
    out = tmp_path / "run"
    train.main(flags(out, f"{SHORT} --dtype bfloat16 --beta 5000"))
    first, second = Run(out).read_log()
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert first["delta_data"] == first["delta_gen"] == 0
    assert second["margin"] != 0
    weight = load_unet(out / "iter1/checkpoint").conv_in.weight
    finer_than_bfloat16 = weight != weight.bfloat16().float()
    assert finer_than_bfloat16.double().mean() > 0.9


@pytest.mark.parametrize(
    "deltas, warned",
    [
        ([(0.01, 0.015)] * 50, True),
        ([(0.01, 0.015)] * 49, False),  # not for long
        ([(0.01, 0.03)] * 50, False),  # the error rises far more on generated images
        ([(-0.01, 0.03)] * 50, False),
        ([(-0.02, -0.01)] * 50, False),
        ([(0.0, 0.0)] * 50, False),
        ([(0.03, 0.01)] * 25 + [(-0.02, 0.01)] * 25, False),  # no rise on average
    ],
)
def test_a_policy_forgets_if_both_errors_are_long_up(deltas, warned, capsys):
    watch = ForgettingWatch("spin-1", log=[])
    for step, (delta_data, delta_gen) in enumerate(deltas, start=1):
        watch.update(step, {"delta_data": delta_data, "delta_gen": delta_gen})
    assert ("warning: spin-1, step 50" in capsys.readouterr().out) == warned


def test_a_model_that_goes_on_has_the_deltas_of_its_log(capsys):
    """Other models' lines do not count, and a warning that was given is not repeated."""
    bad_step = {"model": "spin-1", "delta_data": 0.01, "delta_gen": 0.015}
    other = {"model": "dpo", "delta_data": 0.01, "delta_gen": 0.015}
    watch = ForgettingWatch("spin-1", log=[bad_step] * 48 + [other] * 50)
    watch.update(49, bad_step)
    assert capsys.readouterr().out == ""
    watch.update(50, bad_step)
    assert capsys.readouterr().out.startswith("warning: spin-1, step 50: ")

    watch = ForgettingWatch("spin-1", log=[bad_step] * 50)
    watch.update(51, bad_step)
    assert capsys.readouterr().out == ""


def test_sft_has_nothing_to_watch(capsys):
    watch = ForgettingWatch("sft", log=[])
    for step in range(100):
        watch.update(step, {"loss": 1.0})
    assert capsys.readouterr().out == ""


FAILING = """
    --loss spin --lr 1e-3 --beta 200 --iterations 1 --steps 60 --num-prompts 40 --batch-size 4
    --micro-batch 4 --sampler-steps 5 --score none --grid-prompts 0 --device cpu --out
"""


def test_the_known_failure_is_warned_of_once_and_explained(tmp_path, capsys):
    """While its log looks splendid."""
    out = tmp_path / "run"
    train.main([*FAILING.split(), str(out)])
    printed = capsys.readouterr().out.splitlines()
    [warning] = [line for line in printed if line.startswith("warning: ")]
    assert warning.startswith("warning: spin-1, step 5")
    assert "see tutorial/00_the_map.md, 'Reading the picture'" in warning
    assert "## Reading the picture" in (ROOT / "tutorial/00_the_map.md").read_text()
    last_steps = Run(out).read_log()[-10:]
    assert np.mean([line["implicit_accuracy"] for line in last_steps]) > 0.9


# ---- Presets -------------------------------------------------------------------------------------


def test_the_papers_preset_is_the_papers_table():
    """Appendix A of arXiv 2402.10210."""
    args = train.parse_args("--preset paper --model m --data d".split())
    assert args.steps == [50, 500, 200]
    assert args.lr == [2e-5, 2e-5, 5e-8]
    assert args.beta == [2000, 5000, 5000]
    assert args.batch_size == 2048
    assert args.warmup == 200
    assert args.weight_decay == 1e-2
    assert args.resolution == 512
    assert args.guidance == 7.5
    assert args.seed == 5775709
    assert args.sft_lr == 1e-5
    assert args.dpo_lr == 2e-5
    assert args.dpo_beta == 2000


def test_the_preset_for_sdxl_is_that_of_diffusion_dpos_public_code():
    args = train.parse_args("--preset paper-sdxl --model m --data d".split())
    assert args.lr == [2.048e-5] * 3 and args.dpo_lr == 1e-8 * args.batch_size
    assert args.beta == [5000] * 3 and args.dpo_beta == 5000
    assert args.batch_size == 2048 and args.micro_batch == 1
    assert args.warmup == 200 and args.weight_decay == 1e-2 and args.clip == 1
    assert args.resolution == 1024 and args.flip == 0.5 and args.prompt_dropout == 0.2
    assert args.guidance == 5
    assert args.steps == [50, 500, 200]  # SPIN's


def test_with_a_model_the_papers_preset_is_the_default():
    args = train.parse_args("--model m --data some/images".split())
    paper = train.parse_args("--preset paper --model m --data some/images".split())
    assert args == paper
    assert args.loss == "spin"
    assert args.out == "runs/images"


def test_without_a_model_the_miniature_worlds_preset_is_the_default():
    args = train.parse_args([])
    assert args.preset == "toy"
    assert args.loss == "all"
    assert args.model == str(toy.BASE)
    assert args.out == "runs/toy"


def test_a_flag_overrides_the_preset():
    args = train.parse_args("--model m --data d --lr 1e-6".split())
    assert args.lr == [1e-6, 1e-6, 1e-6]
    assert args.beta == [2000, 5000, 5000]


def test_the_last_value_is_repeated_for_further_iterations():
    args = train.parse_args("--model m --data d --iterations 4 --lr 1e-5 2e-5".split())
    assert args.lr == [1e-5, 2e-5, 2e-5, 2e-5]
    assert args.steps == [50, 500, 200, 200]


def test_dpmpp_has_a_usual_number_of_steps_of_its_own():
    assert train.parse_args("--model m --data d".split()).sampler_steps == 50
    assert train.parse_args("--model m --data d --sampler dpm++".split()).sampler_steps == 20
    with_steps = "--model m --data d --sampler dpm++ --sampler-steps 9"
    assert train.parse_args(with_steps.split()).sampler_steps == 9


@pytest.mark.parametrize(
    "more, compiled",
    [
        ("--device cuda", True),
        ("--device cuda:1 --no-compile", False),
        ("--device cpu", False),
        ("--device cpu --compile", True),
    ],
)
def test_the_step_is_compiled_on_cuda_unless_the_flag_says_otherwise(more, compiled):
    args = train.parse_args(f"--model m --data d {more}".split())
    assert args.compile is compiled


def test_a_gpu_computes_in_half_precision_except_in_the_miniature_world():
    """Its signal is smaller than bfloat16's rounding, and it is done before it is compiled."""
    assert train.parse_args("--model m --data d --device cuda".split()).dtype == "bfloat16"
    assert train.parse_args("--model m --data d --device cpu".split()).dtype == "float32"
    small = train.parse_args("--device cuda".split())
    assert small.dtype == "float32"
    assert small.compile is False


@pytest.mark.parametrize(
    "more, suggestion",
    [
        ("--batch-size 24 --micro-batch 16", "--micro-batch 16: does not divide the 24 pairs"),
        ("--batch-size 24 --micro-batch 16", "use --micro-batch 12, or --no-compile"),
        ("--batch-size 13 --micro-batch 4", "use --batch-size 12, or --no-compile"),
    ],
)
def test_two_sizes_of_micro_batches_are_not_compiled(more, suggestion, capsys):
    with pytest.raises(SystemExit):
        train.parse_args(f"--compile {more}".split())
    assert suggestion in capsys.readouterr().err
    train.parse_args(more.split())
    train.parse_args("--compile --batch-size 7 --micro-batch 16".split())  # one size alone


def test_help_has_groups_and_fits_two_screens(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        train.parse_args(["--help"])
    lines = capsys.readouterr().out.splitlines()
    titles = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert len(titles) == 7
    assert len(lines) <= 80  # two of 40


def test_help_names_the_source_of_every_default(capsys):
    with pytest.raises(SystemExit):
        train.parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "paper: 50 500 200)" in text
    assert "toy: 5e-05, tuned; paper: 2e-05 2e-05 5e-08)" in text
    for name in ASSUMED:
        assert f"paper: {format_value(PAPER[name])}, assumed" in text


def announcement(tmp_path: Path, more: str, capsys) -> list[str]:
    args = train.parse_args(["--out", str(tmp_path / "run"), "--device", "cpu", *more.split()])
    train.announce(args, Run(args.out), images=range(3000))
    return capsys.readouterr().out.splitlines()


def test_a_run_says_in_five_lines_what_it_will_do(tmp_path, capsys):
    lines = announcement(tmp_path, "", capsys)
    assert len(lines) == 5
    assert "3000 real images" in lines[0]
    assert "spin-1, spin-2, spin-3, bounded-1, bounded-2, bounded-3" in lines[1]
    assert "sft, dpo" in lines[2]
    assert "200 test prompts" in lines[3]
    assert STORY_TIME in lines[4]


def test_a_run_says_nothing_of_what_it_will_not_do(tmp_path, capsys):
    lines = announcement(tmp_path, "--loss spin --iterations 1 --score none", capsys)
    assert len(lines) == 3
    assert "self-play: spin-1, " in lines[1]
    assert STORY_TIME not in lines[2]
    lines = announcement(tmp_path, "--unet some/unet", capsys)
    assert "theta_0, to be fine-tuned, is some/unet; " in lines[0]


# ---- The miniature world's data ------------------------------------------------------------------


def hash_of_curated_set(tmp_path: Path, more: str = "") -> str:
    args = train.parse_args(["--out", str(tmp_path / "run"), "--device", "cpu", *more.split()])
    return train.hash_data(args, Run(args.out), train.load_images(args))


@pytest.mark.parametrize("more", ["", "--num-prompts 8", "--loss sft"])
def test_the_curated_set_is_known_by_its_pixels_however_they_are_compressed(more, tmp_path):
    before = hash_of_curated_set(tmp_path, more)
    path = tmp_path / "toy-curated" / "0003.png"
    size = path.stat().st_size
    Image.open(path).save(path, compress_level=0)
    assert path.stat().st_size != size
    assert hash_of_curated_set(tmp_path, more) == before


def test_fewer_prompts_and_the_pairs_of_dpo_are_other_data(tmp_path):
    hashes = set()
    for more in ("", "--num-prompts 8", "--num-prompts 9", "--loss sft"):
        hashes.add(hash_of_curated_set(tmp_path, more))
    assert len(hashes) == 4


@pytest.fixture
def base(tmp_path) -> Path:
    """A copy of the miniature base, whose preferences may be changed."""
    return shutil.copytree(toy.BASE, tmp_path / "base")


def world_flags(base: Path, tmp_path: Path, more: str) -> list[str]:
    flags = f"--preset toy --score none {SHORT} --num-prompts 16 --sampler-steps 1 --device cpu"
    return [*flags.split(), *more.split(), "--model", str(base), "--out", str(tmp_path / "run")]


@pytest.mark.parametrize("more", ["", "--loss dpo"])
def test_a_run_does_not_resume_with_other_preferences(base, tmp_path, more):
    train.main(world_flags(base, tmp_path, more))
    path = base / toy.PREFERENCES
    preferences = load_file(path)
    preferences["preferred"][7, 0, 0, 0] += 1
    save_file(preferences, path, {"model_hash": hash_checkpoint(base)})
    with pytest.raises(InputError, match="started with other contents of --data"):
        train.main(world_flags(base, tmp_path, more))


@pytest.mark.parametrize("more", ["", "--loss dpo", "--loss dpo --dry-run"])
def test_a_base_without_preferences_is_refused_by_name(base, tmp_path, more):
    (base / toy.PREFERENCES).unlink()
    with pytest.raises(InputError, match="base/preferences.safetensors: missing; .*--loss spin"):
        train.main(world_flags(base, tmp_path, more))
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_preferences_of_other_rows_are_refused_by_name(base, tmp_path):
    path = base / toy.PREFERENCES
    save_file({name: tensor[:16] for name, tensor in load_file(path).items()}, path)
    message = r"base/preferences.safetensors: must hold .* of shape \[3000, 4, 8, 8\]"
    with pytest.raises(InputError, match=message):
        train.main(world_flags(base, tmp_path, ""))


@pytest.mark.parametrize("loss", ["spin", "sft"])
def test_self_play_and_sft_need_no_preferences(base, tmp_path, loss):
    (base / toy.PREFERENCES).unlink()
    train.main(world_flags(base, tmp_path, f"--loss {loss}"))
    names = {line["model"] for line in Run(tmp_path / "run").read_log()}
    assert names == {"spin-1" if loss == "spin" else "sft"}


@pytest.mark.parametrize("more", ["", "--num-prompts 2"])
def test_a_curated_set_with_other_pixels_is_refused(more, tmp_path):
    hash_of_curated_set(tmp_path)
    Image.new("RGB", (32, 32)).save(tmp_path / "toy-curated" / "0003.png")
    with pytest.raises(InputError, match="toy-curated: not the miniature world's curated set"):
        hash_of_curated_set(tmp_path, more)
