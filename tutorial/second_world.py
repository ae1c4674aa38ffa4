"""Run a program in a second miniature world: does what holds in the first one hold there?

    python tutorial/second_world.py tutorial/pretrain_toy.py --vae-steps 3500 --out runs/second
    python tutorial/second_world.py tutorial/evidence.py --base runs/second/base --runs runs/two
    python tutorial/findings.py runs/two/results.csv

tutorial/evidence/second.csv is such a table.

An image of this world shows two equal shapes side by side. Shapes, sizes, colors, places and all
words but four are others than in the first world. The number of scenes, their split, the defects of
the web, the score and the settings of all methods are the same. The autoencoder takes half as many
steps: they are enough for it to keep all attributes of the validation prompts' ideal images.
"""

import hashlib
import importlib
import runpy
import sys
from itertools import product
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from spin import toy  # noqa: E402
from spin.toy import pictures, scenes  # noqa: E402

SIZES = {"tiny": 3.0, "big": 4.2}  # radius of a circle of about one shape's area
COLORS = {
    "orange": (0.93, 0.52, 0.10),
    "purple": (0.50, 0.18, 0.62),
    "teal": (0.05, 0.55, 0.55),
    "pink": (0.95, 0.62, 0.74),
    "brown": (0.42, 0.25, 0.12),
    "gray": (0.62, 0.62, 0.62),
}
SHAPES = ("diamonds", "rings", "bars")
PLACES = {  # (x, y) of the point between the two shapes
    "in the upper left": (12, 9),
    "in the upper right": (20, 9),
    "in the lower left": (12, 23),
    "in the lower right": (20, 23),
    "in the middle": (16, 16),
}
APART = 1.6  # from the point between the shapes to each center, in radii


def caption(scene: scenes.Scene) -> str:
    """Describe a scene: "two tiny orange rings in the upper left over teal ground"."""
    words = ["two", scene.size, scene.color, scene.shape, scene.place]
    if scene.background is not None:
        words.append(f"over {scene.background} ground")
    return " ".join(word for word in words if word is not None)


def pair_mask(
    shape: str, radius: float, center: tuple[float, float], angle: float = 0.0
) -> np.ndarray:
    """Return how much of each pixel the two shapes cover: see `spin.toy.scenes.shape_mask`.

    A shape of the first world is drawn once: the web's clutter is made of circles.
    """
    if shape not in SHAPES:
        return single_mask(shape, radius, center, angle)
    grid = np.arange(scenes.SIDE, dtype=np.float32) + 0.5  # the pixels' centers
    dx = grid[None, :] - center[0]
    dy = grid[:, None] - center[1]
    x = np.abs(np.cos(angle) * dx + np.sin(angle) * dy)  # one half is the other's mirror image
    x = np.abs(x - APART * radius)  # from the center of the shape
    y = np.abs(np.cos(angle) * dy - np.sin(angle) * dx)

    # signed distance to the shape's edge, positive inside
    if shape == "diamonds":
        depth = (1.25 * radius - x - y) / np.sqrt(2)
    elif shape == "rings":
        depth = 0.35 * radius - np.abs(np.hypot(x, y) - 0.85 * radius)
    else:
        depth = np.minimum(0.5 * radius - x, 1.5 * radius - y)
    return np.clip(depth + 0.5, 0, 1).astype(np.float32)


single_mask = scenes.shape_mask


def install() -> None:
    """Replace the first world, in this process. Only what is imported afterwards sees it."""
    scenes.SIZES = SIZES
    scenes.COLORS = COLORS
    scenes.SHAPES = SHAPES
    scenes.PLACES = PLACES
    scenes.ATTRIBUTES = {
        "size": tuple(SIZES),
        "color": tuple(COLORS),
        "shape": SHAPES,
        "place": tuple(PLACES),
        "background": tuple(COLORS),
    }
    scenes.Scene.caption = property(caption)
    scenes.shape_mask = pair_mask
    scenes.SCENES = [
        scenes.Scene(*values)
        for values in product(*scenes.ATTRIBUTES.values())
        if values[1] != values[4]  # color and background
    ]
    scenes.ideal_image.cache_clear()
    for name in ("spin.toy.pictures", "spin.toy.score", "spin.toy"):  # they hold copies of these
        importlib.reload(sys.modules[name])
    pictures.CURATED_SHA256 = toy.CURATED_SHA256 = hash_of_images()


def hash_of_images() -> str:
    """Return what `hash_curated_set` returns for the folder of this world's curated set."""
    digest = hashlib.sha256()
    for description, image in pictures.curated_set():
        digest.update(description.encode())
        digest.update(np.asarray(scenes.to_pil(image)).tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    install()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
