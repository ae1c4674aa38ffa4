"""The miniature world: captioned pictures of one shape on a plain background, and an exact score, of pixels and prompt
alone. Pictures are [32,32,3] float32 in [0,1], y downwards; lengths in pixels.
toy_set/ is the small clean set to fine-tune on, its rejected/ an image with some wrong attribute for each; toy_base/ is
the model to begin with. tutorial/drawing.py and pretrain.py made them."""

from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 32
BASE, CURATED = (Path(__file__).parent / name for name in ("base", "set"))
COLOURS = {"red": (0.86, 0.16, 0.16), "green": (0.16, 0.66, 0.24), "blue": (0.16, 0.28, 0.84)}
COLOURS |= {"yellow": (0.95, 0.83, 0.20), "white": (0.96, 0.96, 0.96), "black": (0.08, 0.08, 0.08)}
SHAPES = ("circle", "square", "triangle")
SIZES = {"small": 5.6, "large": 8.6}  # radius
PLACES = {"at the top left": (10, 10), "at the top right": (22, 10), "at the bottom left": (10, 22)}
PLACES |= {"at the bottom right": (22, 22), "in the centre": (16, 16)}
VALUES = {"size": SIZES, "colour": COLOURS, "shape": SHAPES, "place": PLACES, "background": COLOURS}
METRICS, LESS_IS_BETTER = ("aligned", "clean", "reward", "palette"), ("palette",)


@dataclass(frozen=True)
class Scene:
    """What a picture shows. An attribute that is None is left out of the caption."""

    size: str | None
    colour: str | None
    shape: str
    place: str | None
    background: str | None

    @property
    def caption(self) -> str:
        """For example: a small red circle at the top left on a blue background"""
        background = f"on a {self.background} background" if self.background else None
        return " ".join(word for word in ("a", self.size, self.colour, self.shape, self.place, background) if word)


SCENES = [Scene(*values) for values in product(*VALUES.values()) if values[1] != values[4]]
BY_CAPTION = {scene.caption: scene for scene in SCENES}


def split() -> dict[str, list[Scene]]:
    """The 900 scenes in three: 600 "train" (the curated set), 100 "validation" (for tuning), 200 "test"."""
    order = np.random.default_rng(0).permutation(len(SCENES))
    parts = {"train": order[:600], "validation": order[600:700], "test": order[700:]}
    return {name: [SCENES[i] for i in part] for name, part in parts.items()}


def coverage(shape: str, radius: float, centre: tuple[float, float], angle: float = 0.0) -> np.ndarray:
    """[32,32]: the part of each pixel that the shape covers, from the signed distance to its edge.
    radius: the circle's; squares and triangles of about the same area. angle: radians."""
    grid = np.arange(SIDE, dtype=np.float32) + 0.5
    x, y = grid[None, :] - centre[0], grid[:, None] - centre[1]
    x, y = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    if shape == "circle":
        inside = radius - np.hypot(x, y)
    elif shape == "square":
        inside = 0.88 * radius - np.maximum(np.abs(x), np.abs(y))
    else:  # a triangle with its tip up: three half-planes at the same distance from its middle
        y = y - 0.15 * radius
        inside = 0.62 * radius - np.maximum(np.abs(x) * np.sqrt(0.75) - 0.5 * y, y)
    return np.clip(inside + 0.5, 0, 1).astype(np.float32)


def paint(mask: np.ndarray, colour, background) -> np.ndarray:
    """[32,32] and two RGB triples in [0,1] -> [32,32,3]: one colour where mask is 1, the other where it is 0."""
    return mask[..., None] * np.asarray(colour, np.float32) + (1 - mask[..., None]) * np.asarray(background, np.float32)


@cache
def ideal(scene: Scene) -> np.ndarray:
    """The scene as its caption means it."""
    mask = coverage(scene.shape, SIZES[scene.size], PLACES[scene.place])
    return paint(mask, COLOURS[scene.colour], COLOURS[scene.background])


def to_pil(picture: np.ndarray) -> Image.Image:
    """[H,W,3] in [0,1] -> 8 bits."""
    return Image.fromarray((picture * 255).round().astype(np.uint8))


@cache
def templates() -> tuple[list[tuple[str, str, str]], np.ndarray]:
    """Every (size, shape, place), shifted by up to 2 pixels each way: K = 750 names, and their masks [K,1024]."""
    names, masks = [], []
    for (size, radius), shape, (place, (x, y)) in product(SIZES.items(), SHAPES, PLACES.items()):
        for dx, dy in product((-2, -1, 0, 1, 2), repeat=2):
            names.append((size, shape, place))
            masks.append(coverage(shape, radius, (x + dx, y + dy)).ravel())
    return names, np.stack(masks)


def score(images: np.ndarray, prompts: list[str]) -> dict[str, np.ndarray]:
    """Judges pictures [N,32,32,3] in [0,1] by their prompts, captions of whole scenes: a dict of [N] for each metric.
    Raises KeyError for a prompt that describes no scene of this world, ValueError for pictures of another size.
    A picture is fitted, by least squares, as mask x colour + (1 - mask) x background, over all masks that a scene can
    have; the best fit's mask and its nearest named colours say what the picture shows.
    aligned: 1 if all attributes are the prompt's, else 0. palette: rms distance of fitted colours to the nearest named.
    clean: 0..10, without looking at the prompt: 10 exp(-(r + palette) / 0.1), r the rms of what the fit leaves over.
    reward: 0..10: 10 exp(-d / 0.1), d the rms distance to the ideal picture of the prompt."""
    scenes = [BY_CAPTION[prompt] for prompt in prompts]
    names, masks = templates()
    x = images.reshape(len(images), SIDE * SIDE, 3).astype(np.float32)
    # normal equations of every mask m: [m.m  m.n; m.n  n.n] [colour; background] = [m.x; n.x] with n = 1 - m
    mm, mn, nn = (masks**2).sum(1), (masks * (1 - masks)).sum(1), ((1 - masks) ** 2).sum(1)
    mx = masks @ x  # [N,K,3]
    nx = x.sum(1, keepdims=True) - mx
    determinant = (mm * nn - mn**2)[:, None]
    colour = (nn[:, None] * mx - mn[:, None] * nx) / determinant
    background = (mm[:, None] * nx - mn[:, None] * mx) / determinant
    left = (x**2).sum((1, 2))[:, None] - (colour * mx + background * nx).sum(2)  # [N,K], squared
    row, best = np.arange(len(x)), left.argmin(1)
    found = np.stack([colour[row, best], background[row, best]], 1)  # [N,2,3]
    weights = np.stack([masks[best], 1 - masks[best]], 2)  # [N,1024,2]
    rms_left = np.sqrt(((x - weights @ found) ** 2).mean((1, 2)))
    distance = np.linalg.norm(found[:, :, None] - np.array(list(COLOURS.values())), axis=3) / np.sqrt(3)  # [N,2,6]
    palette = np.sqrt((distance.min(2) ** 2).mean(1))
    named, fits = list(COLOURS), zip(best, distance.argmin(2))
    shown = [Scene(names[k][0], named[c], *names[k][1:], named[b]) for k, (c, b) in fits]
    aligned = np.array([a == b for a, b in zip(shown, scenes)], dtype=float)
    off = np.sqrt(((images - np.stack([ideal(scene) for scene in scenes])) ** 2).mean((1, 2, 3)))
    clean, reward = 10 * np.exp(-(rms_left + palette) / 0.1), 10 * np.exp(-off / 0.1)
    return {"aligned": aligned, "clean": clean, "reward": reward, "palette": palette}
