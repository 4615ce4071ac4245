"""The data of a run for reports: how much there is, what was left out, how right the judge was. Never for the loop."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
import dataclasses
import functools
import math
import statistics

from srlm_jax import artifacts, lineage, metrics, paper, records, tables, world

ORACLE = functools.lru_cache(1 << 17)(world.oracle)  # Samples of a trained model repeat each other.
Key = tuple[str, int]  # (prompt id, sample): the name of a response.
Figures = dict[str, tables.Cell | str]  # What is counted → its figure, of one round.


@dataclasses.dataclass(frozen=True)
class Round:
  """The responses of one iteration, their judgements, and the pairs made of them; empty where not there yet.

  Attributes:
    name: its folder, "aift1".
    responses: all of them, or the first shard of them where only examples are shown.
    judgements: all of them.
    pairs: all of them.
  """

  name: str
  responses: list[records.Response]
  judgements: list[records.Judgement]
  pairs: list[records.PreferencePair]

  @property
  def label(self) -> str:
    """Its name as it is shown: "AIFT1"."""
    return self.name.upper()

  def scores(self) -> dict[Key, float | None]:
    """The judge's score of each response."""
    return {(one.prompt_id, one.sample): one.score for one in self.judgements}


def first_shard(artifact: artifacts.Artifact, stem: str, kind: type[records.R]) -> list[records.R]:
  """The records of the first shard alone: enough for examples, however large the run."""
  return [record for name in artifact.shards(stem)[:1] for record in artifact.read(name, kind)]


def load_rounds(finished: lineage.Finished, whole: bool) -> list[Round]:
  """The rounds whose responses are there; `whole` reads all responses, not just examples."""
  rounds = []
  for folder, artifact in finished.items():
    name, _, part = folder.partition("/")
    if part != "responses":
      continue
    read = artifact.read_shards if whole else functools.partial(first_shard, artifact)
    judged, paired = finished.get(f"{name}/judgements"), finished.get(f"{name}/pairs")
    rounds.append(
      Round(
        name,
        list(read("responses", records.Response)),
        list(judged.read_shards("judgements", records.Judgement)) if judged else [],
        paired.read("pairs.jsonl", records.PreferencePair) if paired else [],
      )
    )
  return rounds


def sizes_table(finished: lineage.Finished, judged: int | None) -> tables.Table:
  """How much data each part had, beside the paper's."""

  def fact(name: str, key: str) -> str:
    return tables.number(finished[name].manifest()["facts"].get(key) if name in finished else None)

  rows = [
    tables.row("IFT examples", fact("seed", "ift"), tables.number(paper.SIZES["ift"])),
    tables.row("EFT examples", fact("eft", "examples"), tables.number(paper.SIZES["eft"])),
    tables.row("held-out ranked replies", tables.number(judged), tables.number(paper.SIZES["eft held out"])),
    tables.row("held-out instructions", fact("seed", "eval_prompts"), "256"),
  ]
  if "seed" in finished and "validation" in finished["seed"].manifest()["facts"]:
    rows.append(tables.row("validation prompts, to choose checkpoints by", fact("seed", "validation"), "253"))
  for name in finished:
    if name.endswith("/pairs"):
      model = f"m{int(name.removeprefix('aift').removesuffix('/pairs')) + 1}"
      rows.append(
        tables.row(f"pairs for {lineage.label(model)}", fact(name, "pairs"), tables.number(paper.SIZES.get(model)))
      )
  return tables.Table("sizes", "How much data", ("", "here", "paper"), tuple(rows), paper=(2,))


def counts_tables(finished: lineage.Finished) -> list[tables.Table]:
  """What each stage took in, kept, and left out for which reason; the iterations side by side."""
  parts: dict[str, dict[str, dict[str, int]]] = {}  # Part of the data → column → reason → count.
  for name, artifact in finished.items():
    facts = artifact.manifest()["facts"]
    column, _, part = name.partition("/")
    if "parameters" in facts:
      column, part = lineage.label(name), "fine-tuning"
    if "counts" in facts:
      parts.setdefault(part or name, {})[column.upper() if name.startswith("aift") else column] = facts["counts"]
  titles = {
    "seed": "Seed data: Open Assistant trees",
    "eft": "EFT",
    "prompts": "New prompts",
    "pairs": "Preference pairs",
  }
  found = []
  for part, columns in parts.items():
    reasons = sorted({reason for counts in columns.values() for reason in counts})
    rows = [
      tables.row(one.replace("/", ": "), *(tables.number(counts.get(one, 0)) for counts in columns.values()))
      for one in reasons
    ]
    heads = ("", *columns) if len(columns) > 1 else ("", "count")
    found.append(tables.Table(f"counts-{part}", titles.get(part, part.capitalize()), heads, tuple(rows)))
  return found


