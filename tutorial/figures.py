"""Draw the tutorial's figures, from fixed seeds.

    python tutorial/figures.py [NAME ...]        writes tutorial/figures/NAME.png

Without a name, all but the story_ figures are drawn. Those are images that `python train.py` leaves
in runs/toy, which takes minutes if it has not been run. The evidence_ figures are not drawn here:
tutorial/evidence/README.md says how they were made.
"""

import argparse
import math
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from spin import toy  # noqa: E402
from spin.checkpoint import load_pipeline  # noqa: E402
from spin.checkpoint.configs import SD_1  # noqa: E402
from spin.eval.plots import INK, PALE, PAPER, grid, two_a_row  # noqa: E402
from spin.infra.cli import run_script  # noqa: E402
from spin.infra.errors import InputError  # noqa: E402
from spin.infra.images import save_png, to_pil  # noqa: E402
from spin.loss import LINKS, per_image_error  # noqa: E402
from spin.sampler import decode_latents, sample  # noqa: E402
from spin.scheduler import add_noise, ddim_step, x0_and_eps  # noqa: E402
from spin.toy.pictures import curated_image, curated_row, web_image  # noqa: E402
from spin.unet import UNet  # noqa: E402
from tutorial.charts import arrow_chart, bar_chart, line_chart  # noqa: E402
from tutorial.pretrain_toy import to_tensor  # noqa: E402

FOLDER = ROOT / "tutorial" / "figures"
GUIDANCE = 7.5
STEPS = 20
SHOWN = [1805, 168]  # rows of the curated set whose captions are right and complete


def curated(rows: list[int]) -> tuple[Tensor, list[str]]:
    """Return images [N,3,32,32] in [-1,1] of the curated set, and their captions."""
    captions = []
    images = []
    for row in rows:
        description, image = curated_row(row)
        captions.append(description.caption)
        images.append(np.asarray(toy.to_pil(image)) / 255)  # 8 bits, as in its files
    return to_tensor(images), captions


# ---- Chapter 1 -----------------------------------------------------------------------------------


def noise_levels() -> Image.Image:
    """Show two images of the curated set at seven levels of noise."""
    alphas_cumprod = load_pipeline(toy.BASE).scheduler.alphas_cumprod
    images, captions = curated(SHOWN)
    timesteps = [0, 100, 250, 350, 500, 700, 999]
    generator = torch.Generator().manual_seed(0)
    rows = []
    for x0 in images.split(1):
        eps = torch.randn(x0.shape, generator=generator)
        row = []
        for t in timesteps:
            x_t = add_noise(x0, eps, alphas_cumprod[t])
            row.append(to_pil(x_t[0] / 4 + 0.5))  # -2 is black, 2 white
        rows.append(row)
    return grid(rows, [f"t = {t}" for t in timesteps], captions, 128)


# ---- Chapter 2 -----------------------------------------------------------------------------------


@torch.no_grad()
def sampling_path() -> Image.Image:
    """Show a latent on its way out of the noise, and the x0 predicted from it, both decoded."""
    pipe = load_pipeline(toy.BASE)
    prompt = toy.split()["test"][0].caption
    context = pipe.encode_prompts(["", prompt])
    alphas_cumprod = pipe.scheduler.alphas_cumprod
    timesteps = pipe.scheduler.timesteps(STEPS).tolist()
    levels = [alphas_cumprod[t] for t in timesteps] + [pipe.scheduler.final_alpha_cumprod]

    # `spin.sampler.sample`, but every x_t and every predicted x0 is kept
    x_t = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(2))
    path = []
    predictions = []
    for i, t in enumerate(timesteps):
        both = pipe.unet(x_t.expand(2, -1, -1, -1), torch.tensor(t), context)
        eps_empty, eps_prompt = both.chunk(2)
        eps_guided = eps_empty + GUIDANCE * (eps_prompt - eps_empty)
        x0, eps = x0_and_eps(eps_guided, x_t, levels[i], "epsilon")
        path.append(x_t)
        predictions.append(x0)
        x_t = ddim_step(x0, eps, levels[i], levels[i + 1], eta=0.0, noise=x_t)

    shown = [0, 2, 4, 7, 10, 13, 16, 19]
    upper = [path[i] for i in shown] + [x_t]
    lower = [predictions[i] for i in shown] + [x_t]
    rows = []
    for latents in (upper, lower):
        images = decode_latents(pipe, torch.cat(latents))
        rows.append([to_pil(image) for image in images])
    titles = [f"t = {timesteps[i]}" for i in shown] + ["x0"]
    return grid(rows, titles, [f"x_t: {prompt}", "the network's prediction of x0"], 96)


