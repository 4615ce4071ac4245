"""The notebook: committed without outputs, and run from top to bottom at smoke size."""

import ast
import os
import pathlib

import pytest

nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed: pip install -e '.[test]'")
NOTEBOOK = pathlib.Path(__file__).parents[1] / "notebooks" / "self_rewarding.ipynb"


def test_it_is_committed_without_outputs() -> None:
  book = nbformat.read(NOTEBOOK, as_version=4)
  nbformat.validate(book)
  code = [cell for cell in book.cells if cell.cell_type == "code"]
  assert len(code) >= 8 and book.cells[0].cell_type == "markdown"
  for cell in code:
    assert cell.outputs == [] and cell.execution_count is None, f"clear the outputs of:\n{cell.source}"
    ast.parse(cell.source)


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(tmp_path: pathlib.Path) -> None:
  nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed: pip install -e '.[test]'")
  book = nbformat.read(NOTEBOOK, as_version=4)
  client = nbclient.NotebookClient(
    book, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
  )
  # One device: conftest's eight are slow on a run this long.
  flags = os.environ["XLA_FLAGS"].replace("--xla_force_host_platform_device_count=8", "")
  client.execute(env={**os.environ, "SRLM_NOTEBOOK_SMOKE": "1", "XLA_FLAGS": flags})
  outputs = [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]
  printed = "".join(output.text for output in outputs if output.output_type == "stream")
  shown = [output.data for output in outputs if output.output_type == "display_data"]
  assert "JAX" in printed and "stage dpo" in printed and "As judges, pairwise accuracy" in printed
  assert "chosen,   judged" in printed and "JUDGEMENT of response 1" in printed
  assert sum("image/png" in data for data in shown) == 2
  pages = [data["text/html"] for data in shown if "text/html" in data]
  assert "<svg" in pages[0] and "srcdoc=" in pages[1] and "Self-rewarding run: the tiny world" in pages[1]
  assert (tmp_path / "runs" / "notebook_smoke" / "report" / "report.html").exists()
