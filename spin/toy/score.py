"""The exact score of the miniature world, computed from pixels and prompt alone.

An image is explained as a shape of one color on a background of another: for every mask that a
scene can have, the two colors are fitted by least squares, and the mask with the smallest residual
wins. The winner's attributes and the named colors nearest to the fitted ones are what the image
shows. `score` compares that with the prompt.

`score_set` judges several images of one prompt together: are they distributed as the data?
"""

from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np

from spin.toy.pictures import curated_image
from spin.toy.scenes import (
    COLORS,
    PLACES,
    SCENES,
    SHAPES,
    SIDE,
    SIZES,
    Scene,
    ideal_image,
    shape_mask,
)

METRICS = ("aligned", "clean", "reward", "palette")  # of an image
SET_METRICS = ("energy", "spread")  # of the images of a prompt
LESS_IS_BETTER = ("palette", "energy")

DRAWINGS = 16  # curated drawings of a scene that `score_set` compares with

SCENE_OF_CAPTION = {scene.caption: scene for scene in SCENES}
SHIFTS = (-2, -1, 0, 1, 2)  # pixels by which a shape may be off its place and still be found


def score(images: np.ndarray, prompts: list[str]) -> dict[str, np.ndarray]:
    """Score images [N,32,32,3] in [0,1] by their N prompts, which are captions of SCENES.

    Return an array [N] for each metric:

    aligned: 1 if the image shows all five attributes of the prompt, else 0. Where it is low, one
        sees another shape, color, size or place than the prompt names.
    clean: 0 to 10, namely 10 exp(-(residual + palette) / 0.1), whatever the prompt. The residual
        is the root mean square (rms) of what the fit leaves unexplained. Where it is low, one sees
        specks, spikes, rings around edges, bent outlines, or pale or garish colors.
    reward: 0 to 10, namely 10 exp(-d / 0.1), d being the rms distance to the prompt's ideal image.
        Where it is low, one sees any of these, or the shape out of its place.
    palette: rms distance of the two fitted colors to the nearest named ones. Less is better. Where
        it is high, one sees pale or garish colors.

    Raises KeyError if a prompt is not a caption of SCENES, ValueError for images of another size.
    """
    expected = [SCENE_OF_CAPTION[prompt] for prompt in prompts]

    # What do the images show?
    fit = fit_images(images)
    color_names, palette = name_colors(fit.colors)
    shown = []
    for (size, shape, place), (color, background) in zip(fit.attributes, color_names):
        shown.append(Scene(size, color, shape, place, background))

    # Is it what the prompts ask for?
    aligned = np.array([a == b for a, b in zip(shown, expected)], dtype=float)
    ideal = np.stack([ideal_image(scene) for scene in expected])
    distance = np.sqrt(((images - ideal) ** 2).mean((1, 2, 3)))

    return {
        "aligned": aligned,
        "clean": 10 * np.exp(-(fit.residual + palette) / 0.1),
        "reward": 10 * np.exp(-distance / 0.1),
        "palette": palette,
    }


def score_set(images: np.ndarray, prompt: str) -> dict[str, float]:
    """Score images [M,32,32,3] in [0,1] of one prompt, a caption of SCENES, as a set. M >= 2.

    energy: the energy score (Gneiting and Raftery 2007), from 0, less is better. It is the mean
        distance of an image to a fresh curated drawing of the scene, less half the spread: on
        average, it is least for images that are distributed as the drawings are. Where it is high,
        one sees images that the curated set would not hold, or the same one again and again.
    spread: the mean distance of two images. Where it is lower than the drawings', one sees the same
        image whatever the seed.

    Distances are rms over pixels. Raises KeyError if the prompt is not a caption of SCENES.
    """
    to_drawings = distances(images, drawings_of(SCENE_OF_CAPTION[prompt]))  # [M,DRAWINGS]
    to_each_other = distances(images, images)  # [M,M], 0 on the diagonal
    spread = to_each_other.sum() / (len(images) * (len(images) - 1))
    return {"energy": to_drawings.mean() - spread / 2, "spread": spread}


