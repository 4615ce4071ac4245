"""The report's figures: plain data in, inline SVG out.

Colours become CSS variables (--ink, --line, --c1 …), so that one figure serves light and dark pages. The texts of the
figures are our own labels, the names of models, and the classes of a user's template; nothing that a model wrote goes
in here.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import io
import json
import re
from typing import Any

from cycler import cycler
import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path
import numpy as np

# Each stands for a CSS variable; the page has their values for light and dark.
_INK, _LINE = "#111213", "#d1d2d3"
_SERIES = ("#2f6fb1", "#d9822c", "#2e8b70", "#a8577f", "#7a7a2d", "#5b5ea7")
_VARIABLES = {_INK: "var(--ink)", _LINE: "var(--line)"} | {c: f"var(--c{n})" for n, c in enumerate(_SERIES, 1)}
_PIXELS = 105  # Of the page to an inch of a figure.

_STYLE: Any = {
  "svg.fonttype": "none",
  "text.parse_math": False,
  "svg.hashsalt": "srlm",
  "font.family": "sans-serif",
  "font.size": 9,
  "axes.titlesize": 9,
  "axes.titlelocation": "left",
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.edgecolor": _LINE,
  "axes.labelcolor": _INK,
  "axes.grid": True,
  "axes.grid.axis": "y",
  "axes.axisbelow": True,
  "axes.prop_cycle": cycler(color=_SERIES),
  "grid.color": _LINE,
  "grid.linewidth": 0.6,
  "text.color": _INK,
  "xtick.color": _INK,
  "ytick.color": _INK,
  "xtick.major.size": 0,
  "ytick.major.size": 0,
  "legend.frameon": False,
  "legend.fontsize": 8,
  "lines.linewidth": 1.4,
}

Series = Mapping[str, Sequence[float]]  # Named columns of one training run, "step" among them.


def _svg(figure: Figure) -> str:
  """The figure's SVG element, without prologue, dates, or ids that nothing refers to."""
  buffer = io.StringIO()
  figure.savefig(
    buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
  )
  text = buffer.getvalue()
  text = text[text.index("<svg") :]
  used = set(re.findall(r'(?:href="|url\()#([^")]+)', text))
  text = re.sub(r' id="([^"]+)"', lambda match: match[0] if match[1] in used else "", text)
  # One scale for all figures, so that their type has one size; the page shrinks what is too wide for it.
  width = round(_PIXELS * figure.get_figwidth())
  text = re.sub(
    r'(<svg [^>]*?)width="[^"]+"',
    rf'\1width="{width}"',
    re.sub(r'(<svg [^>]*?)height="[^"]+" ', r"\1", text, count=1),
    count=1,
  )
  for colour, variable in _VARIABLES.items():
    text = text.replace(colour, variable)
  return text


