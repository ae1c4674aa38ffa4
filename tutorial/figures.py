"""The tutorial's figures, from fixed seeds.

    python tutorial/figures.py [NAME ...]        draws tutorial/figures/NAME.png; without a name, all

Those that begin with evidence_ are drawn from tutorial/evidence/evidence.json. story_ ones are what `python train.py`
leaves in runs/toy, minutes if it has not been run; without a name, they are left as they are.
"""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from spin import data, sampler  # noqa: E402
from spin.checkpoint import single_file as original  # noqa: E402
from spin.infra import run  # noqa: E402
from spin.toy import world as toy  # noqa: E402
from spin.eval import plots as viz  # noqa: E402
from spin.checkpoint import pipeline as weights  # noqa: E402
from spin.loss import LINKS, per_image_error  # noqa: E402
from spin.scheduler import add_noise, x0_and_eps  # noqa: E402
from spin.unet import UNet  # noqa: E402
from tutorial import charts, tables  # noqa: E402
from spin.toy import pictures as drawing  # noqa: E402

FOLDER = ROOT / "tutorial" / "figures"


def noise_levels() -> Image.Image:
    """Chapter 1: two pictures of the curated set at seven levels of noise."""
    images, alphas = data.CaptionedImages(toy.CURATED, toy.SIDE), weights.load(toy.BASE).scheduler.alphas_cumprod
    levels, rows = (0, 100, 250, 350, 500, 700, 999), (5, 11)
    draw = torch.Generator().manual_seed(0)
    drowned = []
    for row in rows:
        x0 = images.image(row)[None]
        eps = torch.randn(x0.shape, generator=draw)
        noisy = [add_noise(x0, eps, alphas[t]) for t in levels]
        drowned.append([viz.to_pil(x_t[0] / 4 + 0.5) for x_t in noisy])  # -2 is black, 2 white, beyond is cut
    return viz.grid(drowned, [f"t = {t}" for t in levels], [images.caption(row) for row in rows], 128)


@torch.no_grad()
def sampling_path() -> Image.Image:
    """Chapter 2: a latent on its way out of the noise, and the clean one that the network believes in, both decoded."""
    sd, steps, guidance = weights.load(toy.BASE), 20, 3.0
    prompt, path = toy.split()["test"][0].caption, []
    settings = {"steps": steps, "guidance": guidance, "generators": [torch.Generator().manual_seed(2)]}
    x0 = sampler.sample(sd, [prompt], **settings, trajectory=path)
    context, shown, beliefs = sd.encode_prompts(["", prompt]), [], []
    for x_t, t in zip(path, sd.scheduler.timesteps(steps)):
        empty, asked = sd.unet(x_t.expand(2, -1, -1, -1), t, context).chunk(2)
        eps = empty + guidance * (asked - empty)
        beliefs.append(x0_and_eps(eps, x_t, sd.scheduler.alphas_cumprod[t], "epsilon")[0])
        shown.append(x_t)
    at = [0, 2, 4, 7, 10, 13, 16, 19]
    rows = [[viz.to_pil(sampler.decode(sd, x)[0]) for x in (*(of[i] for i in at), x0)] for of in (shown, beliefs)]
    titles = [f"t = {sd.scheduler.timesteps(steps)[i]}" for i in at]
    return viz.grid(rows, [*titles, "x0"], [f"x_t: {prompt}", "the network's guess of x0"], 96)


@torch.no_grad()
def errors() -> Image.Image:
    """Chapter 3: theta_0's error by timestep, on curated pictures that it was trained with and on others."""
    sd, images = weights.load(toy.BASE), data.CaptionedImages(toy.CURATED, toy.SIDE)
    draw = torch.Generator().manual_seed(0)
    scenes = toy.split()["test"]
    others = np.stack([drawing.curated(scene, np.random.default_rng([1, i])) for i, scene in enumerate(scenes)])
    others = torch.from_numpy(others).permute(0, 3, 1, 2).float() * 2 - 1
    shown = torch.stack([images.image(i) for i in range(len(scenes))])
    sets = {"on pictures it was trained with": (shown, [images.caption(i) for i in range(len(scenes))])}
    sets["on others of the same kind"] = others, [scene.caption for scene in scenes]
    lines = {}
    for name, (pictures, captions) in sets.items():
        x0, context, points = sd.vae.encode(pictures)[0] * sd.vae.scaling_factor, sd.encode_prompts(captions), []
        for level in range(50, 1000, 50):
            t, eps = torch.full((len(x0),), level), torch.randn(x0.shape, generator=draw)
            error = per_image_error(sd.unet(add_noise(x0, eps, sd.scheduler.alphas_cumprod[t]), t, context), eps).mean()
            points.append((level, *[error.item()] * 3))
        lines[name] = points
    title = "mean squared error of the predicted noise (answering 0 would cost 1)"
    return charts.lines(title, "timestep", lines, 620, 280, ticks=(50, 200, 400, 600, 800, 950))


