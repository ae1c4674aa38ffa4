"""Draw the tutorial's figures, from fixed seeds and from the evidence.

    python tutorial/figures.py [NAME ...]        writes tutorial/figures/NAME.png

The story_ figures show a run of `python train.py`, whose log and samples are in tutorial/story. The
evidence_ figures are not drawn here: tutorial/evidence/earlier_world.md says how they were made.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from spin import toy  # noqa: E402
from spin.checkpoint import load_pipeline  # noqa: E402
from spin.checkpoint.configs import SD_1  # noqa: E402
from spin.eval import report  # noqa: E402
from spin.eval.plots import (  # noqa: E402
    COLORS,
    GAP,
    INK,
    LINE,
    MARGIN,
    METHOD_COLORS,
    OCHRE,
    PALE,
    PAPER,
    grid,
)
from spin.infra.cli import run_script  # noqa: E402
from spin.infra.errors import InputError  # noqa: E402
from spin.infra.images import read_image, read_parameters, save_png, to_pil  # noqa: E402
from spin.infra.run import Run  # noqa: E402
from spin.loss import LINKS, per_image_error, spin_bounded_loss, spin_loss  # noqa: E402
from spin.sampler import decode_latents, sample  # noqa: E402
from spin.scheduler import add_noise, ddim_step, x0_and_eps  # noqa: E402
from spin.toy.pictures import curated_image, curated_row, web_image  # noqa: E402
from spin.unet import UNet  # noqa: E402
from tutorial.charts import (  # noqa: E402
    Color,
    Curve,
    Drawing,
    Line,
    arrow_chart,
    bar_chart,
    mix,
    plot,
    tint,
)
from tutorial.findings import Comparison, Scores, pooled  # noqa: E402
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


# ---- Chapter 0 -----------------------------------------------------------------------------------

REAL_COLOR = COLORS[0]  # as delta_data in the log's charts
GENERATED_COLOR = COLORS[1]  # as delta_gen
POLICY_COLOR = COLORS[2]
FROZEN_COLOR = (110, 110, 118)
BOUNDED_COLOR = METHOD_COLORS["bounded"]
SPIN_COLOR = METHOD_COLORS["spin"]


def one_pair() -> Image.Image:
    """Draw how a caption becomes a loss: two images, one noise, two networks, four errors.

    The images and their noise are real, though pixels and not latents. The errors are those of the
    chapter's example.
    """
    pipe = load_pipeline(toy.BASE)
    real, captions = curated(SHOWN[:1])
    latents = sample(pipe, captions, steps=STEPS, guidance=GUIDANCE)
    generated = decode_latents(pipe, latents) * 2 - 1
    noise = torch.randn(real.shape, generator=torch.Generator().manual_seed(0))
    alpha_bar = pipe.scheduler.alphas_cumprod[200]

    sheet = Drawing(900, 538)
    sheet.step(1, 14, 20, "One caption, two images")
    words = "a large red\ncircle at the\nbottom left on a\ngreen background"
    assert words.replace("\n", " ") == captions[0]
    sheet.text(76, 180, "caption", INK, 14)
    sheet.box(12, 192, 140, 276, words)
    sheet.box(12, 300, 140, 350, "the opponent\ngenerates", FROZEN_COLOR)
    sheet.arrow((76, 276), (76, 300))
    sheet.arrow((140, 325), (184, 325))
    sheet.arrow((76, 168), (76, 115), (184, 115))
    sheet.text(76, 92, "its image in\nthe data set")

    sheet.step(2, 318, 20, "The same noise on both")
    sheet.picture(to_pil(noise[0] / 4 + 0.5), 336, 188, 64, INK)
    sheet.text(410, 220, "noise", INK, 14, "lm")
    sheet.arrow((368, 185), (368, 129))
    sheet.arrow((368, 255), (368, 311))

    lanes = [
        (115, real, "real image", REAL_COLOR),
        (325, generated, "generated image", GENERATED_COLOR),
    ]
    for y, image, name, color in lanes:
        noised = add_noise(image, noise, alpha_bar)
        sheet.picture(to_pil(image[0] / 2 + 0.5), 187, y - 48, 96, color)
        sheet.text(235, y + 63, name, color)
        sheet.arrow((286, y), (424, y), color=color)
        sheet.draw.circle((2 * 368, 2 * y), 26, PAPER, color, 4)
        sheet.text(368, y - 1, "+", color, 20)
        sheet.picture(to_pil(noised[0] / 4 + 0.5), 428, y - 48, 96, color)
        sheet.text(476, y + 63, f"{name}, noised" if y == 115 else "generated, noised", color)
    draw_errors(sheet)
    return sheet.finish()


def draw_errors(sheet: Drawing) -> None:
    """Draw the right half of `one_pair`: two networks, the table of errors, the loss."""
    policy = [0.012, 0.025]  # on the real image, on the generated one
    opponent = [0.013, 0.023]
    errors = [torch.tensor([error]) for error in policy + opponent]
    losses, metrics = spin_loss(*errors, beta=2000.0)
    columns = [766, 852]

    sheet.step(3, 566, 20, "Two networks")
    sheet.step(4, 712, 20, "Four errors")
    sheet.box(580, 110, 682, 170, "policy,\nbeing trained", POLICY_COLOR)
    sheet.box(580, 270, 682, 330, "opponent,\nfrozen", FROZEN_COLOR)
    for y, color in ((115, REAL_COLOR), (325, GENERATED_COLOR)):
        near = 8 if color == GENERATED_COLOR else -8
        sheet.arrow((528, y), (579, 140 + near), color=color)
        sheet.arrow((528, y), (579, 300 + near), color=color)
    sheet.text(631, 220, "each guesses\nthe noise\nin both", INK, 14)
    sheet.arrow((683, 140), (722, 140))
    sheet.arrow((683, 300), (722, 300))

    names = ["on the\nreal one", "on the\ngenerated"]
    colors = [REAL_COLOR, GENERATED_COLOR]
    deltas = [metrics["delta_data"].item(), metrics["delta_gen"].item()]
    for i, x in enumerate(columns):
        sheet.text(x, 72, names[i], colors[i])
        sheet.box(x - 40, 115, x + 40, 165, f"{policy[i]:.3f}", colors[i], 17)
        sheet.text(x, 217, "minus", INK, 14)
        sheet.box(x - 40, 275, x + 40, 325, f"{opponent[i]:.3f}", colors[i], 17)
        sheet.text(x, 343, "=", INK, 18)
        sheet.box(x - 40, 360, x + 40, 400, f"{deltas[i]:+.3f}", colors[i], 17)
    sheet.text(716, 380, "policy minus opponent", INK, 14, "rm")

    note = (
        "An error says how far a network's guess is from the noise that\n"
        "was added: the mean of the squared differences."
    )
    sheet.text(14, 478, note, INK, 14, "lm")
    for x in columns:
        sheet.arrow((x, 401), (x, 428))
    sheet.step(5, 470, 478, "One loss")
    margin = metrics["margin"].item()
    result = (
        f"margin = {deltas[1]:.3f} - ({deltas[0]:.3f}) = {margin:.3f}\n"
        f"loss = log(1 + exp(-1000 x {margin:.3f})) = {losses.item():.4f}\n"
        "(1000 is half of beta, a setting)"
    )
    sheet.box(566, 430, 892, 526, result, INK, 15)


def iterations() -> Image.Image:
    """Sketch three iterations of self-play, and what the loss does in them."""
    sheet = Drawing(900, 470)
    pitch = 296
    for k in range(3):
        left = 12 + pitch * k
        draw_iteration(sheet, k, left)
        draw_falling_loss(sheet, k, left, pitch)
        if k < 2:
            turn = left + pitch - 16
            path = [(left + 250, 268), (turn, 268), (turn, 72), (left + pitch - 1, 72)]
            sheet.arrow(*path, color=POLICY_COLOR)
    return sheet.finish()


def draw_iteration(sheet: Drawing, k: int, left: int) -> None:
    """Draw one iteration: theta_k generates images, a copy of it learns and is promoted."""
    sheet.text(left + 132, 20, f"Iteration {k + 1}", INK, 17)
    sheet.box(left, 38, left + 84, 106, f"opponent:\ntheta_{k},\nfrozen", FROZEN_COLOR)
    sheet.text(left + 114, 60, "makes", INK, 13)
    sheet.arrow((left + 85, 72), (left + 143, 72))
    frame = (2 * (left + 144), 2 * 46, 2 * (left + 270), 2 * 154)
    sheet.draw.rounded_rectangle(frame, 12, PAPER, PALE, 3)
    for i in range(3):
        x = left + 150 + 39 * i
        draw_sketch(sheet, x, 54, i, 1.6 / (k + 1), GENERATED_COLOR)
        draw_sketch(sheet, x, 110, i, 0.0, REAL_COLOR)
    sheet.text(left + 138, 128, "the real images,\nalways the same", REAL_COLOR, 14, "rm")
    sheet.arrow((left + 207, 155), (left + 207, 175))
    task = f"policy: a copy of theta_{k}, trained\nto tell the two rows apart"
    sheet.box(left, 176, left + 270, 226, task, POLICY_COLOR)
    sheet.arrow((left + 150, 226), (left + 150, 247))
    outcome = "the result" if k == 2 else "the next opponent"
    sheet.box(left + 40, 248, left + 250, 288, f"theta_{k + 1}, {outcome}", POLICY_COLOR)


def draw_sketch(
    sheet: Drawing, left: int, top: int, shape: int, wobble: float, color: Color
) -> None:
    """Draw a framed circle, triangle or square, its outline off by up to `wobble` pixels."""
    side = 34
    frame = (2 * left, 2 * top, 2 * (left + side), 2 * (top + side))
    sheet.draw.rectangle(frame, tint(color), color, 5)
    corners = [96, 3, 4][shape]
    turn = [0.0, -math.pi / 2, math.pi / 4][shape]
    outline = []
    for i in range(96):
        edge, share = divmod(i * corners / 96, 1)  # a point on the polygon's edge
        angles = [turn + 2 * math.pi * corner / corners for corner in (edge, edge + 1)]
        x = (1 - share) * math.cos(angles[0]) + share * math.cos(angles[1])
        y = (1 - share) * math.sin(angles[0]) + share * math.sin(angles[1])
        radius = 11 + wobble * math.sin(2 * math.pi * 5 * i / 96 + shape)
        outline.append((2 * (left + side / 2 + radius * x), 2 * (top + side / 2 + radius * y)))
    sheet.draw.polygon(outline, color)


def draw_falling_loss(sheet: Drawing, k: int, left: int, width: int) -> None:
    """Sketch an iteration's loss, which falls from log 2."""
    bottom = 436
    height = 100  # of log 2
    path = []
    for i in range(101):
        value = 0.25 + 0.75 * math.exp(-i / 22)
        path.append((2 * (left + (width - 12) * i / 100), 2 * (bottom - height * value)))
    if k < 2:
        path.append((2 * (left + width), 2 * (bottom - height)))
    sheet.draw.line([(2 * left, 2 * bottom), (2 * (left + width - 12), 2 * bottom)], PALE, 3)
    sheet.draw.line(path, INK, 5, joint="curve")
    sheet.draw.circle(path[0], 9, INK)
    sheet.text(left + 12, bottom - height - 10, "loss = log 2 = 0.6931", INK, 14, "lm")
    note = "the loss falls as the policy learns" if k == 0 else "a new opponent: back to log 2"
    sheet.text(left + width / 2 - 6, bottom + 16, note, INK, 14)


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


