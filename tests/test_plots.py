"""The figures' SVG, and the thinning of curves."""

import re

from srlm_jax import plots


def test_figures_take_their_colours_from_the_page() -> None:
  svg = plots.duels([("M2 over M1", 0.5, 0.3, 0.2)])
  assert svg.startswith("<svg ") and svg.rstrip().endswith("</svg>")
  assert "var(--c1)" in svg and "var(--ink)" in svg
  assert not re.search(r"#(111213|d1d2d3|2f6fb1|d9822c)", svg)
  assert re.search(r'<svg [^>]*width="788"', svg.split(">")[0] + ">") and " height=" not in svg.split(">")[0]
  assert svg == plots.duels([("M2 over M1", 0.5, 0.3, 0.2)])


def test_a_map_has_a_dot_for_each_text() -> None:
  found = {"IFT": [(float(n % 20), float(n // 20)) for n in range(300)], "EFT": [(30.0, 1.0), (31.0, 2.0)]}
  svg = plots.points(found)
  lines = {len(re.findall(r"L [-0-9.]+ [-0-9.]+", path)) for path in re.findall(r' d="([^"]+)"', svg)}
  assert {300, 2} <= lines
  assert "IFT (300)" in svg and "var(--c2)" in svg and "<image" not in svg
  assert plots.read_points('{"points": [["IFT", 1, 2], ["EFT", 3, 4], ["IFT", 5, 6]]}') == {
    "IFT": [(1, 2), (5, 6)],
    "EFT": [(3, 4)],
  }


def test_a_name_with_two_dollars_is_no_formula() -> None:
  assert "from $5_ to $9" in plots.duels([("from $5_ to $9", 0.5, 0.3, 0.2)])


def test_curves_are_averaged_over_windows() -> None:
  rows = [{"step": step, "loss": float(step)} for step in range(1, 8)]
  assert plots.smooth(rows, points=3) == {"step": [2.0, 5.0, 7.0], "loss": [2.0, 5.0, 7.0]}
  assert plots.smooth([]) == {}