def _drawn(
  panels: int, draw: Callable[[Sequence[Axes]], None], width: float = 10.0, height: float = 2.5, across: int = 4
) -> str:
  """Panels, `across` in a row, filled by `draw`; width of all and height of a row in inches."""
  across = min(panels, across)
  down = -(-panels // across)
  with matplotlib.rc_context(_STYLE):
    figure = Figure(figsize=(width, height * down), layout="constrained")
    axes = list(figure.subplots(down, across, squeeze=False).flat)
    draw(axes[:panels])
    for axis in axes[panels:]:
      axis.remove()
    return _svg(figure)


def _row_width(panels: int) -> float:
  """Inches for panels that look well at 3.3 inches each."""
  return min(10.0, 3.3 * panels)


def _points(
  axis: Axes, names: Sequence[str], found: Sequence[Mapping[str, Any] | None], colour: str, scale: float
) -> None:
  """One estimate for each name, with its interval."""
  for place, one in enumerate(found):
    if one is None or one["value"] is None:
      continue
    if one["low"] is not None:
      axis.plot([place, place], [scale * one["low"], scale * one["high"]], color=colour, linewidth=2.2, alpha=0.55)
    axis.plot(place, scale * one["value"], "o", color=colour, markersize=5)
  axis.set_xticks(range(len(names)), names)
  axis.set_xlim(-0.5, len(names) - 0.5)


def quality(names: Sequence[str], facts: Sequence[Mapping[str, Any]]) -> str:
  """The oracle's mean, the share of perfect answers and of right content, model by model."""
  panels = {
    "score": ("oracle score, 0 … 5", 1),
    "perfect": ("perfect answers, %", 100),
    "content": ("content right, %", 100),
  }

  def draw(axes: Sequence[Axes]) -> None:
    for axis, (key, (title, scale)) in zip(axes, panels.items(), strict=True):
      _points(axis, names, [one[key] for one in facts], _SERIES[0], scale)
      axis.set_title(title)

  return _drawn(3, draw, height=2.3)


def judging(
  names: Sequence[str], panels: Sequence[tuple[str, float, Sequence[Mapping[str, Any]], Sequence[float | None]]]
) -> str:
  """The judge's agreement with people; panels are (title, scale, estimates of ours, the paper's figures or None)."""

  def draw(axes: Sequence[Axes]) -> None:
    for axis, (title, scale, ours, paper) in zip(axes, panels, strict=True):
      known = [(place, scale * value) for place, value in enumerate(paper) if value is not None]
      axis.plot(*zip(*known, strict=True) if known else ([], []), "D", color=_SERIES[1], markersize=4, fillstyle="none")
      _points(axis, names, ours, _SERIES[0], scale)
      axis.set_title(title)
      axis.tick_params(axis="x", labelsize=7.5)

  return _drawn(len(panels), draw, height=2.3, across=5)


def duels(rows: Sequence[tuple[str, float, float, float]]) -> str:
  """Win, tie and loss shares as stacked bars, one for each (label, win, tie, loss)."""

  def draw(axes: Sequence[Axes]) -> None:
    axis, labels = axes[0], [label for label, *_ in rows]
    places, left = range(len(rows)), [0.0] * len(rows)
    parts = {"win": (_SERIES[0], [one[1] for one in rows]), "tie": (_LINE, [one[2] for one in rows])}
    parts["loss"] = (_SERIES[1], [one[3] for one in rows])
    for name, (colour, fractions) in parts.items():
      shares = [100 * fraction for fraction in fractions]
      bars = axis.barh(places, shares, left=left, color=colour, height=0.68, label=name, alpha=0.6)
      shown = [f"{share:.0f}" if share >= 4 else "" for share in shares]
      axis.bar_label(bars, shown, label_type="center", fontsize=8)
      left = [start + share for start, share in zip(left, shares, strict=True)]
    axis.set_yticks(places, labels)
    axis.invert_yaxis()
    axis.set_xlim(0, 100)
    axis.grid(visible=False)
    axis.set_xticks([])
    axis.spines[:].set_visible(False)
    axis.legend(ncols=3, loc="lower left", bbox_to_anchor=(0, 1))

  return _drawn(1, draw, width=7.5, height=0.5 + 0.27 * len(rows))


def histograms(found: Sequence[tuple[str, Sequence[float], Sequence[int]]]) -> str:
  """How the judge's scores are spread; one panel for each (title, centres, counts)."""

  def draw(axes: Sequence[Axes]) -> None:
    for axis, (title, centres, counts) in zip(axes, found, strict=True):
      total = max(sum(counts), 1)
      width = 0.85 * (centres[1] - centres[0])
      axis.bar(centres, [100 * count / total for count in counts], width=width, color=_SERIES[0])
      axis.set_title(title)
      axis.set_xlabel("judge's score")
      axis.set_ylabel("responses, %")
    highest = max(axis.get_ylim()[1] for axis in axes)
    for axis in axes:
      axis.set_ylim(top=highest)

  return _drawn(len(found), draw, width=_row_width(len(found)))


def calibration(found: Sequence[tuple[str, Sequence[tuple[float, float, int]]]], low: float, high: float) -> str:
  """The oracle's mean for each score of the judge; the area of a point is the number of responses."""

  def draw(axes: Sequence[Axes]) -> None:
    for axis, (title, points) in zip(axes, found, strict=True):
      total = max(sum(count for *_, count in points), 1)
      axis.plot([low, high], [low, high], color=_LINE, linewidth=1)
      axis.plot([score for score, *_ in points], [truth for _, truth, _ in points], color=_SERIES[2], alpha=0.5)
      sizes = [12 + 500 * count / total for *_, count in points]
      axis.scatter(
        [score for score, *_ in points], [truth for _, truth, _ in points], s=sizes, color=_SERIES[2], zorder=3
      )
      axis.set(title=title, xlabel="judge's score", xlim=(low - 0.4, high + 0.4), ylim=(low - 0.4, high + 0.4))
      axis.set_ylabel("oracle's mean")

  return _drawn(len(found), draw, width=_row_width(len(found)))


def strata(panels: Sequence[tuple[str, Sequence[str], Mapping[str, Sequence[Mapping[str, Any] | None]]]]) -> str:
  """Shares with intervals, stratum below stratum; a panel is (title, strata, {model: an estimate or None for each})."""

  def draw(axes: Sequence[Axes]) -> None:
    for axis, (title, names, models) in zip(axes, panels, strict=True):
      for index, (model, found) in enumerate(models.items()):
        colour, offset = _SERIES[index % len(_SERIES)], (index - (len(models) - 1) / 2) * 0.7 / len(models)
        known = [(place + offset, one) for place, one in enumerate(found) if one and one["value"] is not None]
        for place, one in known:
          if one["low"] is not None:
            axis.plot([100 * one["low"], 100 * one["high"]], [place, place], color=colour, linewidth=1.6, alpha=0.55)
        values = [100 * one["value"] for _, one in known]
        axis.plot(values, [place for place, _ in known], "o", color=colour, markersize=3.5, label=model)
      axis.axvline(0, color=_INK, linewidth=0.6)
      axis.set_yticks(range(len(names)), names)
      axis.set_ylim(len(names) - 0.4, -0.6)
      axis.grid(visible=True, axis="x")
      axis.set_title(title)
    axes[0].legend(loc="upper left", bbox_to_anchor=(0, -0.1), ncols=4)

  rows = max((len(names) for _, names, _ in panels), default=1)
  return _drawn(len(panels), draw, height=0.9 + 0.24 * max(rows, 4))


Points = Mapping[str, Sequence[tuple[float, float]]]  # Kind → places in the plane.


def read_points(text: str) -> dict[str, list[tuple[float, float]]]:
  """The points of a map.json, by kind."""
  found: dict[str, list[tuple[float, float]]] = {}
  for kind, x, y in json.loads(text)["points"]:
    found.setdefault(kind, []).append((x, y))
  return found


def points(found: Points) -> str:
  """A map: a dot for each text, one colour for each kind; its axes mean nothing and have no figures."""

  def draw(axes: Sequence[Axes]) -> None:
    axis = axes[0]
    for index, (kind, places) in enumerate(found.items()):
      colour = _SERIES[index % len(_SERIES)]
      # One path of lines without length, whose round ends are the dots: a tenth of what a marker each would take.
      path = Path(np.repeat(np.asarray(places, float), 2, axis=0), np.tile([Path.MOVETO, Path.LINETO], len(places)))
      path.should_simplify = False  # That would take away lines without length.
      dots = PathPatch(path, edgecolor=colour, facecolor="none", linewidth=2.4, capstyle="round", alpha=0.6)
      axis.add_patch(dots)
      axis.plot([], [], "o", color=colour, markersize=5, label=f"{kind} ({len(places):,})")
    axis.autoscale_view()
    axis.set_aspect("equal", adjustable="datalim")
    axis.grid(visible=False)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))

  return _drawn(1, draw, width=7.5, height=5.2)


