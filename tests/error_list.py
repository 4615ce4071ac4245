"""A pytest plugin that writes the list of error messages, each with the tests that raise it.

launch/test.sh --error-list=tests/ERRORS.md runs the tests with every `raise`, `return SomeError(...)` and
`sys.exit(text)` of the package noting that it was reached, subprocesses included, and by which test. Of tests that did
not run, what the file says already is kept: a part of the suite brings the list up to date where it is concerned.
"""

import ast
import builtins
from collections.abc import Iterable, Iterator, Mapping, Sequence
import dataclasses
import importlib.abc
import importlib.machinery
import json
import os
import pathlib
import sys
import tempfile
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # Subprocesses import this module, too, and need not wait for pytest.
  import pytest

TESTS = pathlib.Path(__file__).parent
PACKAGE = TESTS.parent / "srlm_jax"
LIST = TESTS / "ERRORS.md"
NOTES = "SRLM_ERROR_NOTES"  # The file in which processes note what was reached.
SHOWN = 2  # Tests that are named for each message, at the most.
COMMAND = "launch/test.sh --error-list=tests/ERRORS.md"

UNTESTED = 0  # Messages without a test or a reason, at the most: to be lowered with the list.

# Messages that no test here can raise, by module and beginning, each with the reason.
UNREACHED: dict[tuple[str, str], str] = {}


@dataclasses.dataclass(frozen=True, order=True)
class Site:
  """Places of a module that raise the same message, with … for what is filled in."""

  module: str
  error: str
  message: str


def template(node: ast.expr) -> str:
  """What an argument says, with … for what is known only when it runs."""
  if isinstance(node, ast.Constant):
    text = str(node.value)
  elif isinstance(node, ast.JoinedStr):
    text = "".join(template(part) for part in node.values)
  elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
    text = template(node.left) + template(node.right)
  else:
    text = "…"
  return text


def site_of(module: str, node: ast.expr | None) -> Site | None:
  """The site of an expression that makes an error; None where it is raised again, or is none."""
  if not isinstance(node, ast.Call):
    return None
  message = ", ".join(template(one) for one in (*node.args, *(word.value for word in node.keywords)))
  return Site(module, ast.unparse(node.func), " ".join(message.split()))


def is_error(node: ast.expr | None) -> bool:
  """Whether an expression calls a class of errors, by its name."""
  return isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Error")


class Marked(ast.NodeTransformer):
  """Wraps each error where it is made, so that it is noted; `sites` are those found."""

  def __init__(self, module: str) -> None:
    self.module, self.sites = module, list[Site]()

  def wrap(self, node: ast.expr) -> ast.expr:
    site = site_of(self.module, node)
    if site is None:
      return node
    self.sites.append(site)
    noted = ast.Call(ast.Name("_noted", ast.Load()), [node, ast.Constant(json.dumps(dataclasses.astuple(site)))], [])
    return ast.fix_missing_locations(ast.copy_location(noted, node))

  def visit_Raise(self, node: ast.Raise) -> ast.Raise:
    self.generic_visit(node)
    if node.exc is not None:
      node.exc = self.wrap(node.exc)
    return node

  def visit_Return(self, node: ast.Return) -> ast.Return:
    self.generic_visit(node)
    if node.value is not None and is_error(node.value):
      node.value = self.wrap(node.value)
    return node

  def visit_Call(self, node: ast.Call) -> ast.expr:
    self.generic_visit(node)
    says = node.args and isinstance(node.args[0], (ast.JoinedStr, ast.Constant))
    if ast.unparse(node.func) == "sys.exit" and says and not isinstance(getattr(node.args[0], "value", ""), int):
      site = Site(self.module, "sys.exit", " ".join(template(node.args[0]).split()))
      self.sites.append(site)
      noted = ast.Call(
        ast.Name("_noted", ast.Load()), [node.args[0], ast.Constant(json.dumps(dataclasses.astuple(site)))], []
      )
      node.args[0] = ast.fix_missing_locations(ast.copy_location(noted, node.args[0]))
    return node


def marked(module: str, source: str) -> tuple[ast.Module, list[Site]]:
  """A module's tree with its errors wrapped, on the same lines, and their sites."""
  marks = Marked(module)
  return marks.visit(ast.parse(source)), marks.sites


def sites(package: pathlib.Path = PACKAGE) -> list[Site]:
  """Every site of the package, in order."""
  found: set[Site] = set()
  for path in package.rglob("*.py"):
    module = ".".join(path.relative_to(package).with_suffix("").parts)
    found |= set(marked(module, path.read_text(encoding="utf-8"))[1])
  return sorted(found)


# While tests run


def _noted(error: Any, site: str) -> Any:
  """Notes that a site was reached, and by which test; the error itself goes on."""
  test = os.environ.get("PYTEST_CURRENT_TEST", "").partition(" ")[0].partition("[")[0]
  if test and (notes := os.environ.get(NOTES)):
    with open(notes, "a", encoding="utf-8") as file:  # Short lines: processes append whole ones.
      file.write(json.dumps([json.loads(site), test.rpartition("/")[2]]) + "\n")
  return error


