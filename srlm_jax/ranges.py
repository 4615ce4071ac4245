"""What each setting may be: one table of ranges and choices, held against a configuration before any work starts."""

from collections.abc import Callable, Iterable, Mapping
import dataclasses
import math
from typing import Any

from ml_collections import config_dict

from srlm_jax import artifacts, attention, chat, config as config_lib, endpoint, llama, templates


@dataclasses.dataclass(frozen=True)
class Range:
  """The numbers that a setting may be: from `low` to `high`, both included unless `open_low` or `open_high`."""

  low: float
  high: float
  open_low: bool = False
  open_high: bool = False

  def holds(self, value: float) -> bool:
    """Whether the value lies in it; NaN lies nowhere."""
    above = value > self.low if self.open_low else value >= self.low
    return above and (value < self.high if self.open_high else value <= self.high)

  def __str__(self) -> str:
    low = f"{'above' if self.open_low else 'at least'} {self.low:g}"
    return f"{low} and {'below' if self.open_high else 'at most'} {self.high:g}"


# Larger values are slips of the hand, and some would end far from here: in an array without memory, or as another seed.
COUNT, SOME = Range(0, 1e9), Range(1, 1e9)
SHARE = Range(0, 1)
TOKENS = Range(1, 2**20)
AXIS = Range(-1, 2**20)  # Of a mesh; mesh.make_mesh refuses zeros, too.
ANY = Range(-math.inf, math.inf)

_SAMPLING = {"temperature": Range(0, 100), "top_p": Range(0, 1, open_low=True), "max_new": TOKENS}
_TRAINING = {
  "lr": Range(0, 10, open_low=True),
  "end_lr": Range(0, 10),
  "batch": Range(1, 2**20),
  "steps": COUNT,
  "epochs": Range(1, 1e6),
  "min_steps": COUNT,
  "warmup": COUNT,
  "weight_decay": Range(0, 10),
  "b2": Range(0, 1, open_high=True),
  "clip": Range(0, 1e9),
  "accumulate": Range(1, 2**20),
  "save_every": SOME,
  "skip_limit": SOME,
}
_SERVICE = {"concurrency": Range(1, 4096), "retries": Range(0, 1000), "timeout": Range(0, 86400, open_low=True)}

TRAINED = ("pretrain", "sft", "dpo")
SAMPLED = (
  *("prompts.sampling", "responses.sampling", "judge.sampling", "evaluate.sampling", "analysis.sampling"),
  *("select.sampling", "select.verdict"),
)


def _under(section: str, rules: Mapping[str, Any]) -> dict[str, Any]:
  return {f"{section}.{name}": rule for name, rule in rules.items()}