# ---- Chapter 3 -----------------------------------------------------------------------------------


@torch.no_grad()
def errors() -> Image.Image:
    """Plot theta_0's error by timestep, on new images of the web and on curated ones."""
    pipe = load_pipeline(toy.BASE)
    scenes = toy.split()["test"]
    captions = [scene.caption for scene in scenes]
    generator = torch.Generator().manual_seed(0)
    lines = {}
    for name, paint in (("on web images", web_image), ("on curated images", curated_image)):
        images = [paint(scene, np.random.default_rng([1, i])) for i, scene in enumerate(scenes)]
        lines[name] = error_by_timestep(
            pipe, to_tensor(images), captions, range(50, 1000, 50), generator
        )
    title = "mean squared error of the predicted noise (predicting 0 would cost 1)"
    ticks = (50, 200, 400, 600, 800, 950)
    return line_chart(title, "timestep", lines, ticks, 620, 280)


def error_by_timestep(
    pipe, images: Tensor, captions: list[str], timesteps: range, generator: torch.Generator
) -> list[tuple[float, float]]:
    """Return points (timestep, mean error of the predicted noise) over images [N,3,32,32]."""
    mean, _ = pipe.vae.encode(images)
    x0 = mean * pipe.vae.scaling_factor
    context = pipe.encode_prompts(captions)
    points = []
    for timestep in timesteps:
        t = torch.full((len(x0),), timestep)
        eps = torch.randn(x0.shape, generator=generator)
        x_t = add_noise(x0, eps, pipe.scheduler.alphas_cumprod[t])
        error = per_image_error(pipe.unet(x_t, t, context), eps).mean()
        points.append((timestep, error.item()))
    return points


# ---- Chapter 4 -----------------------------------------------------------------------------------


def game() -> Image.Image:
    """Plot the ideal game of one number with lambda = 2.

    In logarithms, each opponent's density goes half of the way to the data's.
    """
    x = torch.linspace(-4, 4, 81)
    data_density = bell(x, 1.0, 0.5) + 0.7 * bell(x, 2.4, 0.3)
    densities = {}
    density = bell(x, -1.5, 1.0)
    for k in range(4):
        densities[f"theta_{k}"] = density
        density = (density * data_density) ** 0.5
    densities["data"] = data_density

    lines = {}
    for name, unnormalized in densities.items():
        y = unnormalized / unnormalized.sum() / 0.1  # 0.1: from one x to the next
        lines[name] = list(zip(x.tolist(), y.tolist()))
    title = "probability density; lambda = 2"
    x_label = "the number that is drawn"
    ticks = (-4, -2, 0, 2, 4)
    return line_chart(title, x_label, lines, ticks, 620, 300, y_range=(0, 0.6))


def bell(x: Tensor, mean: float, sd: float) -> Tensor:
    """Return a normal density at x, but for its factor 1 / sqrt(2 pi)."""
    return torch.exp(-0.5 * ((x - mean) / sd) ** 2) / sd


# ---- Chapter 5 -----------------------------------------------------------------------------------


def links() -> Image.Image:
    """Plot each link l of a pair's logit, and -l', by which the pair is pushed."""
    evenly = torch.linspace(-3, 3, 61)
    t = torch.cat([evenly, torch.tensor([0.999])]).sort().values  # the hinge bends at 1
    t.requires_grad_()
    values = {}
    slopes = {}
    for name, link in LINKS.items():
        y = link(t)
        [gradient] = torch.autograd.grad(y.sum(), t)
        values[name] = list(zip(t.tolist(), y.tolist()))
        slopes[name] = list(zip(t.tolist(), (-gradient).tolist()))
    x_label = "logit = beta / 2 x margin"
    ticks = (-3, -2, -1, 0, 1, 2, 3)
    return two_a_row(
        [
            line_chart("l, what a pair costs", x_label, values, ticks, 460, 270),
            line_chart("-l', how hard it is pushed", x_label, slopes, ticks, 460, 270),
        ]
    )


