"""The scripts as a user runs them: images, and one clear line for what cannot be done."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import write_images, write_metadata
from PIL import Image

import evaluate
import sample
import train
from spin import toy
from spin.eval import sweep, world
from spin.infra.cli import run_script
from spin.infra.interrupt import Interrupted
from spin.infra.run import dtype_of_checkpoint

ROOT = Path(__file__).parent.parent.parent
MAIN = {"train.py": train.main, "sample.py": sample.main, "evaluate.py": evaluate.main}


def run(script: str, arguments: list[str], monkeypatch) -> int:
    """Run a script in this process and return its exit status."""
    monkeypatch.setattr(sys, "argv", [script])  # argparse's messages begin with it
    try:
        return run_script(script, partial(MAIN[script], arguments), advice="")
    except SystemExit as ending:
        return ending.code


# ---- Images --------------------------------------------------------------------------------------


def test_sample_writes_an_image_for_each_prompt_and_seed_and_a_grid(tiny_folder, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue square\n")
    out = tmp_path / "out"
    flags = "--num-images 2 --seed 5 --steps 2 --height 64 --width 72 --batch-size 3 --device cpu"
    files = ["--model", str(tiny_folder), "--prompts", str(prompts), "--out", str(out)]
    paths = sample.main([*files, *flags.split()])
    assert [path.name for path in paths] == ["00000.png", "00001.png", "00002.png", "00003.png"]
    for path in paths:
        assert Image.open(path).size == (72, 64)

    prompt, settings = Image.open(paths[3]).text["parameters"].splitlines()
    assert prompt == "a blue square"
    stated = {"Steps: 2", "Seed: 6", "CFG scale: 7.5", "Sampler: ddim", "Size: 72x64"}
    assert stated <= set(settings.split(", "))
    assert Image.open(out / "grid.png").width > 2 * 192


def test_a_single_image_has_no_grid(tmp_path):
    command = f"--model {toy.BASE} --prompt a --steps 1 --device cpu --out {tmp_path}"
    assert len(sample.main(command.split())) == 1
    assert not (tmp_path / "grid.png").exists()


@pytest.mark.parametrize(
    "files, precision",
    [
        ("--model {run}/iter1/checkpoint", "bfloat16"),
        ("--model {base} --unet {run}/iter1/checkpoint", "bfloat16"),
        ("--model {base} --unet {run}/iter1/checkpoint/unet", "bfloat16"),
        ("--model {base} --unet {run}/iter1/checkpoint --dtype float32", "float32"),
        ("--model {base}", "float32"),
    ],
)
def test_a_model_samples_in_the_dtype_of_its_run(finished, tmp_path, files, precision):
    """Unless another is given."""
    run_folder = shutil.copytree(finished, tmp_path / "run")
    config = json.loads((run_folder / "config.json").read_text())
    (run_folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    files = files.format(run=run_folder, base=toy.BASE)
    flags = f"--prompt a --steps 2 --device cpu --out {tmp_path / 'out'}"
    [path] = sample.main([*files.split(), *flags.split()])
    assert f"Precision: {precision}, " in Image.open(path).text["parameters"]


@pytest.mark.parametrize("content", ['{"dtype": "int8"}', '{"dtype": 5}', "{", "[]", "{}"])
def test_what_is_beside_a_folder_named_checkpoint_need_not_be_a_run(tiny_folder, tmp_path, content):
    shutil.copytree(tiny_folder, tmp_path / "iter1" / "checkpoint")
    (tmp_path / "config.json").write_text(content)
    assert dtype_of_checkpoint(str(tmp_path / "iter1" / "checkpoint")) is None


def test_the_miniature_base_is_sampled_like_the_models_trained_from_it():
    """In float32 on a GPU, too, where other models compute in half precision."""
    assert sample.dtype_of_model(str(toy.BASE), "cuda") == "float32"
    assert sample.dtype_of_model("some/model", "cuda") == "bfloat16"


def test_models_that_are_compared_share_the_dtype_of_the_first_run(finished):
    trained = f"spin-1={finished}/iter1/checkpoint"
    assert evaluate.dtype_of_models([str(toy.BASE), trained], "cuda") == "float32"
    assert evaluate.dtype_of_models(["some/model"], "cuda") == "bfloat16"


# ---- Mistakes ------------------------------------------------------------------------------------

# {arguments: what the line says}, for each script; names in braces are paths
WRONG_TRAIN = {
    "--nonsense 1": "unrecognized arguments: --nonsense 1",
    "--model {model}": "needs both --model and --data",
    "--preset paper --data {images}": "needs both --model and --data",
    "--loss ipo": "argument --loss: invalid choice: 'ipo'",
    "--sampler euler": "argument --sampler: invalid choice: 'euler'",
    "--loss spin --sft-lr 1": "--sft-lr: --loss spin does not use it; give --lr and --beta",
    "--loss dpo --beta 3": "--beta: --loss dpo does not use it; give --dpo-lr and --dpo-beta",
    "--loss sft --beta 3": "--beta: --loss sft does not use it; give --sft-lr",
    "--loss sft --noise independent": "--noise: has no effect with --loss sft",
    "--resolution 64": "needs 32 x 32 pixels",
    "--model {model} --data {images} --steps 0": "invalid int >= 1 value: '0'",
    "--compile --batch-size 10 --micro-batch 4": "--micro-batch 4: does not divide the 10 pairs",
    "--model {model} --data {images} --lr nan": "invalid float >= 0 value: 'nan'",
    "--model {model} --data {images} --flip 2": "invalid float >= 0 and <= 1 value: '2'",
    "--model {model} --data {images} --iterations 1 --lr 1 2": "--lr: 2 values for 1 iterations",
    "--model {model} --data {images} --device meta": "--device meta: cannot be used here",
    "--model {model} --data {images} --device abacus": "--device abacus: cannot be used here",
    "--model {model} --data {images} --loss dpo --device cpu": "12 of 12 rows cannot be used; ",
    "--model {model} --data {model} --device cpu": "metadata.jsonl: no such file",
    "--model {images} --data {images} --device cpu": "unet/config.json: no such file",
    "--model {model} --data {images} --resolution 30 --device cpu": (
        "--resolution 30: must be a multiple of 4"
    ),
    "--model {model} --data {images} --sampler-steps 1000 --device cpu": "1000 sampling steps",
}
WRONG_SAMPLE = {
    "--model {model}": "nothing to sample: give --prompt or --prompts",
    "--model {model} --prompt a --sampler euler": "argument --sampler: invalid choice: 'euler'",
    "--model {model} --prompt a --guidance inf": "invalid float >= 0 value: 'inf'",
    "--model {model} --prompt a --seed 99999999999999999999": "invalid int >= 0 and <=",
    "--model {model} --prompt a --out {images}/metadata.jsonl/x": "[Errno 20] Not a directory",
    "--model {model} --prompts missing.txt": "missing.txt: no such file",
    "--model {model} --save-single model.ckpt": "model.ckpt: the name must end in .safetensors",
    "--model nowhere --prompt a": "nowhere: no such folder",
    "--model {model} --prompt a --height 30 --device cpu": "must be multiples of 4",
    "--model {model} --prompt a --steps 2000 --device cpu": "2000 sampling steps",
    "--model {model} --prompt \udcff": "argument --prompt: invalid UTF-8 text value: '\\udcff'",
    "--model {model} --prompt a --negative-prompt \udcff": "invalid UTF-8 text value",
    "--model {model} --prompt a --sampler ddpm --eta 1": "--eta: --sampler ddpm does not use it",
    "--model {model} --prompt a --prediction-type v": "--prediction-type: invalid choice: 'v'",
}
WRONG_EVALUATE = {
    "": "give a run folder, or --models",
    "nowhere": "nowhere/config.json: no such file",
    "nowhere --models {model}": "give a run folder, or --models",
    "{model}/unet": "unet: not a run of train.py",
    "--models {model}": "--prompts: required, except in the miniature world",
    "--models {model} --prompts {empty}": "empty.txt: holds no prompts",
    "--models {model} --prompts missing.jsonl": "missing.jsonl: no such file",
    "--models {model} no/where --metrics toy": "no/where: no such folder here, and not available",
    "--models {model} nowhere --metrics toy": "nowhere: no such folder or file",
    "--models {model} --metrics toy --validation": "give several values of --guidance",
    "--guidance 1 2 --validation {model}": "a run goes before the flags",
    "--models {model} --prompts {empty} --guidance 1 2 --validation": (
        "--validation: needs a file of prompts, except in the miniature world"
    ),
    "--models {model} {model} --metrics toy": (
        "two models are named base; rename one of them: base-2={model}"
    ),
    "--models {model} --metrics toy --sampler dpm++ --eta 1": (
        "--eta: --sampler dpm++ does not use it"
    ),
    "--models {model} --metrics toy --prediction-type x": "--prediction-type: invalid choice: 'x'",
    "--models {model} --prompts {prompts} --metrics beauty": "invalid choice: 'beauty'",
    "--models {model} --prompts {prompts} --metrics hps": (
        "hps needs HPS_v2_compressed.pt: use --scorers"
    ),
    "--models {model} --prompts {prompts} --scorers s": (
        "put it at s/PickScore_v1/model.safetensors"
    ),
}


@pytest.fixture
def paths(image_folder, tmp_path) -> dict[str, Path]:
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n")
    return {"model": toy.BASE, "images": image_folder, "empty": empty, "prompts": prompts}


def assert_one_line(script: str, arguments: str, expected: str, paths, monkeypatch, capsys) -> None:
    """Check that a script ends with status 2 and with one line, which says what is expected."""
    monkeypatch.chdir(paths["prompts"].parent)
    given = arguments.format(**paths).split()
    if "--out" not in given:
        given += ["--out", "out"]
    assert run(script, given, monkeypatch) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{script}: error: ")
    assert expected.format(**paths) in line


@pytest.mark.parametrize("arguments, expected", WRONG_TRAIN.items())
def test_a_mistake_in_train_ends_in_one_line(arguments, expected, paths, monkeypatch, capsys):
    assert_one_line("train.py", arguments, expected, paths, monkeypatch, capsys)


@pytest.mark.parametrize("arguments, expected", WRONG_SAMPLE.items())
def test_a_mistake_in_sample_ends_in_one_line(arguments, expected, paths, monkeypatch, capsys):
    assert_one_line("sample.py", arguments, expected, paths, monkeypatch, capsys)


@pytest.mark.parametrize("arguments, expected", WRONG_EVALUATE.items())
def test_a_mistake_in_evaluate_ends_in_one_line(arguments, expected, paths, monkeypatch, capsys):
    assert_one_line("evaluate.py", arguments, expected, paths, monkeypatch, capsys)


# ---- Long prompts --------------------------------------------------------------------------------


@pytest.fixture
def prompts(tmp_path) -> Path:
    """A file of three prompts, two of which are longer than the miniature base's 20 tokens."""
    path = tmp_path / "prompts.txt"
    path.write_text(f"{'red ' * 18}\n{'red ' * 19}\n{'red ' * 200}\n")
    return path


