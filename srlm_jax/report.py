"""The report of a run: collects what the finished artifacts say, and writes it as one page and as Markdown.

Everything that a model or a person wrote is escaped by the template; nothing is fetched from anywhere.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import datetime
import json
from typing import Any

from ml_collections import config_dict

from srlm_jax import (
  artifacts,
  config,
  diagnostics,
  excerpts,
  findings,
  finegrained,
  health,
  journal,
  lineage,
  nlp_results,
  outside,
  oversight,
  pages,
  paper,
  plots,
  records,
  selection,
  tables,
  world,
)
from srlm_jax.tables import Table

Finished = Mapping[str, artifacts.Artifact]  # Folder name → committed artifact, in the order of the stages.

# Settings about which the paper is silent, and those that say where and how to run; all others are the paper's.
UNSTATED = (
  *("chat", "model.max_length", "pretrain.", "pairs.", "data.overlap", "monitors.", "health.", "nlp."),
  *(
    f"{stage}.{key}"
    for stage in ("sft", "dpo")
    for key in ("epochs", "steps", "min_steps", "warmup", "weight_decay", "b2", "clip", "pack")
  ),
  *("dpo.decay", "eft.by", "eft.ties", "eft.attempts", "eft.max_share", "eft.max_examples"),
  *("prompts.count", "prompts.max_proposals", "prompts.chat", "judge.min_votes", "evaluate.samples", "mt_bench."),
  "analysis.",
  *(
    f"{stage}.sampling.{key}" for stage in ("prompts", "responses", "judge", "evaluate") for key in ("max_new", "stop")
  ),
  *("select.judge", "select.patience", "select.pairwise", "select.sampling.", "select.verdict."),
)
MACHINE = (
  *("seed", "mesh.", "generation.", "server.", "endpoint.", "tokenizer"),
  *("base.path", "prompts.path", "prompts.per_round", "select.path", "alpaca_eval.url"),
  *(f"model.{key}" for key in ("dtype", "param_dtype", "remat", "logits_chunk", "attention")),
  *(f"{stage}.{key}" for stage in ("pretrain", "sft", "dpo") for key in ("accumulate", "moments")),
  *(f"data.{key}" for key in ("trees", "heldout_trees", "eval_prompts", "judgements", "pretrain")),
)


@dataclasses.dataclass(frozen=True)
class Plot:
  """A figure (an SVG element) and what it shows."""

  svg: str
  caption: str


@dataclasses.dataclass(frozen=True)
class Section:
  """A part of a page with its own anchor; small tables stand `together` in one line where there is room."""

  name: str
  title: str
  text: str = ""
  tables: tuple[Table, ...] = ()
  plots: tuple[Plot, ...] = ()
  together: bool = False


@dataclasses.dataclass(frozen=True)
class Report:
  """All that the page shows, as plain data.

  Attributes:
    title: of the page.
    facts: (what, value) of the run as a whole.
    warnings: what a reader must know before any figure.
    summary: the run in a few sentences.
    cards: (model, [(value, what)]) at the top.
    sections: the tables and figures.
    tree: the tree of the models in text.
    diagram: the same, drawn.
    models: the same with all digests.
    heldout: held-out instructions with each model's answer.
    rounds: (title, exchanges) of each iteration.
    eft: some judge prompts with their judgements.
    unreadable: some votes without a score.
    headline: the main figures, for the manifest.
  """

  title: str
  facts: tuple[tuple[str, str], ...]
  warnings: tuple[str, ...]
  summary: tuple[str, ...]
  cards: tuple[tuple[str, tuple[tuple[str, str], ...]], ...]
  sections: tuple[Section, ...]
  tree: str
  diagram: lineage.Diagram
  models: Table
  heldout: tuple[excerpts.Exchange, ...]
  rounds: tuple[tuple[str, tuple[excerpts.Exchange, ...]], ...]
  eft: tuple[excerpts.Verdict, ...]
  unreadable: tuple[excerpts.Verdict, ...]
  headline: dict[str, Any]


def _wall_time(finished: Finished) -> str:
  """The sum of the stages' seconds; where they did not record them, the time from the first commit to the last."""
  made = [artifact.manifest()["made"] for artifact in finished.values()]
  if made and all("seconds" in one for one in made):
    return tables.duration(sum(one["seconds"] for one in made))
  times = [datetime.datetime.fromisoformat(one["at"]) for one in made]
  return (
    f"{tables.duration((max(times) - min(times)).total_seconds())} from the first commit to the last" if times else "–"
  )


