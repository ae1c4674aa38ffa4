"""The miniature world: captioned images of one shape each, an exact score, a base checkpoint.

scenes.py: the scenes and their captions. pictures.py: the images of the data sets. score.py: what
an image shows, and how well. base/: the model that self-play starts from, and the pairs of its
images that Diffusion-DPO trains on, made by tutorial/pretrain_toy.py.
"""

from pathlib import Path

from spin.toy.pictures import (
    CURATED_SHA256,
    NUM_ROWS,
    curated_image,
    curated_row,
    curated_set,
    hash_curated_set,
    write_curated_set,
)
from spin.toy.scenes import SCENES, SIDE, Scene, ideal_image, split, to_pil
from spin.toy.score import LESS_IS_BETTER, METRICS, SET_METRICS, score, score_set

BASE = Path(__file__).parent / "base"
PREFERENCES = "preferences.safetensors"  # in BASE: see `spin.pairs.load_preferences`

__all__ = [
    "BASE",
    "CURATED_SHA256",
    "LESS_IS_BETTER",
    "METRICS",
    "NUM_ROWS",
    "PREFERENCES",
    "SCENES",
    "SET_METRICS",
    "SIDE",
    "Scene",
    "curated_image",
    "curated_row",
    "curated_set",
    "hash_curated_set",
    "ideal_image",
    "score",
    "score_set",
    "split",
    "to_pil",
    "write_curated_set",
]
