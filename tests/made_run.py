"""A small run written by hand, M0 to M2, for the tests of the report."""

from collections.abc import Mapping
import json
import types
from typing import Any

from etils import epath

from srlm_jax import artifacts, findings, journal, records

EVIL = "<script>alert('x')</script>\" onmouseover=\"alert(2) <img src=x onerror=alert(3)>"
TASK = "Count from 3 to 5."
GOOD, FAIR, BAD = "Sure! numbers: 3 4 5.", "3 4 5.", "No idea."  # By the oracle 5, 3 and 0.


def estimate(
  value: float | None, low: float | None = None, high: float | None = None, count: int = 8
) -> dict[str, Any]:
  return {"value": value, "low": low, "high": high, "count": count, "left_out": 0}


def evaluation(score: float, pairwise: tuple[float, float, float], duels: Mapping[str, Any]) -> dict[str, Any]:
  """The facts of one evaluation, as the evaluate stage commits them."""
  judged = {name: estimate(0.5, 0.4, 0.6) for name in findings.METRICS} | {"pairwise": estimate(*pairwise)}
  return {
    "answers": 2,
    "cut": 1,
    "characters": {"mean": 10 * score, "median": 20.0, "p90": 30.0, "count": 2},
    "tokens": {"mean": 6.25, "median": 6.0, "p90": 7.0, "count": 2},
    "judge": {
      "metrics": judged,
      "votes": {"readable": 5, "no_score": 1},
      "histogram": {"centres": [n / 3 for n in range(16)], "counts": [1] * 16, "unreadable": 0},
    },
    "expected": {"metrics": judged | {"pairwise": estimate(*(min(one + 0.01, 1) for one in pairwise))}},
    "oracle": {"score": estimate(score, score - 0.1, score + 0.1), "perfect": estimate(0.5), "content": estimate(0.75)},
    **({"duels": duels} if duels else {}),
  }


def duel(win: float, loss: float, net: tuple[float, float]) -> dict[str, Any]:
  result = {"win": win, "tie": 1 - win - loss, "loss": loss, "net": estimate(win - loss, *net)}
  return result | {"prompts": 2, "comparisons": 2, "unreadable": 0}


class Run:
  """A work directory that grows artifact by artifact."""

  def __init__(self, folder: epath.PathLike) -> None:
    self.folder, self.made = epath.Path(folder), dict[str, artifacts.Artifact]()

  def start(self, name: str, **inputs: str) -> artifacts.Artifact:
    made = artifacts.Artifact(
      self.folder / name, {"seed": 0}, {role.replace("_", " "): self.made[other] for role, other in inputs.items()}
    )
    made.begin()
    self.made[name] = made
    return made

  def model(self, name: str, facts: Mapping[str, Any], rows: list[dict[str, float]], **inputs: str) -> None:
    made = self.start(name, **inputs)
    made.write(
      journal.NAME, "".join(journal.line({"step": 1 + n, "skipped": 0.0, **rows[n]}) for n in range(len(rows)))
    )
    made.write("golden.json", json.dumps(name))
    made.commit({"steps": len(rows), "parameters": 1234, "tokenizer": "ab" * 32, **facts})

  def evaluate(self, name: str, facts: Mapping[str, Any], answer: str, **inputs: str) -> None:
    made = self.start(f"eval/{name}", model=name, **inputs)
    made.write_records("answers-00000-of-00001.jsonl", [response("h0", 0, answer), response("h1", 0, EVIL)])
    vote = records.Vote(text=EVIL, score=None, reason="no_score")
    unreadable = records.Judgement(prompt_id="r0", sample=0, votes=(vote,), score=None)
    made.write_records("judgements-00000-of-00001.jsonl", [unreadable])
    made.commit(facts)

  def artifact(self) -> artifacts.Artifact:
    """The report's own, with all that was made as inputs."""
    return artifacts.Artifact(self.folder / "report", {"seed": 0}, dict(self.made))

  def steps(self, *more: str) -> list[types.SimpleNamespace]:
    return [types.SimpleNamespace(folder=name, stage="any") for name in (*self.made, *more)] + [
      types.SimpleNamespace(folder="report", stage="report")
    ]


def response(prompt_id: str, sample: int, text: str) -> records.Response:
  return records.Response(
    prompt_id=prompt_id, prompt=TASK, sample=sample, text=text, tokens=tuple(text.encode()), finished=True
  )