def run_facts(finished: Finished, settings: config_dict.ConfigDict, planned: int) -> tuple[tuple[str, str], ...]:
  """What run this is."""
  made = [artifact.manifest()["made"] for artifact in finished.values()]
  base = finished["m0"].manifest()["facts"] if "m0" in finished else {}
  size = f", {base['parameters']:,} parameters" if base else ""
  grader = {
    "oracle": "the world's oracle",
    "judge": f"{lineage.label(settings.evaluate.judge)} as pairwise judge",
    "endpoint": f"{settings.endpoint.model} at {settings.endpoint.url}, as pairwise judge",
    "none": "nobody",
  }
  return (
    ("M0", f"{settings.base.size} ({settings.base.kind}{size})"),
    ("seed", str(settings.seed)),
    (
      "method",
      f"{settings.dpo.method}, β {settings.dpo.beta:g}, N {settings.responses.n}, {settings.judge.votes} votes",
    ),
    ("judge prompt", str(settings.judge.rubric)),
    ("duels decided by", grader.get(settings.evaluate.grader, settings.evaluate.grader)),
    ("finished", max((one["at"] for one in made), default="–").replace("T", " ").replace("Z", " UTC")),
    ("time", _wall_time(finished)),
    ("steps done", f"{len(finished)} of {planned}"),
    ("JAX", ", ".join(sorted({one["jax"] for one in made})) or "–"),
  )


def _kind(key: str) -> str:
  """Whose default a setting has: "paper", "ours" or "machine"."""
  for kind, prefixes in (("ours", UNSTATED), ("machine", MACHINE)):
    if any(key == prefix or (prefix.endswith(".") and key.startswith(prefix)) for prefix in prefixes):
      return kind
  return "paper"


def deviations_table(settings: config_dict.ConfigDict) -> Table:
  """All settings that are not the base configuration's, the paper's own first; `settings.reasons` may say why."""
  flat, base = artifacts.flatten(settings.to_dict()), artifacts.flatten(config.base().to_dict())
  reasons = {key.removeprefix("reasons."): str(flat.pop(key)) for key in list(flat) if key.startswith("reasons.")}
  changed = [key for key in dict.fromkeys([*base, *flat]) if key != "name" and base.get(key) != flat.get(key)]

  def show(values: Mapping[str, Any], key: str) -> str:
    return json.dumps(values[key], ensure_ascii=False) if key in values else tables.MISSING

  kinds = {key: _kind(key) if key in base else "ours" for key in changed}
  order = ("paper", "ours", "machine")
  rows = [
    tables.row(key, kinds[key], show(base, key), show(flat, key), *([reasons.get(key, "")] if reasons else []))
    for key in sorted(changed, key=lambda key: order.index(kinds[key]))
  ]
  note = (
    "Whose default it is: the paper's; ours, where the paper is silent; or a matter of files and machines, not of the "
    "method. The comments of the configuration say more."
  )
  columns = ("setting", "whose", "default", "here", *(["reason"] if reasons else []))
  return Table(
    "deviations",
    "Settings that differ from the base configuration",
    columns,
    tuple(rows),
    note,
    words=tuple(range(len(columns))),
  )