def guidance() -> Image.Image:
    """Plot guidance in one dimension: all images, the prompt's, and those sampled at guidance 3.

    "Images" are numbers with normal densities, for which the best prediction is known.
    """
    x = torch.linspace(-3, 3, 601)
    everything = normal_density(x, 0.0, 1.0)
    prompt = normal_density(x, 1.0, 0.5)
    often_said = prompt**3 / everything**2
    often_said = often_said / often_said.sum() / 0.01  # 0.01: from one x to the next
    sampled = normal_density(x, *guided_mean_and_sd(3.0, steps=50))

    lines = {
        "all images": (curve(x, everything), COLORS[4]),
        "images of the prompt": (curve(x, prompt), REAL_COLOR),
        "what is often said: p(x|c)^3 / p(x)^2": (curve(x, often_said), INK),
        "sampled with guidance 3": (curve(x, sampled), GENERATED_COLOR),
    }
    sheet = Drawing(820, 380)
    frame = (50, 40, 800, 300)
    x_label = "the number that stands for an image"
    plot(sheet, frame, "Probability density", x_label, lines, range(-3, 4), [0, 1, 2, 3, 4])
    return sheet.finish()


def normal_density(x: Tensor, mean: float, sd: float) -> Tensor:
    return torch.exp(-0.5 * ((x - mean) / sd) ** 2) / (sd * math.sqrt(2 * math.pi))