NOTE = "note: 2 prompts have more than 20 tokens; the model reads the first ones"


def test_sample_says_how_many_prompts_are_cut(prompts, tmp_path, capsys):
    flags = f"--model {toy.BASE} --prompts {prompts} --steps 1 --device cpu --out {tmp_path}"
    sample.main(flags.split())
    assert capsys.readouterr().err.count(NOTE) == 1


def test_a_negative_prompt_that_is_cut_counts(tmp_path, capsys):
    flags = f"--model {toy.BASE} --prompt a --steps 1 --device cpu --out {tmp_path}".split()
    sample.main([*flags, "--negative-prompt", "ugly " * 100])
    assert "note: 1 prompt has more than 20 tokens" in capsys.readouterr().err


def test_evaluate_says_how_many_prompts_are_cut_once_for_all_models(
    prompts, tmp_path, monkeypatch, capsys
):
    class Brightness:
        """A scorer that reads any prompt."""

        name = "toy"
        metrics = ("brightness",)
        primary_metric = "brightness"
        less_is_better = ()
        hash = "0"

        def score(self, images, prompts):
            return {"brightness": np.array([np.asarray(image).mean() for image in images])}

    def score_real(vae, prompts, images_per_prompt):
        return {"brightness": np.ones((len(prompts), images_per_prompt))}

    monkeypatch.setattr(sweep, "load_scorer", lambda *arguments: Brightness())
    monkeypatch.setattr(world, "score_real", score_real)
    flags = f"--models a={toy.BASE} b={toy.BASE} --prompts {prompts} --metrics toy --steps 1"
    evaluate.main([*flags.split(), "--num-images", "1", "--device", "cpu", "--out", str(tmp_path)])
    assert capsys.readouterr().err.count(NOTE) == 1


