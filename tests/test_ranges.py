"""The table of ranges: complete, and held against every number and choice before any work starts."""

import math
import re
from typing import Any

from etils import epath
from ml_collections import config_dict
import pytest

from srlm_jax import artifacts, config, mesh as mesh_lib, ranges, steps

LEAVES = artifacts.flatten(config.base().to_dict())
NUMBERS = {
  key: value for key, value in LEAVES.items() if isinstance(value, (int, float)) and not isinstance(value, bool)
}


def changed(**changes: Any) -> config_dict.ConfigDict:
  c = config.base()
  c.update_from_flattened_dict(changes)
  return c


def refused(settings: config_dict.ConfigDict) -> str:
  with pytest.raises(ValueError) as caught:
    ranges.check(settings)
  return str(caught.value)


def test_every_setting_has_a_rule() -> None:
  """A new setting gets its range, its choices, or a place among the names and paths."""
  for key, value in LEAVES.items():
    if isinstance(value, bool):
      continue
    kinds = [ranges.range_of(key) is not None, key in ranges.CHOICES, key in ranges.FREE]
    assert sum(kinds) == 1, f"{key}={value!r} has {sum(kinds)} rules in ranges.py"
    assert (ranges.range_of(key) is not None) == (key in NUMBERS), key


def test_the_table_names_no_setting_that_does_not_exist() -> None:
  assert not [key for key in (*ranges.RANGES, *ranges.CHOICES, *ranges.FREE) if key not in LEAVES]


def test_the_papers_values_pass() -> None:
  ranges.check(config.base())


@pytest.mark.parametrize("key", [key for key in NUMBERS if not key.startswith("monitors.warn.")])
def test_what_is_no_sensible_number_is_refused_by_name(key: str) -> None:
  """Not a number, infinite, far too large, and below the least."""
  absurd = [math.nan, math.inf, -math.inf] if isinstance(NUMBERS[key], float) else []
  for value in [*absurd, type(NUMBERS[key])(10**15), type(NUMBERS[key])(-(10**6))]:
    message = refused(changed(**{key: value}))
    assert message.startswith(f"out of range: config.{key}={value} must be "), message
    assert message.endswith(f" (the base configuration has {NUMBERS[key]})."), message


@pytest.mark.parametrize("key", ["monitors.warn.ties", "monitors.warn.entropy"])
def test_a_threshold_may_be_infinite_but_not_nan(key: str) -> None:
  for value in (math.inf, -math.inf):
    ranges.check(changed(**{key: value}))
  assert f"config.{key}=nan" in refused(changed(**{key: math.nan}))


@pytest.mark.parametrize("key", [key for key in LEAVES if key in ranges.CHOICES])
def test_a_choice_that_is_none_is_refused_with_the_nearest_one(key: str) -> None:
  valid = ranges.CHOICES[key]
  assert LEAVES[key] in valid
  message = refused(changed(**{key: valid[0][:-1]}))
  assert f"{valid[0][:-1]!r} is not a {key}. Did you mean " in message and f"Valid: {', '.join(valid)}." in message


@pytest.mark.parametrize(
  ("key", "edge", "beyond"),
  [
    ("dpo.beta", 1e-6, 0.0),
    ("sft.lr", 1e-12, 0.0),
    ("model.dropout", 0.0, 1.0),
    ("dpo.b2", 0.0, 1.0),
    ("judge.sampling.top_p", 1.0, 0.0),
    ("judge.sampling.temperature", 0.0, -0.1),
    ("data.heldout_fraction", 0.0, 1.0),
    ("data.eft_fraction", 1.0, 1.1),
    ("eft.max_share", 1.0, 0.0),
    ("sft.batch", 1, 0),
    ("sft.steps", 0, -1),
    ("seed", 2**32 - 1, 2**32),
  ],
)
def test_the_edges_of_a_range(key: str, edge: float, beyond: float) -> None:
  ranges.check(changed(**{key: edge}))
  assert f"config.{key}={beyond} must be" in refused(changed(**{key: beyond}))


def test_all_wrong_numbers_are_named_at_once() -> None:
  message = refused(changed(**{"dpo.beta": -1.0, "sft.lr": math.nan, "judge.votes": 0}))
  assert message == (
    "out of range: config.dpo.beta=-1.0 must be above 0 and at most 100 (the base configuration has 0.1); "
    "config.judge.votes=0 must be at least 1 and at most 1000 (the base configuration has 3); "
    "config.sft.lr=nan must be above 0 and at most 10 (the base configuration has 5.5e-06)."
  )


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"judge.min_votes": 4}, "judge.min_votes=4 must lie between 1 and judge.votes=3"),
    ({"judge.method": "expected", "judge.min_votes": 2}, "'expected' gives one vote"),
    ({"responses.n": 1}, "responses.n=1: a pair needs two answers"),
    ({"pairs.margin": 5.0}, "pairs.margin=5.0: must be below 5"),
    ({"responses.sampling.max_new": 2048}, "responses.sampling.max_new=2048: must be below model.max_length=2048"),
    ({"model.max_length": 256}, "judge.sampling.max_new=256: must be below model.max_length=256"),
    (
      {"prompts.seed_demonstrations": 0, "prompts.generated_demonstrations": 0},
      "new prompts are written after examples",
    ),
    ({"evaluate.sampling.stop": ("x", "")}, "config.evaluate.sampling.stop=['x', '']: a tuple of strings"),
  ],
)
def test_settings_that_contradict_each_other_are_refused(changes: dict[str, Any], message: str) -> None:
  assert message in refused(changed(**changes))


def test_settings_that_a_run_does_not_use_may_be_what_they_like() -> None:
  ranges.check(changed(models=1, **{"responses.n": 1, "pairs.margin": 5.0, "responses.sampling.max_new": 4096}))
  ranges.check(changed(**{"dpo.method": "positive_only", "pairs.margin": 5.0}))
  ranges.check(changed(**{"select.judge": "none", "select.sampling.max_new": 4096}))


def test_the_sizes_of_the_world_have_ranges() -> None:
  c = config.base()
  c.world = dict(enabled=True, eft_trees=0, noise=1.5, replies=(3, 4))
  assert refused(c) == (
    "out of range: config.world.eft_trees=0 must be at least 1 and at most 1e+09; "
    "config.world.noise=1.5 must be at least 0 and at most 1."
  )


def test_a_plan_is_made_of_checked_settings_alone() -> None:
  with pytest.raises(ValueError, match=re.escape("config.dpo.beta=-1.0 must be above 0")):
    steps.plan(changed(**{"dpo.beta": -1.0}), epath.Path("w"), mesh_lib.make_mesh())
