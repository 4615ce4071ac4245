"""Where each model comes from: parents, references, data and digests, read from the artifacts' own manifests."""

from collections.abc import Mapping
import dataclasses
import json

from srlm_jax import artifacts, digests, tables

SHORT = 12  # Hex digits of a digest that are shown.
Finished = Mapping[str, artifacts.Artifact]  # Folder name → committed artifact.


@dataclasses.dataclass(frozen=True)
class Model:
  """One model of a run.

  Attributes:
    name: its folder.
    parent: the folder of the model that it was trained from, "" for a root.
    reference: the folder of DPO's reference model, "" where there is none.
    method: "DPO", "SFT", or how a root came to be.
    data: what it was trained on, in words.
    config: digest of the part of the configuration that made it.
    digest: of its content.
    parameters: their number.
    steps: of training; None where there was none.
    tokenizer: digest of its tokenizer.
  """

  name: str
  parent: str
  reference: str
  method: str
  data: str
  config: str
  digest: str
  parameters: int
  steps: int | None
  tokenizer: str


def label(name: str) -> str:
  """A model's name as it is shown: "M2" for "m2", "SFT baseline" for "baseline"; other names as they are."""
  if name.startswith("m") and name[1:].isdigit():
    return name.upper()
  return {"baseline": "SFT baseline", "writer": "prompt writer", "judge": "outside judge"}.get(name, name)


def _data(artifact: artifacts.Artifact) -> str:
  """What a model was trained on, from what it and its inputs recorded."""
  facts = artifact.manifest()["facts"]
  if "pairs" in facts:
    return f"{facts['pairs']:,} pairs of {artifact.inputs['pairs'].folder.parent.name.upper()}"
  if "documents" in facts:
    return f"{facts['documents']:,} documents, {facts['tokens']:,} tokens"
  counts = facts.get("counts", {})
  used = {
    kind: counts[f"{kind} given"]
    - sum(number for name, number in counts.items() if name.startswith(f"{kind} left out"))
    for kind in ("ift", "eft", "aift")
    if f"{kind} given" in counts
  }
  return " + ".join(f"{kind.upper()} {number:,}" for kind, number in used.items())


def _model(name: str, artifact: artifacts.Artifact, names: Mapping[str, str]) -> Model:
  manifest, inputs = artifact.manifest(), artifact.inputs
  facts = manifest["facts"]
  parent = names.get(str(inputs["parent"].folder), "") if "parent" in inputs else ""
  reference = names.get(str(inputs["pairs"].inputs["reference"].folder), "") if "pairs" in inputs else ""
  roots = {"hf": "imported", "pretrain": "pretrained", "random": "random weights"}
  return Model(
    name=name,
    parent=parent,
    reference=reference,
    method="DPO" if "pairs" in inputs else "SFT" if "parent" in inputs else roots.get(facts.get("kind", ""), ""),
    data=_data(artifact),
    config=digests.sha256(json.dumps(manifest["config"], sort_keys=True).encode())[:SHORT],
    digest=manifest["digest"][:SHORT],
    parameters=facts["parameters"],
    steps=facts.get("steps"),
    tokenizer=facts["tokenizer"][:SHORT],
  )


def models(finished: Finished) -> list[Model]:
  """The models among the finished artifacts: those that count their parameters, in their order."""
  names = {str(artifact.folder): name for name, artifact in finished.items()}
  found = [(name, artifact) for name, artifact in finished.items() if "parameters" in artifact.manifest()["facts"]]
  return [_model(name, artifact, names) for name, artifact in found]


def stale(finished: Finished) -> list[str]:
  """What was made from something that has changed since, in words; empty where everything fits."""
  return [
    f"{name} was made from another {role} than the one that is there now"
    for name, artifact in finished.items()
    for role, digest in artifact.manifest()["inputs"].items()
    if role in artifact.inputs and artifact.inputs[role].done and artifact.inputs[role].digest() != digest
  ]


def table(found: list[Model]) -> tables.Table:
  """All that is known of each model."""
  columns = ("model", "by", "from", "reference", "data", "steps", "parameters", "content", "config", "tokenizer")
  rows = tuple(
    tables.row(
      label(one.name),
      one.method,
      label(one.parent) or tables.MISSING,
      label(one.reference) or tables.MISSING,
      one.data or tables.MISSING,
      tables.number(one.steps),
      tables.number(one.parameters),
      one.digest,
      one.config,
      one.tokenizer,
    )
    for one in found
  )
  note = f"Content, config and tokenizer are the first {SHORT} hex digits of SHA-256 digests."
  return tables.Table(
    "models", "Models and what they are made from", columns, rows, note, words=(0, 1, 2, 3, 4, 7, 8, 9)
  )


def _children(found: list[Model], parent: str) -> list[Model]:
  names = {one.name for one in found}
  return [one for one in found if (one.parent if one.parent in names else "") == parent]


def lineage_text(found: list[Model]) -> str:
  """The tree of the models, for the log and for Markdown."""
  lines: list[str] = []

  def add(one: Model, lead: str, branch: str) -> None:
    how = ", ".join(
      part for part in (one.method, one.data, one.reference and f"reference {label(one.reference)}") if part
    )
    lines.append(f"{lead}{branch}{label(one.name)} {one.digest} ({how}; {one.parameters:,} parameters)")
    below = lead + {"": "", "├─ ": "│  ", "└─ ": "   "}[branch]
    children = _children(found, one.name)
    for child in children:
      add(child, below, "└─ " if child is children[-1] else "├─ ")

  for root in _children(found, ""):
    add(root, "", "")
  return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Node:
  """A box of the diagram, its upper left corner at (x, y); `to` is the corner of its parent's box."""

  name: str
  lines: tuple[str, ...]
  how: tuple[str, ...]
  x: int
  y: int
  to: tuple[int, int] | None


@dataclasses.dataclass(frozen=True)
class Diagram:
  """Boxes of one size, from left to right by generation."""

  nodes: tuple[Node, ...]
  width: int
  height: int
  box: tuple[int, int] = (132, 54)


def diagram(found: list[Model], captions: Mapping[str, str]) -> Diagram:
  """Places the models: the longest line of descent straight to the right, side branches below it.

  Args:
    found: the models.
    captions: one more line for some models, by name.
  """
  across, down = 292, 84
  nodes: list[Node] = []

  def depth(one: Model) -> int:
    return 1 + max((depth(child) for child in _children(found, one.name)), default=0)

  def place(one: Model, column: int, line: int, to: tuple[int, int] | None) -> int:
    """Adds a model and its descendants from `line` on; returns the first line that is free below them."""
    x, y = column * across, line * down
    how = (one.method, one.data) if to else ()
    caption = captions.get(one.name) or one.method
    nodes.append(Node(label(one.name), (one.digest, caption), how, x, y, to))
    free = line
    for child in sorted(_children(found, one.name), key=depth, reverse=True):
      free = place(child, column + 1, free, (x, y))
    return max(free, line + 1)

  free = 0
  for root in _children(found, ""):
    free = place(root, 0, free, None)
  width = max((node.x for node in nodes), default=0) + Diagram.box[0]
  return Diagram(tuple(nodes), width, max(free - 1, 0) * down + Diagram.box[1])