def guided_mean_and_sd(
    scale: float, steps: int, mean: float = 1.0, sd: float = 0.5
) -> tuple[float, float]:
    """Return mean and standard deviation of what the guided sampler makes of pure noise.

    All images are N(0, 1), those of the prompt N(mean, sd^2). Every step is linear in x_t, and so
    are all steps together: two inputs give both numbers.
    """
    levels = sampling_levels(steps)
    x_t = torch.tensor([0.0, 1.0])
    for now, after in zip(levels, levels[1:]):
        slope = (1 - now).sqrt()
        eps_empty = slope * x_t
        eps_prompt = slope * (x_t - now.sqrt() * mean) / (now * sd**2 + 1 - now)
        eps_guided = eps_empty + scale * (eps_prompt - eps_empty)
        x0, eps = x0_and_eps(eps_guided, x_t, now, "epsilon")
        x_t = ddim_step(x0, eps, now, after, eta=0.0)
    from_0, from_1 = x_t.tolist()
    return from_0, from_1 - from_0


@cache
def sampling_levels(steps: int) -> Tensor:
    """Return alpha_bar before each sampling step, and 1, the level of clean images."""
    scheduler = load_pipeline(toy.BASE).scheduler
    timesteps = scheduler.timesteps(steps)
    return torch.cat([scheduler.alphas_cumprod[timesteps], torch.ones(1)])


# ---- Chapter 3 -----------------------------------------------------------------------------------


@torch.no_grad()
def errors() -> Image.Image:
    """Plot theta_0's error by timestep, on new images of the web and on curated ones."""
    pipe = load_pipeline(toy.BASE)
    scenes = toy.split()["test"]
    captions = [scene.caption for scene in scenes]
    generator = torch.Generator().manual_seed(0)
    lines = {}
    for name, paint, color in (
        ("on web images", web_image, OCHRE),
        ("on curated images", curated_image, REAL_COLOR),
    ):
        images = [paint(scene, np.random.default_rng([1, i])) for i, scene in enumerate(scenes)]
        points = error_by_timestep(
            pipe, to_tensor(images), captions, range(50, 1000, 50), generator
        )
        lines[name] = (points, color)
    title = "Mean squared error of the predicted noise (predicting 0 would cost 1)"
    sheet = Drawing(620, 330)
    ticks = (50, 200, 400, 600, 800, 950)
    plot(sheet, (50, 40, 600, 250), title, "timestep", lines, ticks, [0, 0.1, 0.2, 0.3])
    return sheet.finish()


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


# ---- Chapters 4, 5 and 7 -------------------------------------------------------------------------


def game() -> Image.Image:
    """Plot the ideal game of one number with lambda = 2.

    In logarithms, each opponent's density goes half of the way to the data's.
    """
    x = torch.linspace(-4, 4, 321)
    data = normalized(x, bell(x, 1.0, 0.5) + 0.7 * bell(x, 2.4, 0.3))
    density = bell(x, -1.5, 1.0)
    lines = {}
    for k in range(4):
        density = normalized(x, density)
        color = mix(GENERATED_COLOR, PAPER, 0.4 + 0.2 * k)
        lines[f"theta_{k}"] = (curve(x, density), color)
        density = (density * data) ** 0.5
    lines["data"] = (curve(x, data), REAL_COLOR)
    title = "How often each number is generated (probability density); lambda = 2"
    return densities(title, lines, range(-4, 5, 2), [0, 0.2, 0.4, 0.6, 0.8])


