"""Human evaluation (paper §3.2): two models' answers side by side on a blind page, and the votes of several annotators.

Three files: the page, self-contained and without any name of a model; its key, which says what lies where; and a
ballot of each annotator, which the page saves. The key's seed draws the instructions and their sides; the page has no
seed.
"""

import base64
from collections import Counter
from collections.abc import Mapping, Sequence
import dataclasses
import hashlib
import importlib.resources
import json
import random
from typing import Any, Literal

from etils import epath
import jinja2
import pydantic

from srlm_jax import agreement, lines, metrics, records, tables

Side = Literal["left", "right"]


class Item(records.Record):
  """One comparison of the page: its name there, and which of its sides is the model's."""

  id: str
  prompt_id: str
  sample: int
  model: Side


class Key(records.Record):
  """What the page hides. `answers` are the digests of the two evaluations that the answers were taken from."""

  format: Literal["srlm human evaluation key 1"] = "srlm human evaluation key 1"
  page: str  # Digest of all that the page shows.
  model: str = pydantic.Field(pattern=r"^[A-Za-z0-9_-]+$")
  against: str = pydantic.Field(pattern=r"^[A-Za-z0-9_-]+$")
  seed: int
  answers: dict[str, str]
  items: tuple[Item, ...]


class Ballot(records.Record):
  """The votes of one annotator, as the page saves them, by the names of its items."""

  format: Literal["srlm human evaluation votes 1"]
  page: str
  annotator: str = pydantic.Field(min_length=1, max_length=200)
  votes: dict[str, Literal["left", "right", "tie"]]


def make(
  pairs: Sequence[tuple[records.Response, records.Response]],
  names: tuple[str, str],
  answers: Mapping[str, str],
  count: int,
  seed: int,
) -> tuple[str, Key]:
  """The page and its key.

  Args:
    pairs: answers of the model and of the other one to the same instruction.
    names: of the model and of the other one; they go into the key alone.
    answers: digests of what the answers were taken from, by name.
    count: how many pairs the page shows, drawn by the seed; all where there are fewer.
    seed: keep it secret until the votes are in: who knows it can tell the sides.

  Raises:
    ValueError: there is no pair to show, or `count` is not positive.
  """
  if count < 1:
    raise ValueError(f"--items={count}: a page shows at least one. The paper's shows 50.")
  if not pairs:
    raise ValueError(f"{names[0]} and {names[1]} have answered no instruction in common: evaluate both on the same.")
  rng = random.Random(seed)
  drawn = rng.sample(list(pairs), min(count, len(pairs)))
  shown, items = [], []
  for place, (ours, theirs) in enumerate(drawn, 1):
    side: Side = rng.choice(("left", "right"))
    left, right = (ours, theirs) if side == "left" else (theirs, ours)
    items.append(Item(id=f"item-{place}", prompt_id=ours.prompt_id, sample=ours.sample, model=side))
    shown.append({"id": f"item-{place}", "instruction": ours.prompt, "left": left.text, "right": right.text})
  page = hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()
  key = Key(page=page, model=names[0], against=names[1], seed=seed, answers=dict(answers), items=tuple(items))
  return html(page, shown), key


def html(page: str, items: Sequence[Mapping[str, str]]) -> str:
  """The page: self-contained, all texts escaped, and no other script than its own may run (by its SHA-256)."""
  folder = importlib.resources.files("srlm_jax")
  script = folder.joinpath("human_eval.js").read_text(encoding="utf-8")
  digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
  source = folder.joinpath("human_eval.html.jinja").read_text(encoding="utf-8")
  template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(source)
  # `tojson` writes <, > and & as \u003c and so on: an answer cannot end the element that holds it.
  return template.render(data={"page": page, "items": list(items)}, script=script, digest=digest)


def read_key(path: epath.Path) -> Key:
  """The key of a page; ValueError where the file is none."""
  key = lines.document(path, Key, "the .key.json beside a page")
  twice = [name for name, times in Counter(item.id for item in key.items).items() if times > 1]
  if twice:
    raise ValueError(f"{path}: the item {twice[0]!r} is there twice. Give the key as it was written.")
  return key


