"""What the tutorial's figures are drawn with, by Pillow: a sheet, and charts on it."""

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from spin.eval.plots import COLORS, INK, PALE, PAPER, TOP, make_axes

Color = tuple[int, int, int]
Curve = list[tuple[float, float]]  # points (x, y)


class Drawing:
    """A sheet that is drawn at twice its size and scaled down, so that its lines are smooth."""

    def __init__(self, width: int, height: int):
        self.size = (width, height)
        self.sheet = Image.new("RGB", (2 * width, 2 * height), PAPER)
        self.draw = ImageDraw.Draw(self.sheet)

    def text(
        self, x: float, y: float, text: str, color: Color = INK, size: int = 14, anchor: str = "mm"
    ) -> None:
        font = ImageFont.load_default(2 * size)
        align = "left" if anchor[0] == "l" else "center"
        self.draw.multiline_text(
            (2 * x, 2 * y), text, color, font, anchor, spacing=size / 2, align=align
        )

    def box(
        self,
        left: int,
        top: int,
        right: int,
        bottom: int,
        text: str,
        color: Color = INK,
        size: int = 14,
    ) -> None:
        """Draw a box with a colored frame, tinted inside, and text in its middle."""
        corners = (2 * left, 2 * top, 2 * right, 2 * bottom)
        self.draw.rounded_rectangle(corners, 12, tint(color), color, 4)
        self.text((left + right) / 2, (top + bottom) / 2, text, INK, size)

    def picture(self, image: Image.Image, left: int, top: int, side: int, color: Color) -> None:
        """Draw an image, enlarged to side x side pixels, in a colored frame."""
        frame = (2 * left - 5, 2 * top - 5, 2 * (left + side) + 4, 2 * (top + side) + 4)
        self.draw.rectangle(frame, color)
        enlarged = image.resize((2 * side, 2 * side), Image.Resampling.NEAREST)
        self.sheet.paste(enlarged, (2 * left, 2 * top))

    def arrow(self, *points: tuple[float, float], color: Color = INK) -> None:
        """Draw straight lines from point to point, with a head at the last one."""
        (x_before, y_before), (x, y) = points[-2:]
        length = math.hypot(x - x_before, y - y_before)
        along_x = (x - x_before) / length
        along_y = (y - y_before) / length
        back_x = x - 9 * along_x
        back_y = y - 9 * along_y
        path = [(2 * a, 2 * b) for a, b in (*points[:-1], (back_x, back_y))]
        self.draw.line(path, color, 4, joint="curve")
        left_wing = (2 * (back_x - 5 * along_y), 2 * (back_y + 5 * along_x))
        right_wing = (2 * (back_x + 5 * along_y), 2 * (back_y - 5 * along_x))
        self.draw.polygon([(2 * x, 2 * y), left_wing, right_wing], color)

    def step(self, number: int, x: int, y: int, text: str) -> None:
        """Write a heading with its left end at x, after its number in a dark disk."""
        self.draw.circle((2 * (x + 10), 2 * y), 20, INK)
        self.text(x + 10, y, str(number), PAPER, 13)
        self.text(x + 26, y, text, INK, 15, "lm")

    def finish(self) -> Image.Image:
        return self.sheet.resize(self.size, Image.Resampling.LANCZOS)


def tint(color: Color) -> Color:
    """Return a color mixed with white, one part to nine."""
    return tuple((channel + 9 * 255) // 10 for channel in color)


def mix(color: Color, other: Color, share: float) -> Color:
    """Return `share` of a color, the rest being another."""
    return tuple(round(share * a + (1 - share) * b) for a, b in zip(color, other))


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


def density_chart(
    title: str, curves: dict[str, tuple[Curve, Color]], x_ticks: range, y_ticks: list[float]
) -> Image.Image:
    """Plot curves {name: (points, color)} above a common axis, with a legend below it."""
    sheet = Drawing(700, 340)
    left, right, top, bottom = 60, 685, 40, 275

    def place(x: float, y: float) -> tuple[float, float]:
        column = left + (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]) * (right - left)
        return 2 * column, 2 * (bottom - y / y_ticks[-1] * (bottom - top))

    sheet.text(left, 18, title, INK, 14, "lm")
    for y in y_ticks:
        sheet.draw.line([place(x_ticks[0], y), place(x_ticks[-1], y)], PALE, 2)
        sheet.text(left - 8, place(0, y)[1] / 2, f"{y:g}", INK, 14, "rm")
    for x in x_ticks:
        sheet.text(place(x, 0)[0] / 2, bottom + 16, f"{x}", INK, 14)
    for points, color in curves.values():
        sheet.draw.line([place(x, y) for x, y in points], color, 5, joint="curve")

    font = ImageFont.load_default(14)
    x = left
    for name, (_, color) in curves.items():
        sheet.draw.line([(2 * x, 2 * 318), (2 * (x + 22), 2 * 318)], color, 7)
        sheet.text(x + 28, 318, name, INK, 14, "lm")
        x += 28 + font.getlength(name) + 22
    return sheet.finish()