def densities(
    title: str, lines: dict[str, Line], x_ticks: Sequence[float], y_ticks: Sequence[float]
) -> Image.Image:
    """Plot probability densities of one number."""
    sheet = Drawing(700, 356)
    plot(sheet, (60, 40, 685, 275), title, "the number", lines, x_ticks, y_ticks)
    return sheet.finish()


def bell(x: Tensor, mean: float, sd: float) -> Tensor:
    """Return a normal density at x, but for its factor 1 / sqrt(2 pi)."""
    return torch.exp(-0.5 * ((x - mean) / sd) ** 2) / sd


def normalized(x: Tensor, density: Tensor) -> Tensor:
    """Return a density at evenly spaced x, scaled so that the area below it is 1."""
    return density / density.sum() / (x[1] - x[0])


def curve(x: Tensor, y: Tensor) -> Curve:
    return list(zip(x.tolist(), y.tolist()))


def paths() -> Image.Image:
    """Draw the chapter's worked case: two paths of three steps, and what two players expected."""
    levels = torch.tensor([0.9, 0.7, 0.4, 0.1])  # alpha_bar_0 to alpha_bar_3
    real = torch.tensor([1.2, 1.0, 0.2, 0.5])  # x_0 to x_3
    generated = torch.tensor([-0.2, 0.1, 0.3, -0.6])
    sheet = Drawing(900, 412)
    write_key(sheet)
    on_real = draw_path(sheet, 145, "the real image's path", real, levels, REAL_COLOR)
    on_generated = draw_path(
        sheet, 560, "the generated image's path", generated, levels, GENERATED_COLOR
    )

    sheet.text(14, 324, "policy's\nsquared error", POLICY_COLOR, 13, "lm")
    sheet.text(14, 362, "opponent's", FROZEN_COLOR, 13, "lm")
    outcomes = []
    for t, real_change, generated_change in zip((3, 2, 1), on_real, on_generated, strict=True):
        outcome = "won" if real_change < generated_change else "lost"
        outcomes.append(f"step {t} is {outcome}")
    rule = "A step is won if policy's minus opponent's error is smaller on the real path: "
    sheet.text(14, 394, rule + ", ".join(outcomes) + ".", INK, 14, "lm")
    return sheet.finish()


def write_key(sheet: Drawing) -> None:
    """Write what the marks of `paths` mean."""
    words = [
        ("A dot is where a step ended. A bar goes from there to where", INK),
        ("the policy", POLICY_COLOR),
        ("or", INK),
        ("the opponent", FROZEN_COLOR),
        ("expected the step to end.", INK),
    ]
    font = ImageFont.load_default(28)  # at twice the size, as the sheet is
    x = 14
    for text, color in words:
        sheet.text(x, 18, text, color, 14, "lm")
        x += font.getlength(text + " ") / 2


def draw_path(
    sheet: Drawing, left: int, title: str, path: Tensor, levels: Tensor, color: Color
) -> list[float]:
    """Draw a path x_0 to x_3 from t = 3 on, and both players' errors.

    Return the policy's squared error minus the opponent's for steps 3, 2 and 1.
    """

    def column(t: int) -> int:
        return left + 95 * (3 - t)

    def row(x: float) -> float:
        return 270 - (x + 0.8) / 2.2 * 200

    sheet.text(left + 142, 52, title, color, 15)
    for x in (-0.5, 0.0, 0.5, 1.0):
        sheet.draw.line([(2 * (left - 12), 2 * row(x)), (2 * (left + 320), 2 * row(x))], PALE, 2)
        sheet.text(left - 18, row(x), f"{x:g}", INK, 13, "rm")
    points = [(2 * column(t), 2 * row(path[t].item())) for t in (3, 2, 1, 0)]
    sheet.draw.line(points, color, 4)

    differences = []
    sheet.text(column(3), 292, "x_3", INK, 14)
    for t in (3, 2, 1):
        end = path[t - 1].item()
        sheet.text(column(t - 1) + 8, 292, f"x_{t - 1}", INK, 14)
        errors = []
        for i, (mean, shade) in enumerate([(0.5, POLICY_COLOR), (0.0, FROZEN_COLOR)]):
            expected = expected_step(mean, path[t], levels[t], levels[t - 1])
            errors.append((end - expected) ** 2)
            x = column(t - 1) + 9 + 9 * i
            sheet.draw.line([(2 * x, 2 * row(expected)), (2 * x, 2 * row(end))], shade, 6)
            bar = [(2 * x - 9, 2 * row(expected)), (2 * x + 9, 2 * row(expected))]
            sheet.draw.line(bar, shade, 6)
            sheet.text(column(t - 1) + 8, 324 + 38 * i, f"{errors[-1]:.3f}", shade, 14)
        differences.append(errors[0] - errors[1])
    for point in points:
        sheet.draw.circle(point, 9, color)
    return differences


def expected_step(mean: float, x_t: Tensor, alpha_bar: Tensor, alpha_bar_prev: Tensor) -> float:
    """Return mu_theta(x_t), with eta = 1, of a player that takes the data for N(mean, 1/4)."""
    variance_t = alpha_bar / 4 + 1 - alpha_bar
    eps = (1 - alpha_bar).sqrt() * (x_t - alpha_bar.sqrt() * mean) / variance_t
    x0, _ = x0_and_eps(eps, x_t, alpha_bar, "epsilon")
    nothing = torch.zeros(())
    return ddim_step(x0, eps, alpha_bar, alpha_bar_prev, eta=1.0, noise=nothing).item()