def test_train_says_how_many_captions_are_cut_at_the_first_start(tmp_path, capsys):
    images = write_images(tmp_path / "images", count=4)
    rows = [{"file_name": f"{i}.jpg", "text": "red " * (17 + i)} for i in (0, 2)]
    write_metadata(images, rows)
    flags = f"""
        --preset toy --loss sft --iterations 1 --steps 1 --batch-size 2 --grid-prompts 0
        --data {images} --out {tmp_path / "run"} --device cpu
    """
    train.main(flags.split())
    expected = "note: 1 prompt has more than 20 tokens"
    assert capsys.readouterr().err.count(expected) == 1
    train.main(flags.split())
    assert expected not in capsys.readouterr().err


def test_an_error_of_a_gpus_memory_ends_in_the_flags_that_help(capsys):
    def exhaust_memory():
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 24 GiB"
        )

    assert run_script("train.py", exhaust_memory, "advice", "lower --micro-batch") == 2
    expected = "train.py: error: CUDA out of memory; lower --micro-batch"
    assert capsys.readouterr().err.strip() == expected


# ---- Interruptions -------------------------------------------------------------------------------


def interrupt():
    raise KeyboardInterrupt


def interrupt_training():
    raise Interrupted("3 of 4 steps are saved")


@pytest.mark.parametrize(
    "main, line",
    [
        (interrupt, "train.py: stopped; what is finished is kept"),
        (interrupt_training, "train.py: stopped; 3 of 4 steps are saved"),
    ],
)
def test_an_interruption_ends_in_one_line(main, line, capsys):
    assert run_script("train.py", main, "what is finished is kept") == 130
    assert capsys.readouterr().err.strip() == line


