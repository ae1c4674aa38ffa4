"""Charts and grids: what is drawn lies where its numbers say, and nothing is lost in silence."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from spin.eval import plots

WIDTH = 460
HEIGHT = 240
AXIS = HEIGHT - plots.TOP - plots.BOTTOM  # pixels


def pixels_of(chart: Image.Image, color: tuple[int, int, int]) -> np.ndarray:
    """Return [N,2]: row and column of every pixel of a color."""
    return np.argwhere((np.asarray(chart) == color).all(axis=2))


def test_points_and_intervals_lie_where_their_numbers_say():
    points = {
        "low": {"mean": 1.0, "low": 0.5, "high": 1.2},
        "high": {"mean": 3.0, "low": 2.9, "high": 3.6},
    }
    chart = plots.interval_chart("reward", points, WIDTH, HEIGHT)
    pixels_per_unit = AXIS / (3.1 * 1.1)  # from 0.5 to 3.6, and a twentieth on either side

    dots = pixels_of(chart, plots.COLORS[1])
    middle = (plots.LEFT + WIDTH - plots.RIGHT) / 2
    left = dots[dots[:, 1] < middle, 0].mean()
    right = dots[dots[:, 1] > middle, 0].mean()
    assert left - right == pytest.approx(2.0 * pixels_per_unit, abs=2)

    bars = pixels_of(chart, plots.COLORS[0])
    for half in (bars[bars[:, 1] < middle], bars[bars[:, 1] > middle]):
        assert np.ptp(half[:, 0]) == pytest.approx(0.7 * pixels_per_unit, abs=3)


def test_bars_start_at_zero_if_it_is_in_sight():
    points = {"a": {"mean": 2.0, "low": 1.5, "high": 2.5}, "b": {"mean": -1, "low": -2, "high": 0}}
    chart = np.asarray(plots.interval_chart("gain", points, WIDTH, HEIGHT))
    axes = plots.make_axes("gain", [-2, 2.5], WIDTH, HEIGHT)
    column = chart[:, int(axes.x(0.25)) + 12]  # beside the dot and the interval
    bar = np.argwhere((column == plots.PALE).all(axis=1))[:, 0]
    assert round(axes.y(2.0)) in bar and round(axes.y(1.0)) in bar
    assert round(axes.y(-0.3)) not in bar


def test_a_line_goes_through_its_values():
    chart = plots.line_chart("loss", {"loss": [0.0, 1.0, 0.0]}, (), WIDTH, HEIGHT)
    line = pixels_of(chart, plots.COLORS[0])
    axes = plots.make_axes("loss", [0, 1], WIDTH, HEIGHT)
    peak = line[line[:, 0].argmin()]
    assert peak[0] == pytest.approx(axes.y(1), abs=2)
    assert peak[1] == pytest.approx(axes.x(0.5), abs=3)
    assert line[:, 1].min() == pytest.approx(axes.x(0), abs=1)
    assert line[:, 1].max() == pytest.approx(axes.x(1), abs=1)


def test_values_that_are_not_finite_are_left_out():
    finite = plots.line_chart("loss", {"loss": [0.0, 1.0]}, (), WIDTH, HEIGHT)
    axis_only = plots.line_chart("loss", {"loss": [math.nan, math.inf]}, (), WIDTH, HEIGHT)
    assert len(pixels_of(finite, plots.COLORS[0])) > 300
    assert len(pixels_of(axis_only, plots.COLORS[0])) == 0
    single = plots.line_chart("loss", {"loss": [math.nan, 1.0]}, (), WIDTH, HEIGHT)
    assert 4 < len(pixels_of(single, plots.COLORS[0])) < 40  # a dot


@pytest.mark.parametrize("count", [2, 5])
def test_every_line_has_a_color_of_its_own(count):
    lines = {f"line {i}": [i, i + 0.5] for i in range(count)}
    chart = plots.line_chart("many", lines, (), WIDTH, HEIGHT)
    for color in plots.COLORS[:count]:
        assert len(pixels_of(chart, color)) > 300


def test_more_lines_than_colors_are_refused():
    lines = {f"line {i}": [i, i + 0.5] for i in range(6)}
    with pytest.raises(ValueError, match="many: 6 lines, but there are 5 colors"):
        plots.line_chart("many", lines, (), WIDTH, HEIGHT)


def test_a_running_mean_begins_anew_after_a_mark_and_skips_what_is_not_finite():
    values = [1.0, 3.0, math.nan, 5.0, 11.0, 13.0]
    means = plots.running_mean(values, marks=(4,), window=2)
    assert means == pytest.approx([1.0, 2.0, math.nan, 4.0, 11.0, 12.0], nan_ok=True)
    assert plots.running_mean(values[3:], marks=(), window=1) == values[3:]


def test_a_running_mean_lies_over_pale_single_values():
    lines = {"loss": [0.0, 1.0] * 20}
    chart = plots.line_chart("loss", lines, (), WIDTH, HEIGHT, window=10)
    mean = pixels_of(chart, plots.COLORS[0])
    values = pixels_of(chart, plots.pale(plots.COLORS[0]))
    axes = plots.make_axes("loss", [0, 1], WIDTH, HEIGHT)
    later = mean[mean[:, 1] > axes.x(0.5)]
    assert later[:, 0] == pytest.approx(axes.y(0.5), abs=2)
    assert values[:, 0].min() == pytest.approx(axes.y(1), abs=2)
    assert values[:, 0].max() == pytest.approx(axes.y(0), abs=2)


def test_marks_are_vertical_lines():
    lines = {"loss": [0.0, 1.0, 0.0, 1.0, 0.0]}
    without = np.asarray(plots.line_chart("loss", lines, (), WIDTH, HEIGHT), int)
    marked = np.asarray(plots.line_chart("loss", lines, (2, 4), WIDTH, HEIGHT), int)
    changed = np.abs(marked - without).sum(axis=(0, 2)).nonzero()[0]
    axes = plots.make_axes("loss", [0, 1], WIDTH, HEIGHT)
    assert changed == pytest.approx([axes.x(0.25), axes.x(0.75)], abs=1)


@given(st.floats(1e-12, 1e12))
def test_ticks_are_round_and_three_to_six(span):
    spacing = plots.tick_spacing(span)
    mantissa = f"{spacing:.6e}"[0]
    assert mantissa in "125" and float(f"{spacing:.0e}") == pytest.approx(spacing, rel=1e-12)
    assert 2 * (1 - 1e-9) <= span / spacing <= 5 * (1 + 1e-9)


def test_a_grid_has_a_cell_for_every_image():
    small = Image.new("RGB", (2, 2), "red")
    wide = Image.new("RGB", (400, 100), "blue")
    sheet = plots.grid([[small, wide], [wide, small]], ["one", "two"], ["first", "second"], cell=64)
    pitch = 64 + plots.GAP
    header = plots.LINE + plots.GAP
    assert sheet.size == (plots.MARGIN + 2 * pitch, header + 2 * pitch)
    red = pixels_of(sheet, (255, 0, 0))
    assert len(red) == 2 * 64 * 64, "a small image is enlarged by repeating its pixels"
    assert len(pixels_of(sheet, (0, 0, 255))) == 2 * 64 * 16, "a wide one keeps its proportions"
    with pytest.raises(ValueError):
        plots.grid([[small]], ["one"], ["first", "second"])


def test_a_difference_is_amplified_around_mid_gray_and_clipped():
    ideal = Image.new("RGB", (2, 2), (100, 100, 100))
    image = Image.new("RGB", (2, 2), (110, 90, 100))
    image.putpixel((1, 0), (255, 0, 100))
    difference = plots.difference(image, ideal, gain=3)
    assert difference.getpixel((0, 0)) == (158, 98, 128)
    assert difference.getpixel((1, 0)) == (255, 0, 128)
    assert pixels_of(plots.difference(ideal, ideal, gain=3), (128, 128, 128)).shape == (4, 2)


def test_a_smaller_ideal_image_is_enlarged_to_be_compared():
    ideal = Image.new("RGB", (2, 2), "red")
    ideal.putpixel((1, 1), (0, 0, 255))
    image = ideal.resize((8, 8), Image.Resampling.NEAREST)
    assert len(pixels_of(plots.difference(image, ideal, gain=3), (128, 128, 128))) == 64


def test_panels_stand_two_a_row():
    panels = [Image.new("RGB", (10, 6), color) for color in ("red", "green", "blue")]
    sheet = plots.two_a_row(panels)
    assert sheet.size == (20, 12)
    assert sheet.getpixel((15, 2)) == (0, 128, 0) and sheet.getpixel((5, 8)) == (0, 0, 255)
    assert plots.two_a_row(panels[:1]).size == (10, 6)
