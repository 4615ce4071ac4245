"""A round of data against the oracle, worked out by hand."""

from etils import epath
import made_run
import pytest

from srlm_jax import diagnostics


def test_the_oracle_judges_the_pairs(tmp_path: epath.Path) -> None:
  [one] = diagnostics.load_rounds(made_run.whole_run(tmp_path).made, whole=True)
  figures = {row[0].text: row[1].text for row in diagnostics.oracle_table([one]).rows}
  assert figures["pairs ordered right, %"] == figures["pairs ordered wrong, %"] == "33.3"
  assert figures["pairs of equal quality, %"] == "33.3"
  assert figures["oracle mean, all responses"] == "2.67"  # (5 + 0 + 3 + 3 + 0 + 5) / 6
  assert diagnostics.calibration(one) == [(1, pytest.approx(8 / 3), 3), (4, pytest.approx(8 / 3), 3)]
  figures = {row[0].text: row[1].text for row in diagnostics.pairs_table([one]).rows}
  assert figures["both texts are equal, %"] == figures["chosen is the longer one, %"] == "33.3"
