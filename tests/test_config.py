"""Configurations: the paper's values, files that build, and keys that are not misspelt."""

import functools
import importlib.util
import pathlib
import re
import types
from typing import Any

from absl import flags
from etils import epath
import jax
from ml_collections import config_dict, config_flags
import pytest

from srlm_jax import artifacts, checkpoint, config, llama, mesh as mesh_lib, rollout, sampling, steps, train_step
from srlm_jax.stages import base as base_stage

ROOT = pathlib.Path(__file__).parents[1]
VARIANTS = {"tiny": ("", "smoke"), "oasst_sample": ("",)}  # Of the other files: the sizes of models.
FILES = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))

# Every value that the paper states, with where it does so.
PAPER = [
  ("base.size", "llama2_70b", "§3.1: the base model is Llama 2 70B"),
  ("models", 3, "§3.1: M1, M2 and M3"),
  ("data.ift_examples", 3200, "§3.1.1: 3,200 IFT examples"),
  ("data.eval_prompts_count", 256, "§3.1.3: 256 test prompts head to head"),
  ("eft.enabled", True, "§2.2: M1 is SFT on IFT and EFT"),
  ("eft.writer", "baseline", "§3.1.1: the SFT baseline writes justification and score"),
  ("model.dropout", 0.1, "§3.1.2"),
  ("sft.lr", 5.5e-6, "§3.1.2"),
  ("sft.end_lr", 1.1e-6, "§3.1.2"),
  ("sft.decay", "cosine", "§3.1.2"),
  ("sft.batch", 16, "§3.1.2"),
  ("sft.save_every", 200, "§3.1.2: a checkpoint every 200 steps"),
  ("dpo.lr", 1e-6, "§3.1.2"),
  ("dpo.end_lr", 1e-7, "§3.1.2"),
  ("dpo.batch", 16, "§3.1.2"),
  ("dpo.beta", 0.1, "§3.1.2"),
  ("dpo.save_every", 200, "§3.1.2"),
  ("select.every", 200, "§3.1.2: a checkpoint every 200 steps, early stopping"),
  ("select.prompts", 253, "§3.1.2: on 253 validation prompts"),
  ("dpo.method", "dpo", "§2.4"),
  ("dpo.reference", "previous", "§2.4: M_t is the reference of M_{t+1}"),
  ("prompts.writer", "fixed", "§3.1.1: Llama 2-Chat 70B writes the new prompts in all iterations"),
  ("prompts.seed_demonstrations", 6, "§3.1.1: 8-shot, six from the seed data"),
  ("prompts.generated_demonstrations", 2, "and two that a model wrote"),
  ("prompts.sampling.temperature", 0.6, "§3.1.1"),
  ("prompts.sampling.top_p", 0.9, "§3.1.1"),
  ("prompts.max_rouge", 0.7, "Self-Instruct's filter"),
  ("responses.n", 4, "§3.1.1: four candidates"),
  ("responses.sampling.temperature", 0.7, "§3.1.1"),
  ("responses.sampling.top_p", 0.9, "§3.1.1"),
  ("judge.rubric", "judge_additive", "§2.2: five points that add up"),
  ("judge.method", "sampled", "§3.1.1"),
  ("judge.votes", 3, "§3.1.1: three samples, averaged"),
  ("judge.sampling.temperature", 0.7, "§3.1.1: the same decoding parameters"),
  ("judge.sampling.top_p", 0.9, "§3.1.1"),
  ("pairs.margin", 0.0, "§2.4: equal scores alone are dropped"),
]


def get_config(name: str, *variant: str) -> config_dict.ConfigDict:
  spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
  assert spec and spec.loader
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(*variant)


def value(settings: config_dict.ConfigDict, key: str) -> Any:
  return functools.reduce(lambda section, part: section[part], key.split("."), settings)


BUILT = [(name, variant) for name in FILES for variant in VARIANTS.get(name, tuple(llama.SIZES))]


def built(name: str, variant: str) -> config_dict.ConfigDict:
  return get_config(name, *([variant] if variant else []))


@pytest.mark.parametrize(("key", "expected", "where"), PAPER, ids=[key for key, _, _ in PAPER])
def test_the_base_has_the_papers_value(key: str, expected: object, where: str) -> None:
  found = value(config.base(), key)
  assert (found, type(found)) == (expected, type(expected)), where


