"""Tables and figures as text."""

import made_run
import pytest

from srlm_jax import tables


@pytest.mark.parametrize(
  ("cell", "text", "small"),
  [
    (tables.estimate(made_run.estimate(0.7874, 0.7, 0.85)), "78.7", "[70.0, 85.0]"),
    (tables.estimate(made_run.estimate(-0.18), digits=3), "−0.180", ""),
    (tables.estimate(made_run.estimate(None)), "–", ""),
    (tables.estimate(made_run.estimate(0.1, -0.05, 0.2), signed=True), "+10.0", "[−5.0, +20.0]"),
  ],
)
def test_estimates_are_shown_with_their_intervals(cell: tables.Cell, text: str, small: str) -> None:
  assert (cell.text, cell.small) == (text, small)


def test_markdown_shows_marks_as_they_are() -> None:
  table = tables.Table("t", "a|b", ("x", "y"), (tables.row("<b>|*", "1\n2"),))
  assert tables.markdown(table) == "### a\\|b\n\n| x | y |\n| --- | ---: |\n| &lt;b>\\|\\* | 1 2 |\n"
  with pytest.raises(ValueError, match="a row of 1 cells under 2 columns"):
    tables.Table("t", "", ("x", "y"), (tables.row("1"),))
