"""Grids of images, line charts and interval charts, drawn with Pillow."""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

INK = (32, 32, 36)
PALE = (200, 200, 206)
PAPER = (255, 255, 255)
COLORS = [(31, 105, 180), (214, 90, 24), (34, 139, 76), (150, 60, 160), (120, 120, 120)]
OCHRE = (158, 112, 24)

#: The color of a method's models.
METHOD_COLORS = {"sft": COLORS[0], "dpo": OCHRE, "spin": INK, "bounded": COLORS[3]}

# pixels between a chart's edges and its axes
LEFT = 76
TOP = 34
RIGHT = 14
BOTTOM = 30

Lines = dict[str, Sequence[float]]  # {line's name: its values at steps 1, 2, ...}
Point = dict[str, float]  # mean, low, high


# ---- Grids of images -----------------------------------------------------------------------------

MARGIN = 190  # pixels to the left of the images, for the captions
GAP = 6  # pixels between two images
LINE = 19  # pixels from a line of text to the next
FONT_SIZE = 15
CAPTION_WIDTH = 24  # characters a line


def grid(
    rows: Sequence[Sequence[Image.Image]],
    columns: Sequence[str],
    captions: Sequence[str],
    cell: int = 192,
) -> Image.Image:
    """Return a table of images.

    rows: as many images as there are columns, in each row.
    columns: the title above each column.
    captions: the prompt to the left of each row.
    cell: pixels a side of the square that an image is fitted into.
    """
    pitch = cell + GAP
    header = LINE + GAP if any(columns) else 0
    font = ImageFont.load_default(FONT_SIZE)
    sheet = Image.new("RGB", (MARGIN + len(columns) * pitch, header + len(rows) * pitch), PAPER)
    draw = ImageDraw.Draw(sheet)

    for j, title in enumerate(columns):
        draw.text((MARGIN + j * pitch + cell / 2, 2), title, INK, font, anchor="ma")

    for i, (images, caption) in enumerate(zip(rows, captions, strict=True)):
        top = header + i * pitch
        lines = textwrap.wrap(caption, CAPTION_WIDTH)[: cell // LINE]
        text = "\n".join(lines)
        draw.multiline_text((GAP, top + GAP), text, INK, font, spacing=LINE - FONT_SIZE)
        for j, image in enumerate(images):
            fitted = fit(image, cell)
            x = MARGIN + j * pitch + (cell - fitted.width) // 2
            y = top + (cell - fitted.height) // 2
            sheet.paste(fitted, (x, y))
    return sheet


def fit(image: Image.Image, side: int) -> Image.Image:
    """Return the image resized so that its longer side is `side` pixels.

    A small image is enlarged by repeating its pixels, not smoothed.
    """
    scale = side / max(image.size)
    width = max(1, round(image.width * scale))
    height = max(1, round(image.height * scale))
    method = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    return image.resize((width, height), method)


def difference(image: Image.Image, ideal: Image.Image, gain: float) -> Image.Image:
    """Return 128 + gain * (image - ideal) in each channel, clipped: mid-gray where they are equal.

    ideal: is enlarged to the size of `image` if it is smaller.
    """
    ideal = ideal.resize(image.size, Image.Resampling.NEAREST)
    signed = np.asarray(image, np.float32) - np.asarray(ideal, np.float32)  # [H,W,3]
    amplified = np.clip(128 + gain * signed, 0, 255)
    return Image.fromarray(amplified.round().astype(np.uint8))


# ---- Charts --------------------------------------------------------------------------------------


@dataclass
class Axes:
    """A chart's panel, and where a value lies on it: `low` to `high` from its bottom to its top."""

    panel: Image.Image
    draw: ImageDraw.ImageDraw
    font: ImageFont.FreeTypeFont
    low: float
    high: float

    @property
    def left(self) -> int:
        return LEFT

    @property
    def right(self) -> int:
        return self.panel.width - RIGHT

    @property
    def bottom(self) -> int:
        return self.panel.height - BOTTOM

    def x(self, fraction: float) -> float:
        """Return the pixel column at a fraction of the way from left to right."""
        return self.left + fraction * (self.right - self.left)

    def y(self, value: float) -> float:
        """Return the pixel row of a value."""
        return self.bottom - (value - self.low) / (self.high - self.low) * (self.bottom - TOP)


def make_axes(title: str, values: Sequence[float], width: int, height: int) -> Axes:
    """Return a panel with a title, and round numbers at its left that cover `values`."""
    lowest = min(values, default=0.0)
    highest = max(values, default=0.0)
    padding = (highest - lowest) * 0.05 or abs(highest) * 0.05 or 1.0
    panel = Image.new("RGB", (width, height), PAPER)
    axes = Axes(
        panel,
        ImageDraw.Draw(panel),
        ImageFont.load_default(13),
        low=lowest - padding,
        high=highest + padding,
    )
    axes.draw.text((axes.left, 6), title, INK, axes.font)

    spacing = tick_spacing(axes.high - axes.low)
    first = math.ceil(axes.low / spacing)
    last = math.floor(axes.high / spacing)
    for k in range(first, last + 1):
        value = k * spacing
        y = axes.y(value)
        axes.draw.line([(axes.left, y), (axes.right, y)], PALE)
        axes.draw.text((axes.left - 6, y), f"{value:.4g}", INK, axes.font, anchor="rm")
    return axes


def tick_spacing(span: float) -> float:
    """Return the smallest of 1, 2 and 5 times a power of 10 that is at least a fifth of `span`."""
    power = 10.0 ** math.floor(math.log10(span / 5))
    for multiple in (1, 2, 5):
        if multiple * power >= span / 5:
            return multiple * power
    return 10 * power


def line_chart(
    title: str,
    lines: Lines,
    marks: Sequence[int],
    width: int = 460,
    height: int = 240,
    window: int = 1,
    colors: Sequence[tuple[int, int, int]] = COLORS,
) -> Image.Image:
    """Return a panel with lines over steps 1, 2, .... Values that are not finite are left out.

    window: how many steps a running mean covers. It lies over the values, which are thin and pale,
        and begins anew after each step in `marks`. 1: the values alone.

    colors: of the lines, in order.

    Raises ValueError if there are more lines than colors.
    """
    if len(lines) > len(colors):
        raise ValueError(f"{title}: {len(lines)} lines, but there are {len(colors)} colors")

    finite = []
    for values in lines.values():
        finite += [value for value in values if math.isfinite(value)]
    axes = make_axes(title, finite, width, height)
    last_step = max(2, *(len(values) for values in lines.values()))

    for mark in marks:
        x = axes.x((mark - 1) / (last_step - 1))
        axes.draw.line([(x, axes.bottom), (x, TOP)], PALE)
    below = axes.bottom + 6
    axes.draw.text((axes.left, below), "step 1", INK, axes.font)
    axes.draw.text((axes.right, below), str(last_step), INK, axes.font, anchor="ra")

    # The first line is drawn last, over the others; the legend grows from right to left.
    legend_end = axes.right
    colored = list(zip(lines.items(), colors))
    for (name, values), color in reversed(colored):
        if window > 1:
            draw_line(axes, values, last_step, pale(color), width=1)
        draw_line(axes, running_mean(values, marks, window), last_step, color, width=2)
        if len(lines) > 1:
            axes.draw.text((legend_end, 6), name, color, axes.font, anchor="ra")
            legend_end -= axes.font.getlength(name) + 14
    return axes.panel


def draw_line(
    axes: Axes, values: Sequence[float], last_step: int, color: tuple[int, int, int], width: int
) -> None:
    """Draw values at steps 1, 2, ... as a smooth line, and a single one as a dot."""
    points = []
    for step, value in enumerate(values, start=1):
        if math.isfinite(value):
            points.append((axes.x((step - 1) / (last_step - 1)), axes.y(value)))
    if len(points) == 1:
        axes.draw.circle(points[0], 2, color)

    # Pillow's lines have jagged edges: draw at twice the size and scale down.
    size = axes.panel.size
    stencil = Image.new("L", (2 * size[0], 2 * size[1]))
    doubled = [(2 * x, 2 * y) for x, y in points]
    ImageDraw.Draw(stencil).line(doubled, 255, 2 * width, joint="curve")
    axes.panel.paste(color, mask=stencil.resize(size, Image.Resampling.BOX))


def running_mean(values: Sequence[float], marks: Sequence[int], window: int) -> list[float]:
    """Return the mean of every value and up to window - 1 before it, back to the last mark.

    marks: steps, counted from 1, after which the mean begins anew. Values that are not finite are
        left out of it, and it is not finite at their steps.
    """
    means = []
    recent: list[float] = []  # finite values
    for step, value in enumerate(values, start=1):
        if math.isfinite(value):
            recent = [*recent, value][-window:]
            means.append(sum(recent) / len(recent))
        else:
            means.append(math.nan)
        if step in marks:
            recent = []
    return means


def pale(color: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return a color mixed with white, two parts to one."""
    return tuple((channel + 2 * 255) // 3 for channel in color)


def interval_charts(
    models: dict[str, dict[str, Point]], width: int = 460, height: int = 240
) -> Image.Image:
    """Return a panel for each metric, with each model's mean and interval.

    models: {model: {metric: mean, low, high}}.
    width: of a panel, which is wider if the models' names need it.
    """
    longest = max(len(name) for name in models)
    width = max(width, LEFT + RIGHT + len(models) * (8 * longest + 8))
    panels = []
    for metric in next(iter(models.values())):
        points = {name: metrics[metric] for name, metrics in models.items()}
        panels.append(interval_chart(metric, points, width, height))
    return two_a_row(panels)


def interval_chart(title: str, points: dict[str, Point], width: int, height: int) -> Image.Image:
    """Return a panel with each model's mean, its interval, and a bar from 0 if 0 is in sight."""
    lows = [point["low"] for point in points.values()]
    highs = [point["high"] for point in points.values()]
    axes = make_axes(f"{title}, mean and 95% interval", lows + highs, width, height)
    zero_shows = min(lows + highs) <= 0 <= max(lows + highs)

    for i, (name, point) in enumerate(points.items()):
        x = axes.x((i + 0.5) / len(points))
        mean = axes.y(point["mean"])
        low = axes.y(point["low"])
        high = axes.y(point["high"])
        if zero_shows:
            zero = axes.y(0)
            axes.draw.rectangle([x - 18, min(zero, mean), x + 18, max(zero, mean)], PALE)
        axes.draw.line([(x, low), (x, high)], COLORS[0], 3)
        for end in (low, high):
            axes.draw.line([(x - 6, end), (x + 6, end)], COLORS[0], 2)
        axes.draw.circle((x, mean), 5, COLORS[1])
        axes.draw.text((x, axes.bottom + 8), name, INK, axes.font, anchor="ma")
    return axes.panel


def two_a_row(panels: Sequence[Image.Image]) -> Image.Image:
    """Return panels of equal size on one sheet, two a row."""
    width, height = panels[0].size
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    sheet = Image.new("RGB", (columns * width, rows * height), PAPER)
    for i, panel in enumerate(panels):
        row, column = divmod(i, columns)
        sheet.paste(panel, (column * width, row * height))
    return sheet
