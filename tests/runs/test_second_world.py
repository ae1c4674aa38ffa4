"""Specification of tutorial/second_world.py. It replaces the first world for good, in one process,
so that each test runs a program of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from spin import toy

ROOT = Path(__file__).parent.parent.parent

PROGRAM = """
import json, sys
from pathlib import Path
import numpy as np
from spin import toy
from spin.text import Tokenizer

captions = [scene.caption for scene in toy.SCENES]
scores = toy.score(np.stack([toy.ideal_image(scene) for scene in toy.SCENES]), captions)
words = sorted({word for caption in captions for word in caption.split()})
image = toy.ideal_image(next(scene for scene in toy.SCENES if scene.place == "in the middle"))
folder = Path(sys.argv[1])
toy.write_curated_set(folder)
print(json.dumps({
    "captions": captions,
    "aligned": scores["aligned"].tolist(),
    "clean": scores["clean"].tolist(),
    "split": {name: len(scenes) for name, scenes in toy.split().items()},
    "tokens": {word: len(Tokenizer().encode(word)) for word in words},
    "mirrored": bool(np.allclose(image, image[:, ::-1])),
    "hole": bool(np.allclose(image[16, 15:17], image[0, 0])),
    "hash_agrees": toy.hash_curated_set(folder) == toy.CURATED_SHA256,
}))
"""


def run(program: Path, *arguments: str) -> str:
    command = [sys.executable, "tutorial/second_world.py", str(program), *arguments]
    return subprocess.run(
        command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=600
    ).stdout


@pytest.fixture(scope="module")
def facts(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("second")
    program = folder / "program.py"
    program.write_text(PROGRAM)
    return json.loads(run(program, str(folder / "curated")))


def test_it_is_as_large_as_the_first_and_shares_no_caption(facts):
    assert len(set(facts["captions"])) == len(toy.SCENES)
    assert not set(facts["captions"]) & set(toy.SCENE_OF_CAPTION)
    assert facts["split"] == {name: len(scenes) for name, scenes in toy.split().items()}


def test_only_four_words_are_the_first_worlds(facts):
    first = {word for caption in toy.SCENE_OF_CAPTION for word in caption.split()}
    assert first & set(facts["tokens"]) == {"in", "the", "left", "right"}
    assert set(facts["tokens"].values()) == {1}, "each is one token, as pretrain_toy.py needs"


def test_the_score_knows_its_images(facts):
    assert set(facts["aligned"]) == {1.0}
    assert min(facts["clean"]) > 9.99


def test_two_shapes_stand_side_by_side(facts):
    assert facts["mirrored"] and facts["hole"]


def test_its_curated_set_is_the_one_that_train_expects(facts):
    assert facts["hash_agrees"]


def test_a_program_trains_in_it(tmp_path):
    small = "--images 64 --vae-steps 2 --steps 2 --rows 4"
    run(ROOT / "tutorial/pretrain_toy.py", *small.split(), "--out", str(tmp_path / "base"))
    vocabulary = json.loads((tmp_path / "base/base/tokenizer/vocab.json").read_text())
    assert "rings</w>" in vocabulary and "circle</w>" not in vocabulary
    flags = "--preset toy --loss spin-bounded --iterations 1 --steps 2 --batch-size 4"
    flags += " --sampler-steps 2 --score none --grid-prompts 1 --device cpu"
    model = ["--model", str(tmp_path / "base/base"), "--out", str(tmp_path / "run")]
    run(ROOT / "train.py", *flags.split(), *model)
    lines = (tmp_path / "toy-curated/metadata.jsonl").read_text().splitlines()
    assert len(lines) == toy.NUM_ROWS
    assert all(json.loads(line)["text"].startswith("two ") for line in lines)
    assert (tmp_path / "run/iter1/checkpoint").exists()