def curves(finished: Finished) -> dict[str, dict[str, list[float]]]:
  """The training metrics of each model that was trained here, thinned for plotting."""
  found = {}
  for name, given in _journals(finished).items():
    rows = [row for row in given if None not in row.values()]
    if rows:
      found[name] = plots.smooth(rows)
  return found


def _journals(finished: Finished) -> dict[str, list[dict[str, Any]]]:
  """The metrics of every step of each training."""
  return {
    lineage.label(name): [row for row in journal.parse(artifact.read_text(journal.NAME)) if row]
    for name, artifact in finished.items()
    if journal.NAME in artifact.manifest()["files"]
  }


def _cards(measured: findings.Measured) -> tuple[tuple[str, tuple[tuple[str, str], ...]], ...]:
  cards = []
  for name, facts in measured.items():
    pairwise = facts["judge"]["metrics"]["pairwise"]["value"]
    figures = [(tables.MISSING if pairwise is None else f"{tables.percent(pairwise)} %", "pairwise")]
    figures.append((tables.number(facts["characters"]["mean"]), "characters"))
    if "oracle" in facts:
      figures.insert(0, (tables.number(facts["oracle"]["score"]["value"], 2), "oracle"))
    cards.append((lineage.label(name), tuple(figures)))
  return tuple(cards)


def _short(name: str) -> str:
  """A model's name below an axis."""
  return "SFT" if name == "baseline" else lineage.label(name)


def _following(measured: findings.Measured, grader: str) -> Section:
  duels = findings.duel_facts(measured)
  names, drawn = [_short(name) for name in measured], []
  if duels:
    bars = [
      (f"{lineage.label(name)} over {lineage.label(other)}", found["win"], found["tie"], found["loss"])
      for (name, other), found in duels.items()
    ]
    drawn.append(Plot(plots.duels(bars), "Head to head, in per cent of the comparisons."))
  if measured and all("oracle" in facts for facts in measured.values()):
    shown = plots.quality(names, [facts["oracle"] for facts in measured.values()])
    drawn.append(Plot(shown, "Quality by the oracle, with 95 % intervals."))
  if measured:
    drawn.append(Plot(plots.lengths(names, [facts["characters"] for facts in measured.values()]), "Growth of length."))
  found = (findings.following_table(measured), findings.duels_table(measured, grader)) if measured else ()
  text = "Each model answers the held-out instructions; in a duel, two models' answers to one instruction meet."
  return Section("following", "Following instructions", text, found, tuple(drawn))


def _judging(measured: findings.Measured) -> Section:
  shown = {"pairwise": 100, "five_best": 100, "exact_match": 100, "spearman": 1, "kendall": 1}
  panels = [
    (
      findings.METRICS[metric][0],
      scale,
      [facts["judge"]["metrics"][metric] for facts in measured.values()],
      [paper.JUDGING[metric].get(name) for name in measured],
    )
    for metric, scale in shown.items()
  ]
  drawn = (
    (
      Plot(
        plots.judging([_short(name) for name in measured], panels),
        "Dots: this run, with 95 % intervals. Diamonds: the paper.",
      ),
    )
    if measured
    else ()
  )
  found = (findings.judging_table(measured), findings.votes_table(measured)) if measured else ()
  both = {name: facts for name, facts in measured.items() if "expected" in facts}
  beside = (findings.expected_table(both),) if both else ()
  text = "Each model scores held-out replies that people have ranked."
  return Section("judging", "Judging", text, (*found, *beside), drawn)


def _outside(finished: Finished) -> tuple[Section, ...]:
  """The benchmarks that other programs bring, if any was run."""
  found = (*outside.report_tables(finished), *nlp_results.report_tables(finished))
  text = "What the models can do on benchmarks that other programs bring."
  return (Section("outside", "Benchmarks from outside", text, found),) if found else ()


