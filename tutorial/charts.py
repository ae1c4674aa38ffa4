"""What spin/viz.py does not draw: lines with intervals over an axis of numbers, bars, arrows, a coloured table."""

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from spin.eval.plots import BOTTOM, COLOURS, INK, LEFT, PALE, PAPER, RIGHT, TOP, axes

Point = tuple[float, float, float, float]  # x, mean, low, high
GOOD, BAD = (62, 150, 81), (204, 77, 60)


def lines(
    title: str,
    x_label: str,
    lines: dict[str, Sequence[Point]],
    width: int = 500,
    height: int = 270,
    even: bool = False,
    ticks: Sequence[float] = (),
    span: Sequence[float] = (),
) -> Image.Image:
    """{line's name: points}, a bar for each interval that has a width.

    even: the x that occur stand at even distances. ticks: those to label, if not all. span: the heights to be shown.
    """
    ends = span or [y for points in lines.values() for point in points for y in point[2:]]
    xs = sorted({point[0] for points in lines.values() for point in points})
    upper, _, font, level = axes(title, ends, width, height - 18)
    panel = Image.new("RGB", (width, height), PAPER)  # with room for a label below the axes
    panel.paste(upper)
    draw = ImageDraw.Draw(panel)
    place = (lambda x: float(xs.index(x))) if even else float
    left, right, floor = LEFT + 20, width - RIGHT - 20, height - 18 - BOTTOM
    span_of_x = place(xs[-1]) - place(xs[0]) or 1
    across = lambda x: left + (place(x) - place(xs[0])) / span_of_x * (right - left)  # noqa: E731
    for x in ticks or xs:
        draw.text((across(x), floor + 6), f"{x:g}", INK, font, anchor="ma")
    draw.text(((left + right) / 2, floor + 24), x_label, INK, font, anchor="ma")
    if min(ends) < 0 < max(ends):
        draw.line([(LEFT, level(0)), (width - RIGHT, level(0))], INK)
    colours = dict(zip(lines, COLOURS, strict=False))
    for n, (name, points) in enumerate(lines.items()):
        bars = any(low < high for _, _, low, high in points)
        shift = (6 if even else 3) * (n - (len(lines) - 1) / 2) if bars else 0  # so that they stand side by side
        draw.line([(across(x) + shift, level(mean)) for x, mean, _, _ in points], colours[name], 2)
        for x, mean, low, high in points:
            if low < high:
                draw.line([(across(x) + shift, level(low)), (across(x) + shift, level(high))], colours[name], 2)
                draw.circle((across(x) + shift, level(mean)), 3 if len(points) < 20 else 1, colours[name])
    return with_legend(panel, colours)


def with_legend(panel: Image.Image, names: dict[str, tuple[int, int, int]]) -> Image.Image:
    """The panel with a line below it that says what each colour is, broken where it is full."""
    font, x, y, places = ImageFont.load_default(13), LEFT, 4, []
    for name in names:
        if x > LEFT and x + 18 + font.getlength(name) > panel.width - RIGHT:
            x, y = LEFT, y + 18
        places.append((x, y))
        x += 18 + font.getlength(name) + 16
    sheet = Image.new("RGB", (panel.width, panel.height + y + 20), PAPER)
    sheet.paste(panel)
    draw = ImageDraw.Draw(sheet)
    for (x, y), (name, colour) in zip(places, names.items()):
        draw.rectangle([x, panel.height + y + 3, x + 11, panel.height + y + 12], colour)
        draw.text((x + 18, panel.height + y), name, INK, font)
    return sheet


