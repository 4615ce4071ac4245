"""The tiny world: its truth against hand-scored answers, its people against their probabilities."""

import numpy as np
import pytest

from srlm_jax import world

TWO = "Give me three birds then count from 9 to 12."
SAY = "Say owl three times."
DOWN = "Count down from 7 to 3 then list two fish for me."

ORACLE = [
  # instruction, response, score
  (TWO, "Sure! birds: crow swan owl. numbers: 9 10 11 12.", 5),
  (TWO, "sure! birds: crow, swan, owl.\nnumbers: 9, 10, 11, 12", 5),
  (TWO, "Sure! numbers: 9 10 11 12. birds: owl swan crow.", 5),
  (TWO, "Sure! birds: crow swan owl. numbers: 9 10 11 12. Hope this helps!", 4),
  (TWO, "Sure! birds: crow swan owl dove. numbers: 9 10 11 12.", 4),  # Surplus.
  (TWO, "Sure! birds: crow crow swan owl. numbers: 9 10 11 12.", 4),  # Repeated.
  (TWO, "Sure! birds: crow swan owl. numbers: 9 10 10 11 12.", 4),
  (TWO, "Sure! birds: crow swan owl. numbers: 9 10 11 12. birds: crow swan owl.", 4),
  (TWO, "birds: crow swan owl. numbers: 9 10 11 12.", 3),  # No opening.
  (TWO, "Sure! crow swan owl. 9 10 11 12.", 3),  # No labels.
  (TWO, "Sure! crow swan owl. numbers: 9 10 11 12.", 3),
  (TWO, "crow swan owl. 9 10 11 12. Let me know.", 3),
  (TWO, "Sure! birds: crow swan. numbers: 9 10 11 12.", 2),
  (TWO, "Sure! birds: crow swan owl trout. numbers: 9 10 11 12.", 2),  # Complete, but a fish is no bird.
  (TWO, "Sure! birds: crow swan owl. numbers: 9 10 12.", 2),
  (TWO, "Sure! birds: crow swan owl. numbers: 9 10 11 12 13.", 2),
  (TWO, "Sure! birds: crow swan owl. numbers: 12 11 10 9.", 1),
  (TWO, "Sure! birds: crow. numbers: 9 10 11 12.", 1),  # One of three is less than half.
  (TWO, "Sure! birds: crow swan owl.", 1),
  (TWO, "crow", 1),
  (TWO, "Sure! fish: cod carp eel. numbers: 1 2 3.", 0),
  (TWO, "Sure! birds: cod.", 0),
  (TWO, "I like tea.", 0),
  (TWO, "", 0),
  (TWO, "Sure!", 0),
  (SAY, "Sure! words: owl owl owl.", 5),
  (SAY, "Sure! words: owl owl owl owl.", 4),
  (SAY, "Sure! words: owl owl.", 2),
  (SAY, "Sure! words: owl.", 1),
  (SAY, "Sure! words: owl owl crow.", 2),
  (DOWN, "Sure! numbers: 7 6 5 4 3. fish: cod eel.", 5),
  (DOWN, "Sure! numbers: 3 4 5 6 7. fish: cod eel.", 1),  # Upwards only one number is in its place.
  (DOWN, "Sure! numbers: 7 6 5 4 3. fish: cod cod.", 2),
  ("List two fish for me then say cod three times.", "Sure! words: cod cod cod.", 1),
  ("Sing me a song.", "Sure!", 0),
]


@pytest.mark.parametrize("text,response,score", ORACLE)
def test_oracle_by_hand(text: str, response: str, score: int) -> None:
  assert world.oracle(text, response) == score


def test_oracle_detail() -> None:
  detail = world.oracle_detail(TWO, "Sure! birds: crow swan owl. 9 10. Have fun!")
  assert detail == {
    "score": 2,
    "well_formed": True,
    "opening": True,
    "labels": False,
    "extra": True,
    "complete": False,
    "content": 0.5,
  }


@pytest.mark.parametrize(
  "junk", ["\ud800", "İ：.", ":" * 500, "birds: " * 200, "9 " * 300, "\x00\n\n...", "Sure! 😀 owl: :."]
)
def test_oracle_takes_any_string(junk: str) -> None:
  assert 0 <= world.oracle(TWO, junk) <= 2
  assert world.oracle(junk, junk) == 0
  assert isinstance(world.is_heldout(junk), bool)
  assert world.parse(junk) is None