def gradient() -> Image.Image:
    """Draw one pair's matching and pushing term, in the plane of their gradients."""
    pipe = load_pipeline(toy.BASE)
    image, captions = curated(SHOWN[:1])
    with torch.no_grad():
        mean, _ = pipe.vae.encode(image)
    real = mean * pipe.vae.scaling_factor
    generated = sample(pipe, captions, steps=STEPS, guidance=GUIDANCE)
    eps = torch.randn(real.shape, generator=torch.Generator().manual_seed(0))
    matching = error_gradient(pipe, real, eps, captions)
    pushing = error_gradient(pipe, generated, eps, captions)

    # in units of the matching term's length: pushing's part along it, and the part across
    unit = matching.norm()
    along = (matching @ pushing / unit**2).item()
    across = ((pushing - along * matching).norm() / unit).item()
    arrows = {
        "against matching: SFT's step": (0.0, 1.0),
        "along pushing": (across, -along),
        "their sum: self-play's step": (across, 1 - along),
    }
    angle = math.degrees(math.atan2(across, along))
    length = math.hypot(along, across)
    note = (
        f"Between the two gradients {angle:.0f} degrees; "
        f"pushing is {length:.2f} times as long as matching."
    )
    return arrow_chart("Where a step leads, in the plane of the two gradients", arrows, note)


def error_gradient(pipe, x0: Tensor, eps: Tensor, captions: list[str]) -> Tensor:
    """Return the gradient of the error at t = 400 for the UNet's weights, as one vector."""
    t = torch.tensor([400])
    with torch.no_grad():
        context = pipe.encode_prompts(captions)
    x_t = add_noise(x0, eps, pipe.scheduler.alphas_cumprod[t])
    error = per_image_error(pipe.unet(x_t, t, context), eps).sum()
    gradients = torch.autograd.grad(error, list(pipe.unet.parameters()))
    return torch.cat([gradient.flatten() for gradient in gradients])


# ---- Chapter 7 -----------------------------------------------------------------------------------

DOWN_COLOR = (214, 228, 244)
MIDDLE_COLOR = (232, 232, 236)
UP_COLOR = (250, 226, 206)
DOWN_X = 265  # the middle of the column of down blocks
UP_X = 735


def unet() -> Image.Image:
    """Sketch the UNet of SD-1.5: a box for each block, as wide as it has channels."""
    with torch.device("meta"):
        network = UNet(SD_1["unet"])
    all_channels = SD_1["unet"]["block_out_channels"]
    size = SD_1["unet"]["sample_size"]
    row_y = [70, 155, 240, 325]
    middle_y = 420
    sheet = Image.new("RGB", (960, 480), PAPER)
    draw = ImageDraw.Draw(sheet)

    write(draw, DOWN_X, 18, "latent, 4 channels, and conv_in")
    write(draw, UP_X, 18, "conv_out: the noise, 4 channels")
    for x in (DOWN_X, UP_X):
        draw.line([(x, 28), (x, row_y[0] - 25)], INK, 2)

    for level, y in enumerate(row_y):
        channels = all_channels[level]
        side = size // 2**level
        write(draw, 15, y, f"{side} x {side}, {channels}", "lm")
        draw_block(draw, DOWN_X, y, channels, describe(network.down_blocks[level]), DOWN_COLOR)
        draw_block(draw, UP_X, y, channels, describe(network.up_blocks[3 - level]), UP_COLOR)
        draw_skips(draw, y, channels)
        if level > 0:
            above = row_y[level - 1]
            draw_vertical_arrow(draw, DOWN_X, above + 26, y - 28)
            write(draw, DOWN_X + 10, (above + y) / 2 - 1, "half", "lm")
            draw_vertical_arrow(draw, UP_X, y - 26, above + 28)
            write(draw, UP_X + 10, (above + y) / 2 + 1, "double", "lm")

    middle_x = (DOWN_X + UP_X) // 2
    write(draw, 15, middle_y, "the middle: 8 x 8, 1280", "lm")
    draw_block(draw, middle_x, middle_y, 1280, "2 resnets, a transformer", MIDDLE_COLOR)
    lowest = row_y[-1] + 26
    draw.line([(DOWN_X, lowest), (DOWN_X, middle_y), (378, middle_y)], INK, 2)
    draw.line([(622, middle_y), (UP_X, middle_y), (UP_X, lowest)], INK, 2)

    key = (
        "Left: height x width, channels inside. The wider a box, the more channels. "
        "Time enters every resnet, text every transformer."
    )
    write(draw, 15, 462, key, "lm")
    return sheet


def write(draw: ImageDraw.ImageDraw, x: float, y: float, text: str, anchor: str = "mm") -> None:
    draw.text((x, y), text, INK, ImageFont.load_default(13), anchor)


