"""report: one page, and its main tables in Markdown, about all that is finished."""

from collections.abc import Sequence
import dataclasses
import logging
from typing import Protocol

from etils import epath
from ml_collections import config_dict

from srlm_jax import artifacts, report

logger = logging.getLogger(__name__)


class Step(Protocol):
  """What is read of a `steps.Step`; that module imports the stages, so it cannot be imported here."""

  @property
  def folder(self) -> str:
    """Its artifact's folder below the work directory."""

  @property
  def stage(self) -> str:
    """Its stage's name."""


def human_evaluations(workdir: epath.Path) -> dict[str, artifacts.Artifact]:
  """What `srlm human-eval-read` wrote, by folder: votes come from outside, so no step makes them."""
  folders = sorted((workdir / "analysis").glob("human-*"))
  found = {f"analysis/{folder.name}": artifacts.Artifact(folder, {}, {}) for folder in folders}
  return {name: artifact for name, artifact in found.items() if artifact.done}


def run(out: artifacts.Artifact, settings: config_dict.ConfigDict, steps: Sequence[Step]) -> None:
  """Writes report.html and report.md. `out.inputs` are all artifacts of the run by folder; unfinished ones are skipped.

  Made anew at every call, also of a run that is not complete. ValueError where a finished artifact was made with
  another configuration than `settings`.
  """
  finished = {name: artifact for name, artifact in out.inputs.items() if artifact.done}
  for artifact in finished.values():
    artifact.check_config()
  finished |= human_evaluations(out.folder.parent)
  missing = [step.folder for step in steps if step.stage != "report" and step.folder not in finished]
  name = str(settings.get("name", "")) or out.folder.parent.name
  found = report.collect(finished, settings, missing, name)
  logger.info("lineage:\n%s", found.tree)
  for line in (*found.warnings, *found.summary):
    logger.info("report: %s", line)
  # A partial report is made from what is there, so that what is missing may come later.
  done = dataclasses.replace(out, inputs=finished)
  done.folder.mkdir(parents=True, exist_ok=True)
  done.write("report.html", report.html(found))
  done.write("report.md", report.markdown(found))
  done.commit({"headline": found.headline, "summary": list(found.summary), "done": len(finished), "missing": missing})
  logger.info("report: %s", done.folder / "report.html")
