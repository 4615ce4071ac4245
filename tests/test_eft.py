"""Tests of srlm_jax.eft by cases that can be checked by hand."""

from collections import Counter
import dataclasses
import pathlib

import pytest

from srlm_jax import eft, records, templates
from srlm_jax.stages import eft as stage


def judged(name: str, *attempts: list[float | None]) -> list[eft.Judged]:
  """Judgements of a prompt: attempt i has the scores of the replies of rank 0, 1, …"""
  return [
    eft.Judged(
      prompt_id=name,
      prompt=f"{name}?",
      reply_id=f"r{rank}",
      reply=f"{name} {rank}",
      rank=rank,
      score=score,
      judgement_text=f"Score: {score}",
      sample=sample,
    )
    for sample, scores in enumerate(attempts)
    for rank, score in enumerate(scores)
  ]


def kept(examples: list[eft.Judged]) -> list[tuple[str, str, int]]:
  return [(one.prompt_id, one.reply_id, one.sample) for one in examples]


def check_sums(counts: Counter[str]) -> None:
  for name in {key.split("/")[0] for key in counts if "/" in key}:
    assert counts[name] == sum(number for key, number in counts.items() if key.startswith(f"{name}/")), name


PROMPTS = [
  *judged("agrees", [5, 3, 1]),
  *judged("swapped", [5, 1, 3]),
  *judged("ties", [5, 3, 3]),
  *judged("equal", [4, 4]),
]


def test_by_prompt_asks_for_the_whole_order() -> None:
  accepted, counts = eft.accept(PROMPTS)
  assert kept(accepted) == [("agrees", "r0", 0), ("agrees", "r1", 0), ("agrees", "r2", 0)]
  assert counts == {
    "prompts": 4,
    "prompts/kept": 1,
    "prompts/disagrees": 1,
    "prompts/tied": 2,
    "replies": 11,
    "replies/kept": 3,
    "replies/disagrees": 3,
    "replies/tied": 5,
  }
  check_sums(counts)


def test_ties_may_agree_but_not_all_of_them() -> None:
  accepted, counts = eft.accept(PROMPTS, ties="agree")
  assert {one.prompt_id for one in accepted} == {"agrees", "ties"}
  assert counts["prompts/tied"] == 1  # "equal" tells nothing apart.
  check_sums(counts)


def test_first_agreeing_attempt_wins() -> None:
  accepted, _ = eft.accept(judged("p", [3, 4], [None, 1], [5, 2], [4, 1]))
  assert kept(accepted) == [("p", "r0", 2), ("p", "r1", 2)]
  # The samples of different attempts are not combined: 5 of attempt 1 and 2 of attempt 0 would agree.
  assert not eft.accept(judged("p", [2, 2], [5, 5]))[0]


def example(name: str, prompt: str = "Name a bird.", response: str = "Fine.\nScore: 4", kind: str = "eft") -> str:
  filled = templates.load_rubric("judge_additive").fill(prompt, "owl")
  return records.dumps([records.SFTExample(id=name, kind=kind, prompt=filled, response=response)])


def test_annotators_judgements_that_cannot_be_learned_from_are_counted(tmp_path: pathlib.Path) -> None:
  path, rubric = tmp_path / "judgements.jsonl", templates.load_rubric("judge_additive")
  path.write_text(
    example("good")
    + example("kind", kind="ift")
    + example("none", response="Fine.")
    + example("range", response="Score: 6")
    + example("held out", prompt="Say [INST] owl.")
    + example("longer", prompt="Say [INST] owl. Twice.")
  )
  kept, counts = eft.annotated(path, rubric, ["Say [INST] owl.", "Say crow."])
  assert [one.id for one in kept] == ["good", "longer"]
  assert counts == {
    "judgements": 6,
    "judgements/kept": 2,
    "judgements/kind is not eft": 1,
    "judgements/no_score": 1,
    "judgements/out_of_range": 1,
    "judgements/prompt held out": 1,
  }
  assert len(eft.annotated(path, rubric)[0]) == 3
  # Without the instruction before the response no prompt can be told by its beginning.
  turned = dataclasses.replace(rubric, text=rubric.text[:20] + "{response} {instruction}")
  assert len(eft.annotated(path, turned, ["Say [INST] owl."])[0]) == 3