def resting() -> Image.Image:
    """Plot the data, what a painter at the data generates, and the painter that generates it."""
    data = (1.0, 0.5)
    painters = {
        "the data": (data, REAL_COLOR),
        "generated by the painter at the data": (guided_mean_and_sd(3.0, 20), GENERATED_COLOR),
        "the painter that generates the data": (painter_that_generates(*data), POLICY_COLOR),
    }
    x = torch.linspace(-2, 3, 501)
    lines = {}
    for name, (mean_and_sd, color) in painters.items():
        lines[name] = (curve(x, normal_density(x, *mean_and_sd)), color)
    title = "Probability densities; guidance 3, 20 DDIM steps"
    return densities(title, lines, range(-2, 4), range(6))


def painter_that_generates(mean: float, sd: float) -> tuple[float, float]:
    """Return mean and sd of the painter that generates N(mean, sd^2) at guidance 3 in 20 steps."""
    # The wider a painter's distribution, the wider what it generates, whatever the mean: bisect.
    low, high = 0.1, 2.0
    for _ in range(30):
        painter_sd = (low + high) / 2
        _, generated_sd = guided_mean_and_sd(3.0, 20, 0.0, painter_sd)
        if generated_sd < sd:
            low = painter_sd
        else:
            high = painter_sd
    # The mean of what it generates is linear in its own mean.
    of_mean_0, _ = guided_mean_and_sd(3.0, 20, 0.0, painter_sd)
    of_mean_1, _ = guided_mean_and_sd(3.0, 20, 1.0, painter_sd)
    painter_mean = (mean - of_mean_0) / (of_mean_1 - of_mean_0)
    return painter_mean, painter_sd


# ---- Chapters 6 and 7 ----------------------------------------------------------------------------

TEAL = (0, 140, 150)


def links() -> Image.Image:
    """Plot each link of a pair's logit, and minus its slope, the weight of the pair."""
    evenly = torch.linspace(-3, 3, 61)
    t = torch.cat([evenly, torch.tensor([0.999])]).sort().values  # the hinge bends at 1
    t.requires_grad_()
    values = {}
    slopes = {}
    colors = {"logistic": SPIN_COLOR, "hinge": TEAL, "correlation": COLORS[4]}
    for name, link in LINKS.items():
        y = link(t)
        [slope] = torch.autograd.grad(y.sum(), t)
        values[name] = (curve(t.detach(), y.detach()), colors[name])
        slopes[name] = (curve(t.detach(), -slope), colors[name])
    sheet = Drawing(900, 330)
    ticks = range(-3, 4)
    x_label = "logit = beta / 2 x margin"
    title = "The link: what a pair costs"
    plot(sheet, (50, 40, 430, 250), title, x_label, values, ticks, range(-2, 5))
    title = "Minus its slope: the weight of a pair"
    plot(sheet, (505, 40, 885, 250), title, x_label, slopes, ticks, [0, 0.5, 1])
    return sheet.finish()


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


# ---- Chapter 9 -----------------------------------------------------------------------------------

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
    sheet = Drawing(960, 480)
    sheet.text(DOWN_X, 18, "latent, 4 channels, and conv_in", INK, 13)
    sheet.text(UP_X, 18, "conv_out: the noise, 4 channels", INK, 13)
    sheet.arrow((DOWN_X, 28), (DOWN_X, row_y[0] - 24))
    sheet.arrow((UP_X, row_y[0] - 24), (UP_X, 28))

    for level, y in enumerate(row_y):
        channels = all_channels[level]
        side = size // 2**level
        sheet.text(15, y, f"{side} x {side}, {channels}", INK, 13, "lm")
        draw_block(sheet, DOWN_X, y, channels, describe(network.down_blocks[level]), REAL_COLOR)
        draw_block(sheet, UP_X, y, channels, describe(network.up_blocks[3 - level]), OCHRE)
        draw_skips(sheet, y, channels)
        if level > 0:
            above = row_y[level - 1]
            sheet.arrow((DOWN_X, above + 24), (DOWN_X, y - 24))
            sheet.text(DOWN_X + 12, (above + y) / 2, "half", INK, 13, "lm")
            sheet.arrow((UP_X, y - 24), (UP_X, above + 24))
            sheet.text(UP_X + 12, (above + y) / 2, "double", INK, 13, "lm")

    middle_x = (DOWN_X + UP_X) // 2
    half = box_width(1280) / 2
    sheet.text(15, middle_y, "the middle: 8 x 8, 1280", INK, 13, "lm")
    draw_block(sheet, middle_x, middle_y, 1280, "2 resnets, a transformer", FROZEN_COLOR)
    lowest = row_y[-1] + 24
    sheet.arrow((DOWN_X, lowest), (DOWN_X, middle_y), (middle_x - half, middle_y))
    sheet.arrow((middle_x + half, middle_y), (UP_X, middle_y), (UP_X, lowest))

    key = (
        "Left: height x width, channels inside. The wider a box, the more channels. "
        "Time enters every resnet, text every transformer."
    )
    sheet.text(15, 462, key, INK, 13, "lm")
    return sheet.finish()


