"""Variety of texts, counted by hand."""

import pytest

from srlm_jax import repetition


def test_words_are_words_and_marks_in_lower_case() -> None:
  assert repetition.words("Say it: OWL, owl!\nÜber 3.") == ["say", "it", ":", "owl", ",", "owl", "!", "über", "3", "."]


def test_distinct_n_by_hand() -> None:
  texts = ["a b a b a b", "a b c"]
  assert repetition.distinct(texts, 1) == 3 / 9
  assert repetition.distinct(texts, 2) == 3 / 7  # ab ba ab ba ab, ab bc
  assert repetition.distinct(texts, 3) == 3 / 5  # aba bab aba bab, abc
  assert repetition.distinct(["a", ""], 2) is None


def test_length_alone_is_no_loss_of_variety() -> None:
  text = " ".join(f"w{n}" for n in range(100))
  assert repetition.distinct([text, f"{text} {text}"], 1) == repetition.distinct([text, text], 1) == 0.5
  assert repetition.distinct(["a a a a"], 1, longest=2) == 0.5


def test_repeated_by_hand() -> None:
  assert repetition.repeated("a b a b a b") == pytest.approx(1 / 3)  # abab baba abab
  assert repetition.repeated("a b c d e") == 0
  assert repetition.repeated("a a a a a a") == pytest.approx(2 / 3)
  assert repetition.repeated("a b c") is None


def test_compression_rises_with_repetition() -> None:
  varied = "The quick brown fox jumps over the lazy dog, and nobody knows why it does."
  assert repetition.compression([varied] * 20) > 5 > repetition.compression([varied]) > 0.5
  assert repetition.compression([]) is None


def test_the_summary_puts_them_together() -> None:
  found = repetition.summary(["a b a b a b", "a b c d e", "a"])
  assert found["distinct_1"] == 5 / 12 and found["repeated"] == pytest.approx(1 / 6)
  assert found["repeating"] == pytest.approx(1 / 3)  # One of three texts, that without a 4-gram included.
  assert set(repetition.summary([]).values()) == {None}