def game() -> Image.Image:
    """Chapter 4: the ideal game of one number, lambda 2: each painter goes half of the way to the data, in logs."""
    x = torch.linspace(-4, 4, 81)
    bell = lambda mean, sd: torch.exp(-0.5 * ((x - mean) / sd) ** 2) / sd  # noqa: E731
    data_density, painter, curves = bell(1.0, 0.5) + 0.7 * bell(2.4, 0.3), bell(-1.5, 1.0), {}
    for k in range(4):
        curves[f"theta_{k}"] = painter
        painter = (painter * data_density) ** 0.5
    curves["data"] = data_density
    points = {
        name: [(a, b, b, b) for a, b in zip(x.tolist(), (y / y.sum() / 0.1).tolist())] for name, y in curves.items()
    }
    ticks, span = (-4, -2, 0, 2, 4), (0, 0.6)
    title = "probability density; lambda = 2"
    return charts.lines(title, "the number that is drawn", points, 620, 300, ticks=ticks, span=span)


def links() -> Image.Image:
    """Chapter 5: l of a pair's logit, and -l', by which it is pushed."""
    t = torch.cat([torch.linspace(-3, 3, 61), torch.tensor([0.999])]).sort().values.requires_grad_()  # hinge bends at 1
    values, slopes = {}, {}
    for name, link in LINKS.items():
        y = link(t)
        slope = -torch.autograd.grad(y.sum(), t)[0]
        values[name], slopes[name] = ([(a, b, b, b) for a, b in zip(t.tolist(), of.tolist())] for of in (y, slope))
    ticks = (-3, -2, -1, 0, 1, 2, 3)
    panels = [charts.lines(title, "logit = beta / 2 x margin", of, 460, ticks=ticks) for title, of in
              (("l, what a pair costs", values), ("-l', how hard it is pushed", slopes))]  # fmt: skip
    return viz.two_a_row(panels)


def gradient() -> Image.Image:
    """Chapter 5: for its pair, the plane in which the matching and the pushing term lie, and where a step leads."""
    sd, images = weights.load(toy.BASE), data.CaptionedImages(toy.CURATED, toy.SIDE)
    caption, t = images.caption(5), torch.tensor([400])
    with torch.no_grad():
        real = sd.vae.encode(images.image(5)[None])[0] * sd.vae.scaling_factor
        context = sd.encode_prompts([caption])
    eps = torch.randn(real.shape, generator=torch.Generator().manual_seed(0))
    found = []
    for x0 in (real, sampler.sample(sd, [caption], steps=20, guidance=3.0)):
        sd.unet.requires_grad_(True).zero_grad()
        per_image_error(sd.unet(add_noise(x0, eps, sd.scheduler.alphas_cumprod[t]), t, context), eps).sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in sd.unet.parameters()]))
    matching, pushing = found
    unit = matching.norm()
    along = (matching @ pushing / unit**2).item()
    across = ((pushing - along * matching).norm() / unit).item()
    names = {
        "against matching: SFT's step": (0.0, 1.0),
        "along pushing": (across, -along),
        "their sum: self-play's step": (across, 1 - along),
    }
    angle = math.degrees(math.atan2(across, along))
    note = f"Between the two gradients {angle:.0f} degrees; pushing is {math.hypot(along, across):.2f} times as long"
    note += " as matching."
    return charts.arrows("Where a step leads, in the plane of the two gradients", names, [note])