def _training(finished: Finished, watched: Mapping[str, health.Observer], limits: health.Limits) -> Section:
  runs = curves(finished)
  marks = {name: (*observer.skipped, *observer.spikes) for name, observer in watched.items()}
  plain = {name: run for name, run in runs.items() if "margin" not in run}
  preferred = {name: run for name, run in runs.items() if "margin" in run}
  marked = " Dotted lines: skipped steps and spikes of the loss." if any(marks.values()) else ""
  drawn = [Plot(plots.sft(plain, marks), f"Pretraining and supervised fine-tuning.{marked}")] if plain else []
  drawn += [Plot(plots.dpo(preferred, marks), f"DPO, averaged over windows of steps.{marked}")] if preferred else []
  found = (health.table(watched, limits),) if watched else ()
  return Section("training", "Training", tables=found, plots=tuple(drawn))


def _checkpoints(finished: Finished) -> tuple[Section, ...]:
  """How checkpoints were chosen among; nothing where no model was chosen so."""
  facts = {lineage.label(name): artifact.manifest()["facts"] for name, artifact in finished.items()}
  found = {name: one["selection"] for name, one in facts.items() if "selection" in one}
  if not found:
    return ()
  runs = {
    name: ([trial["step"] for trial in one["curve"]], [trial["net"] for trial in one["curve"]], one["chosen"])
    for name, one in found.items()
  }
  text = " ".join(
    [
      "At each checkpoint the model answers the validation prompts, and a judge compares its answers with those of the "
      "checkpoint before it; step 0 is the model where training started.",
      *selection.sentences(found),
    ]
  )
  shown = Plot(plots.checkpoints(runs), "Against the checkpoint before, with 95 % intervals. A ring: the model.")
  return (Section("selection", "Choice of checkpoints", text, (selection.table(found),), (shown,)),)


def _aift(rounds: Sequence[diagnostics.Round], oracle: bool, scale: tuple[float, float], votes: int) -> Section:
  """What the iterations' own data look like, and how right the judge was where the oracle can tell."""
  judged = [one for one in rounds if one.judgements]
  found = [diagnostics.pairs_table(judged)] if judged else []
  drawn = []
  if judged:
    spreads = [(one.label, *diagnostics.score_counts(one, scale, votes)) for one in judged]
    drawn.append(Plot(plots.histograms(spreads), "The judge's scores of its own responses."))
  if judged and oracle:
    found.append(diagnostics.oracle_table(judged))
    points = [(one.label, diagnostics.calibration(one)) for one in judged]
    drawn.append(
      Plot(plots.calibration(points, *scale), "The oracle's mean of the responses that the judge gave each score.")
    )
  text = "The models' own training data: responses of M_t, scored by M_t itself."
  return Section("aift", "Self-made preference data", text, tuple(found), tuple(drawn))


def _monitors(watched: oversight.Oversight) -> Section:
  drawn = (Plot(watched.svg, "The main figures, model by model."),) if watched.svg else ()
  text = (
    "Signs that a run games its judge, loses its variety or its manners. What is beyond its threshold warns at the top."
  )
  return Section("monitors", "Monitors", text, watched.tables, drawn)


def _finegrained(finished: Finished) -> list[Section]:
  """The closer looks that are there: by category, the map of the prompts, human evaluations."""
  return [
    Section(part.name, part.title, part.text, part.tables, tuple(Plot(*drawn) for drawn in part.plots))
    for part in finegrained.parts(finished)
  ]