def bars(title: str, values: dict[str, float], unit: str, width: int = 640) -> Image.Image:
    """A horizontal bar for each name, from 0, with its number behind it."""
    font, tall, left = ImageFont.load_default(13), 26, 250
    sheet = Image.new("RGB", (width, TOP + tall * len(values) + 8), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((10, 8), title, INK, font)
    scale = (width - left - 90) / max(values.values())
    for i, (name, value) in enumerate(values.items()):
        middle = TOP + (i + 0.5) * tall
        draw.text((left - 8, middle), name, INK, font, anchor="rm")
        draw.rectangle([left, middle - 8, left + max(1, value * scale), middle + 8], COLOURS[0])
        draw.text((left + value * scale + 8, middle), f"{value:.3g} {unit}", INK, font, anchor="lm")
    return sheet


def arrows(title: str, named: dict[str, tuple[float, float]], notes: Sequence[str], side: int = 620) -> Image.Image:
    """An arrow from the origin to each point (x, y) of a plane, with its name at the tip, all to one scale, and notes
    in lines below."""
    font, (wide, tall) = ImageFont.load_default(13), (side, side // 2)
    sheet = Image.new("RGB", (wide, TOP + tall + 20 * len(notes) + 10), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((10, 8), title, INK, font)
    xs, ys = zip((0.0, 0.0), *named.values())
    scale = min((wide - 280) / (max(xs) - min(xs)), (tall - 60) / (max(ys) - min(ys)))
    left = 140 + (wide - 280 - scale * (max(xs) - min(xs))) / 2
    place = lambda x, y: (left + scale * (x - min(xs)), TOP + tall - 30 - scale * (y - min(ys)))  # noqa: E731
    start = place(0.0, 0.0)
    for (name, point), colour in zip(named.items(), COLOURS):
        tip, length = place(*point), math.hypot(*point)
        along = point[0] / length, -point[1] / length
        draw.line([start, (tip[0] - 6 * along[0], tip[1] - 6 * along[1])], colour, 3)
        wings = [(tip[0] - 13 * along[0] + s * along[1], tip[1] - 13 * along[1] - s * along[0]) for s in (-6, 6)]
        draw.polygon([tip, *wings], colour)
        draw.text((tip[0] + 12 * along[0], tip[1] + 12 * along[1]), name, colour, font, "lm" if point[0] >= 0 else "rm")
    draw.circle(start, 4, INK)
    for i, note in enumerate(notes):
        draw.text((10, TOP + tall + 20 * i), note, INK, font)
    return sheet


def heat_map(
    title: str, x_label: str, y_label: str, columns: Sequence[str], rows: Sequence[str], values: Sequence[Sequence]
) -> Image.Image:
    """A table of (number, whether it is resolved), green above 0, red below; those not resolved are pale."""
    font, wide, tall = ImageFont.load_default(13), 84, 30
    left, top = LEFT + 24, TOP + 18
    sheet = Image.new("RGB", (left + wide * len(columns) + RIGHT, top + tall * len(rows) + 22), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((6, 6), title, INK, font)
    draw.text((6, top - 16), y_label, INK, font)
    for i, name in enumerate(columns):
        draw.text((left + (i + 0.5) * wide, top - 16), name, INK, font, anchor="ma")
    draw.text((left + len(columns) * wide / 2, top + tall * len(rows) + 4), x_label, INK, font, anchor="ma")
    largest = max(abs(value) for row in values for value, _ in row) or 1.0
    for j, (name, row) in enumerate(zip(rows, values, strict=True)):
        draw.text((left - 8, top + (j + 0.5) * tall), name, INK, font, anchor="rm")
        for i, (value, resolved) in enumerate(row):
            share = (0.25 + 0.75 * abs(value) / largest) ** 0.5 if resolved else 0.0
            tone = GOOD if value > 0 else BAD
            colour = tuple(round(share * a + (1 - share) * b) for a, b in zip(tone, PALE if not resolved else PAPER))
            box = [left + i * wide, top + j * tall, left + (i + 1) * wide - 2, top + (j + 1) * tall - 2]
            draw.rectangle(box, colour)
            draw.text((left + (i + 0.5) * wide, top + (j + 0.5) * tall), f"{value:+.3f}", INK, font, anchor="mm")
    return sheet