def test_the_reward_lies_between_0_and_5() -> None:
  rubric = rollout.judging(config.base().judge).rubric
  assert (rubric.low, rubric.high) == (0, 5)


@pytest.mark.parametrize("name", ["llama2", "m1", "m2", "m3"])
def test_the_papers_files_change_the_size_and_the_last_model_alone(name: str) -> None:
  changed = get_config(name).to_dict()
  changed["models"] = 3
  assert changed == config.base().to_dict()
  assert get_config(name).models == (int(name[1]) if name[1:].isdigit() else 3)
  assert get_config(name, "llama2_7b").base.size == "llama2_7b"


def test_m1_m2_and_m3_differ_in_the_last_model_alone() -> None:
  """They share a work directory: a model's artifacts are the same in all of them."""
  mesh, place = mesh_lib.make_mesh(), epath.Path("w")
  plans = [{step.folder: step for step in steps.plan(get_config(f"m{index}"), place, mesh)} for index in (1, 2, 3)]
  for smaller, larger in zip(plans, plans[1:], strict=False):
    for folder in smaller.keys() - {"report", max(name for name in smaller if name.startswith("analysis/map-"))}:
      assert (smaller[folder].config, smaller[folder].inputs) == (larger[folder].config, larger[folder].inputs)
  assert [max(folder for folder in plan if re.fullmatch(r"m\d", folder)) for plan in plans] == ["m1", "m2", "m3"]


@pytest.mark.parametrize(("name", "variant"), BUILT)
def test_every_file_builds_and_plans(name: str, variant: str) -> None:
  c = built(name, variant)
  mesh = mesh_lib.make_mesh(**c.mesh)
  planned = steps.plan(c, epath.Path("w"), mesh)
  assert [step.folder for step in planned][-1] == "report" and planned[0].stage in ("world", "base")
  assert {f"m{index}" for index in range(c.models + 1)} <= {step.folder for step in planned}
  steps.artifacts_of(planned, epath.Path("w"))  # Every step comes after its inputs.
  assert rollout.judging(c.judge).votes >= 1
  for section in (c.pretrain, c.sft, c.dpo):
    count = train_step.count_steps(section, 1000)
    train_step.schedule(config.frozen(train_step.OptimizerConfig, {**section, "steps": count}))
  asking = () if c.world.enabled else (c.analysis,)
  for section in (c.prompts, c.responses, c.judge, c.evaluate, *asking):  # Room for a prompt beside the continuation.
    assert sampling.Sampling(**section.sampling).max_new + 32 <= c.model.max_length
  for how in (c.select.sampling, c.select.verdict):
    assert c.select.judge == "none" or sampling.Sampling(**how).max_new + 32 <= c.model.max_length


@pytest.mark.parametrize(("name", "size"), [(name, size) for name in FILES for size in llama.SIZES])
def test_every_file_builds_every_size_in_the_abstract(name: str, size: str) -> None:
  c = get_config(name)
  c.base.size = size
  words = types.SimpleNamespace(vocab_size=32000)
  shape = base_stage._fresh_config(c, words)
  model = checkpoint.abstract_model(shape, mesh_lib.make_mesh(**c.mesh))
  assert model.embedding.shape == (32000, llama.SIZES[size].embed)
  assert {str(leaf.dtype) for leaf in jax.tree.leaves(model)} == {c.model.param_dtype}
  if size == "llama2_70b":
    assert sum(leaf.size for leaf in jax.tree.leaves(model)) == 68_976_648_192


def test_an_unknown_size_is_refused() -> None:
  c = config.base()
  c.base.size = "llama2_7"
  with pytest.raises(ValueError, match="'llama2_7' is not a model size. Did you mean 'llama2_7b'?"):
    base_stage._fresh_config(c, types.SimpleNamespace(vocab_size=320))


def parse(*arguments: str) -> config_dict.ConfigDict:
  """What the command line makes of a configuration, as main defines it."""
  values, argv = flags.FlagValues(), ["srlm", *arguments]
  found = config_flags.DEFINE_config_file("config", None, "", lock_config=True, flag_values=values, sys_argv=argv)
  values(argv)
  return found.value