def _share(hits: Sequence[bool]) -> tables.Cell:
  """A share in per cent, with its interval over prompts (a prompt has one pair)."""
  return tables.estimate(dataclasses.asdict(metrics.mean_with_interval([[float(hit)] for hit in hits])))


def _mean(values: Sequence[float], digits: int = 2) -> str:
  return tables.number(statistics.fmean(values) if values else None, digits)


def _turned(rows: Sequence[Figures]) -> tuple[tuple[tables.Cell, ...], ...]:
  """From the figures of each round to one row for each figure, one column for each round."""
  names = list(rows[0]) if rows else []
  return tuple(tables.row(name, *(figures[name] for figures in rows)) for name in names)


def pairs_table(rounds: Sequence[Round]) -> tables.Table:
  """What the judge's choices look like, without any truth about them."""
  rows: list[Figures] = []
  for one in rounds:
    scores = [judgement.score for judgement in one.judgements if judgement.score is not None]
    rows.append(
      {
        "judge's mean score of a response": _mean(scores),
        "pairs": tables.number(len(one.pairs)),
        "mean score, chosen": _mean([pair.chosen_score for pair in one.pairs]),
        "mean score, rejected": _mean([pair.rejected_score for pair in one.pairs]),
        "mean characters, chosen": _mean([len(pair.chosen) for pair in one.pairs], 1),
        "mean characters, rejected": _mean([len(pair.rejected) for pair in one.pairs], 1),
        "chosen is the longer one, %": _share([len(pair.chosen) > len(pair.rejected) for pair in one.pairs]),
        "both texts are equal, %": _share([pair.chosen == pair.rejected for pair in one.pairs]),
      }
    )
  note = "A judge that prefers length shows it here first. Equal texts that got different scores teach nothing."
  columns = ("", *(one.label for one in rounds))
  return tables.Table("pairs", "What is chosen and rejected", columns, _turned(rows), note)


def _oracle(pair: records.PreferencePair) -> tuple[int, int]:
  return ORACLE(pair.prompt, pair.chosen), ORACLE(pair.prompt, pair.rejected)


def oracle_table(rounds: Sequence[Round]) -> tables.Table:
  """How often the judge's choice is right by the world's ground truth."""
  rows: list[Figures] = []
  for one in rounds:
    truth = [_oracle(pair) for pair in one.pairs]
    prompts = {response.prompt_id: response.prompt for response in one.responses}
    scores = [float(ORACLE(response.prompt, response.text)) for response in one.responses]
    rows.append(
      {
        "new prompts that are well formed, %": _share([world.parse(text) is not None for text in prompts.values()]),
        "pairs ordered right, %": _share([chosen > rejected for chosen, rejected in truth]),
        "pairs of equal quality, %": _share([chosen == rejected for chosen, rejected in truth]),
        "pairs ordered wrong, %": _share([chosen < rejected for chosen, rejected in truth]),
        "oracle mean, all responses": _mean(scores),
        "oracle mean, chosen": _mean([chosen for chosen, _ in truth]),
        "oracle mean, rejected": _mean([rejected for _, rejected in truth]),
      }
    )
  note = "Computed for this report alone: no stage of the loop reads the oracle."
  columns = ("", *(one.label for one in rounds))
  return tables.Table("oracle-pairs", "The judge's choices against the oracle", columns, _turned(rows), note)


def score_counts(one: Round, scale: tuple[float, float], votes: int) -> tuple[Sequence[float], Sequence[int]]:
  """How often the judge gave which mean score: (the means that `votes` whole votes can have, counts)."""
  found = metrics.histogram([judgement.score for judgement in one.judgements], *scale, 1 / votes)
  return found.centres, found.counts


def calibration(one: Round) -> list[tuple[int, float, int]]:
  """For each score of the judge, to the nearest whole: (score, the oracle's mean of those responses, their number)."""
  scores = one.scores()
  groups: dict[int, list[int]] = defaultdict(list)
  for response in one.responses:
    score = scores.get((response.prompt_id, response.sample))
    if score is not None:
      groups[math.floor(score + 0.5)].append(ORACLE(response.prompt, response.text))
  return [(score, statistics.fmean(found), len(found)) for score, found in sorted(groups.items())]


def unreadable(judgements: Sequence[records.Judgement]) -> Iterator[tuple[records.Judgement, records.Vote]]:
  """The votes without a score."""
  for judgement in judgements:
    for vote in judgement.votes:
      if vote.score is None:
        yield judgement, vote
