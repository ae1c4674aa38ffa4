"""The blind test of the README: its sheets, and what the answers say."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spin import toy
from spin.infra.errors import InputError
from spin.infra.images import save_png
from tutorial import blind_toy

EVIDENCE = Path(blind_toy.__file__).parent / "evidence"
GRAY = {"base": 10, "sft": 20, "spin-3": 30}


def test_a_sheet_shows_the_ideal_image_then_the_models_in_the_keys_order(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text('{"guidance": 7.5}')
    for model, level in GRAY.items():
        for prompt in range(200):
            path = run / f"evaluation/images/{model}/guidance-7.5-32px/{prompt:05d}-0.png"
            save_png(Image.new("RGB", (32, 32), (level, level, level)), path)

    key = blind_toy.main(["sheets", str(run), "--out", str(tmp_path / "out")])
    assert json.loads((tmp_path / "out/key.json").read_text()) == key
    assert len(set(key["prompts"])) == len(key["order"]) == 60
    assert len({tuple(order) for order in key["order"]}) == 6, "all orders occur"
    sheet = np.asarray(Image.open(tmp_path / "out/sheet6.png"))
    for row in range(10):
        y = 25 + row * 134
        scene = toy.split()["test"][key["prompts"][50 + row]]
        ideal = np.asarray(toy.to_pil(toy.ideal_image(scene)))
        np.testing.assert_array_equal(sheet[y : y + 128 : 4, 190 : 190 + 128 : 4], ideal)
        for column, model in enumerate(key["order"][50 + row], start=1):
            assert (sheet[y, 190 + column * 134] == GRAY[model]).all()


def test_the_exact_interval_is_that_of_published_tables():
    """Clopper and Pearson, 95%: 0 of 10 gives 0 to 0.3085, 5 of 10 gives 0.1871 to 0.8129."""
    assert blind_toy.binomial_interval(0, 10) == (0, pytest.approx(0.3085, abs=1e-4))
    assert blind_toy.binomial_interval(5, 10) == pytest.approx((0.1871, 0.8129), abs=1e-4)
    assert blind_toy.binomial_interval(10, 10)[1] == 1


@pytest.mark.parametrize(
    "folder, stated, page",
    [
        ("blind/observer-1", "0.95 [0.86, 0.99]", "README.md"),
        ("blind/observer-2", "0.93 [0.84, 0.98]", "README.md"),
        ("blind_earlier/observer-1", "0.50 [0.37, 0.63]", "tutorial/evidence/earlier_world.md"),
        ("blind_earlier/observer-2", "0.77 [0.64, 0.87]", "tutorial/evidence/earlier_world.md"),
    ],
)
def test_the_page_says_what_the_answers_say(folder, stated, page, capsys):
    result = blind_toy.main(["judge", str(EVIDENCE / folder)])
    assert f"spin-3 is nearest: {result['spin-3 is nearest'][0]} of 60, {stated}\n" in (
        capsys.readouterr().out
    )
    text = " ".join((EVIDENCE.parent.parent / page).read_text().split())
    assert stated in text


def test_incomplete_answers_are_refused(tmp_path):
    (tmp_path / "key.json").write_text(json.dumps({"order": [list(blind_toy.MODELS)] * 2}))
    for answers in (["ABC"], ["ABC", "AAB"]):
        (tmp_path / "answers.json").write_text(json.dumps({"orders": answers}))
        with pytest.raises(InputError, match="must be 2 orders such as BAC"):
            blind_toy.main(["judge", str(tmp_path)])