def lengths(names: Sequence[str], characters: Sequence[Mapping[str, float]]) -> str:
  """Mean, median and 90th percentile of the answers' lengths, model by model."""

  def draw(axes: Sequence[Axes]) -> None:
    for key, title in (("mean", "mean"), ("median", "median"), ("p90", "90th percentile")):
      axes[0].plot(range(len(names)), [one[key] for one in characters], "o-", label=title, markersize=4)
    axes[0].set_xticks(range(len(names)), names)
    axes[0].set_ylim(bottom=0)
    axes[0].margins(x=0.08)
    axes[0].set_title("characters of an answer")
    axes[0].legend(ncols=3, loc="lower right")

  return _drawn(1, draw, width=5.5)


def trends(names: Sequence[str], panels: Sequence[tuple[str, float, Sequence[float | None]]]) -> str:
  """Figures from model to model; panels are (title, scale, a value for each name or None)."""

  def draw(axes: Sequence[Axes]) -> None:
    for axis, (title, scale, values) in zip(axes, panels, strict=True):
      known = [(place, scale * value) for place, value in enumerate(values) if value is not None]
      axis.plot(*zip(*known, strict=True), "o-", color=_SERIES[0], markersize=4)
      axis.set_xticks(range(len(names)), names)
      axis.set_xlim(-0.5, len(names) - 0.5)
      axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))
      axis.set_title(title)
      axis.tick_params(axis="x", labelsize=7.5)

  return _drawn(len(panels), draw, height=1.9, across=3)


def _lines(axis: Axes, runs: Mapping[str, Series], columns: Mapping[str, str], title: str) -> None:
  """Columns of several runs over their steps: one colour for each run, one stroke for each column."""
  for index, (name, run) in enumerate(runs.items()):
    for (column, what), stroke in zip(columns.items(), ("-", "--"), strict=False):
      if column in run:
        label = f"{name}, {what}" if what else name
        axis.plot(run["step"], run[column], stroke, color=_SERIES[index % len(_SERIES)], label=label)
  axis.set_title(title)
  axis.set_xlabel("step")
  axis.margins(x=0.01)


