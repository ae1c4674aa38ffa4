"""The scripts as a user runs them: pictures, and one clear line with exit status 2 for what cannot be done."""

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import sample
from spin.infra import run

ROOT = Path(__file__).parent.parent.parent


def test_sample_writes_pictures_and_a_grid(tiny_folder, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue square\n")
    command = f"--model {tiny_folder} --prompts {prompts} --num-images 2 --seed 5 --steps 2 --height 64 --width 72"
    paths = sample.main([*command.split(), "--batch-size", "3", "--device", "cpu", "--out", str(tmp_path / "out")])
    assert [path.name for path in paths] == ["00000.png", "00001.png", "00002.png", "00003.png"]
    assert all(Image.open(path).size == (72, 64) for path in paths)
    text = Image.open(paths[3]).text["parameters"]
    assert text.splitlines()[0] == "a blue square"
    settings = text.splitlines()[1].split(", ")
    assert {"Steps: 2", "Seed: 6", "CFG scale: 7.5", "Sampler: ddim", "Size: 72x64"} <= set(settings)
    assert Image.open(tmp_path / "out/grid.png").width > 2 * 192


def test_a_single_image_has_no_grid(tiny_folder, tmp_path):
    command = f"--model {tiny_folder} --prompt a --steps 1 --height 64 --width 64 --device cpu --out {tmp_path}"
    assert len(sample.main(command.split())) == 1
    assert not (tmp_path / "grid.png").exists()


WRONG = {
    "train.py --nonsense 1": "unrecognized arguments: --nonsense 1",
    "train.py --model {tiny}": "needs both --model and --data",
    "train.py --preset paper --data {pictures}": "needs both --model and --data",
    "train.py --loss spin --sft-lr 1": "--sft-lr: --loss spin has --lr and --beta instead",
    "train.py --loss dpo --beta 3": "--beta: --loss dpo has --dpo-lr and --dpo-beta instead",
    "train.py --loss spin-trajectory --noise independent": "for a path drawn by ddim",
    "train.py --loss spin-trajectory --sampler ddpm": "for a path drawn by ddim",
    "train.py --loss dpo --link hinge": "not for --loss dpo",
    "train.py --loss sft --noise independent": "not for --loss sft",
    "train.py --resolution 64": "needs 32 pixels a side",
    "train.py --loss sft --beta 3": "--beta: --loss sft has --sft-lr instead",
    "train.py --model {tiny} --data {pictures} --loss dpo": "12 of 12 rows cannot be used; ",
    "train.py --model {tiny} --data {pictures} --opponent-dtype bfloat16 --device cpu": "only with --dtype bfloat16",
    "train.py --model {tiny} --data {tiny}": "metadata.jsonl: no such file",
    "train.py --model {pictures} --data {pictures}": "unet/config.json: no such file",
    "train.py --model {tiny} --data {pictures} --nonsense 1": "unrecognized arguments: --nonsense 1",
    "train.py --model {tiny} --data {pictures} --steps 0": "invalid int from 1 on value: '0'",
    "train.py --model {tiny} --data {pictures} --lr nan": "invalid float from 0 on value: 'nan'",
    "train.py --model {tiny} --data {pictures} --flip 2": "invalid float from 0 to 1 value: '2'",
    "train.py --model {tiny} --data {pictures} --iterations 1 --lr 1 2": "--lr: 2 values for 1 iterations",
    "train.py --model {tiny} --data {pictures} --device meta": "--device meta: cannot be used here",
    "sample.py --model {tiny} --prompt a --guidance inf": "invalid float from 0 on value: 'inf'",
    "sample.py --model {tiny} --prompt a --seed 99999999999999999999": "invalid int from 0 to",
    "sample.py --model {tiny} --prompt a --out {pictures}/metadata.jsonl/x": "error: [Errno 20] Not a directory",
    "train.py --model {tiny} --data {pictures} --resolution 60 --device cpu": "--resolution 60: must be a multiple",
    "train.py --model {tiny} --data {pictures} --device nonsense": "--device nonsense: cannot be used here",
    "train.py --model {tiny} --data {pictures} --sampler-steps 1000 --device cpu": "1000 sampling steps",
    "sample.py --model {tiny}": "nothing to draw: give --prompt or --prompts",
    "sample.py --model {tiny} --prompts missing.txt": "missing.txt: no such file",
    "sample.py --model {tiny} --save-single model.ckpt": "model.ckpt: the name must end in .safetensors",
    "sample.py --model nowhere --prompt a": "nowhere: no such folder",
    "sample.py --model {tiny} --prompt a --height 60 --device cpu": "must be multiples of 8",
    "sample.py --model {tiny} --prompt a --steps 2000 --device cpu": "2000 sampling steps",
    "evaluate.py": "give a run folder, or --models",
    "evaluate.py nowhere": "nowhere/config.json: no such file",
    "evaluate.py nowhere --models {tiny}": "give a run folder, or --models",
    "evaluate.py {tiny}/unet": "unet: not a run of train.py",
    "evaluate.py --models {tiny}": "--prompts: needed, but for the miniature world",
    "evaluate.py --models {tiny} --prompts {empty}": "empty.txt: holds no prompts",
    "evaluate.py --models {tiny} --prompts missing.jsonl": "missing.jsonl: no such file",
    "evaluate.py --models {tiny} no/where --metrics toy": "no/where: no such folder here, and not to be had",
    "evaluate.py --models {tiny} nowhere --metrics toy": "nowhere: no such folder or file",
    "evaluate.py --models {tiny} {tiny} --metrics toy": "two are called model; give one another name: model-2={tiny}",
    "evaluate.py --models {tiny} --prompts {empty} --metrics beauty": "invalid choice: 'beauty' (choose from",
    "evaluate.py --models {tiny} --prompts {one} --metrics hps": "hps needs HPS_v2_compressed.pt: say --scorers",
    "evaluate.py --models {tiny} --prompts {one} --scorers s": "put it at s/PickScore_v1/model.safetensors",
}


@pytest.mark.parametrize("command, expected", WRONG.items())
def test_a_mistake_is_answered_in_one_line(command, expected, tiny_folder, pictures, tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "one.txt").write_text("a red circle\n")
    places = {"tiny": tiny_folder, "pictures": pictures, "empty": tmp_path / "empty.txt", "one": tmp_path / "one.txt"}
    script, *arguments = command.format(**places).split()
    expected = expected.format(**places)
    out = [] if "--out" in arguments else ["--out", str(tmp_path / "out")]
    command = [sys.executable, ROOT / script, *arguments, *out]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    lines = result.stderr.splitlines()
    assert result.returncode == 2
    assert expected in lines[-1] and lines[-1].startswith(f"{script}: error:")
    assert len(lines) == 1, result.stderr


def test_ctrl_c_is_answered_in_one_line(capsys):
    def interrupted():
        raise KeyboardInterrupt

    assert run.script("train.py", interrupted) == 130
    assert capsys.readouterr().err.strip() == "train.py: stopped; what is finished is kept"


@pytest.mark.parametrize("script", ["train.py", "sample.py", "evaluate.py"])
def test_help(script):
    result = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True, check=True)
    assert "--out" in result.stdout