def describe(block: torch.nn.Module) -> str:
    """Return what a UNet's block is made of."""
    parts = f"{len(block.resnets)} resnets"
    if hasattr(block, "attentions"):
        parts += ", transformers"
    return parts


def box_width(channels: int) -> float:
    return 150 + channels / 14


def draw_block(
    sheet: Drawing, x: float, y: float, channels: int, text: str, color: Color
) -> None:
    """Draw a box around (x, y)."""
    half = box_width(channels) / 2
    sheet.box(x - half, y - 24, x + half, y + 24, text, color, 13)


def draw_skips(sheet: Drawing, y: float, channels: int) -> None:
    """Draw three arrows from the down block to the up block at height y."""
    sheet.text((DOWN_X + UP_X) / 2, y - 28, "three skips", INK, 13)
    half = box_width(channels) / 2
    for arrow_y in (y - 14, y, y + 14):
        start = (DOWN_X + half + 5, arrow_y)
        sheet.arrow(start, (UP_X - half - 5, arrow_y), color=FROZEN_COLOR)


# ---- Chapter 10 ----------------------------------------------------------------------------------


def attention() -> Image.Image:
    """Show an image that the miniature base generates, and where it looks at which word."""
    pipe = load_pipeline(toy.BASE).freeze()
    caption = "a large red circle at the top left on a blue background"
    words = caption.split()
    x0 = sample(pipe, [caption], steps=STEPS, guidance=GUIDANCE)
    weights = cross_attention(pipe, x0, caption)  # [16,20]

    row = [to_pil(decode_latents(pipe, x0)[0])]
    titles = ["the image"]
    for word in ("red", "blue", "background", "circle"):
        position = 1 + words.index(word)  # the first token says that a caption begins
        share = weights[:, position].reshape(4, 4)
        strength = (share / FULL_SHARE).clamp(max=1)
        color = torch.tensor(HEAT) / 255
        row.append(to_pil(1 + strength[None] * (color[:, None, None] - 1)))  # white: none
        titles.append(f'"{word}", max {100 * share.max().item():.0f}%')
    sheet = grid([row], titles, [caption], 160)
    for j in range(1, len(row)):
        left = MARGIN + j * (160 + GAP)
        top = LINE + GAP
        frame = [left, top, left + 159, top + 159]
        ImageDraw.Draw(sheet).rectangle(frame, outline=PALE)
    return sheet


HEAT = (205, 84, 22)  # the color of FULL_SHARE
FULL_SHARE = 0.75


def cross_attention(pipe, x0: Tensor, caption: str) -> Tensor:
    """Return how the last cross-attention divides each position's attention, at t = 700: [16,20].

    Averaged over heads, for a latent x0 [1,4,8,8].
    """
    layer = pipe.unet.up_blocks[0].attentions[1].transformer_blocks[0].attn2
    found = []

    def note(module, inputs, output):
        tokens, context = inputs
        q = module.split_heads(module.to_q(tokens))
        k = module.split_heads(module.to_k(context))
        scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])
        found.append(scores.softmax(dim=3).mean(1)[0])

    hook = layer.register_forward_hook(note)
    t = torch.tensor([700])
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    x_t = add_noise(x0, eps, pipe.scheduler.alphas_cumprod[t])
    with torch.no_grad():
        pipe.unet(x_t, t, pipe.encode_prompts([caption]))
    hook.remove()
    return found[0]


# ---- Chapter 11 ----------------------------------------------------------------------------------


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


def sdxl() -> Image.Image:
    """Draw the two ways in which a prompt reaches SDXL's UNet."""
    sheet = Drawing(900, 330)
    added = OCHRE
    sheet.box(14, 50, 110, 90, "prompt")
    sheet.box(160, 24, 330, 64, "CLIP ViT-L", REAL_COLOR)
    sheet.box(160, 88, 330, 128, "OpenCLIP ViT-bigG", REAL_COLOR)
    sheet.arrow((110, 62), (160, 44))
    sheet.arrow((110, 78), (160, 108))
    sheet.box(410, 50, 560, 102, "context\n77 x (768 + 1280)", REAL_COLOR)
    sheet.arrow((330, 44), (410, 66), color=REAL_COLOR)
    sheet.arrow((330, 108), (410, 86), color=REAL_COLOR)
    sheet.box(720, 50, 886, 102, "every\ncross-attention", POLICY_COLOR)
    sheet.arrow((560, 76), (720, 76), color=REAL_COLOR)

    sheet.box(14, 186, 110, 226, "six sizes")
    sheet.box(160, 186, 330, 226, "6 x 256 sinusoids", added)
    sheet.arrow((110, 206), (160, 206))
    sheet.box(410, 180, 560, 232, "linear, SiLU,\nlinear", added)
    sheet.arrow((330, 206), (410, 206), color=added)
    sheet.arrow((245, 128), (245, 156), (485, 156), (485, 180), color=added)
    sheet.text(365, 144, "pooled: 1280", added, 13)

    sheet.box(14, 270, 110, 310, "timestep")
    sheet.box(160, 270, 330, 310, "320 sinusoids", FROZEN_COLOR)
    sheet.arrow((110, 290), (160, 290))
    sheet.box(410, 264, 560, 316, "linear, SiLU,\nlinear", FROZEN_COLOR)
    sheet.arrow((330, 290), (410, 290))
    sheet.text(630, 248, "+", INK, 26)
    sheet.arrow((560, 206), (620, 238), color=added)
    sheet.arrow((560, 290), (620, 258))
    sheet.box(720, 222, 886, 274, "every residual\nblock", POLICY_COLOR)
    sheet.arrow((642, 248), (720, 248))
    return sheet.finish()