def _mark(axis: Axes, steps: Iterable[int]) -> None:
  """A dotted line at each step."""
  for step in steps:
    axis.axvline(step, color=_SERIES[1], linestyle=":", linewidth=0.8)


def sft(runs: Mapping[str, Series], marks: Mapping[str, Sequence[int]] | None = None) -> str:
  """Losses of pretraining and of supervised fine-tuning, one panel for each run; `marks` are steps of note of each."""

  def draw(axes: Sequence[Axes]) -> None:
    for axis, (name, run) in zip(axes, runs.items(), strict=True):
      _lines(axis, {name: run}, {"loss": ""}, f"{name}: loss, nats a token")
      _mark(axis, (marks or {}).get(name, ()))
      axis.set_ylim(bottom=0)

  return _drawn(len(runs), draw, width=_row_width(len(runs)))


def dpo(runs: Mapping[str, Series], marks: Mapping[str, Sequence[int]] | None = None) -> str:
  """Loss, margin, accuracy and rewards of the DPO runs over their steps; `marks` are steps of note of each."""

  def draw(axes: Sequence[Axes]) -> None:
    _lines(axes[0], runs, {"loss": ""}, "DPO loss")
    for name in runs:
      _mark(axes[0], (marks or {}).get(name, ()))
    _lines(axes[1], runs, {"margin": ""}, "reward margin")
    _lines(axes[2], runs, {"accuracy": ""}, "margin > 0, share")
    _lines(axes[3], runs, {"chosen_reward": "chosen", "rejected_reward": "rejected"}, "rewards")
    axes[0].legend()
    axes[3].legend()

  return _drawn(4, draw)


def checkpoints(runs: Mapping[str, tuple[Sequence[int], Sequence[Mapping[str, Any]], int]]) -> str:
  """Wins minus losses of each checkpoint against the one before it, in per cent; a ring marks the one that was kept.

  Args:
    runs: (steps, estimates, step of the one kept) by the name of the model.
  """

  def draw(axes: Sequence[Axes]) -> None:
    for axis, (name, (steps, nets, kept)) in zip(axes, runs.items(), strict=True):
      known = [(step, net) for step, net in zip(steps, nets, strict=True) if net["value"] is not None]
      for step, net in known:
        if net["low"] is not None:
          axis.plot([step, step], [100 * net["low"], 100 * net["high"]], color=_SERIES[0], linewidth=2.2, alpha=0.55)
      axis.plot([step for step, _ in known], [100 * net["value"] for _, net in known], "o-", color=_SERIES[0])
      chosen = [(step, 100 * net["value"]) for step, net in known if step == kept]
      axis.plot([x for x, _ in chosen], [y for _, y in chosen], "o", color=_SERIES[1], fillstyle="none", markersize=11)
      axis.axhline(0, color=_INK, linewidth=0.8)
      axis.set_title(f"{name}: win − loss, %")
      low, high = axis.get_ylim()
      axis.set_ylim(min(low, -5), max(high, 5))  # A draw is to look like one.
      axis.set_xlabel("step")
      axis.set_xlim(0, 1.08 * max(steps))

  return _drawn(len(runs), draw, width=_row_width(len(runs)))


def overlaid(panels: Sequence[tuple[str, str, Sequence[Series | None]]]) -> str:
  """One column of several runs over their steps; panels are (title, column, the runs, None where one has no such).

  A run's colour is that of its place, with broken strokes from the seventh on: the page says whose it is, since the
  names of runs are not our own texts.
  """

  def draw(axes: Sequence[Axes]) -> None:
    for axis, (title, column, runs) in zip(axes, panels, strict=True):
      for place, run in enumerate(runs):
        if run:
          stroke = "-" if place < len(_SERIES) else "--"
          axis.plot(run["step"], run[column], stroke, color=_SERIES[place % len(_SERIES)], alpha=0.85)
      axis.set_title(title)
      axis.set_xlabel("step")
      axis.margins(x=0.01)
      if column == "loss":
        axis.set_ylim(bottom=0)

  return _drawn(len(panels), draw, width=_row_width(len(panels)))


def smooth(rows: Iterable[Mapping[str, float]], points: int = 150) -> dict[str, list[float]]:
  """Columns of training metrics, averaged over windows of equal size so that about `points` remain."""
  given = list(rows)
  window = max(-(-len(given) // points), 1)
  parts = [given[start : start + window] for start in range(0, len(given), window)]
  names = given[0].keys() if given else ()
  return {name: [sum(row[name] for row in part) / len(part) for part in parts] for name in names}