def describe(block: torch.nn.Module) -> str:
    """Return what a UNet's block is made of."""
    parts = f"{len(block.resnets)} resnets"
    if hasattr(block, "attentions"):
        parts += ", transformers"
    return parts


def box_width(channels: int) -> float:
    return 150 + channels / 14


def draw_block(
    draw: ImageDraw.ImageDraw, x: float, y: float, channels: int, text: str, color: tuple
) -> None:
    """Draw a box around (x, y)."""
    half = box_width(channels) / 2
    draw.rectangle([x - half, y - 24, x + half, y + 24], color, INK)
    write(draw, x, y, text)


def draw_skips(draw: ImageDraw.ImageDraw, y: float, channels: int) -> None:
    """Draw three arrows from the down block to the up block at height y."""
    write(draw, (DOWN_X + UP_X) / 2, y - 28, "three skips")
    half = box_width(channels) / 2
    start = DOWN_X + half + 5
    tip = UP_X - half - 5
    for arrow_y in (y - 12, y, y + 12):
        draw.line([(start, arrow_y), (tip, arrow_y)], PALE, 2)
        draw.polygon([(tip - 6, arrow_y - 4), (tip - 6, arrow_y + 4), (tip, arrow_y)], INK)


def draw_vertical_arrow(draw: ImageDraw.ImageDraw, x: float, start: float, end: float) -> None:
    draw.line([(x, start), (x, end)], INK, 2)
    forward = math.copysign(5, end - start)
    back = end - forward
    draw.polygon([(x - 5, back), (x + 5, back), (x, end + forward / 2)], INK)


# ---- Chapter 8 -----------------------------------------------------------------------------------


@torch.no_grad()
def latents() -> Image.Image:
    """Show images, the four channels of their latents, and the images decoded from them."""
    vae = load_pipeline(toy.BASE).vae
    images, captions = curated(SHOWN)
    rows = []
    for image in images.split(1):
        mean, _ = vae.encode(image)
        decoded = vae.decode(mean)
        row = [to_pil(image[0] / 2 + 0.5)]
        for channel in mean[0]:
            row.append(to_pil((channel / 8 + 0.5).expand(3, -1, -1)))
        row.append(to_pil(decoded[0] / 2 + 0.5))
        rows.append(row)
    channels = [f"channel {i}" for i in range(4)]
    return grid(rows, ["image", *channels, "decoded"], captions, 128)


# ---- Chapter 9 -----------------------------------------------------------------------------------


def cost() -> Image.Image:
    """Plot the operations for one pair at 512 px, counted on the meta device."""
    with torch.device("meta"):
        network = UNet(SD_1["unet"])
        with FlopCounterMode(display=False) as counter:
            network(torch.empty(1, 4, 64, 64), torch.empty(1), torch.empty(1, 77, 768))
    forward = counter.get_total_flops() / 1e12
    # Guidance evaluates the network twice a step. A backward pass costs two forward passes; a pair
    # is two images.
    values = {
        "opponent samples, 50 guided steps": 2 * 50 * forward,
        "or, with --sampler dpm++, 20 steps": 2 * 20 * forward,
        "policy, forward and backward": 2 * 3 * forward,
        "opponent, forward": 2 * forward,
    }
    return bar_chart("One pair of SD-1.5 at 512 px", values, "TFLOP")


# ---- The script ----------------------------------------------------------------------------------

FIGURES = {
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
# {name: file of the run folder}
STORY = {
    "story_grid": "samples/grid.png",
    "story_curves": "curves.png",
    "story_results": "results.png",
}


def main(argv: list[str] | None = None) -> None:
    names = [*FIGURES, *STORY]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(names)}")
    parser.add_argument("--out", default=str(FOLDER), help="folder (default: tutorial/figures)")
    args = parser.parse_args(argv)
    for name in args.names:
        if name not in names:
            raise InputError(f"{name}: no such figure. There are {', '.join(names)}")

    for name in args.names or FIGURES:
        if name in STORY:
            run_folder = ROOT / "runs" / "toy"
            train.main(["--out", str(run_folder)])
            image = Image.open(run_folder / STORY[name]).convert("RGB")
        else:
            image = FIGURES[name]()
        save_png(image.quantize(256), Path(args.out) / f"{name}.png")


if __name__ == "__main__":
    sys.exit(run_script("figures.py", main, "finished figures are kept"))
