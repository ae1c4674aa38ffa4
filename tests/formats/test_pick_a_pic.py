"""tutorial/pick_a_pic.py on rows made here: pyarrow is not needed."""

import json
import sys
from io import BytesIO

import pytest
from PIL import Image

from spin import data
from spin.infra.errors import InputError
from tutorial import pick_a_pic


def jpeg(color: str) -> bytes:
    file = BytesIO()
    Image.new("RGB", (64, 48), color).save(file, format="JPEG")
    return file.getvalue()


def row(caption: str, label_0: float, label_1: float) -> dict:
    """Return a row whose image 0 is red and whose image 1 is blue."""
    return {
        "caption": caption,
        "label_0": label_0,
        "label_1": label_1,
        "jpg_0": jpeg("red"),
        "jpg_1": jpeg("blue"),
    }


ROWS = [row("the first", 1.0, 0.0), row("a tie", 0.5, 0.5), row("the second", 0.0, 1.0)]


def test_the_preferred_image_comes_first_and_ties_are_left_out(tmp_path):
    assert pick_a_pic.write_pairs(ROWS, tmp_path) == 2
    lines = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert [line["text"] for line in lines] == ["the first", "the second"]
    assert (tmp_path / lines[0]["file_name"]).read_bytes() == jpeg("red")
    assert (tmp_path / lines[0]["rejected_file_name"]).read_bytes() == jpeg("blue")
    assert (tmp_path / lines[1]["file_name"]).read_bytes() == jpeg("blue")
    assert (tmp_path / lines[1]["rejected_file_name"]).read_bytes() == jpeg("red")


def test_the_folder_is_data_for_training(tmp_path):
    pick_a_pic.write_pairs(ROWS, tmp_path)
    images = data.CaptionedImages(tmp_path, 32, with_rejected=True)
    assert len(images) == 2
    assert images.caption(1) == "the second"
    red, _, blue = images.image(1).mean((1, 2))
    assert blue > 0.9 and red < -0.9
    red, _, blue = images.rejected_image(1).mean((1, 2))
    assert red > 0.9 and blue < -0.9


def test_no_folder_holds_more_than_a_thousand_pairs(tmp_path, monkeypatch):
    monkeypatch.setattr(pick_a_pic, "PAIRS_PER_FOLDER", 2)
    pick_a_pic.write_pairs([row(f"image {i}", 1.0, 0.0) for i in range(5)], tmp_path)
    counts = [len(list(folder.iterdir())) for folder in sorted(tmp_path.glob("0*"))]
    assert counts == [4, 4, 2]


def test_the_script(tmp_path, monkeypatch, capsys):
    """The parquet files are read by pyarrow, which is replaced here."""
    monkeypatch.setitem(sys.modules, "pyarrow", type(sys)("pyarrow"))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", type(sys)("pyarrow.parquet"))
    monkeypatch.setattr(pick_a_pic, "read_rows", lambda files: ROWS[: len(files)])
    (tmp_path / "train-00000.parquet").touch()
    (tmp_path / "validation-00000.parquet").touch()
    out = tmp_path / "out"
    pick_a_pic.main([str(tmp_path), str(out)])
    assert "1 pairs" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["0000", "metadata.jsonl"]


def test_an_interrupted_conversion_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", type(sys)("pyarrow"))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", type(sys)("pyarrow.parquet"))
    broken = {**row("broken", 1.0, 0.0), "jpg_1": None}
    monkeypatch.setattr(pick_a_pic, "read_rows", lambda files: [*ROWS, broken])
    (tmp_path / "train-00000.parquet").touch()
    with pytest.raises(TypeError):
        pick_a_pic.main([str(tmp_path), str(tmp_path / "out")])
    assert [path.name for path in tmp_path.iterdir()] == ["train-00000.parquet"]


def test_refusals(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="holds no file train-"):
        pick_a_pic.main([str(tmp_path), str(tmp_path / "out")])
    (tmp_path / "train-00000.parquet").touch()
    with pytest.raises(InputError, match="exists already"):
        pick_a_pic.main([str(tmp_path), str(tmp_path)])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match="pip install pyarrow"):
        pick_a_pic.main([str(tmp_path), str(tmp_path / "out")])