def test_the_command_line_changes_values() -> None:
  file = ROOT / "configs"
  c = parse(f"--config={file}/tiny.py:smoke", "--config.dpo.beta=0.2", "--config.eft.enabled=False", "--config.seed=7")
  assert (c.dpo.beta, c.eft.enabled, c.seed, c.base.size) == (0.2, False, 7, "smoke")
  assert parse(f"--config={file}/llama2.py:llama2_13b").base.size == "llama2_13b"


@pytest.mark.parametrize(
  ("argument", "message"),
  [
    ("--config.dpo.betta=0.2", "(?s)betta.*Did you mean.*beta"),
    ("--config.judgee.votes=5", "(?s)judgee.*Did you mean.*judge"),
    ("--config.dpo.beta=much", "beta"),
    ("--config.judge.votes=2.5", "votes"),
  ],
)
def test_a_misspelt_key_and_a_wrong_type_are_refused(argument: str, message: str) -> None:
  with pytest.raises((AttributeError, KeyError, flags.Error, ValueError), match=message):
    parse(f"--config={ROOT / 'configs' / 'tiny.py'}", argument)


@pytest.mark.parametrize(("name", "variant"), BUILT)
def test_no_file_has_a_key_that_the_base_lacks(name: str, variant: str) -> None:
  """The base is not locked, so a key that a file misspells would be a new one."""
  known, found = (artifacts.flatten(c.to_dict()).keys() for c in (config.base(), built(name, variant)))
  free = ("world.", "reasons.")  # Sizes of the world, checked where it is made, and remarks for the report.
  assert not [key for key in found - known if not key.startswith(free)]


def test_an_unknown_variant_is_refused() -> None:
  with pytest.raises(ValueError, match="tiny.py:big: the variants are none and 'smoke'"):
    get_config("tiny", "big")


def test_the_readme_names_settings_that_exist() -> None:
  text = (ROOT / "README.md").read_text(encoding="utf-8")
  found = re.findall(r"--config\.([a-z_.0-9]+)=([^\s`]+)", text)
  assert len(found) > 10
  mesh = mesh_lib.make_mesh()
  for key, quoted in found:
    given = quoted.strip('"')
    c = parse(f"--config={ROOT / 'configs' / 'llama2.py'}", f"--config.{key}={given}")
    assert str(value(c, key)) in (given, f"{given}.0")
    steps.plan(c, epath.Path("w"), mesh)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"responses.sampling.stop": ("x",)}, "have no end token"),
    ({"dpo.method": "positive"}, "'positive' is not a dpo.method. Did you mean 'positive_only'?"),
    ({"dpo.reference": "m0"}, "'m0' is not a dpo.reference"),
    ({"prompts.writer": "parents"}, "'parents' is not a prompts.writer. Did you mean 'parent'?"),
    ({"evaluate.judge": "m7"}, "'m7' is not a model"),
    ({"select.judge": "writr"}, "'writr' is not a select.judge of baseline. Did you mean 'writer'?"),
    ({"dpo.method": "positive_only", "judge.method": "expected"}, "an expected score is never a full 5"),
    ({"analysis.model": "m9"}, "'m9' is not a model of this run (analysis.model)"),
    ({"evaluate.grader": "oracle"}, "evaluate.grader='oracle' grades the tiny world alone"),
    ({"generation.mesh.tensor": 3}, "generation.mesh: mesh sizes"),
    ({"select.judge": "oracle"}, "select.judge='oracle' judges the tiny world alone"),
    ({"select.patience": 0}, "config.select.patience=0 must be at least 1"),
  ],
)
def test_an_impossible_choice_is_refused_before_any_work(changes: dict[str, object], message: str) -> None:
  c = config.base()
  c.update_from_flattened_dict(changes)
  with pytest.raises(ValueError, match=re.escape(message)):
    steps.artifacts_of(steps.plan(c, epath.Path("w"), mesh_lib.make_mesh()), epath.Path("w"))


def test_frozen_takes_the_fields_that_a_dataclass_knows() -> None:
  section = config.base().dpo
  found = config.frozen(train_step.OptimizerConfig, {**section, "steps": 9})
  assert (found.lr, found.end_lr, found.decay, found.steps, found.b2) == (1e-6, 1e-7, "linear", 9, 0.95)
