"""The images of the miniature world's data sets, and the curated set as a folder.

There are two ways to paint a scene:

    web        jittered, cluttered, washed out: what pretraining sees
    curated    clean, and only a little jittered: what fine-tuning learns from

The captions of both are careless: here and there a word is wrong or missing. The curated set has
better images than the web, but no better words.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import numpy as np

from spin.infra.errors import InputError
from spin.infra.files import read_text
from spin.infra.images import read_image
from spin.toy.scenes import (
    ATTRIBUTES,
    COLORS,
    PLACES,
    SIDE,
    SIZES,
    Scene,
    paint,
    shape_mask,
    split,
    to_pil,
)

PER_SCENE = 5  # images of each scene in the curated set
TRAIN_SCENES = split()["train"]
NUM_ROWS = PER_SCENE * len(TRAIN_SCENES)  # of the curated set

# hash_curated_set of the folder that write_curated_set writes
CURATED_SHA256 = "8a4568dacb191dc86486ef471b3e3c94a9666c71b9e7d935247e5e4c4700484b"


# ---- two ways to paint a scene -------------------------------------------------------------------


def jittered_colors(scene: Scene, sd: float, rng: np.random.Generator) -> tuple:
    """Return the scene's color and background, Gaussian noise of this sd added to each channel."""
    color = np.array(COLORS[scene.color]) + rng.normal(0, sd, 3)
    background = np.array(COLORS[scene.background]) + rng.normal(0, sd, 3)
    return color, background


def curated_image(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Return the scene with a little jitter: sd 0.015 of colors, 0.4 pixels of place."""
    color, background = jittered_colors(scene, 0.015, rng)
    center = PLACES[scene.place] + rng.normal(0, 0.4, 2)
    mask = shape_mask(scene.shape, SIZES[scene.size], center)
    return np.clip(paint(mask, color, background), 0, 1)


def web_image(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Return the scene as a careless painter paints it.

    One random carelessness from 0.15 to 1 scales all defects but the last: jitter, clutter,
    blotches, fading. The last, a little noise of sd 0.015, is in every image.
    """
    carelessness = rng.uniform(0.15, 1)

    color, background = jittered_colors(scene, 0.08 * carelessness, rng)
    center = PLACES[scene.place] + rng.normal(0, 1.8 * carelessness, 2)
    radius = SIZES[scene.size] * (1 + rng.normal(0, 0.12 * carelessness))
    angle = rng.normal(0, 0.35 * carelessness)
    image = paint(shape_mask(scene.shape, radius, center, angle), color, background)

    for _ in range(rng.poisson(carelessness)):  # clutter: small circles of any color
        circle = shape_mask("circle", rng.uniform(0.8, 2.2), rng.uniform(0, SIDE, 2))
        circle_color = rng.uniform(0, 1, 3)
        image = paint(circle, circle_color, (0, 0, 0)) + (1 - circle[..., None]) * image

    blotches = rng.normal(0, 0.025 * carelessness, (SIDE // 4, SIDE // 4, 3))
    image = image + blotches.repeat(4, 0).repeat(4, 1)  # each blotch is 4 x 4 pixels

    fading = rng.uniform(0, 0.6 * carelessness)
    image = (1 - fading) * image + fading * 0.55  # towards a light gray

    noise = rng.normal(0, 0.015, image.shape)
    return np.clip(image + noise, 0, 1).astype(np.float32)


# ---- careless captions ---------------------------------------------------------------------------


def careless_description(scene: Scene, rng: np.random.Generator) -> Scene:
    """Return what a careless caption says of a scene.

    Each attribute is wrong with probability 0.08, and missing, as None, with probability 0.2. The
    shape is never missing.
    """
    described = with_mistakes(scene, 0.08, rng)
    for name in ATTRIBUTES:
        if name != "shape" and rng.random() < 0.2:
            described = replace(described, **{name: None})
    return described


def with_mistakes(scene: Scene, probability: float, rng: np.random.Generator) -> Scene:
    """Return the scene, each attribute replaced by a wrong value with this probability.

    Color and background stay different.
    """
    result = scene
    for name, values in ATTRIBUTES.items():
        if rng.random() < probability:
            excluded = [getattr(result, name)]
            if name in ("color", "background"):
                excluded = [result.color, result.background]
            wrong_values = [value for value in values if value not in excluded]
            choice = rng.integers(len(wrong_values))
            result = replace(result, **{name: wrong_values[choice]})
    return result


# ---- the curated set -----------------------------------------------------------------------------


def curated_row(row: int) -> tuple[Scene, np.ndarray]:
    """Return what the caption of a row of the curated set says, and the image [32,32,3].

    Row r shows scene r % 600 of "train". Each row is drawn anew.
    """
    scene = TRAIN_SCENES[row % len(TRAIN_SCENES)]
    rng = np.random.default_rng([0, row])
    image = curated_image(scene, rng)
    return careless_description(scene, rng), image


def curated_set() -> Iterator[tuple[str, np.ndarray]]:
    """Yield (caption, image) of each row of the curated set."""
    for row in range(NUM_ROWS):
        description, image = curated_row(row)
        yield description.caption, image


def file_name(row: int) -> str:
    """Return the name of a row's image in the folder of the curated set."""
    return f"{row:04d}.png"


def write_curated_set(folder: Path) -> None:
    """Write the curated set as a data set like any other: PNGs and metadata.jsonl.

    A folder that is there already is kept. Several processes may call this at once: each writes a
    temporary folder of its own, and the first to finish renames it into place.
    Raises InputError if the folder is there but incomplete.
    """
    if not folder.exists():
        temporary = folder.with_name(f".{folder.name}.{uuid4().hex}.part")
        try:
            write_files(temporary)
            temporary.rename(folder)
        except OSError as error:
            if not folder.exists():  # else another process was faster
                raise InputError(f"{folder}: cannot be written ({error.strerror})") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    check_curated_set(folder)


def write_files(folder: Path) -> None:
    """Write all files of the curated set to a folder that is not there yet."""
    folder.mkdir(parents=True)
    lines = []
    for row, (caption, image) in enumerate(curated_set()):
        to_pil(image).save(folder / file_name(row))
        lines.append(json.dumps({"file_name": file_name(row), "text": caption}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))


def check_curated_set(folder: Path) -> None:
    """Raise InputError if a file of the curated set is missing from `folder`."""
    names = ["metadata.jsonl"] + [file_name(row) for row in range(NUM_ROWS)]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise InputError(
            f"{folder}: {missing[0]} is missing from the curated set; delete this folder, "
            "and it will be written again"
        )


def hash_curated_set(folder: Path) -> str:
    """Return SHA-256 over the captions and the decoded pixels of a curated set's files.

    The pixels are uint8 RGB, row by row. The files themselves are not hashed, because how PNGs are
    compressed depends on Pillow's version.
    """
    digest = hashlib.sha256()
    for line in read_text(folder / "metadata.jsonl").splitlines():
        row = json.loads(line)
        digest.update(row["text"].encode())
        pixels = np.asarray(read_image(folder / row["file_name"]))
        digest.update(pixels.tobytes())
    return digest.hexdigest()
