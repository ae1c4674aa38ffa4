"""The scenes of the miniature world: a shape on a plain background, and its caption.

An image of this world is a [32,32,3] float32 array in [0,1]. Its first axis points down. Lengths
are in pixels, colors are RGB triples in [0,1].
"""

from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np
from PIL import Image

SIDE = 32

# The attributes of a scene: each value's name in captions, and what is painted for it.
SIZES = {"small": 5.6, "large": 8.6}  # radius of a circle of this size
COLORS = {
    "red": (0.86, 0.16, 0.16),
    "green": (0.16, 0.66, 0.24),
    "blue": (0.16, 0.28, 0.84),
    "yellow": (0.95, 0.83, 0.20),
    "white": (0.96, 0.96, 0.96),
    "black": (0.08, 0.08, 0.08),
}
SHAPES = ("circle", "square", "triangle")
PLACES = {  # (x, y) of the shape's center
    "at the top left": (10, 10),
    "at the top right": (22, 10),
    "at the bottom left": (10, 22),
    "at the bottom right": (22, 22),
    "in the centre": (16, 16),
}
ATTRIBUTES = {
    "size": tuple(SIZES),
    "color": tuple(COLORS),
    "shape": SHAPES,
    "place": tuple(PLACES),
    "background": tuple(COLORS),
}


@dataclass(frozen=True)
class Scene:
    """What an image shows. An attribute that is None is left out of the caption."""

    size: str | None
    color: str | None
    shape: str
    place: str | None
    background: str | None

    @property
    def caption(self) -> str:
        """Describe the scene: "a small red circle at the top left on a blue background"."""
        words = ["a", self.size, self.color, self.shape, self.place]
        if self.background is not None:
            words.append(f"on a {self.background} background")
        return " ".join(word for word in words if word is not None)


SCENES = [
    Scene(size, color, shape, place, background)
    for size, color, shape, place, background in product(*ATTRIBUTES.values())
    if color != background
]


def split() -> dict[str, list[Scene]]:
    """Return the 900 scenes in three parts.

    "train": 600, those of the curated set. "validation": 100, for tuning. "test": 200.
    """
    order = np.random.default_rng(0).permutation(len(SCENES))
    shuffled = [SCENES[i] for i in order]
    return {"train": shuffled[:600], "validation": shuffled[600:700], "test": shuffled[700:]}


def shape_mask(
    shape: str, radius: float, center: tuple[float, float], angle: float = 0.0
) -> np.ndarray:
    """Return how much of each pixel the shape covers: [32,32] float32 in [0,1].

    radius: of a circle. Squares and triangles get about the same area.
    center: (x, y).
    angle: rotation in radians.
    Raises ValueError for an unknown shape.
    """
    grid = np.arange(SIDE, dtype=np.float32) + 0.5  # the pixels' centers
    dx = grid[None, :] - center[0]
    dy = grid[:, None] - center[1]
    x = np.cos(angle) * dx + np.sin(angle) * dy
    y = np.cos(angle) * dy - np.sin(angle) * dx

    # signed distance to the shape's edge, positive inside
    if shape == "circle":
        depth = radius - np.hypot(x, y)
    elif shape == "square":
        depth = 0.88 * radius - np.maximum(np.abs(x), np.abs(y))
    elif shape == "triangle":  # points up: three half-planes equally far from its centroid
        below_centroid = y - 0.15 * radius
        slanted_side = np.abs(x) * np.sqrt(0.75) - 0.5 * below_centroid
        depth = 0.62 * radius - np.maximum(slanted_side, below_centroid)
    else:
        raise ValueError(f"shape {shape!r}: only {', '.join(SHAPES)} are known")

    return np.clip(depth + 0.5, 0, 1).astype(np.float32)


def paint(mask: np.ndarray, color, background) -> np.ndarray:
    """Return an image [32,32,3]: `color` where mask [32,32] is 1, `background` where it is 0."""
    weight = mask[..., None]
    foreground = weight * np.asarray(color, np.float32)
    return foreground + (1 - weight) * np.asarray(background, np.float32)


@cache
def ideal_image(scene: Scene) -> np.ndarray:
    """Return the image [32,32,3] that a scene's caption means, without any jitter."""
    mask = shape_mask(scene.shape, SIZES[scene.size], PLACES[scene.place])
    return paint(mask, COLORS[scene.color], COLORS[scene.background])


def to_pil(image: np.ndarray) -> Image.Image:
    """Return an image [H,W,3] in [0,1] as 8-bit RGB, rounded to the nearest level."""
    return Image.fromarray((image * 255).round().astype(np.uint8))
