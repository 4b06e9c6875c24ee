"""Charts are whole SVG documents that show what they were given."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from experiments import curve, retention
from experiments.plot import (
    BOTTOM,
    COLOURS,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Curve,
    line_chart,
    log_axis,
    ticks,
)
from training.progress import Point

SVG = "{http://www.w3.org/2000/svg}"


def test_a_chart_draws_every_curve_at_its_place() -> None:
    chart = line_chart(
        "retention & <forgetting>",
        "updates since",
        "right",
        [
            Curve("memory", [(0, 1.0), (10, 0.5)], errors=[0.0, 0.1]),
            Curve("closed form", [(0, 1.0)], dashed=True),
        ],
        y_range=(0, 1),
        y_percent=True,
    )
    root = ElementTree.fromstring(chart)
    texts = [element.text for element in root.iter(f"{SVG}text")]
    assert {"retention & <forgetting>", "memory", "closed form", "100 %", "10"} <= set(texts)
    circles = [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in root.iter(f"{SVG}circle")]
    (x_first, y_first), (x_last, y_last), other = circles
    assert x_first < x_last
    assert y_first < y_last  # SVG's y grows downwards
    assert other == (x_first, y_first)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 50), (0, 1_000_000), (0.93, 1.0), (-3, 4), (0, 0)])
def test_ticks_are_few_and_inside(low: float, high: float) -> None:
    drawn = ticks(low, high)
    assert 1 <= len(drawn) <= 7
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in drawn)


@pytest.mark.parametrize(
    ("low", "high"), [(1, 1), (253, 335), (0.4, 30_000), (3, 18), (0.001, 1e7), (1000, 1000), (99.9, 100.1)]
)
def test_a_logarithmic_axis_has_a_few_round_numbers_around_what_is_drawn(low: float, high: float) -> None:
    drawn = log_axis(low, high)
    assert drawn == sorted(drawn)
    assert drawn[0] <= low * (1 + 1e-9)
    assert high * (1 - 1e-9) <= drawn[-1]
    assert 3 <= len(drawn) <= 13


def test_a_logarithmic_chart_gives_every_tenfold_the_same_height() -> None:
    chart = line_chart("", "", "", [Curve("c", [(0, 1.0), (1, 10.0), (2, 100.0)])], y_log=True)
    circles = [float(c.attrib["cy"]) for c in ElementTree.fromstring(chart).iter(f"{SVG}circle")]
    assert circles[0] - circles[1] == pytest.approx(circles[1] - circles[2], abs=0.2)
    assert circles[0] > circles[1]


def test_marks_and_curves_keep_to_the_range() -> None:
    chart = line_chart("", "", "", [Curve("c", [(-5, 1.0), (50, 2.0)])], x_range=(0, 100), marks=[50])
    root = ElementTree.fromstring(chart)
    circles = [float(c.attrib["cx"]) for c in root.iter(f"{SVG}circle")]
    marks = [p.attrib["d"] for p in root.iter(f"{SVG}path") if p.attrib.get("stroke-dasharray") == "2 3"]
    assert circles[0] == LEFT
    assert marks[0].startswith(f"M{circles[1]:.1f} ")
    assert circles[1] == pytest.approx((LEFT + WIDTH - RIGHT) / 2)


def test_no_points_are_refused() -> None:
    with pytest.raises(ValueError, match="nothing"):
        line_chart("", "", "", [Curve("none", [])])


def test_the_curve_of_a_training_run(tmp_path: Path) -> None:
    for step in (25, 50):
        Point(step, 1.0, "full pool", 0.5, 0.25, 1.0, 1.0).keep(tmp_path / "curve.csv")
    drawn = curve.chart(tmp_path / "curve.csv")
    assert drawn.count("<circle") == 4
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="no column 'step'"):
        curve.chart(tmp_path / "other.csv")


def test_the_closed_form_counts_updates_not_contexts() -> None:
    """A context of two blocks leaves (1 - K/N)^2t behind t others."""
    layer = {"age": 0, "held": [16, 16], "num_tokens": 16, "num_blocks": 50}
    told = {"memory": True, "prompt": None, "given": ""}
    steps = {str(step): told | layer | {"age": 2 * step} for step in (0, 10)}
    items = {"0": {"unit": 0, "question": "", "answers": [""], "empty": False, "steps": steps}}
    chart = retention.chart(retention.summary(items, [0, 10]), "", "")
    last = ElementTree.fromstring(chart).findall(f"{SVG}circle")[-1]
    assert float(last.attrib["cy"]) == pytest.approx(
        HEIGHT - BOTTOM - 0.98**20 * (HEIGHT - TOP - BOTTOM), abs=0.1
    )


def test_error_bars_are_of_the_prompts_that_fitted() -> None:
    row = {"step": 0, "items": 100, "memory": 1.0, "empty": 0.0, "prompt": 0.5}
    survival = {"measured": 1.0, "closed_form": 1.0}
    lengths = []
    for counted in ({"prompts": 4}, {}):  # older results do not say how many
        chart = retention.chart({"rows": [row | counted | {"survival": survival}]}, "", "told nothing")
        assert ">told nothing<" in chart
        paths = [one.attrib for one in ElementTree.fromstring(chart).iter(f"{SVG}path")]
        (bar,) = (one["d"] for one in paths if one["stroke"] == COLOURS[1] and "V" in one["d"])
        low, high = (float(part) for part in bar.split(" ")[1].split("V"))
        lengths.append((low - high) / (HEIGHT - TOP - BOTTOM))
    assert lengths == pytest.approx([2 * 0.25, 2 * 0.05], abs=0.001)