@pytest.mark.parametrize(
  "text,want",
  [
    ("Give me three birds.", [("list", "birds", 3)]),
    ("  give ME three\n birds. ", [("list", "birds", 3)]),
    ("Now tell me two trees then repeat oak four times.", [("list", "trees", 2), ("say", "words", 4)]),
    ("Please count from 0 to 4.", [("count", "numbers", 5)]),
    ("Give me three birds then please count from 0 to 4.", None),
    ("Name two different tools then count down from 12 to 10.", [("list", "tools", 2), ("count", "numbers", 3)]),
    ("List four trees for me then say oak two times.", [("list", "trees", 4), ("say", "words", 2)]),
    ("Give me three birds", None),
    ("Give me three planets.", None),
    ("Give me nine birds.", None),
    ("Count from 9 to 3.", None),
    ("Count down from 3 to 9.", None),
    ("Count from 3 to 16.", None),
    ("Say tea two times.", None),
    ("Give me two birds then name two different birds.", None),
    ("Give me two birds then say owl two times then count from 1 to 3.", None),
    ("Give me two birds then.", None),
    ("then", None),
  ],
)
def test_parse(text: str, want: list[tuple[str, str, int]] | None) -> None:
  parts = world.parse(text)
  assert (parts and [(part.task, part.label, part.amount) for part in parts]) == want


def test_instructions() -> None:
  rng = np.random.default_rng(0)
  texts = [world.instruction(rng) for _ in range(20_000)]
  parts = [world.parse(text) for text in texts]
  assert all(parts)
  assert all(text[0].isupper() and text.endswith(".") and len(text.split()) > 3 for text in texts)
  assert abs(np.mean([len(part) == 1 for part in parts]) - 0.35) < 0.015
  assert abs(np.mean([world.is_heldout(text) for text in texts]) - 0.2) < 0.03
  # A text's number of collisions tells the size of the space it is drawn from: n²/2N for N equally likely texts.
  pairs = [text for text in texts if " then " in text]
  assert len(pairs) ** 2 / 2 / (len(pairs) - len(set(pairs))) > 20_000
  for side in (True, False):
    assert {world.is_heldout(world.instruction(rng, side)) for _ in range(100)} == {side}


def test_heldout_depends_on_the_words_alone() -> None:
  assert world.bucket("Say owl three times.") == world.bucket(" say OWL  three times.\n")


def _many(profile: str | world.Profile, count: int, start: str = "") -> list[tuple[str, str]]:
  rng = np.random.default_rng(5)
  pairs = []
  while len(pairs) < count:
    text = world.instruction(rng)
    if start in text:
      pairs.append((text, world.answer(world.parse(text), rng, profile)))
  return pairs


def test_flaw_frequencies() -> None:
  answers = [answer for _, answer in _many("human", 8000)]
  on_topic = [answer for answer in answers if answer not in world.OFF_TOPIC]
  assert abs(1 - len(on_topic) / len(answers) - 0.02) < 0.01  # Half of the .04; the others answer another question.
  assert abs(np.mean([not answer.startswith("Sure!") for answer in on_topic]) - 0.30) < 0.02
  assert abs(np.mean([":" not in answer for answer in on_topic]) - 0.25) < 0.02
  assert abs(np.mean([answer.endswith(world.CHATTER) for answer in on_topic]) - 0.30) < 0.02


@pytest.mark.parametrize("flaw,share", [("few", 0.20), ("repeat", 0.10), ("wrong", 0.12)])
def test_part_flaw_frequencies(flaw: str, share: float) -> None:
  rng = np.random.default_rng(6)
  profile = world.Profile(**{flaw: getattr(world.PROFILES["human"], flaw)})
  (part,) = world.parse(SAY)
  answers = [world.answer((part,), rng, profile) for _ in range(5000)]
  assert abs(np.mean([answer != "Sure! words: owl owl owl." for answer in answers]) - share) < 0.02


@pytest.mark.parametrize(
  "flaw,scores",
  [
    ("no_opening", {3}),
    ("no_labels", {3}),
    ("chatter", {4}),
    ("repeat", {2, 4}),  # In place of another item, or beside the right ones.
    ("surplus", {2, 4, 5}),  # A number too many is a wrong one; beyond 0 and 15 there is none.
    ("few", {1, 2}),
    ("wrong", {1, 2}),
    ("dropped", {1}),
  ],
)
def test_one_flaw_costs_what_it_should(flaw: str, scores: set[int]) -> None:
  pairs = _many(world.Profile(**{flaw: 1.0}), 300, start=" then ")
  assert {world.oracle(text, answer) for text, answer in pairs} <= scores


def test_profiles() -> None:
  mean = {name: np.mean([world.oracle(*pair) for pair in _many(name, 2000)]) for name in world.PROFILES}
  assert mean["flawless"] == 5
  assert 2.4 < mean["human"] < 3.0
  assert mean["lost"] < mean["worse"] < mean["human"] - 0.5
  with pytest.raises(ValueError, match="flawless"):
    world.answer(world.parse(SAY), np.random.default_rng(0), "perfect")


def test_a_profile_that_nobody_has_is_refused() -> None:
  with pytest.raises(ValueError, match="No profile 'humane': choose from .*human"):
    world.answer((), np.random.default_rng(0), "humane")
