"""The health of a training, read from its metrics: skipped steps, spikes of the loss, growth of DPO's margin and drift.

All of it is for people: nothing in the loop depends on it but the warnings, each of which is said once. The limits are
`health` in the configuration: they are where to look, not proofs.
"""

from collections import deque
from collections.abc import Iterable, Mapping
import dataclasses
import statistics
from typing import Any

from srlm_jax import tables

MEAN = 10  # Steps over which margin and drift are averaged: those of one batch say little.
SEEN = 20  # Losses that it takes to tell a spike from the usual ups and downs.
ROUND = 1e-3  # Of the median: losses that differ by less are alike, so that a flat curve has no spikes.


@dataclasses.dataclass(frozen=True)
class Limits:
  """Beyond which a training warns.

  Attributes:
    window: steps before a step with which its loss is compared.
    spike: robust standard deviations that a loss lies above their median.
    margin: of DPO's rewards, chosen minus rejected.
    drift: of DPO, nats a response (see `losses.dpo`).
  """

  window: int = 100
  spike: float = 8.0
  margin: float = 10.0
  drift: float = 50.0


@dataclasses.dataclass
class _Peak:
  """The largest mean of the last steps' values."""

  value: float | None = None
  step: int = 0
  last: deque[float] = dataclasses.field(default_factory=lambda: deque(maxlen=MEAN))

  def see(self, step: int, value: float) -> None:
    self.last.append(value)
    mean = sum(self.last) / len(self.last)
    if len(self.last) == MEAN and (self.value is None or mean > self.value):
      self.value, self.step = mean, step


class Observer:
  """Sees the metrics of each step, in order."""

  def __init__(self, limits: Limits) -> None:
    self._limits, self._losses = limits, deque[float](maxlen=limits.window)
    self.steps, self.skipped = 0, list[int]()
    self.spikes: dict[int, float] = {}  # Step → how many robust standard deviations above the median.
    self._peaks = {"margin": _Peak(), "drift": _Peak()}
    self._said = set[str]()

  def see(self, row: Mapping[str, Any]) -> list[str]:
    """Takes a step's metrics, as in the journal; what there is to warn of, each kind once."""
    self.steps, step = self.steps + 1, row["step"]
    if row["skipped"] or row["loss"] is None:
      self.skipped.append(step)
      return []
    height = self._height(row["loss"])
    self._losses.append(row["loss"])
    found = {}
    if height > self._limits.spike:
      self.spikes[step] = height
      found["spike"] = (
        f"the loss of step {step} is {row['loss']:.4g}, {height:.1f} robust standard deviations above the median "
        "of the steps before: a batch unlike the others, or a learning rate that is too high?"
      )
    for name, peak in self._peaks.items():
      if row.get(name) is not None:
        peak.see(step, row[name])
    margin, drift = (self._peaks[name].value for name in ("margin", "drift"))
    if margin is not None and margin > self._limits.margin:
      found["margin"] = (
        f"the reward margin has grown to {margin:.3g} at step {step}: the pairs are decided beyond doubt, and more "
        "steps only move the model away from its reference. Fewer steps, or a lower learning rate?"
      )
    if drift is not None and drift > self._limits.drift:
      found["drift"] = (
        f"chosen and rejected responses together have become less likely by {drift:.3g} nats each at step {step}: the "
        "model is far from its reference. A higher beta, or a lower learning rate?"
      )
    fresh = [text for kind, text in found.items() if kind not in self._said]
    self._said |= found.keys()
    return fresh

  def _height(self, loss: float) -> float:
    """How far a loss is above the median of those before, in their robust standard deviations."""
    if len(self._losses) < SEEN:
      return 0.0
    middle = statistics.median(self._losses)
    spread = 1.4826 * statistics.median(abs(one - middle) for one in self._losses)
    return (loss - middle) / max(spread, ROUND * abs(middle), 1e-9)

  def facts(self) -> dict[str, Any]:
    """What was seen, for a manifest."""
    worst = max(self.spikes, key=lambda step: self.spikes[step], default=0)
    found: dict[str, Any] = {"steps": self.steps, "skipped": len(self.skipped), "spikes": len(self.spikes)}
    if worst:
      found["worst spike"] = {"step": worst, "height": round(self.spikes[worst], 2)}
    for name, peak in self._peaks.items():
      if peak.value is not None:
        found[name] = {"step": peak.step, "highest": round(peak.value, 4)}
    return found


def observe(rows: Iterable[Mapping[str, Any]], limits: Limits) -> tuple[Observer, list[str]]:
  """An observer that has seen the metrics of these steps, and what it warned of."""
  observer, said = Observer(limits), list[str]()
  for row in rows:
    said += observer.see(row)
  return observer, said


def table(found: Mapping[str, Observer], limits: Limits) -> tables.Table:
  """Each training's health."""

  def cell(facts: Mapping[str, Any], name: str, what: str, digits: int) -> str:
    one = facts.get(name)
    return tables.MISSING if one is None else f"{one[what]:,.{digits}f} (step {one['step']:,})"

  rows = list[tuple[tables.Cell, ...]]()
  for name, observer in found.items():
    facts = observer.facts()
    counts = (f"{facts['steps']:,}", f"{facts['skipped']:,}", f"{facts['spikes']:,}")
    peaks = (cell(facts, "margin", "highest", 3), cell(facts, "drift", "highest", 2))
    rows.append(tables.row(name, *counts, cell(facts, "worst spike", "height", 1), *peaks))
  note = (
    "Skipped: loss or gradient was not finite, and the step changed nothing. A spike: a loss more than "
    f"{limits.spike:g} robust standard deviations above the median of the {limits.window:,} steps before. Margin and "
    f"drift: the highest mean of {MEAN} steps; drift is by how many nats chosen and rejected responses became less "
    f"likely. They warn above {limits.margin:g} and {limits.drift:g}."
  )
  columns = ("training", "steps", "skipped", "spikes", "worst spike", "highest margin", "highest drift")
  return tables.Table("health", "Health of the trainings", columns, tuple(rows), note)
