"""The journal of a training: what is written comes back, and a changed digit does not."""

import json
import math

from etils import epath
import pytest

from srlm_jax import journal

ROW = {"step": 3, "lr": 1e-6, "loss": 0.6931471824645996, "skipped": 0.0}


def test_a_line_is_json_and_comes_back() -> None:
  text = journal.line(ROW)
  assert text.endswith("\n") and text.count("\n") == 1
  assert {**json.loads(text), "crc": None} == {**ROW, "crc": None}
  assert journal.parse(text * 2) == [ROW, ROW]


def test_what_is_not_finite_is_null() -> None:
  text = journal.line({**ROW, "loss": math.nan, "grad_norm": math.inf})
  assert "NaN" not in text and "Infinity" not in text
  assert journal.parse(text) == [{**ROW, "loss": None, "grad_norm": None}]


def test_no_flipped_bit_gives_another_value() -> None:
  data = journal.line(ROW).encode()
  found = 0
  for bit in range(8 * len(data)):
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    rows = journal.parse(bytes(changed).decode(errors="replace"))
    found += None in rows
    assert all(row in (None, ROW) for row in rows), bit
  assert found > 8 * len(data) * 0.95  # The others change spaces between tokens, say.


@pytest.mark.parametrize("text", ["{", "[]", "3", '{"step": 3}', '{"loss": 1, "crc": "0"}', "\ufffd"])
def test_a_line_that_is_none_is_none(text: str) -> None:
  assert journal.parse(text + "\n") == [None]


def test_a_journal_goes_on_behind_the_saved_steps(tmp_path: epath.Path, caplog: pytest.LogCaptureFixture) -> None:
  path = epath.Path(tmp_path) / journal.NAME
  log = journal.Journal(path, 0)
  for step in (1, 2, 3):
    log.add({**ROW, "step": step})
  assert not path.exists()
  log.flush()
  with path.open("ab") as file:
    file.write(b'{"step": 4, "l\xff')
  done = epath.Path(tmp_path) / f"{journal.NAME}.done"
  done.write_text("of a commit that was stopped")
  again = journal.Journal(path, 2)
  assert [row["step"] for row in again.rows] == [1, 2] and not caplog.records
  assert not done.exists()
  again.add({**ROW, "step": 3})
  again.flush()
  assert path.read_text() == "".join(journal.line({**ROW, "step": step}) for step in (1, 2, 3))
  path.write_text(path.read_text().replace("6931", "6932", 1))
  assert [row["step"] for row in journal.Journal(path, 3).rows] == [2, 3]
  assert "the metrics of 1 of the first 3 steps are damaged or missing" in caplog.text


def test_without_a_path_nothing_is_kept(tmp_path: epath.Path) -> None:
  log = journal.Journal(None, 5)
  log.add(ROW)
  log.flush()
  assert log.rows == []
