"""The charts that only the tutorial needs, drawn with Pillow: lines over numbers, bars, arrows."""

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from spin.eval.plots import COLORS, INK, PAPER, TOP, make_axes

Color = tuple[int, int, int]


def line_chart(
    title: str,
    x_label: str,
    lines: dict[str, list[tuple[float, float]]],
    ticks: Sequence[float],
    width: int,
    height: int,
    y_range: Sequence[float] = (),
) -> Image.Image:
    """Return a panel with lines through points (x, y), and a legend below it.

    lines: {name: points}, their x from left to right.
    ticks: the x to label.
    y_range: numbers that the vertical axis covers; those of the points by default.
    """
    points = []
    for line in lines.values():
        points += line
    y_values = y_range or [y for _, y in points]
    axes = make_axes(title, y_values, width, height - 18)  # 18: for x_label
    x_min = min(x for x, _ in points)
    x_max = max(x for x, _ in points)
    first_column = axes.left + 20
    pixels_per_x = (axes.right - 20 - first_column) / (x_max - x_min)

    if min(y_values) < 0 < max(y_values):
        zero = axes.y(0)
        axes.draw.line([(axes.left, zero), (axes.right, zero)], INK)
    for x in ticks:
        column = first_column + (x - x_min) * pixels_per_x
        axes.draw.text((column, axes.bottom + 6), f"{x:g}", INK, axes.font, anchor="ma")
    for line, color in zip(lines.values(), COLORS):
        path = []
        for x, y in line:
            path.append((first_column + (x - x_min) * pixels_per_x, axes.y(y)))
        axes.draw.line(path, color, 2)

    sheet = Image.new("RGB", (width, height + 24), PAPER)
    sheet.paste(axes.panel)
    draw = ImageDraw.Draw(sheet)
    middle = (axes.left + axes.right) / 2
    draw.text((middle, axes.bottom + 24), x_label, INK, axes.font, anchor="ma")
    draw_legend(draw, list(lines), axes.left, height + 4)
    return sheet


def draw_legend(draw: ImageDraw.ImageDraw, names: list[str], left: float, top: float) -> None:
    """Draw a square of each line's color with its name, in one row."""
    font = ImageFont.load_default(13)
    x = left
    for name, color in zip(names, COLORS):
        draw.rectangle([x, top + 3, x + 11, top + 12], color)
        draw.text((x + 18, top), name, INK, font)
        x += 18 + font.getlength(name) + 16


def bar_chart(title: str, values: dict[str, float], unit: str) -> Image.Image:
    """Return a horizontal bar for each name, from 0, with its number at the end."""
    bar_height = 26
    left = 250
    width = 640
    font = ImageFont.load_default(13)
    sheet = Image.new("RGB", (width, TOP + bar_height * len(values) + 8), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((10, 8), title, INK, font)

    pixels_per_unit = (width - left - 90) / max(values.values())
    for i, (name, value) in enumerate(values.items()):
        middle = TOP + (i + 0.5) * bar_height
        length = value * pixels_per_unit
        draw.text((left - 8, middle), name, INK, font, anchor="rm")
        draw.rectangle([left, middle - 8, left + max(1, length), middle + 8], COLORS[0])
        draw.text((left + length + 8, middle), f"{value:.3g} {unit}", INK, font, anchor="lm")
    return sheet


def arrow_chart(title: str, arrows: dict[str, tuple[float, float]], note: str) -> Image.Image:
    """Return arrows from the origin to points (x, y), to one scale, with a note below.

    arrows: {name, which stands at the tip: point}.
    """
    width = 620
    height = 310
    font = ImageFont.load_default(13)
    sheet = Image.new("RGB", (width, TOP + height + 30), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((10, 8), title, INK, font)
    draw.text((10, TOP + height), note, INK, font)

    # The scale and the origin that center everything, with room for the names.
    xs = [0.0] + [x for x, _ in arrows.values()]
    ys = [0.0] + [y for _, y in arrows.values()]
    x_span = max(xs) - min(xs)
    y_span = max(ys) - min(ys)
    scale = min((width - 280) / x_span, (height - 60) / y_span)
    origin_x = (width - scale * x_span) / 2 - scale * min(xs)
    origin_y = TOP + height - 30 + scale * min(ys)

    for (name, (x, y)), color in zip(arrows.items(), COLORS):
        tip = (origin_x + scale * x, origin_y - scale * y)
        length = math.hypot(x, y)
        along = (x / length, -y / length)  # the arrow's direction on the sheet, y down
        draw_arrow(draw, (origin_x, origin_y), tip, along, color)
        anchor = "lm" if x >= 0 else "rm"
        draw.text((tip[0] + 12 * along[0], tip[1] + 12 * along[1]), name, color, font, anchor)
    draw.circle((origin_x, origin_y), 4, INK)
    return sheet


def draw_arrow(
    draw: ImageDraw.ImageDraw,
    start: tuple[float, float],
    tip: tuple[float, float],
    along: tuple[float, float],
    color: Color,
) -> None:
    """Draw an arrow whose head is 13 pixels long and 12 wide. along: its direction, of length 1."""
    shaft_end = (tip[0] - 6 * along[0], tip[1] - 6 * along[1])
    draw.line([start, shaft_end], color, 3)
    back = (tip[0] - 13 * along[0], tip[1] - 13 * along[1])
    left_wing = (back[0] - 6 * along[1], back[1] + 6 * along[0])
    right_wing = (back[0] + 6 * along[1], back[1] - 6 * along[0])
    draw.polygon([tip, left_wing, right_wing], color)
