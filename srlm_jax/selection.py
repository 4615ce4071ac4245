"""Which checkpoint of a training becomes the model (paper §3.1.2): the rules, and their table. No model in here."""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

from srlm_jax import metrics, tables


@dataclasses.dataclass(frozen=True)
class Trial:
  """A candidate's answers against those of the candidate before it.

  Attributes:
    step: of the candidate.
    against: step of the one before it; 0 is the model where training started.
    win: share of the comparisons that the candidate won; None without any.
    tie: likewise.
    loss: likewise.
    net: wins minus losses with their interval, the fields of a `metrics.Estimate`.
    prompts: those with a readable comparison.
    comparisons: readable ones.
    unreadable: comparisons whose verdict could not be read.
  """

  step: int
  against: int
  win: float | None
  tie: float | None
  loss: float | None
  net: Mapping[str, Any]
  prompts: int
  comparisons: int
  unreadable: int

  @property
  def lost(self) -> bool:
    """Whether there were more losses than wins; without a readable comparison nothing is lost."""
    return self.net["value"] is not None and self.net["value"] < 0


def trial(step: int, against: int, outcomes: Sequence[Sequence[int]], unreadable: int) -> Trial:
  """The trial that these outcomes, grouped by prompt, make: +1 where the candidate `step` won, 0 a tie, -1 a loss."""
  return Trial(step, against, **dataclasses.asdict(metrics.duel(outcomes)), unreadable=unreadable)


def candidates(every: int, steps: int) -> list[int]:
  """The steps after which a training of `steps` steps has a candidate: each `every` steps, and the end.

  None where it has fewer than `every`: there is no choice, its last weights are the model.
  """
  found = list(range(every, steps + 1, every))
  return found if not found or found[-1] == steps else [*found, steps]


def decide(trials: Sequence[Trial], patience: int) -> tuple[int, bool]:
  """What the trials so far say.

  Args:
    trials: of the candidates, in their order.
    patience: losses in a row that stop training.

  Returns:
    The step of the last candidate that did not lose (0: the model where training started), and whether training stops.
  """
  kept, losses = 0, 0
  for one in trials:
    kept, losses = (kept, losses + 1) if one.lost else (one.step, 0)
  return kept, losses >= patience


def facts(trials: Sequence[Trial], patience: int, steps: int, judge: str) -> dict[str, Any]:
  """What a model's manifest says of the choice: the curve of trials, who judged, and what was taken."""
  kept, stopped = decide(trials, patience)
  return {
    "judge": judge,
    "patience": patience,
    "planned": steps,
    "chosen": kept,
    "stopped": stopped and trials[-1].step < steps,
    "curve": [dataclasses.asdict(one) | {"lost": one.lost} for one in trials],
  }


def sentence(one: Trial) -> str:
  """A trial in words, for the log."""
  if one.win is None:
    return f"step {one.step} against {one.against}: no readable comparison, {one.unreadable} unreadable"
  shares = ", ".join(f"{name} {tables.percent(getattr(one, name))}" for name in ("win", "tie", "loss"))
  net = tables.estimate(one.net, signed=True)
  return (
    f"step {one.step} against {one.against}: {shares} %, net {net.text} {net.small} on {one.prompts} prompts, "
    f"{one.unreadable} unreadable"
  )


def table(found: Mapping[str, Mapping[str, Any]]) -> tables.Table:
  """The trials of each model, by its name as it is shown; the values are what `facts` gives."""
  rows = []
  for name, one in found.items():
    for trial in one["curve"]:
      if trial["step"] == one["chosen"]:
        fate = tables.Cell("the model", tone="good")
      else:
        fate = tables.Cell("lost", tone="bad") if trial["lost"] else tables.Cell("")
      rows.append(
        tables.row(
          name,
          tables.number(trial["step"]),
          tables.number(trial["against"]),
          *(tables.percent(trial[key]) for key in ("win", "tie", "loss")),
          tables.estimate(trial["net"], signed=True),
          tables.number(trial["comparisons"]),
          tables.number(trial["unreadable"]),
          fate,
        )
      )
  columns = ("model", "step", "against", "win, %", "tie, %", "loss, %", "win − loss", "comparisons", "unreadable", "")
  return tables.Table("checkpoints", "Each checkpoint against the one before it", columns, tuple(rows), words=(0, 9))


def sentences(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
  """What the choice came to, a sentence for each model."""
  said = []
  for name, one in found.items():
    last, planned, chosen = one["curve"][-1]["step"], one["planned"], one["chosen"]
    ended = f"training stopped at step {last} of {planned}" if one["stopped"] else f"all {planned} steps were trained"
    taken = f"the model is that of step {chosen}" if chosen else "the model is the one where training started"
    said.append(f"{name}: {ended}; {taken} (judge: {one['judge']}).")
  return said