def unet() -> Image.Image:
    """Chapter 7: the UNet of SD-1.5, traced on the meta device: a box for each level, as wide as it has channels."""
    with torch.device("meta"):
        network = UNet(original.SD_1["unet"])
        inputs = torch.empty(1, 4, 64, 64), torch.empty(1), torch.empty(1, 77, 768)
    traced = []
    for block in [*network.down_blocks, network.mid_block, *network.up_blocks]:
        block.register_forward_hook(
            lambda block, _, out: traced.append((block, [out] if torch.is_tensor(out) else out))
        )
    network(*inputs)
    sheet, font = Image.new("RGB", (960, 480), viz.PAPER), ImageFont.load_default(13)
    draw, rows = ImageDraw.Draw(sheet), [70, 155, 240, 325]
    text = lambda x, y, said, anchor="mm": draw.text((x, y), said, viz.INK, font, anchor)  # noqa: E731

    def box(x: int, y: int, width: float, title: str, colour) -> None:
        draw.rectangle([x - width / 2, y - 24, x + width / 2, y + 24], colour, viz.INK)
        text(x, y, title)

    left, right, down, up = 265, 735, (214, 228, 244), (250, 226, 206)
    for level, y in enumerate(rows):
        block, outputs = traced[level]
        size, channels = outputs[0].shape[-1], outputs[0].shape[1]
        attends = ", transformers" * hasattr(block, "attentions")
        box(left, y, 150 + channels / 14, f"{len(block.resnets)} blocks{attends}", down)
        text(15, y, f"{size} x {size}, {channels}", "lm")
        block, (output,) = traced[-1 - level]
        width = output.shape[1]
        box(right, y, 150 + width / 14, f"{len(block.resnets)} blocks{attends}", up)
        for i in range(3):  # what each block of the way up reads
            line = y - 12 + 12 * i
            tip = right - 80 - width / 28
            draw.line([(left + 80 + channels / 28, line), (tip, line)], viz.PALE, 2)
            draw.polygon([(tip - 6, line - 4), (tip - 6, line + 4), (tip, line)], viz.INK)
        text((left + right) / 2, y - 28, "three skips")
        if level:
            for x, ends, said in (
                (left, (rows[level - 1] + 26, y - 28), "half"),
                (right, (y - 26, rows[level - 1] + 28), "double"),
            ):
                draw.line([(x, ends[0]), (x, ends[1])], viz.INK, 2)
                tip = 5 if ends[1] > ends[0] else -5
                draw.polygon([(x - 5, ends[1] - tip), (x + 5, ends[1] - tip), (x, ends[1] + tip / 2)], viz.INK)
                text(x + 10, sum(ends) / 2, said, "lm")
    y = 420
    box((left + right) // 2, y, 150 + 1280 / 14, "2 blocks, a transformer", (232, 232, 236))
    text(15, y, "the middle: 8 x 8, 1280", "lm")
    draw.line([(left, rows[-1] + 26), (left, y), (378, y)], viz.INK, 2)
    draw.line([(622, y), (right, y), (right, rows[-1] + 26)], viz.INK, 2)
    text(left, 18, "latent, 4 channels, and conv_in")
    text(right, 18, "conv_out: the noise, 4 channels")
    for x in (left, right):
        draw.line([(x, 28), (x, rows[0] - 25)], viz.INK, 2)
    said = "Left: height x width, channels inside. The wider a box, the more channels."
    text(15, 462, f"{said} Time enters every block, text every transformer.", "lm")
    return sheet


@torch.no_grad()
def latents() -> Image.Image:
    """Chapter 8: a picture, the four channels of its latent, the picture that comes back."""
    sd, images, rows = weights.load(toy.BASE), data.CaptionedImages(toy.CURATED, toy.SIDE), (5, 11)
    shown = []
    for row in rows:
        x = images.image(row)[None]
        mean, _ = sd.vae.encode(x)
        back = (sd.vae.decode(mean)[0] / 2 + 0.5).clamp(0, 1)
        channels = [viz.to_pil((c / 16 + 0.5).expand(3, -1, -1)) for c in mean[0]]
        shown.append([viz.to_pil(x[0] / 2 + 0.5), *channels, viz.to_pil(back)])
    titles = ["picture", *(f"channel {i}" for i in range(4)), "and back"]
    return viz.grid(shown, titles, [images.caption(row) for row in rows], 128)


def cost() -> Image.Image:
    """Chapter 9: operations for one pair at 512 px, counted on the meta device."""
    with torch.device("meta"):
        network = UNet(original.SD_1["unet"])
        with FlopCounterMode(display=False) as counter:
            network(torch.empty(1, 4, 64, 64), torch.empty(1), torch.empty(1, 77, 768))
    once = counter.get_total_flops() / 1e12
    values = {"opponent draws, 50 guided steps": 100 * once, "or, with --sampler dpm++, 20 steps": 40 * once}
    values |= {"policy, forward and backward": 6 * once, "opponent, forward": 2 * once}
    return charts.bars("One pair of SD-1.5 at 512 px", values, "TFLOP")


FIGURES: dict[str, Callable[[], Image.Image]] = {
    "noise_levels": noise_levels,
    "sampling_path": sampling_path,
    "errors": errors,
    "game": game,
    "links": links,
    "gradient": gradient,
    "unet": unet,
    "latents": latents,
    "cost": cost,
}
FOUND = run.read_json(ROOT / "tutorial" / "evidence" / "evidence.json")
EVIDENCE = [f"evidence_{name}" for name, (part, _) in tables.FIGURES.items() if part in FOUND]
STORY = {"story_grid": "samples/grid.png", "story_curves": "curves.png", "story_results": "results.png"}


def figure(name: str) -> Image.Image:
    if name in STORY:
        return Image.open(Path(train.main(["--out", str(ROOT / "runs" / "toy")])["out"], STORY[name])).convert("RGB")
    if name in EVIDENCE:
        return tables.figure(name.removeprefix("evidence_"), FOUND)
    return FIGURES[name]()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    every = [*FIGURES, *EVIDENCE]
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join([*every, *STORY])}")
    parser.add_argument("--out", default=str(FOLDER), help="default: tutorial/figures")
    args = parser.parse_args(argv)
    for name in args.names or every:
        if name not in [*every, *STORY]:
            raise run.InputError(f"{name}: no such figure. There are {', '.join([*every, *STORY])}")
        viz.save_png(figure(name).quantize(256), Path(args.out) / f"{name}.png")


if __name__ == "__main__":
    sys.exit(run.script("figures.py", main))