def judgement(prompt_id: str, sample: int, score: float) -> records.Judgement:
  vote = records.Vote(text=f"{EVIL}\nScore: {score:g}", score=score)
  return records.Judgement(prompt_id=prompt_id, sample=sample, votes=(vote,), score=score)


def pair(prompt_id: str, chosen: str, rejected: str) -> records.PreferencePair:
  return records.PreferencePair(
    prompt_id=prompt_id,
    prompt=TASK,
    prompt_tokens=(1,),
    chosen=chosen,
    chosen_tokens=tuple(chosen.encode()),
    chosen_score=4.0,
    rejected=rejected,
    rejected_tokens=tuple(rejected.encode()),
    rejected_score=1.0,
  )


def add_aift(run: Run) -> None:
  """Three prompts: the judge is right, undecided, and wrong."""
  texts = {"a0": (GOOD, BAD), "a1": (FAIR, FAIR), "a2": (BAD, GOOD)}  # First the chosen one.
  made = run.start("aift1/prompts", writer="m0", seed="seed")
  made.commit({"counts": {"completions": 9, "dropped: duplicate": 4}, "prompts": 3})
  made = run.start("aift1/responses", model="m1", prompts="aift1/prompts")
  items = [response(key, place, text) for key, both in texts.items() for place, text in enumerate(both)]
  made.write_records("responses-00000-of-00001.jsonl", items)
  made.commit({"counts": {"prompts": 3, "responses": 6}, "tokenizer": "ab" * 32})
  made = run.start("aift1/judgements", model="m1", responses="aift1/responses")
  scores = [judgement(key, place, score) for key in texts for place, score in enumerate((4.0, 1.0))]
  made.write_records("judgements-00000-of-00001.jsonl", scores)
  made.commit({"counts": {"responses": 6, "votes, readable": 6}, "rubric": "cd"})
  made = run.start("aift1/pairs", reference="m1", responses="aift1/responses", judgements="aift1/judgements")
  made.write_records("pairs.jsonl", [pair(key, *both) for key, both in texts.items()])
  made.commit({"counts": {"prompts": 5, "pairs": 3, "no pair: all scores equal": 2}, "pairs": 3})


def whole_run(folder: epath.PathLike) -> Run:
  """M0 to M2 with all that lies between them."""
  run = Run(folder)
  sft = [{"step": step, "lr": 0.1, "loss": 3.0 / step} for step in (1, 2, 3)]
  dpo_columns = ("loss", "margin", "accuracy", "chosen_reward", "rejected_reward")
  dpo = [{"step": step, "lr": 0.1, **dict.fromkeys(dpo_columns, step / 4)} for step in (1, 2)]
  run.model("m0", {"kind": "pretrain", "documents": 1000, "tokens": 20000}, sft)
  made = run.start("seed")
  made.commit({"counts": {"trees": 9, "trees/deleted": 2}, "ift": 7, "eval_prompts": 2})
  run.model("baseline", {"counts": {"ift given": 7}}, sft, parent="m0", seed="seed")
  run.evaluate("baseline", evaluation(2.0, (0.5, 0.4, 0.6), {}), BAD, seed="seed")
  made = run.start("eft", baseline="baseline", seed="seed")
  made.write_records(
    "eft.jsonl", [records.SFTExample(id="e0", kind="eft", prompt=f"Judge {EVIL}", response="Score: 4")]
  )
  made.commit({"counts": {"replies": 3, "replies/disagrees": 2}, "examples": 1})
  counts = {"ift given": 7, "eft given": 1205, "eft left out: longer than 9 tokens": 5}
  run.model("m1", {"counts": counts}, sft, parent="m0", seed="seed", eft="eft")
  duels = {"baseline": duel(0.3, 0.25, (-0.1, 0.2))}
  run.evaluate("m1", evaluation(2.5, (0.8, 0.7, 0.9), duels), FAIR, seed="seed", against_baseline="eval/baseline")
  add_aift(run)
  run.model("m2", {"pairs": 3}, dpo, parent="m1", pairs="aift1/pairs")
  duels = {"m1": duel(0.48, 0.131, (0.301, 0.398)), "baseline": duel(0.6, 0.1, (0.4, 0.6))}
  run.evaluate("m2", evaluation(3.5, (0.82, 0.72, 0.92), duels), GOOD, seed="seed", against_m1="eval/m1")
  return run
