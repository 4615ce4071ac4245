"""The list of error messages: whole, and made from what the tests raise."""

import ast
import os
import pathlib
import subprocess
import sys
import textwrap
from typing import Any

import error_list
from error_list import Site
import pytest

SOURCE = """
import sys

def low(value):
  if value < 0:
    raise ValueError(f"value={value}: must be at "
                     f"least {0}. Raise | it.")
  return value

def low_of(text):
  try:
    return low(int(text))
  except TypeError as error:
    raise made(text, kind="a number") from error

def made(value, kind):
  return ValueError(f"{value} is not {kind}.")

def leave(code):
  if code:
    sys.exit(code)
  sys.exit(f"good bye, {code}")

def again():
  try:
    low(-1)
  except ValueError as error:
    raise
  except KeyError as error:
    raise error
"""
LOW = Site("toy", "ValueError", "value=…: must be at least …. Raise | it.")
SITES = [
  LOW,
  Site("toy", "made", "…, a number"),
  Site("toy", "ValueError", "… is not …."),
  Site("toy", "sys.exit", "good bye, …"),
]


def test_every_place_that_makes_an_error_is_found_and_what_is_raised_again_is_not() -> None:
  tree, found = error_list.marked("toy", SOURCE)
  assert found == SITES
  plain = [(type(node), node.lineno) for node in ast.walk(ast.parse(SOURCE)) if isinstance(node, ast.stmt)]
  assert [(type(node), node.lineno) for node in ast.walk(tree) if isinstance(node, ast.stmt)] == plain


@pytest.fixture
def toy(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
  """The source as a module that notes what it raises, in tmp_path/notes."""
  (tmp_path / "notes").touch()
  monkeypatch.setenv(error_list.NOTES, str(tmp_path / "notes"))
  space: dict[str, Any] = {"_noted": error_list._noted}
  exec(compile(error_list.marked("toy", SOURCE)[0], "toy.py", "exec"), space)
  return space


def test_what_is_raised_is_noted_with_its_test(toy: dict[str, Any], tmp_path: pathlib.Path) -> None:
  assert toy["low"](3) == 3
  with pytest.raises(ValueError, match="value=-1: must be at least 0"):
    toy["again"]()
  with pytest.raises(ValueError, match=r"\[\] is not a number"):
    toy["low_of"]([])
  with pytest.raises(SystemExit, match="good bye, 0"):
    toy["leave"](0)
  name = "test_error_list.py::test_what_is_raised_is_noted_with_its_test"
  notes = list(error_list.notes_of(tmp_path / "notes"))
  assert notes == [(site, name) for site in (LOW, SITES[2], SITES[1], SITES[3])]


def test_a_subprocess_notes_what_it_raises_too(tmp_path: pathlib.Path) -> None:
  """The whole plugin: a suite of one test, which starts a program."""
  test = tmp_path / "test_inner.py"
  test.write_text(
    textwrap.dedent("""
    import subprocess, sys
    def test_inner():
      code = "from srlm_jax import templates; templates.load_rubric('no_such')"
      done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
      assert "no template" in done.stderr
    """)
  )
  command = [sys.executable, "-m", "pytest", "-q", "-p", "error_list", f"--rootdir={tmp_path}", str(test)]
  path = os.pathsep.join([str(error_list.TESTS), str(error_list.TESTS.parent)])
  environment = {key: value for key, value in os.environ.items() if key != error_list.NOTES}
  done = subprocess.run(
    [*command, "--error-list=ERRORS.md"],
    cwd=tmp_path,
    env={**environment, "PYTHONPATH": path},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  found = error_list.read(tmp_path / "ERRORS.md")
  assert list(found) == error_list.sites()
  assert {site.message[:13]: tests for site, tests in found.items() if tests} == {
    "no template …": ["test_inner.py::test_inner"]
  }


def test_a_list_is_read_as_it_was_written() -> None:
  found = {LOW: ["test_a.py::test_b"], SITES[1]: []}
  text = error_list.markdown(found)
  assert "| toy | ValueError | value=…: must be at least …. Raise \\| it. | test_a.py::test_b |" in text
  assert "| no test yet |" in text and "1 of the\n2 have one" in text
  path = error_list.LIST.with_name("none.md")
  assert error_list.read(path) == {}


def test_a_part_of_the_suite_changes_what_it_concerns_alone(tmp_path: pathlib.Path) -> None:
  here = "test_error_list.py::" + test_a_part_of_the_suite_changes_what_it_concerns_alone.__name__
  other = "test_ranges.py::test_the_papers_values_pass"
  path = tmp_path / "list.md"
  path.write_text(error_list.markdown({LOW: [other], SITES[1]: [here], Site("toy", "ValueError", "gone"): [here]}))
  found = error_list.merged(error_list.read(path), [(SITES[2], here)], {here}, SITES)
  assert found == {LOW: [other], SITES[1]: [], SITES[2]: [here], SITES[3]: []}
  path.write_text(error_list.markdown({LOW: ["test_ranges.py::test_that_is_gone"]}))
  assert error_list.merged(error_list.read(path), [], set(), [LOW]) == {LOW: []}


def test_the_list_has_every_message_of_the_sources() -> None:
  """ERRORS.md, by the command in its first lines."""
  missing = sorted(set(error_list.sites()) - error_list.read(error_list.LIST).keys())
  gone = sorted(error_list.read(error_list.LIST).keys() - set(error_list.sites()))
  assert not missing and not gone, f"run `{error_list.COMMAND} FILE …` with the tests of what changed"


def test_every_message_of_the_list_has_a_test_or_a_reason() -> None:
  found = error_list.read(error_list.LIST)
  untested = [site for site, tests in found.items() if not tests and not error_list.reason(site)]
  assert len(untested) <= error_list.UNTESTED, "\n".join(map(str, untested))
  assert [test for tests in found.values() for test in tests if not error_list.exists(test)] == []
  stale = [site for site, tests in found.items() if tests and error_list.reason(site)]
  assert not stale, "a test raises it: take it out of UNREACHED"
  assert not [key for key in error_list.UNREACHED if not any(error_list.reason(site) for site in found)]