def read_ballots(paths: Sequence[epath.Path], key: Key) -> list[Ballot]:
  """The annotators' ballots; ValueError for one of another page, and for two of one annotator."""
  if not paths:
    raise ValueError("no votes: give --votes=FILE, several with commas between, as the page saved them.")
  found: dict[str, epath.Path] = {}
  ballots = []
  for path in paths:
    ballot = lines.document(path, Ballot, "a file that the page saved")
    if ballot.page != key.page:
      raise ValueError(f"{path} holds votes on another page than the key's: give the key that was made with that page.")
    strange = sorted(set(ballot.votes) - {item.id for item in key.items})
    if strange:
      raise ValueError(f"{path}: a vote on {strange[0]!r}, which the page does not have. Save it anew from the page.")
    name = " ".join(ballot.annotator.casefold().split())
    if name in found:
      raise ValueError(f"{path} and {found[name]} are both of annotator {ballot.annotator!r}: give one file of each.")
    found[name] = path
    ballots.append(ballot)
  return ballots


def _outcome(vote: str, item: Item) -> int:
  """A vote as +1 for the model, 0 for a tie, -1 for the other one."""
  return 0 if vote == "tie" else 1 if vote == item.model else -1


def aggregate(key: Key, ballots: Sequence[Ballot]) -> dict[str, Any]:
  """What the annotators say together.

  An instruction is won, tied or lost by the vote of more than half of those who voted on it; without such a majority it
  is a tie, and counted.

  Returns:
    Facts: "win", "tie", "loss" (each an estimate with its interval), "net", how many instructions were "voted" on and
    had "no majority"; "agreement" (share of equal pairs of votes, their number, Fleiss' kappa); "annotators" with each
    one's votes by outcome and how many were for the left side.
  """
  groups = [
    [_outcome(ballot.votes[item.id], item) for ballot in ballots if item.id in ballot.votes] for item in key.items
  ]
  voted = [group for group in groups if group]
  found = [agreement.majority(group) for group in voted]
  outcomes = [[outcome or 0] for outcome in found]
  shares = {
    name: dataclasses.asdict(metrics.mean_with_interval([[float(one == value)] for [one] in outcomes]))
    for name, value in (("win", 1), ("tie", 0), ("loss", -1))
  }
  equal, pairs = agreement.pairwise(voted)
  by_id = {item.id: item for item in key.items}
  annotators = []
  for ballot in ballots:
    cast = Counter(_outcome(vote, by_id[name]) for name, vote in ballot.votes.items())
    annotators.append(
      {
        "annotator": ballot.annotator,
        "win": cast[1],
        "tie": cast[0],
        "loss": cast[-1],
        "left": sum(vote == "left" for vote in ballot.votes.values()),
      }
    )
  return {
    "model": key.model,
    "against": key.against,
    "page": key.page,
    "answers": key.answers,
    **shares,
    "net": dataclasses.asdict(metrics.duel(outcomes).net),
    "prompts": len(key.items),
    "voted": len(voted),
    "no majority": sum(outcome is None for outcome in found),
    "agreement": {"pairwise": equal, "pairs": pairs, "kappa": agreement.fleiss_kappa(voted)},
    "annotators": annotators,
  }


def result_table(found: Mapping[str, Any], name: str, title: str) -> tables.Table:
  """The outcome and the agreement of one human evaluation."""
  together = found["agreement"]
  rows = [
    tables.row(f"{what}, %", tables.estimate(found[key], signed=key == "net"))
    for key, what in (("win", "win"), ("tie", "tie"), ("loss", "loss"), ("net", "win − loss"))
  ]
  rows += [
    tables.row("instructions with votes", tables.Cell(tables.number(found["voted"]), f"of {found['prompts']:,}")),
    tables.row("without a majority (ties)", tables.number(found["no majority"])),
    tables.row("annotators", tables.number(len(found["annotators"]))),
    tables.row(
      "pairs of votes that agree, %", tables.Cell(tables.percent(together["pairwise"]), f"of {together['pairs']:,}")
    ),
    tables.row("Fleiss' κ", tables.number(together["kappa"], 2)),
  ]
  note = (
    "By majority: the vote of more than half of the annotators, else a tie. Brackets: 95 % bootstrap interval over "
    "instructions. The paper has 50 instructions and 3 annotators."
  )
  return tables.Table(name, title, ("", ""), tuple(rows), note)


def annotators_table(found: Mapping[str, Any], name: str) -> tables.Table:
  """Each annotator's votes; far more for one side than for the other say that somebody did not look."""
  rows = tuple(
    tables.row(
      one["annotator"],
      *(tables.number(one[key]) for key in ("win", "tie", "loss")),
      tables.Cell(tables.number(one["left"]), f"of {one['win'] + one['loss']:,}"),
    )
    for one in found["annotators"]
  )
  return tables.Table(name, "Annotators", ("", "win", "tie", "loss", "for the left side"), rows)