def test_what_the_baseline_judges_must_be_ranked() -> None:
  replies = (records.Reply(id="a", text="owl", rank=0), records.Reply(id="b", text="crow", rank=None))
  one = records.RankedReplies(prompt_id="p", prompt="Name a bird.", replies=replies)
  assert stage._rank(one, 0) == 0
  with pytest.raises(ValueError, match=r"reply b of prompt p has no rank.*Run the seed stage again"):
    stage._rank(one, 1)


def test_a_file_without_any_usable_judgement_is_refused(tmp_path: pathlib.Path) -> None:
  path, rubric = tmp_path / "judgements.jsonl", templates.load_rubric("judge_five_bucket")
  path.write_text(example("a", response="4 of 5") + example("b", response="Score: 0") + example("c", kind="ift"))
  with pytest.raises(ValueError, match=r"none of its 3 judgements can be learned from: no_score \(1\), out_of_range "):
    eft.annotated(path, rubric)
  path.write_text(example("a") * 2)
  with pytest.raises(ValueError, match=r"line 2: the id 'a' is on line 1, too"):
    eft.annotated(path, rubric)


def test_order_of_the_judgements_does_not_matter() -> None:
  some = judged("p", [3, 4, 0], [5, 2, 1])
  assert eft.accept(some[::-1])[0] == eft.accept(some)[0]
  assert eft.accept(some[::-1], by="reply")[0] == eft.accept(some, by="reply")[0]


def test_human_ties_ask_for_nothing() -> None:
  first, second = judged("p", [1, 5])
  assert not eft.accept([first, second])[0]
  assert not eft.accept([first, second.model_copy(update={"rank": 0})])[0]
  third = judged("p", [0, 0, 0])[2]
  assert len(eft.accept([first, second.model_copy(update={"rank": 0}), third])[0]) == 3


def test_gaps_in_the_ranks_do_not_matter() -> None:
  first, second = judged("p", [4, 2])
  assert len(eft.accept([first.model_copy(update={"rank": 1}), second.model_copy(update={"rank": 7})])[0]) == 2


@pytest.mark.parametrize("by", ["prompt", "reply"])
def test_unreadable_incomplete_and_lonely(by: str) -> None:
  incomplete = judged("incomplete", [5, 3], [4, 2])
  # Reply r0 has sample 0 only, r1 sample 1 only.
  incomplete = [incomplete[0], incomplete[3]]
  accepted, counts = eft.accept(judged("unread", [5, None]) + incomplete + judged("alone", [5]), by=by)
  assert not accepted
  assert (counts["prompts/unreadable"], counts["prompts/fewer than two replies"]) == (2, 1)
  check_sums(counts)


def test_by_reply_asks_for_more_than_half_of_the_pairs() -> None:
  # Pairs: r0 right against r1, r2, r3; r1 (2) right against r0, wrong against r2 and r3: one of three;
  # r2 (4) right against r0 and r3: two of three; r3 (3) right against r0 and r2: two of three.
  accepted, counts = eft.accept(judged("p", [5, 2, 4, 3]), by="reply")
  assert kept(accepted) == [("p", "r0", 0), ("p", "r2", 0), ("p", "r3", 0)]
  assert (counts["replies/kept"], counts["replies/disagrees"], counts["prompts/kept"]) == (3, 1, 1)
  check_sums(counts)
  # Of three replies half of the pairs is not enough: r1 and r2 have one of two.
  assert kept(eft.accept(judged("p", [5, 1, 3]), by="reply")[0]) == [("p", "r0", 0)]