# ---- From a shell --------------------------------------------------------------------------------


def run_in_shell(command: list[str], cwd: Path, **environment) -> subprocess.CompletedProcess:
    script, *arguments = command
    return subprocess.run(
        [sys.executable, ROOT / script, *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("script", MAIN)
def test_help(script, monkeypatch, capsys):
    assert run(script, ["--help"], monkeypatch) == 0
    assert "--out" in capsys.readouterr().out


def test_help_on_a_cluster_that_sets_master_addr(tmp_path):
    result = run_in_shell(["train.py", "--help"], tmp_path, MASTER_ADDR="node-1")
    assert result.returncode == 0, result.stderr
    assert "--out" in result.stdout


def test_training_on_a_cluster_that_sets_what_torchrun_sets(flags, tmp_path):
    """One process is one process, whatever its environment says of others."""
    cluster = {"MASTER_ADDR": "node-1", "MASTER_PORT": "1", "RANK": "3", "WORLD_SIZE": "4"}
    arguments = flags(tmp_path / "run", "--iterations 1 --steps 1 --grid-prompts 0")
    result = run_in_shell(["train.py", *arguments], tmp_path, **cluster)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run/iter1/checkpoint").exists()


def test_a_mistake_ends_with_status_2_and_no_traceback(tmp_path):
    result = run_in_shell(["evaluate.py", "nowhere", "--device", "cpu"], tmp_path)
    assert result.returncode == 2
    assert result.stderr == "evaluate.py: error: nowhere/config.json: no such file\n"
