"""Pairs: best against worst, and every reason for which there is none."""

import json
import pathlib

from etils import epath
import pytest
import tiny_model

from srlm_jax import artifacts, config, pairing
from srlm_jax.records import Judgement, Response, Vote
from srlm_jax.stages import pairs as pairs_stage


def response(sample: int, finished: bool = True, prompt: str = "p") -> Response:
  return Response(
    prompt_id=prompt, prompt="Say owl.", sample=sample, text=f"owl {sample}", tokens=(5, 2), finished=finished
  )


def scored(*scores: float, cut: tuple[int, ...] = ()) -> list[pairing.Scored]:
  return [(response(sample, sample not in cut), score) for sample, score in enumerate(scores)]


def judgement(sample: int, score: float | None, prompt: str = "p") -> Judgement:
  votes = (Vote(text="", score=score, reason="" if score is not None else "no_score"),)
  return Judgement(prompt_id=prompt, sample=sample, votes=votes, score=score)


@pytest.mark.parametrize(
  ("scores", "best", "worst"),
  [
    ((3.0, 5.0, 1.0, 4.0), 1, 2),
    ((0.0, 5.0), 1, 0),
    ((5.0, 4.0, 5.0, 4.0), 0, 1),  # The first sampled among equals, on both sides.
    ((2.0, 2.0, 2.0, 7 / 3), 3, 0),
  ],
)
def test_best_and_worst(scores: tuple[float, ...], best: int, worst: int) -> None:
  for order in (1, -1):  # Whatever the order they come in.
    found = pairing.best_and_worst(scored(*scores)[::order], 0.0)
    assert [one[0].sample for one in found] == [best, worst]
    assert (found[0][1], found[1][1]) == (max(scores), min(scores))


def test_ties_are_no_pair() -> None:
  assert pairing.best_and_worst(scored(4.0, 4.0, 4.0, 4.0), 0.0) == "all scores equal"
  assert "fewer than two" in pairing.best_and_worst(scored(4.0), 0.0)
  assert "fewer than two" in pairing.best_and_worst([], 0.0)


def test_the_margin_must_be_exceeded() -> None:
  assert pairing.best_and_worst(scored(3.0, 4.0), 1.0) == "scores differ by no more than the margin, 1"
  best, worst = pairing.best_and_worst(scored(3.0, 4.5), 1.0)
  assert (best[1], worst[1]) == (4.5, 3.0)


def test_an_unfinished_response_is_never_chosen_but_may_be_rejected() -> None:
  best, worst = pairing.best_and_worst(scored(5.0, 3.0, 1.0, cut=(0, 2)), 0.0)
  assert (best[0].sample, worst[0].sample) == (1, 2)
  assert pairing.best_and_worst(scored(5.0, 1.0, cut=(0,)), 0.0) == "the best response was cut by the length limit"
  assert pairing.best_and_worst(scored(5.0, 1.0, cut=(0, 1)), 0.0) == "no response ended by itself"


def test_an_unreadable_verdict_is_left_out_and_never_rejected() -> None:
  responses = [response(sample) for sample in range(4)]
  judgements = [judgement(0, None), judgement(1, 3.0), judgement(2, 5.0), judgement(3, None)]
  groups = pairing.by_prompt(responses, judgements)
  assert groups == {"p": [(responses[1], 3.0), (responses[2], 5.0)]}
  ((best, worst),) = pairing.pair_up(groups, 0.0)[0]
  assert (best[0].sample, worst[0].sample) == (2, 1)


def test_every_prompt_is_counted_once() -> None:
  scores = {"pair": (1.0, 5.0), "tie": (2.0, 2.0), "lone": (None, 4.0), "none": (None, None), "other": (4.0, 0.0)}
  responses = [response(sample, prompt=name) for name in scores for sample in (0, 1)]
  judgements = [judgement(sample, score, name) for name, both in scores.items() for sample, score in enumerate(both)]
  pairs, counts = pairing.pair_up(pairing.by_prompt(responses, judgements), 0.0)
  assert [(best[0].prompt_id, best[0].sample, worst[0].sample) for best, worst in pairs] == [
    ("pair", 1, 0),
    ("other", 0, 1),
  ]
  assert counts == {
    "prompts": 5,
    "pairs": 2,
    "no pair: all scores equal": 1,
    "no pair: fewer than two responses with a score": 2,
  }


@pytest.mark.parametrize(
  "judgements",
  [
    [judgement(1, 3.0), judgement(0, 5.0)],  # Another order,
    [judgement(0, 3.0), judgement(1, 5.0, "q")],  # another prompt,
    [judgement(0, 3.0)],  # too few,
    [judgement(0, 3.0), judgement(1, 5.0), judgement(2, 5.0)],  # too many.
  ],
)
def test_judgements_of_other_responses_are_refused(judgements: list[Judgement]) -> None:
  with pytest.raises(ValueError, match="judgement"):
    pairing.by_prompt([response(0), response(1)], judgements)


def test_perfect_answers_have_the_full_score_and_an_end() -> None:
  groups = {"p": scored(5.0, 5.0, 14 / 3, cut=(1,)), "q": [(response(3, prompt="q"), 5.0)], "r": []}
  assert [(one.prompt_id, one.sample) for one in pairing.perfect(groups, 5.0)] == [("p", 0), ("q", 3)]


def test_too_few_pairs_end_the_stage_with_their_reasons(tmp_path: pathlib.Path) -> None:
  words, made = tiny_model.words(), {}
  for name in ("m1", "responses", "judgements"):
    made[name] = artifacts.Artifact(epath.Path(tmp_path / name), {}, {})
    made[name].begin()
  words.save(made["m1"].folder / "tokenizer")
  made["m1"].write("golden.json", json.dumps(words.golden()))
  made["responses"].write_records("responses-00000-of-00001.jsonl", [response(0), response(1)])
  made["judgements"].write_records("judgements-00000-of-00001.jsonl", [judgement(0, 4.0), judgement(1, 4.0)])
  for one in made.values():
    one.commit({"tokenizer": words.digest})
  inputs = {"reference": made["m1"], "responses": made["responses"], "judgements": made["judgements"]}
  out = artifacts.Artifact(epath.Path(tmp_path / "pairs"), {}, inputs)
  out.begin()
  with pytest.raises(ValueError, match=r"0 preference pairs, pairs\.min_pairs=\d+ are needed: .*all scores equal': 1"):
    pairs_stage.run(out, config.base(), tiny_model.one_device())