RANGES: dict[str, Range] = {
  "seed": Range(0, 2**32 - 1),  # jax.random.key takes 32 bits and drops the others.
  "models": Range(1, 100),
  "model.dropout": Range(0, 1, open_high=True),
  "model.max_length": Range(2, 2**20),
  "model.logits_chunk": Range(0, 2**20),
  **_under("mesh", dict.fromkeys(("slice", "data", "fsdp", "tensor"), AXIS)),
  **_under("generation.mesh", dict.fromkeys(("data", "fsdp", "tensor"), AXIS)),
  "generation.rows": Range(1, 2**20),
  "generation.shard": SOME,
  **{key: rule for section in TRAINED for key, rule in _under(section, _TRAINING).items()},
  **{key: rule for section in SAMPLED for key, rule in _under(section, _SAMPLING).items()},
  "dpo.beta": Range(0, 100, open_low=True),
  "data.ift_examples": COUNT,
  "data.eft_fraction": SHARE,
  "data.heldout_fraction": Range(0, 1, open_high=True),
  "data.eval_prompts_count": COUNT,
  "select.every": SOME,
  "select.prompts": SOME,
  "select.patience": SOME,
  "eft.attempts": Range(1, 1000),
  "eft.max_share": Range(0, 1, open_low=True),
  "eft.max_examples": COUNT,
  "prompts.count": SOME,
  "prompts.max_proposals": SOME,
  "prompts.per_round": SOME,
  "prompts.seed_demonstrations": Range(0, 100),
  "prompts.generated_demonstrations": Range(0, 100),
  "prompts.max_rouge": SHARE,
  "responses.n": Range(1, 1000),
  "judge.votes": Range(1, 1000),
  "judge.min_votes": Range(1, 1000),
  "pairs.margin": Range(0, 1e6),
  "pairs.min_pairs": SOME,
  "evaluate.samples": Range(1, 1000),
  "monitors.canary_prompts": COUNT,
  "health.window": Range(20, 1e6),
  "health.spike": Range(0, 1e9),
  "health.margin": Range(0, 1e9),
  "health.drift": Range(0, 1e9),
  "analysis.points": COUNT,
  "analysis.perplexity": Range(1, 1e6),
  **_under("server", _SERVICE),
  **_under("endpoint", _SERVICE),
  "endpoint.requests_per_minute": Range(0, 1e9),
  "endpoint.price_in": Range(0, 1e9),
  "endpoint.price_out": Range(0, 1e9),
  "nlp.limit": COUNT,
  "nlp.rows": Range(1, 2**20),
}

# Sections to which a file may add keys: the sizes of the world, the tasks of lm-eval, and the monitors' thresholds.
OPEN: dict[str, Range] = {
  "world.noise": SHARE,
  "world.": SOME,
  "nlp.tasks.": Range(0, 1000),
  "monitors.warn.": ANY,  # inf is never.
}

_MOMENTS = ("float32", "bfloat16")
CHOICES: dict[str, tuple[str, ...]] = {
  "base.kind": ("hf", "pretrain", "random"),
  "base.size": tuple(llama.SIZES),
  "chat": chat.KINDS,
  "model.dtype": (*_MOMENTS, "float16"),
  "model.param_dtype": (*_MOMENTS, "float16"),
  "model.remat": llama.REMAT,
  "model.attention": ("auto", *attention.KINDS),
  **{f"{section}.decay": ("cosine", "linear") for section in TRAINED},
  **{f"{section}.moments": _MOMENTS for section in TRAINED},
  "dpo.method": ("dpo", "positive_only"),
  "dpo.reference": ("previous", "baseline"),
  "eft.writer": ("baseline", "annotators"),
  "eft.by": ("prompt", "reply"),
  "eft.ties": ("disagree", "agree"),
  "prompts.writer": ("fixed", "m0", "parent"),
  "judge.method": ("sampled", "expected"),
  "evaluate.grader": ("oracle", "judge", "endpoint", "none"),
  "endpoint.limit": endpoint.LIMITS,
}

# Names, paths and addresses, which are checked where they are looked up; `stop` is checked below.
FREE = (
  *("name", "tokenizer", "topology", "base.path"),
  *("data.trees", "data.heldout_trees", "data.eval_prompts", "data.judgements", "data.pretrain"),
  *("select.judge", "select.path", "select.pairwise", "prompts.path", "judge.rubric"),
  *("server.url", "server.model", "endpoint.url", "endpoint.model", "endpoint.cache"),
  *("evaluate.judge", "evaluate.pairwise", "alpaca_eval.annotators", "alpaca_eval.url"),
  *("mt_bench.judge", "mt_bench.templates", "monitors.prompts", "monitors.rubric", "monitors.refusals"),
  *("nlp.include_path", "analysis.classes", "analysis.model", "analysis.vectors"),
  *(f"{section}.stop" for section in SAMPLED),
)


def range_of(key: str) -> Range | None:
  """The range of a setting ("dpo.beta"); None for one that is no number."""
  return RANGES.get(key) or next((rule for start, rule in OPEN.items() if key.startswith(start)), None)