class Loader(importlib.machinery.SourceFileLoader):
  """Loads a module of the package with its errors wrapped; nothing is cached."""

  def get_code(self, fullname: str) -> types.CodeType:
    module = fullname.partition(".")[2]
    tree, _ = marked(module, self.get_data(self.path).decode())
    return compile(tree, self.path, "exec", dont_inherit=True)


class Finder(importlib.abc.MetaPathFinder):
  """Finds the package's modules as always, and loads them by Loader."""

  def find_spec(
    self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
  ) -> importlib.machinery.ModuleSpec | None:
    if fullname.partition(".")[0] != PACKAGE.name:
      return None
    spec = importlib.machinery.PathFinder.find_spec(fullname, path)
    if spec and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
      spec.loader = Loader(fullname, spec.loader.path)
    return spec


def install() -> None:
  """From now on the package's modules note their errors, in the file that the environment names."""
  builtins._noted = _noted  # type: ignore[attr-defined]
  sys.meta_path.insert(0, Finder())


# The list


def read(path: pathlib.Path) -> dict[Site, list[str]]:
  """The tests of each message in a list; nothing where there is no list yet."""
  found: dict[Site, list[str]] = {}
  if not path.exists():
    return found
  for line in path.read_text(encoding="utf-8").splitlines():
    cells = [cell.strip().replace("\0", "|") for cell in line.replace("\\|", "\0").split("|")[1:-1]]
    if len(cells) == 4 and cells[0] not in ("module", "---"):
      module, error, message, tests = cells
      found[Site(module, error, message)] = [name for name in tests.split(", ") if name.startswith("test_")]
  return found


def merged(
  old: Mapping[Site, Sequence[str]], notes: Iterable[tuple[Site, str]], ran: set[str], known: Sequence[Site]
) -> dict[Site, list[str]]:
  """For each known site the tests that reach it: those noted, and of earlier ones those that did not run now."""
  found: dict[Site, set[str]] = {
    site: {test for test in old.get(site, ()) if test not in ran and exists(test)} for site in known
  }
  for site, test in notes:
    if site in found:
      found[site].add(test)
  return {site: _shown(site, tests) for site, tests in found.items()}


def exists(test: str) -> bool:
  """Whether the sources have a test, "test_ranges.py::test_the_papers_values_pass"."""
  file, _, name = test.partition("::")
  path = TESTS / file
  return path.exists() and f"def {name}(" in path.read_text(encoding="utf-8")


def _shown(site: Site, tests: set[str]) -> list[str]:
  """A few of the tests: those of the module's own file first."""
  own = f"test_{site.module.rpartition('.')[2]}.py"
  return sorted(tests, key=lambda test: (not test.startswith(own), test))[:SHOWN]


def reason(site: Site) -> str:
  """Why no test here can raise it, from UNREACHED; "" for the others."""
  for (module, start), why in UNREACHED.items():
    if site.module == module and site.message.startswith(start):
      return why
  return ""


def markdown(found: Mapping[Site, Sequence[str]]) -> str:
  """The list as a page."""

  def row(site: Site, tests: Sequence[str]) -> str:
    cells = (site.module, site.error, site.message, ", ".join(tests) or reason(site) or "no test yet")
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

  tested = sum(bool(tests) for tests in found.values())
  return "\n".join(
    [
      "# Error messages",
      "",
      f"Every message with which the package refuses something, and a test or two that raise it: {tested} of the",
      f"{len(found)} have one; beside the others stands why not. … is filled in. Made by",
      f"`{COMMAND}`; with a few test files named, it brings up to date what these raise.",
      "`tests/test_error_list.py` holds it against the sources.",
      "",
      "| module | error | message | tests |",
      "|---|---|---|---|",
      *(row(site, found[site]) for site in sorted(found)),
      "",
    ]
  )


def notes_of(path: pathlib.Path) -> Iterator[tuple[Site, str]]:
  """What processes noted."""
  for line in path.read_text(encoding="utf-8").splitlines():
    site, test = json.loads(line)
    yield Site(*site), test


# The plugin: conftest.py takes these over


def pytest_addoption(parser: "pytest.Parser") -> None:
  parser.addoption("--error-list", metavar="FILE", help="write the error messages and the tests that raise them")


def pytest_configure(config: "pytest.Config") -> None:
  if not config.getoption("--error-list"):
    return
  folder = pathlib.Path(tempfile.mkdtemp(prefix="error_list_"))
  os.environ[NOTES] = str(folder / "notes.jsonl")
  (folder / "notes.jsonl").touch()
  (folder / "sitecustomize.py").write_text(
    f"import sys\nsys.path.append({str(TESTS)!r})\nimport error_list\nerror_list.install()\n"
  )
  os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
  install()


def pytest_sessionfinish(session: "pytest.Session") -> None:
  target = session.config.getoption("--error-list")
  if not target or not session.items:
    return
  notes = pathlib.Path(os.environ[NOTES])
  ran = {item.nodeid.partition("[")[0].rpartition("/")[2] for item in session.items}
  path = pathlib.Path(session.config.invocation_params.dir, target)
  found = merged(read(path), notes_of(notes), ran, sites())
  path.write_text(markdown(found), encoding="utf-8")
  print(f"\n{path}: {sum(map(bool, found.values()))} of {len(found)} messages have a test")