def test_by_reply_ties() -> None:
  some = judged("p", [5, 3, 3]) + judged("equal", [4, 4, 4])
  assert kept(eft.accept(some, by="reply")[0]) == [("p", "r0", 0)]
  assert kept(eft.accept(some, by="reply", ties="agree")[0]) == [("p", "r0", 0), ("p", "r1", 0), ("p", "r2", 0)]


def test_by_reply_takes_each_replys_first_agreeing_sample() -> None:
  accepted, _ = eft.accept(judged("p", [5, 1, 3], [4, 3, 1]), by="reply")
  assert kept(accepted) == [("p", "r0", 0), ("p", "r1", 1), ("p", "r2", 1)]


def test_accept_refuses() -> None:
  with pytest.raises(ValueError, match="two judgements are sample 0"):
    eft.accept(judged("p", [5, 3]) + judged("p", [4, 1]))
  with pytest.raises(ValueError, match="by='both'"):
    eft.accept([], by="both")
  with pytest.raises(ValueError, match="ties='maybe'"):
    eft.accept([], ties="maybe")


def scored(**scores: int) -> list[eft.Judged]:
  """So many judgements of each score, as s4=20."""
  return [
    one
    for name, count in scores.items()
    for index in range(count)
    for one in judged(f"{name}-{index}", [float(name[1:])])
  ]


def tally(examples: list[eft.Judged]) -> dict[float, int]:
  return dict(Counter(one.score for one in examples))


def test_thin_reaches_the_share_and_no_more() -> None:
  some = scored(s5=10, s4=60, s3=20, s2=10)
  thinned, counts = eft.thin(some, max_share=0.5)
  assert tally(thinned) == {5: 10, 4: 40, 3: 20, 2: 10}  # 40 of 80.
  assert (counts["examples"], counts["examples/kept"], counts["examples/most common score"]) == (100, 80, 20)
  assert (counts["before: score 4"], counts["after: score 4"], counts["after: score 3"]) == (60, 40, 20)
  check_sums(counts)
  assert thinned == [one for one in some if one in thinned]  # In order.
  assert eft.thin(thinned, max_share=0.5)[0] == thinned


def test_thin_stops_at_the_second_most_common() -> None:
  assert tally(eft.thin(scored(s4=60, s3=20, s2=1), max_share=0.3)[0]) == {4: 20, 3: 20, 2: 1}
  assert tally(eft.thin(scored(s4=9), max_share=0.3)[0]) == {4: 9}
  assert eft.thin([], max_share=0.3)[0] == []


def test_thin_is_deterministic_by_seed() -> None:
  some = scored(s4=30, s3=10)
  first = eft.thin(some, max_share=0.5, seed=1)[0]
  assert {one.prompt_id for one in eft.thin(some[::-1], max_share=0.5, seed=1)[0]} == {one.prompt_id for one in first}
  assert eft.thin(some, max_share=0.5, seed=2)[0] != first


def test_thin_refuses() -> None:
  for share in (0, 1.1):
    with pytest.raises(ValueError, match="max_share"):
      eft.thin([], max_share=share)
  with pytest.raises(ValueError, match="without a score"):
    eft.thin(judged("p", [None]))


def test_examples_are_filled_judge_prompts() -> None:
  examples = eft.to_examples(judged("p", [5, 2]), lambda instruction, response: f"<{instruction}|{response}>")
  assert [(one.id, one.kind, one.prompt, one.response) for one in examples] == [
    ("p/r0", "eft", "<p?|p 0>", "Score: 5"),
    ("p/r1", "eft", "<p?|p 1>", "Score: 2"),
  ]


def test_no_overlap() -> None:
  eft.no_overlap(["a?", "b?"], ["c?"])
  with pytest.raises(ValueError, match=r"1 held-out prompt.*' B\? '"):
    eft.no_overlap(["a?", "b?"], ["c?", " B? "])
