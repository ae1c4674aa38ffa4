"""Picture grids and line charts, drawn with Pillow."""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from torch import Tensor

from spin.infra.run import whole

INK, PALE, PAPER = (32, 32, 36), (200, 200, 206), (255, 255, 255)
LEFT, TOP, RIGHT, BOTTOM = 76, 34, 14, 30  # pixels around a chart
COLOURS = [(31, 105, 180), (214, 90, 24), (34, 139, 76), (150, 60, 160), (120, 120, 120)]
Pictures, Plot = Sequence[Image.Image], dict[str, Sequence[float]]  # a plot: {line name: values over steps 1, 2, ...}


def to_pil(image: Tensor) -> Image.Image:
    """[3,H,W] in [0,1] -> an 8-bit RGB picture, rounded to the nearest level."""
    return Image.fromarray((image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy())


def parameters(prompt: str, settings: dict) -> str:
    """How a picture was made, as Stable Diffusion programs write it to a PNG. settings: {"Seed": 1, ...}."""
    others = [f"{name}: {value}" for name, value in settings.items() if name != "Negative prompt"]
    negative = [f"Negative prompt: {settings['Negative prompt']}"] if settings.get("Negative prompt") else []
    return "\n".join([prompt, *negative, ", ".join(others)])


def save_png(picture: Image.Image, path: Path, prompt: str = "", settings: dict | None = None) -> None:
    """Whole or not at all. prompt and settings: how it was made, for its text chunk "parameters"."""
    info = PngImagePlugin.PngInfo()
    if settings is not None:
        info.add_itxt("parameters", parameters(prompt, settings | {"Size": f"{picture.width}x{picture.height}"}))
    with whole(path) as part:
        picture.save(part, format="PNG", pnginfo=info)


def grid(rows: Sequence[Pictures], columns: Sequence[str], captions: Sequence[str], cell: int = 192) -> Image.Image:
    """A table of pictures of `cell` pixels: a title over each column, a caption (a prompt) to the left of each row."""
    font, gap, margin, line = ImageFont.load_default(15), 6, 190, 19
    title_height = line + gap if any(columns) else 0
    sheet = Image.new("RGB", (margin + len(columns) * (cell + gap), title_height + len(rows) * (cell + gap)), PAPER)
    draw = ImageDraw.Draw(sheet)
    for j, title in enumerate(columns):
        draw.text((margin + j * (cell + gap) + cell / 2, 2), title, INK, font, anchor="ma")
    for i, (pictures, caption) in enumerate(zip(rows, captions, strict=True)):
        top, lines = title_height + i * (cell + gap), textwrap.wrap(caption, 24)[: cell // line]
        draw.multiline_text((gap, top + gap), "\n".join(lines), INK, font, spacing=line - 15)
        for j, picture in enumerate(pictures):
            scale = cell / max(picture.size)
            size = tuple(max(1, round(side * scale)) for side in picture.size)
            shown = picture.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)
            sheet.paste(shown, (margin + j * (cell + gap) + (cell - size[0]) // 2, top + (cell - size[1]) // 2))
    return sheet


def line_charts(panels: dict[str, Plot], marks: Sequence[int] = (), width: int = 460, height: int = 240) -> Image.Image:
    """A panel for each title, two a row; at steps in `marks` a vertical line. Values not finite are left out."""
    return two_a_row([line_chart(title, lines, marks, width, height) for title, lines in panels.items()])


def interval_charts(models: dict[str, dict[str, dict[str, float]]], width: int = 460, height: int = 240) -> Image.Image:
    """A panel for each metric, a point with its interval for each model: {model: {metric: mean, low, high}}."""
    points = {metric: {name: of[metric] for name, of in models.items()} for metric in next(iter(models.values()))}
    width = max(width, LEFT + RIGHT + len(models) * (8 * max(map(len, models)) + 8))  # for the models' names
    return two_a_row([interval_chart(metric, of_models, width, height) for metric, of_models in points.items()])


def two_a_row(panels: Pictures) -> Image.Image:
    (width, height), columns = panels[0].size, min(2, len(panels))
    sheet = Image.new("RGB", (columns * width, math.ceil(len(panels) / columns) * height), PAPER)
    for i, panel in enumerate(panels):
        sheet.paste(panel, (i % columns * width, i // columns * height))
    return sheet


def axes(title: str, values: Sequence[float], width: int, height: int):
    """A panel with round numbers up its side, around `values`: the panel, its draw, its font, and y -> its height."""
    panel, font = Image.new("RGB", (width, height), PAPER), ImageFont.load_default(13)
    draw = ImageDraw.Draw(panel)
    low, high = min(values, default=0.0), max(values, default=0.0)
    pad = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    low, high = low - pad, high + pad
    level = lambda y: height - BOTTOM - (y - low) / (high - low) * (height - BOTTOM - TOP)  # noqa: E731
    draw.text((LEFT, 6), title, INK, font)
    apart = next(m * 10.0**e for e in range(-99, 99) for m in (1, 2, 5) if m * 10.0**e >= (high - low) / 5)
    for y in (apart * k for k in range(math.ceil(low / apart), math.floor(high / apart) + 1)):
        draw.line([(LEFT, level(y)), (width - RIGHT, level(y))], PALE)
        draw.text((LEFT - 6, level(y)), f"{y:.4g}", INK, font, anchor="rm")
    return panel, draw, font, level


def line_chart(title: str, lines: Plot, marks: Sequence[int], width: int, height: int) -> Image.Image:
    finite = [y for values in lines.values() for y in values if math.isfinite(y)]
    panel, draw, font, level = axes(title, finite, width, height)
    count, legend = max(2, *(len(values) for values in lines.values())), width - RIGHT
    across = lambda step: LEFT + (step - 1) / (count - 1) * (width - RIGHT - LEFT)  # noqa: E731
    for mark in marks:
        draw.line([(across(mark), height - BOTTOM), (across(mark), TOP)], PALE)
    draw.text((LEFT, height - BOTTOM + 6), "step 1", INK, font)
    draw.text((width - RIGHT, height - BOTTOM + 6), str(count), INK, font, anchor="ra")
    for (name, values), colour in reversed(list(zip(lines.items(), COLOURS))):
        points = [(across(step), level(y)) for step, y in enumerate(values, start=1) if math.isfinite(y)]
        draw.line(points, colour, 2)
        if len(points) == 1:
            draw.circle(points[0], 2, colour)
        if len(lines) > 1:
            draw.text((legend, 6), name, colour, font, anchor="ra")
            legend -= font.getlength(name) + 14
    return panel


def interval_chart(title: str, points: dict[str, dict[str, float]], width: int, height: int) -> Image.Image:
    ends = [point[end] for point in points.values() for end in ("low", "high")]
    panel, draw, font, level = axes(f"{title}, mean and 95 % interval", ends, width, height)
    for i, (name, point) in enumerate(points.items()):
        x = LEFT + (i + 0.5) * (width - RIGHT - LEFT) / len(points)
        mean, low, high = (level(point[key]) for key in ("mean", "low", "high"))
        if min(ends) <= 0 <= max(ends):
            draw.rectangle([x - 18, min(level(0), mean), x + 18, max(level(0), mean)], PALE)
        draw.line([(x, low), (x, high)], COLOURS[0], 3)
        for end in (low, high):
            draw.line([(x - 6, end), (x + 6, end)], COLOURS[0], 2)
        draw.circle((x, mean), 5, COLOURS[1])
        draw.text((x, height - BOTTOM + 8), name, INK, font, anchor="ma")
    return panel