# ---- Chapter 12 ----------------------------------------------------------------------------------


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


# ---- Chapter 19 ----------------------------------------------------------------------------------

def push_line() -> Image.Image:
    """Plot two losses, and the two deltas, of an opponent whose weights go along the push.

    The pair is that of chapter 6, and beta is 2000.
    """
    lengths = torch.linspace(0, 0.02, 41)
    losses, bounded_losses, metrics = losses_along_the_push(lengths.tolist())
    sheet = Drawing(900, 344)
    ticks = (0, 0.005, 0.01, 0.015, 0.02)
    x_label = "how far the weights went along the push"
    lines = {
        "(C.6)": (curve(lengths, losses), SPIN_COLOR),
        "bounded": (curve(lengths, bounded_losses), BOUNDED_COLOR),
    }
    frame = (60, 44, 425, 262)
    plot(sheet, frame, "Loss", x_label, lines, ticks, [0, 0.5, 1, 1.5, 2, 2.5], low=-0.3)
    lines = {
        "on the real image": (curve(lengths, metrics["delta_data"]), REAL_COLOR),
        "on the generated image": (curve(lengths, metrics["delta_gen"]), GENERATED_COLOR),
    }
    frame = (520, 44, 885, 262)
    title = "Error, minus the opponent's"
    plot(sheet, frame, title, x_label, lines, ticks, [0, 0.005, 0.01, 0.015], low=-0.002)
    return sheet.finish()


