"""Who is better: alignment of two models' answers, the oracle, and a judge that sees both orders."""

import pytest
import tiny_model

from srlm_jax import grading, sampling, templates, world
from srlm_jax.records import Judgement, Response, Vote

HOW = sampling.Sampling(temperature=1.0, top_p=1.0, max_new=40)
SHORT = templates.Pairwise("{instruction}\nFirst: {response_a}\nSecond: {response_b}\n", "digest")


def response(prompt: str, sample: int, text: str, instruction: str = "Name a bird.") -> Response:
  return Response(prompt_id=prompt, prompt=instruction, sample=sample, text=text, tokens=(2,), finished=True)


def pairs(*texts: tuple[str, str]) -> list[grading.Pair]:
  return [(response(f"p{n}", 0, a), response(f"p{n}", 0, b)) for n, (a, b) in enumerate(texts)]


def judged(both: list[grading.Pair], speaker: tiny_model.Actor) -> tuple[grading.Outcomes, int]:
  return grading.grouped(grading.by_judge(speaker, both, "m1", SHORT, HOW))


def test_answers_to_the_same_prompt_and_sample_stand_side_by_side() -> None:
  ours = [response("p", 0, "a"), response("p", 1, "b"), response("q", 0, "c"), response("r", 0, "d")]
  theirs = [response("r", 0, "z"), response("q", 1, "y"), response("p", 1, "x"), response("p", 0, "w")]
  assert [(one.text, other.text) for one, other in grading.align(ours, theirs)] == [("a", "w"), ("b", "x"), ("d", "z")]


def liking(word: str) -> object:
  """A judge who likes the answer that has a word in it."""

  def script(prompt: str, sample: int) -> str:
    first, second = prompt.split("First: ")[1].split("Second: ")
    has = [word in first, word in second]
    return "[[C]]" if has[0] == has[1] else f"Because of it: [[{'A' if has[0] else 'B'}]]"

  return script


def test_a_judge_who_sees_the_difference_finds_the_winner() -> None:
  both = pairs(("A crow.", "Stone."), ("Stone.", "A crow."), ("Stone.", "Stone."))
  assert judged(both, tiny_model.actor(liking("crow"))) == ([[1], [-1], [0]], 0)


def test_each_pair_is_shown_in_both_orders() -> None:
  speaker = tiny_model.actor(liking("crow"))
  judged(pairs(("A crow.", "Stone.")), speaker)
  shown = [prompt.split("First: ")[1].split("\nSecond: ")[0] for prompt in speaker.asked]
  assert sorted(shown) == ["A crow.", "Stone."]


@pytest.mark.parametrize("favourite", ["A", "B"])
def test_a_judge_with_a_favourite_place_decides_nothing(favourite: str) -> None:
  speaker = tiny_model.actor(lambda prompt, sample: f"[[{favourite}]]")
  assert judged(pairs(("crow", "stone"), ("owl", "fox")), speaker) == ([[0], [0]], 0)


def test_unreadable_cut_and_too_long_ones_are_counted_and_decide_nothing() -> None:
  def script(prompt: str, sample: int) -> str | None:
    if "fox" in prompt:
      return None  # The length limit cut it, behind an "[[A]]".
    return "Neither." if "First: owl" in prompt else "[[A]]"

  speaker = tiny_model.actor(script, max_length=200)
  both = pairs(("crow", "stone"), ("owl", "stone"), ("fox", "stone"), ("owl " * 300, "stone"))
  assert judged(both, speaker) == ([[0], [], [], []], 3)


def test_outcomes_are_grouped_by_prompt() -> None:
  both = [(response("p", n, "crow"), response("p", n, "stone")) for n in (0, 1)]
  both.append((response("q", 0, "stone"), response("q", 0, "crow")))
  assert judged(both, tiny_model.actor(liking("crow"))) == ([[1, 1], [-1]], 0)


def test_the_oracle_compares_its_scores() -> None:
  text = "Say owl three times."
  parts = world.parse(text)
  assert parts is not None
  rng = world.np.random.default_rng(0)
  best = world.answer(parts, rng, "flawless")
  scores = world.oracle(text, best), world.oracle(text, "no idea")
  assert scores[0] > scores[1]
  one, other = (response("p", 0, answer, text) for answer in (best, "no idea"))
  assert grading.grouped(grading.by_oracle([(one, other), (other, one), (one, one)])) == ([[1, -1, 0]], 0)


def test_reasons_count_votes() -> None:
  def vote(reason: str) -> Vote:
    return Vote(text="", score=None if reason else 3.0, reason=reason)

  votes = [(vote(""), vote("no_score")), (vote(""), vote("too_long"))]
  judgements = [Judgement(prompt_id="p", sample=n, votes=both, score=3.0) for n, both in enumerate(votes)]
  assert grading.reasons(judgements) == {"readable": 2, "no_score": 1, "too_long": 1}
