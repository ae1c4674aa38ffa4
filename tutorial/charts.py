"""What the tutorial's figures are drawn with, by Pillow: a sheet, and charts on it."""

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from spin.eval.plots import COLORS, INK, PALE, PAPER

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

    def line(self, points: Curve, color: Color, width: float) -> None:
        """Draw a line through points, equally wide in every direction, unlike Pillow's own.

        It is a rectangle from each point to the next, with a disk on each point.
        """
        half = width  # half of it, but at twice the size
        for (x_before, y_before), (x, y) in zip(points, points[1:]):
            length = math.hypot(x - x_before, y - y_before)
            if length == 0:
                continue
            across_x = half * (y - y_before) / length
            across_y = -half * (x - x_before) / length
            corners = [
                (2 * x_before + across_x, 2 * y_before + across_y),
                (2 * x + across_x, 2 * y + across_y),
                (2 * x - across_x, 2 * y - across_y),
                (2 * x_before - across_x, 2 * y_before - across_y),
            ]
            self.draw.polygon(corners, color)
        for x, y in points:
            self.draw.circle((2 * x, 2 * y), half, color)

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


Line = tuple[Curve, Color]


def plot(
    sheet: Drawing,
    frame: tuple[int, int, int, int],
    title: str,
    x_label: str,
    lines: dict[str, Line],
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    low: float | None = None,
) -> None:
    """Plot lines {name: (points, color)} in a frame (left, top, right, bottom), legend below it.

    The axes go from the first tick to the last, or upward from `low`. Points above are left out.
    """
    left, top, right, bottom = frame
    low = y_ticks[0] if low is None else low

    def column(x: float) -> float:
        return left + (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]) * (right - left)

    def row(y: float) -> float:
        return bottom - (y - low) / (y_ticks[-1] - low) * (bottom - top)

    sheet.text(left, top - 24, title, INK, 15, "lm")
    for y in y_ticks:
        color = INK if y == 0 else PALE
        sheet.draw.line([(2 * left, 2 * row(y)), (2 * right, 2 * row(y))], color, 2)
        sheet.text(left - 8, row(y), f"{y:g}", INK, 13, "rm")
    for x in x_ticks:
        sheet.text(column(x), bottom + 16, f"{x:g}", INK, 13)
    sheet.text((left + right) / 2, bottom + 36, x_label, INK, 13)

    for points, color in reversed(lines.values()):  # the first one lies over the others
        path = [(column(x), row(y)) for x, y in points if y <= y_ticks[-1]]
        sheet.line(path, color, 2.2)

    font = ImageFont.load_default(14)
    legend_x = left
    legend_y = bottom + 62
    for name, (_, color) in lines.items():
        key = [(2 * legend_x, 2 * legend_y), (2 * (legend_x + 22), 2 * legend_y)]
        sheet.draw.line(key, color, 7)
        sheet.text(legend_x + 28, legend_y, name, INK, 14, "lm")
        legend_x += 28 + font.getlength(name) + 22


def bar_chart(title: str, values: dict[str, float], unit: str) -> Image.Image:
    """Return a horizontal bar for each name, from 0, with its number at the end."""
    left = 250
    width = 640
    sheet = Drawing(width, 42 + 26 * len(values))
    sheet.text(10, 15, title, INK, 14, "lm")
    pixels_per_unit = (width - left - 90) / max(values.values())
    for i, (name, value) in enumerate(values.items()):
        y = 47 + 26 * i
        right = left + value * pixels_per_unit
        sheet.text(left - 8, y, name, INK, 13, "rm")
        sheet.draw.rectangle([2 * left, 2 * (y - 8), 2 * right, 2 * (y + 8)], COLORS[0])
        sheet.text(right + 8, y, f"{value:.3g} {unit}", INK, 13, "lm")
    return sheet.finish()


def arrow_chart(title: str, arrows: dict[str, tuple[float, float]], note: str) -> Image.Image:
    """Return arrows from the origin to points (x, y), to one scale, with a note below.

    arrows: {name, which stands at the tip: point}.
    """
    width = 620
    height = 310
    sheet = Drawing(width, height + 64)
    sheet.text(10, 15, title, INK, 14, "lm")
    sheet.text(10, height + 46, note, INK, 14, "lm")

    # The scale and the origin that center everything, with room for the names.
    xs = [0.0] + [x for x, _ in arrows.values()]
    ys = [0.0] + [y for _, y in arrows.values()]
    x_span = max(xs) - min(xs)
    y_span = max(ys) - min(ys)
    scale = min((width - 280) / x_span, (height - 60) / y_span)
    origin_x = (width - scale * x_span) / 2 - scale * min(xs)
    origin_y = height + scale * min(ys)

    for (name, (x, y)), color in zip(arrows.items(), COLORS):
        tip_x = origin_x + scale * x
        tip_y = origin_y - scale * y
        sheet.arrow((origin_x, origin_y), (tip_x, tip_y), color=color)
        room = 12 / math.hypot(x, y)
        sheet.text(tip_x + room * x, tip_y - room * y, name, color, 14, "lm" if x >= 0 else "rm")
    sheet.draw.circle((2 * origin_x, 2 * origin_y), 8, INK)
    return sheet.finish()
