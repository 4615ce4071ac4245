"""The direction of imports: a module knows what stands above it in LAYERS, and nothing else of the package."""

import ast
from collections.abc import Iterator
import pathlib

import pytest

import srlm_jax

PACKAGE = pathlib.Path(srlm_jax.__file__).parent

# Every module, in an order in which each imports earlier ones only.
LAYERS = {
  "files": "version storage digests",
  "data": (
    "lines records templates filters metrics oasst oasst_split eft pairing canaries repetition world world_judges "
    "world_files classes strata tsne agreement paper tables human_eval selection monitors health plots pages config"
  ),
  "arrays": "xla_flags endings interruption distributed compiled mesh tokenizer chat batching dataset",
  "model": "attention decode_attention llama hf_files convert",
  "pure": "logprobs losses train_step sampling",
  "host": (
    "artifacts checkpoint journal generator lm_eval_model service workdir server rollout endpoint "
    "train_loop grading safety pairset embedding"
  ),
  "shared by stages": (
    "modelstore early_stopping finetune lineage nlp_results nlp diagnostics findings reward oversight finegrained "
    "excerpts outside alpaca_eval mt_bench report comparison"
  ),
  "stages": (
    "stages.world stages.base stages.seed stages.sft stages.eft stages.prompts stages.responses stages.judge "
    "stages.pairs stages.dpo stages.evaluate stages.canaries stages.safety stages.classify stages.analyse stages.embed "
    "stages.report"
  ),
  "run": "checks ranges given steps room commands slices chips hlo hlo_cost programs plan main __main__",
}
ORDER = [name for names in LAYERS.values() for name in names.split()]
LAYER_OF = {name: layer for layer, names in LAYERS.items() for name in names.split()}

# Libraries that a layer does without: data is plain Python and numpy, and a ConfigDict goes no deeper than the stages.
DEVICES = {"flax", "jax", "jaxlib", "optax", "orbax"}
WITHOUT = {
  "files": DEVICES | {"ml_collections"},
  "data": DEVICES,
  "arrays": {"ml_collections", "orbax"},
  "model": {"ml_collections", "orbax"},
  "pure": {"etils", "ml_collections", "orbax"},
  "host": {"ml_collections"},
}
NOWHERE = {"tensorflow", "torch"}


def sources() -> dict[str, str]:
  """{"stages.sft": its source, …}; the package itself is "" and the stages' package "stages"."""
  found = {}
  for path in sorted(PACKAGE.rglob("*.py")):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    found[".".join(part for part in parts if part != "__init__")] = path.read_text(encoding="utf-8")
  return found


def imported(source: str) -> Iterator[str]:
  """The dotted names that a source imports, at its top or inside a function; a relative one begins with a dot."""
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      base = "." * node.level + (f"{node.module}." if node.module else "")
      yield from (base + alias.name for alias in node.names)


def ours(source: str, modules: list[str]) -> set[str]:
  """The modules of the package that a source imports; a name that is none of them is a thing inside its module."""
  found = set()
  for dotted in imported(source):
    if dotted.split(".")[0] == "srlm_jax":
      inner = dotted.removeprefix("srlm_jax").removeprefix(".")
      found.add(inner if inner in modules else inner.rpartition(".")[0])
  return found


def violations(name: str, source: str) -> list[str]:
  """What is wrong with a module's imports, a sentence each."""
  wrong = [f"{name} imports {dotted}: name it in full" for dotted in imported(source) if dotted.startswith(".")]
  for other in sorted(ours(source, ORDER)):
    if other not in ORDER:
      wrong.append(f"{name} imports {other or 'the package itself'}, which is no module of LAYERS")
    elif LAYER_OF[name] == LAYER_OF[other] == "stages":
      wrong.append(f"{name} imports the stage {other}: move what they share out of the stages")
    elif ORDER.index(other) >= ORDER.index(name):
      wrong.append(f"{name} ({LAYER_OF[name]}) imports {other} ({LAYER_OF[other]}), which comes later")
  outside = {dotted.split(".")[0] for dotted in imported(source)}
  unwanted = outside & (WITHOUT.get(LAYER_OF[name], set()) | NOWHERE)
  exempt = {"ml_collections"} if name == "config" else set()
  return wrong + [f"{name} ({LAYER_OF[name]}) imports {library}" for library in sorted(unwanted - exempt)]


def test_every_module_is_in_the_table() -> None:
  assert sorted(sources()) == sorted(["", "stages", *ORDER])


@pytest.mark.parametrize("name", sorted(sources()))
def test_imports_go_down(name: str) -> None:
  source = sources()[name]
  if name in ("", "stages"):
    assert ours(source, ORDER) == set(), "a package's __init__ imports nothing of the package"
  else:
    assert name in ORDER, "a new module: give it its place in LAYERS"
    assert violations(name, source) == []


@pytest.mark.parametrize(
  ("name", "source", "complaint"),
  [
    ("losses", "from srlm_jax import train_step", "losses (pure) imports train_step (pure), which comes later"),
    ("llama", "import srlm_jax.stages.sft", "llama (model) imports stages.sft (stages), which comes later"),
    ("llama", "from srlm_jax.artifacts import Artifact", "llama (model) imports artifacts (host), which comes later"),
    ("mesh", "def f():\n  from srlm_jax import main", "mesh (arrays) imports main (run), which comes later"),
    ("records", "import jax.numpy as jnp", "records (data) imports jax"),
    ("losses", "from srlm_jax import lossses", "losses imports the package itself, which is no module of LAYERS"),
    ("losses", "from . import logprobs", "losses imports .logprobs: name it in full"),
    ("stages.judge", "from .eft import run", "stages.judge imports .eft.run: name it in full"),
    ("checkpoint", "from ml_collections import config_dict", "checkpoint (host) imports ml_collections"),
    ("stages.dpo", "import torch", "stages.dpo (stages) imports torch"),
    (
      "stages.dpo",
      "from srlm_jax.stages import sft",
      "stages.dpo imports the stage stages.sft: move what they share out of the stages",
    ),
  ],
)
def test_a_wrong_import_is_found(name: str, source: str, complaint: str) -> None:
  assert violations(name, source) == [complaint]


def test_right_imports_pass() -> None:
  source = "from srlm_jax import artifacts, config as config_lib\nfrom srlm_jax.records import Prompt\nimport jax"
  assert ours(source, ORDER) == {"artifacts", "config", "records"}
  assert violations("stages.judge", source) == []