def distances(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the rms distance of every one of [M,H,W,3] to every one of [N,H,W,3]: [M,N]."""
    differences = images[:, None] - others[None]  # [M,N,H,W,3]
    return np.sqrt((differences**2).mean((2, 3, 4)))


@cache
def drawings_of(scene: Scene) -> np.ndarray:
    """Return curated drawings of a scene, [DRAWINGS,32,32,3], none of which is in a data set."""
    rng = np.random.default_rng([1, SCENES.index(scene)])  # data sets are drawn from [0, ...]
    return np.stack([curated_image(scene, rng) for _ in range(DRAWINGS)]).astype(np.float32)


@cache
def templates() -> tuple[list[tuple[str, str, str]], np.ndarray]:
    """Return K = 750 attributes (size, shape, place) and the masks [K,1024] that show them.

    Each combination of the three appears 25 times, shifted by up to 2 pixels in each direction.
    """
    attributes = []
    masks = []
    for size, shape, place in product(SIZES, SHAPES, PLACES):
        x, y = PLACES[place]
        for dx, dy in product(SHIFTS, SHIFTS):
            attributes.append((size, shape, place))
            masks.append(shape_mask(shape, SIZES[size], (x + dx, y + dy)).ravel())
    return attributes, np.stack(masks)


@dataclass(frozen=True)
class Fit:
    """The best fit mask * color + (1 - mask) * background of each of N images."""

    attributes: list[tuple[str, str, str]]  # N times (size, shape, place)
    colors: np.ndarray  # [N,2,3]: the shape's color, then the background
    residual: np.ndarray  # [N], rms of what the fit leaves unexplained


def fit_images(images: np.ndarray) -> Fit:
    """Fit every template to images [N,32,32,3] and return each image's best fit."""
    attributes, masks = templates()
    x = images.reshape(len(images), SIDE * SIDE, 3).astype(np.float32)  # [N,1024,3]

    # With a mask m and n = 1 - m, the two colors solve the normal equations
    #     [m.m  m.n] [color     ]   [m.x]
    #     [m.n  n.n] [background] = [n.x]
    mm = (masks**2).sum(1)  # [K]
    mn = (masks * (1 - masks)).sum(1)
    nn = ((1 - masks) ** 2).sum(1)
    mx = masks @ x  # [N,K,3]
    nx = x.sum(1, keepdims=True) - mx
    determinant = (mm * nn - mn**2)[:, None]
    color = (nn[:, None] * mx - mn[:, None] * nx) / determinant  # [N,K,3]
    background = (mm[:, None] * nx - mn[:, None] * mx) / determinant

    # At the solution the squared residual is x.x - color m.x - background n.x.
    explained = (color * mx + background * nx).sum(2)  # [N,K]
    squared_residual = (x**2).sum((1, 2))[:, None] - explained
    best = squared_residual.argmin(1)  # [N]

    row = np.arange(len(x))
    colors = np.stack([color[row, best], background[row, best]], 1)  # [N,2,3]
    weights = np.stack([masks[best], 1 - masks[best]], 2)  # [N,1024,2]
    residual = np.sqrt(((x - weights @ colors) ** 2).mean((1, 2)))
    return Fit([attributes[k] for k in best], colors, residual)


def name_colors(colors: np.ndarray) -> tuple[list[tuple[str, str]], np.ndarray]:
    """Name the two colors, the shape's and the background's, of N images: colors [N,2,3].

    Return N pairs of names, and the rms distance [N] of the two colors to the named ones.
    """
    names = list(COLORS)
    named = np.array(list(COLORS.values()))  # [6,3]
    distance = np.linalg.norm(colors[:, :, None] - named, axis=3) / np.sqrt(3)  # [N,2,6]
    nearest = distance.argmin(2)  # [N,2]
    palette = np.sqrt((distance.min(2) ** 2).mean(1))
    return [(names[i], names[j]) for i, j in nearest], palette