def collect(finished: Finished, settings: config_dict.ConfigDict, missing: Sequence[str], run_name: str) -> Report:
  """Everything that the report of the run `run_name` shows; `missing` are the steps that are not done yet."""
  oracle = settings.evaluate.grader == "oracle"
  truth = world.oracle if oracle else None
  evaluations = {name.removeprefix("eval/"): one for name, one in finished.items() if name.startswith("eval/")}
  measured = {name: artifact.manifest()["facts"] for name, artifact in evaluations.items()}
  rounds = diagnostics.load_rounds(finished, whole=oracle)
  found = lineage.models(finished)
  centres = next(iter(measured.values()))["judge"]["histogram"]["centres"] if measured else (0.0, 5.0)
  captions = {
    name: f"oracle {facts['oracle']['score']['value']:.2f}" for name, facts in measured.items() if "oracle" in facts
  }
  judged = next(iter(measured.values()))["judge"]["metrics"]["unreadable"]["count"] if measured else None
  counts = (diagnostics.sizes_table(finished, judged), *diagnostics.counts_tables(finished))
  watched = oversight.collect(finished, measured, rounds, centres[-1], settings.monitors.warn)
  limits = config.frozen(health.Limits, settings.health)
  trainings = {name: health.observe(rows, limits) for name, rows in _journals(finished).items()}
  unwell = [f"{name}: {text}" for name, (_, said) in trainings.items() for text in said]
  sections = (
    _following(measured, settings.evaluate.grader),
    _judging(measured),
    *_outside(finished),
    *_finegrained(finished),
    _aift(rounds, oracle, (centres[0], centres[-1]), settings.judge.votes),
    _monitors(watched),
    _training(finished, {name: observer for name, (observer, _) in trainings.items()}, limits),
    *_checkpoints(finished),
    Section("data", "Data", "What came in, what was kept, and why the rest was left out.", counts, together=True),
    Section("settings", "Deviations from the paper", tables=(deviations_table(settings),)),
  )
  claims = (Section("findings", "Findings", tables=(findings.claims_table(measured),)),) if len(measured) > 1 else ()
  unreadable = [one for part in rounds for one in excerpts.unreadable(part.label, part.judgements, 3)]
  for name, artifact in evaluations.items():
    judgements = diagnostics.first_shard(artifact, "judgements", records.Judgement)
    unreadable += excerpts.unreadable(f"{lineage.label(name)} on held-out replies", judgements, 2)
  unfinished = [f"Not done yet: {', '.join(missing)}."] if missing else []
  warnings = [*lineage.stale(finished), *unfinished, *watched.warnings, *unwell]
  return Report(
    title=f"Self-rewarding run: {run_name}",
    facts=run_facts(finished, settings, len(finished) + len(missing)),
    warnings=tuple(warnings),
    summary=tuple(findings.summary(measured)),
    cards=_cards(measured),
    sections=claims + sections,
    tree=lineage.lineage_text(found),
    diagram=lineage.diagram(found, captions),
    models=lineage.table(found),
    heldout=tuple(excerpts.heldout(evaluations, 6, truth)),
    rounds=tuple((one.label, tuple(excerpts.sampled(one, 4, truth))) for one in rounds),
    eft=tuple(excerpts.eft(finished["eft"], 4)) if "eft" in finished else (),
    unreadable=tuple(unreadable),
    headline=findings.headline(measured),
  )


def html(report: Report) -> str:
  """The page: self-contained, all texts escaped; only our own SVG is put in as it is."""
  return pages.render("report.html.jinja", report=report, source=paper.SOURCE, label=lineage.label)


def sections_markdown(sections: Sequence[Section]) -> list[str]:
  """The tables of some sections in Markdown, under their heads; a section without tables is left out."""
  parts = []
  for section in sections:
    if section.tables:
      parts += [f"## {section.title}", section.text] if section.text else [f"## {section.title}"]
      parts += [tables.markdown(table) for table in section.tables]
  return parts


def markdown(report: Report) -> str:
  """The main tables, with the same figures as the page."""
  parts = [f"# {tables.escaped(report.title)}"]
  parts += [f"> {tables.escaped(warning)}" for warning in report.warnings]
  parts.append("\n".join(f"- {tables.escaped(f'{what}: {value}')}" for what, value in report.facts))
  parts.append("\n".join(f"- {tables.escaped(sentence)}" for sentence in report.summary))
  parts += [
    *sections_markdown(report.sections),
    "## Lineage",
    f"```\n{report.tree}\n```",
    tables.markdown(report.models),
    f"The paper's figures: {paper.SOURCE}.",
  ]
  return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"