@torch.no_grad()
def losses_along_the_push(lengths: list[float]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return the losses of (C.6), the bounded losses and the metrics, [N] each."""
    pipe = load_pipeline(toy.BASE)
    image, captions = curated(SHOWN[:1])
    mean, _ = pipe.vae.encode(image)
    real = mean * pipe.vae.scaling_factor
    generated = sample(pipe, captions, steps=STEPS, guidance=GUIDANCE)
    eps = torch.randn(real.shape, generator=torch.Generator().manual_seed(0))
    with torch.enable_grad():
        push = error_gradient(pipe, generated, eps, captions)
    push = push / push.norm()

    t = torch.tensor([400])
    context = pipe.encode_prompts(captions).expand(2, -1, -1)
    x_t = add_noise(torch.cat([real, generated]), eps, pipe.scheduler.alphas_cumprod[t])
    parameters = list(pipe.unet.parameters())
    start = torch.nn.utils.parameters_to_vector(parameters)
    opponent_guess = pipe.unet(x_t, t.expand(2), context)
    opponent_errors = per_image_error(opponent_guess, eps)
    errors = []
    gaps = []
    for length in lengths:
        torch.nn.utils.vector_to_parameters(start + length * push, parameters)
        guess = pipe.unet(x_t, t.expand(2), context)
        errors.append(per_image_error(guess, eps))
        gaps.append(per_image_error(guess, opponent_guess)[1])
    err_data, err_gen = torch.stack(errors).T
    losses, metrics = spin_loss(err_data, err_gen, *opponent_errors, beta=2000.0)
    bounded_losses, _ = spin_bounded_loss(
        err_data, err_gen, *opponent_errors, torch.stack(gaps), beta=2000.0
    )
    return losses, bounded_losses, metrics


def mirror() -> Image.Image:
    """Draw where the losses send the policy's guess: to the noise, away from it, to its mirror."""
    sheet = Drawing(900, 330)
    noise = (72, 210)
    guess = (128, 163)
    mirrored = (184, 116)
    panels = [  # the arrow's length is in steps from the noise to the guess
        ("On the real image, both losses:", "pulled to the noise", REAL_COLOR, noise, -0.86),
        ("On the generated image, (C.6):", "pushed away, without end", SPIN_COLOR, noise, 2.1),
        ("On the generated image, bounded:", "pulled to its mirror", BOUNDED_COLOR, mirrored, 0.86),
    ]
    for i, (title, words, color, center, length) in enumerate(panels):
        left = 14 + 298 * i
        frame = (2 * left, 2 * 58, 2 * (left + 276), 2 * 268)
        sheet.draw.rounded_rectangle(frame, 12, PAPER, PALE, 3)
        sheet.text(left, 18, title, INK, 15, "lm")
        sheet.text(left, 40, words, color, 15, "lm")
        for radius in (16, 32, 48):
            middle = (2 * (left + center[0]), 2 * center[1])
            sheet.draw.circle(middle, 2 * radius, None, mix(color, PAPER, 0.35), 2)
        tip_x = guess[0] + length * (guess[0] - noise[0])
        tip_y = guess[1] + length * (guess[1] - noise[1])
        sheet.arrow((left + guess[0], guess[1]), (left + tip_x, tip_y), color=color)
        if i > 0:
            draw_spot(sheet, left + mirrored[0], mirrored[1], "its mirror", BOUNDED_COLOR)
        draw_spot(sheet, left + noise[0], noise[1], "the noise", INK)
        draw_spot(sheet, left + guess[0], guess[1], "opponent's guess", FROZEN_COLOR)
    note = (
        "A guess is a point: here with two numbers, in the miniature world with 256. "
        "The policy starts at the opponent's guess.\n"
        "Along a circle the loss is the same. It falls in the direction of the arrow."
    )
    sheet.text(14, 300, note, INK, 14, "lm")
    return sheet.finish()


def draw_spot(sheet: Drawing, x: float, y: float, name: str, color: Color) -> None:
    """Draw a point, and its name below it and to the right."""
    sheet.draw.circle((2 * x, 2 * y), 11, color)
    sheet.text(x + 8, y + 13, name, color, 14, "lm")


# ---- The evidence --------------------------------------------------------------------------------

# A model has the same color everywhere; a later iteration is darker.
MODELS = [
    *("sft", "dpo", "spin-1", "spin-2", "spin-3"),
    *("bounded-1", "bounded-2", "bounded-3"),
]


def model_color(name: str) -> Color:
    """Return the color of a model, "sft" or "spin-2"."""
    method, _, iteration = name.partition("-")
    shares = {"": 1.0, "1": 0.75, "2": 0.87, "3": 1.0}
    return mix(METHOD_COLORS[method], PAPER, shares[iteration])


def gains() -> Image.Image:
    """Plot each model's reward minus theta_0's over the bases of tutorial/evidence/results.csv."""
    scores = Scores(ROOT / "tutorial" / "evidence" / "results.csv")
    sheet = Drawing(900, 316)
    titles = {"7.5": "at guidance 7.5", "best reward": "each model at its best guidance"}
    for left, (setting, title) in zip((96, 548), titles.items()):
        place = ("reward", setting, "mean of 5")
        differences = {}
        for name in MODELS:
            compared = Comparison(f"story/{name}", "theta_0", *place)
            differences[name] = scores.differences(compared)
        draw_intervals(sheet, left, f"Reward minus theta_0's, {title}", differences)
    sheet.text(450, 302, "a dot: a base; a line: the 95% interval", INK, 13)
    return sheet.finish()


def draw_intervals(
    sheet: Drawing, left: int, title: str, differences: dict[str, np.ndarray]
) -> None:
    """Draw a line for the interval of each model's difference, and a dot for each base.

    differences: {model: [bases,seeds,folds]}.
    """
    right, top, row_height = left + 270, 46, 28
    low, high = -0.4, 1.2

    def column(value: float) -> float:
        return left + (value - low) / (high - low) * (right - left)

    sheet.text(left - 80, 20, title, INK, 15, "lm")
    bottom = top + row_height * len(differences)
    for tick in (-0.4, 0.0, 0.4, 0.8, 1.2):
        x = 2 * column(tick)
        sheet.draw.line([(x, 2 * top), (x, 2 * bottom)], INK if tick == 0 else PALE, 2)
        sheet.text(column(tick), bottom + 12, f"{tick:+.1f}" if tick else "0", INK, 13)
    for i, (name, values) in enumerate(differences.items()):
        y = top + (i + 0.5) * row_height
        color = model_color(name)
        interval = pooled(values)
        sheet.text(left - 8, y, name, color, 14, "rm")
        ends = [(2 * column(interval.low), 2 * y), (2 * column(interval.high), 2 * y)]
        sheet.draw.line(ends, color, 10)
        for value in interval.by_base:
            sheet.draw.circle((2 * column(value), 2 * y), 7, PAPER, color, 3)
        sheet.text(right + 44, y, f"{interval.mean:+.2f}", color, 14, "rm")


# ---- The story -----------------------------------------------------------------------------------

# The log, to four digits, and samples/ of a run of `python train.py`
STORY = ROOT / "tutorial" / "story"


def story_grid() -> Image.Image:
    """Draw the run's samples/grid.png, with six bits a channel: its file is a third smaller."""
    columns = {}
    for name in ["base", *MODELS]:
        paths = sorted((STORY / "samples" / name).iterdir())
        columns[name] = [read_image(path) for path in paths]
    prompts = [read_parameters(path).partition("\n")[0] for path in paths]
    scenes = {scene.caption: scene for scene in toy.split()["test"]}
    ideal_images = [toy.to_pil(toy.ideal_image(scenes[prompt])) for prompt in prompts]
    return report.draw_grid(columns, prompts, ideal_images).point(lambda value: value // 4 * 4 + 2)


def story_curves() -> Image.Image:
    """Draw the run's curves.png."""
    return report.draw_curves(Run(STORY).read_log())


# ---- The script ----------------------------------------------------------------------------------

FIGURES = {
    "one_pair": one_pair,
    "iterations": iterations,
    "noise_levels": noise_levels,
    "sampling_path": sampling_path,
    "guidance": guidance,
    "errors": errors,
    "game": game,
    "paths": paths,
    "resting": resting,
    "links": links,
    "gradient": gradient,
    "unet": unet,
    "attention": attention,
    "latents": latents,
    "sdxl": sdxl,
    "cost": cost,
    "push_line": push_line,
    "mirror": mirror,
    "gains": gains,
    "story_grid": story_grid,
    "story_curves": story_curves,
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(FIGURES)}")
    parser.add_argument("--out", default=str(FOLDER), help="folder (default: tutorial/figures)")
    args = parser.parse_args(argv)
    for name in args.names:
        if name not in FIGURES:
            raise InputError(f"{name}: no such figure. There are {', '.join(FIGURES)}")

    for name in args.names or FIGURES:
        image = FIGURES[name]()
        if name != "story_grid":  # 256 colors would be too few for its samples
            image = image.quantize(256)
        save_png(image, Path(args.out) / f"{name}.png")


if __name__ == "__main__":
    sys.exit(run_script("figures.py", main, "finished figures are kept"))
