"""How the miniature world's pictures were drawn: the curated set in spin/toy/set, and what its base was pretrained on.

    python tutorial/drawing.py FOLDER        draws the curated set again, the same to the last pixel

Three ways to draw a scene: `curated`, a little jittered; `web`, as pretraining sees it: jittered, cluttered, washed out
and carelessly captioned; `loser`, a web picture with wrong attributes, the rejected image of Diffusion-DPO.
"""

import json
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from spin.infra import run  # noqa: E402
from spin.toy.world import COLOURS, PLACES, SCENES, SIDE, SIZES, VALUES, Scene, coverage, paint, split, to_pil  # noqa: E402


def about(scene: Scene, sd: float, rng: np.random.Generator) -> list[np.ndarray]:
    return [np.array(COLOURS[name]) + rng.normal(0, sd, 3) for name in (scene.colour, scene.background)]


def curated(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """The scene with a little jitter of colour (sd .015) and place (.4 px)."""
    colour, background = about(scene, 0.015, rng)
    mask = coverage(scene.shape, SIZES[scene.size], PLACES[scene.place] + rng.normal(0, 0.4, 2))
    return np.clip(paint(mask, colour, background), 0, 1)


def web(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """The scene drawn carelessly; how much so, u in .15 to 1, is a matter of luck and the same for all its defects.

    But for a little noise, sd .015, which every picture has.
    """
    u = rng.uniform(0.15, 1)
    colour, background = about(scene, 0.08 * u, rng)
    centre = PLACES[scene.place] + rng.normal(0, 1.8 * u, 2)
    radius = SIZES[scene.size] * (1 + rng.normal(0, 0.12 * u))
    picture = paint(coverage(scene.shape, radius, centre, rng.normal(0, 0.35 * u)), colour, background)
    for _ in range(rng.poisson(u)):  # clutter
        blob = coverage("circle", rng.uniform(0.8, 2.2), rng.uniform(0, SIDE, 2))
        picture = paint(blob, rng.uniform(0, 1, 3), (0, 0, 0)) + (1 - blob[..., None]) * picture
    blotches = rng.normal(0, 0.025 * u, (SIDE // 4, SIDE // 4, 3))
    picture = picture + blotches.repeat(4, 0).repeat(4, 1)
    fade = rng.uniform(0, 0.6 * u)
    picture = (1 - fade) * picture + fade * 0.55  # washed out
    return np.clip(picture + rng.normal(0, 0.015, picture.shape), 0, 1).astype(np.float32)


def mistaken(scene: Scene, rng: np.random.Generator, chance: float = 0.12) -> Scene:
    """Each attribute is wrong with this chance; colour and background stay different."""
    for field in fields(Scene):
        if rng.random() < chance:
            taken = (getattr(scene, field.name), scene.colour if field.name == "background" else None)
            taken += (scene.background,) if field.name == "colour" else ()
            others = [value for value in VALUES[field.name] if value not in taken]
            scene = replace(scene, **{field.name: others[rng.integers(len(others))]})
    return scene


def loser(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """[32,32,3], what DPO is told to avoid for this scene's caption: a web picture, its attributes often wrong."""
    return web(mistaken(scene, rng), rng)


def curated_set(seed: int = 0) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """(caption, picture, rejected picture) of each scene of "train"."""
    rngs = [np.random.default_rng([seed, i]) for i in range(len(SCENES))]
    return [(scene.caption, curated(scene, rng), loser(scene, rng)) for scene, rng in zip(split()["train"], rngs)]


def careless_caption(scene: Scene, rng: np.random.Generator) -> str:
    """Each attribute wrong in 8 of 100 captions, missing (but never the shape) in 20."""
    told = mistaken(scene, rng, 0.08)
    drop = [field.name for field in fields(Scene) if field.name != "shape" and rng.random() < 0.2]
    return replace(told, **dict.fromkeys(drop)).caption


def write_curated(folder: Path) -> None:
    """The curated set as train.py reads it: PNGs, for each a rejected one in rejected/, and metadata.jsonl."""
    (folder / "rejected").mkdir(parents=True)
    rows = []
    for i, (caption, picture, rejected) in enumerate(curated_set()):
        row = {"file_name": f"{i:03d}.png", "text": caption, "rejected_file_name": f"rejected/{i:03d}.png"}
        to_pil(picture).save(folder / row["file_name"])
        to_pil(rejected).save(folder / row["rejected_file_name"])
        rows.append(json.dumps(row))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if len(argv) != 1 or Path(argv[0]).exists():
        raise run.InputError("give one folder that does not exist yet")
    write_curated(Path(argv[0]))


if __name__ == "__main__":
    sys.exit(run.script("drawing.py", main))
