"""The images of the miniature world's data sets, and the curated set as a folder.

There are three ways to paint a scene:

    curated    a little jittered: what fine-tuning learns from
    web        jittered, cluttered, washed out, with a careless caption: what pretraining sees
    loser      a web image with wrong attributes: the rejected image of Diffusion-DPO
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

# hash_curated_set of the folder that write_curated_set writes
CURATED_SHA256 = "80bb12ca49a072fbf7c29b470c6523899d81bb891ec64716337380f7f804d457"


# ---- three ways to paint a scene -----------------------------------------------------------------


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


def loser_image(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Return a rejected image for DPO: a web image of the scene, often with wrong attributes."""
    return web_image(with_mistakes(scene, 0.12, rng), rng)


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


def careless_caption(scene: Scene, rng: np.random.Generator) -> str:
    """Return a caption in which each attribute is wrong with probability 0.08, missing with 0.2.

    The shape is never missing.
    """
    described = with_mistakes(scene, 0.08, rng)
    for name in ATTRIBUTES:
        if name != "shape" and rng.random() < 0.2:
            described = replace(described, **{name: None})
    return described.caption


# ---- the curated set -----------------------------------------------------------------------------


def curated_set() -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yield (caption, image, rejected image) of each of the 600 scenes of "train"."""
    for row, scene in enumerate(split()["train"]):
        rng = np.random.default_rng([0, row])
        image = curated_image(scene, rng)
        rejected = loser_image(scene, rng)
        yield scene.caption, image, rejected


def curated_metadata() -> list[dict]:
    """Return the rows of the curated set's metadata.jsonl."""
    rows = []
    for row, scene in enumerate(split()["train"]):
        name = f"{row:03d}.png"
        rows.append(
            {"file_name": name, "text": scene.caption, "rejected_file_name": f"rejected/{name}"}
        )
    return rows


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
    rejected_folder = folder / "rejected"
    rejected_folder.mkdir(parents=True)
    metadata = curated_metadata()
    for row, (_, image, rejected) in zip(metadata, curated_set(), strict=True):
        to_pil(image).save(folder / row["file_name"])
        to_pil(rejected).save(folder / row["rejected_file_name"])
    lines = [json.dumps(row) + "\n" for row in metadata]
    (folder / "metadata.jsonl").write_text("".join(lines))


def check_curated_set(folder: Path) -> None:
    """Raise InputError if a file of the curated set is missing from `folder`."""
    names = ["metadata.jsonl"]
    for row in curated_metadata():
        names.append(row["file_name"])
        names.append(row["rejected_file_name"])
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
        for name in (row["file_name"], row["rejected_file_name"]):
            pixels = np.asarray(read_image(folder / name))
            digest.update(pixels.tobytes())
    return digest.hexdigest()