def wrong(settings: config_dict.ConfigDict) -> Iterable[str]:
  """What is wrong with each number that lies outside its range."""
  base = artifacts.flatten(config_lib.base().to_dict())
  for key, value in artifacts.flatten(settings.to_dict()).items():
    rule = range_of(key)
    if rule is None or isinstance(value, bool) or not isinstance(value, (int, float)) or rule.holds(value):
      continue
    usual = f" (the base configuration has {base[key]})" if key in base else ""
    yield f"config.{key}={value} must be {rule}{usual}"


def check(settings: config_dict.ConfigDict) -> None:
  """Holds a configuration against the table, and its settings against each other.

  Raises:
    ValueError: numbers out of range (all are named), a choice that is none (with the nearest one), or settings that
      contradict each other.
  """
  values = artifacts.flatten(settings.to_dict())
  if found := list(wrong(settings)):
    raise ValueError(f"out of range: {'; '.join(found)}.")
  for key, valid in CHOICES.items():
    if values[key] not in valid:
      raise artifacts.unknown(values[key], list(valid), key)
  for section in SAMPLED:
    stop = values[f"{section}.stop"]
    if isinstance(stop, str) or not all(isinstance(text, str) and text for text in stop):
      raise ValueError(f"config.{section}.stop={stop!r}: a tuple of strings that are not empty, as in ('\\n\\n',).")
  for rule in _TOGETHER:
    rule(settings)


def _room(settings: config_dict.ConfigDict) -> None:
  """Every continuation that this run samples leaves room for its prompt."""
  c, used = settings, ["judge.sampling", "evaluate.sampling"]
  used += ["prompts.sampling", "responses.sampling"] if c.models > 1 else []
  used += ["select.sampling", "select.verdict"] if c.select.judge != "none" else []
  used += ["analysis.sampling"] if c.analysis.classes and c.evaluate.grader == "judge" and not c.world.enabled else []
  values = artifacts.flatten(c.to_dict())
  for key in (f"{section}.max_new" for section in used):
    if values[key] >= c.model.max_length:
      raise ValueError(
        f"config.{key}={values[key]}: must be below model.max_length={c.model.max_length}, which the prompt needs, "
        "too. Lower it, or raise model.max_length."
      )


def _votes(settings: config_dict.ConfigDict) -> None:
  """Each score can have the votes that it needs."""
  judge = settings.judge
  if judge.min_votes > judge.votes:
    raise ValueError(f"judge.min_votes={judge.min_votes} must lie between 1 and judge.votes={judge.votes}.")
  if judge.method == "expected" and judge.min_votes > 1:
    raise ValueError(f"judge.min_votes={judge.min_votes}: judge.method='expected' gives one vote. Set it to 1.")


def _pairs(settings: config_dict.ConfigDict) -> None:
  """Two answers whose scores differ by more than the margin can be."""
  if settings.models < 2 or settings.dpo.method != "dpo":
    return
  if settings.responses.n < 2:
    raise ValueError(f"responses.n={settings.responses.n}: a pair needs two answers to a prompt. The paper has 4.")
  rubric = templates.load_rubric(settings.judge.rubric)
  if settings.pairs.margin >= rubric.high - rubric.low:
    raise ValueError(
      f"pairs.margin={settings.pairs.margin}: must be below {rubric.high - rubric.low:g}, or no two scores of "
      f"judge.rubric={settings.judge.rubric} ({rubric.low:g} to {rubric.high:g}) are a pair. The paper has 0."
    )


def _demonstrations(settings: config_dict.ConfigDict) -> None:
  """A few-shot prompt shows something."""
  section = settings.prompts
  if section.seed_demonstrations + section.generated_demonstrations < 1:
    raise ValueError(
      "prompts.seed_demonstrations=0 and prompts.generated_demonstrations=0: new prompts are written after examples. "
      "The paper has 6 and 2."
    )


_TOGETHER: tuple[Callable[[config_dict.ConfigDict], None], ...] = (_room, _votes, _pairs, _demonstrations)
