"""Self-Instruct's filters: every rule alone and at its edge, and ROUGE-L against a table written out by hand."""

import random
import time

import pytest

from srlm_jax import filters


def reference_rouge(first: list[str], second: list[str]) -> float:
  """ROUGE-L F from precision and recall over the textbook table of longest common subsequences."""
  table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
  for i, word in enumerate(first, 1):
    for j, other in enumerate(second, 1):
      table[i][j] = table[i - 1][j - 1] + 1 if word == other else max(table[i - 1][j], table[i][j - 1])
  common = table[-1][-1]
  if not common:
    return 0.0
  precision, recall = common / len(first), common / len(second)
  return 2 * precision * recall / (precision + recall)


def words(count: int) -> str:
  return " ".join(f"Word{number}" for number in range(count))


def test_clean_collapses_white_space_and_capitalises_only_the_first_letter() -> None:
  assert filters.clean("  name\tthree \n\n  birds of NASA ") == "Name three birds of NASA"
  assert filters.clean("éclair recipes") == "Éclair recipes"
  assert filters.clean(" \n ") == ""
  assert filters.clean(filters.clean(" a  b")) == "A b"


@pytest.mark.parametrize(
  "task, reason",
  [
    ("", "too_short"),
    ("Name three birds", "too_short"),
    ("Name three small birds", None),
    (words(150), None),
    (words(151), "too_long"),
    ("Write a program that sorts", "starts_write_a_program"),
    ("write a program that sorts", "starts_write_a_program"),
    ("Please write a program that sorts", None),
    ("Write a poem that rhymes", None),
    ("- name three small birds", "punctuation_start"),
    ('"Name three small birds"', "punctuation_start"),
    ("3 birds that can swim", None),
    ("¿Qué hora es ahora mismo?", "non_ascii_start"),
    ("Écris un poème court", "non_ascii_start"),
    ("Name three birds in café style", None),
  ],
)
def test_each_rule_of_the_wording_at_its_edge(task: str, reason: str | None) -> None:
  assert filters.reject_reason(task) == reason


@pytest.mark.parametrize("word", filters.SELF_INSTRUCT_BLACKLIST)
def test_blacklisted_words_are_matched_whole_and_in_any_case(word: str) -> None:
  assert filters.reject_reason(f"Tell me about {word}, please now") == "blacklisted"
  assert filters.reject_reason(f"{word.upper()} is what I mean") == "blacklisted"
  assert filters.reject_reason(f"Tell me about x{word}s2 please now") is None


def test_blacklist_looks_alike_but_is_not() -> None:
  for task in ("Write a short paragraph on bees", "Explain imagery in poetry", "Describe a plotter or drawer",
               "Should I go together with him?", "Who profiled the mapped genome?"):  # fmt: skip
    assert filters.reject_reason(task) is None, task
  assert filters.reject_reason("How do I go \n to the park?") == "blacklisted"


def test_the_blacklist_can_be_another() -> None:
  task = "Recommend some music for running"
  assert filters.reject_reason(task) is None
  assert filters.reject_reason(task, filters.TaskRules(blacklist=("music",))) == "blacklisted"
  assert filters.reject_reason("Draw me a small bird", filters.TaskRules(blacklist=())) is None
  assert filters.reject_reason("Explain C++ to a child", filters.TaskRules(blacklist=("c++",))) == "blacklisted"


def test_the_number_of_words_is_a_setting() -> None:
  rules = filters.TaskRules(min_words=2, max_words=3)
  assert [filters.reject_reason(words(n), rules) for n in (1, 2, 3, 4)] == ["too_short", None, None, "too_long"]


@pytest.mark.parametrize(
  "settings, message",
  [
    ({"min_words": 0}, "min_words=0"),
    ({"min_words": 9, "max_words": 8}, "max_words=8"),
    ({"blacklist": ("map", " ")}, "blacklist"),
    ({"blacklist": "map"}, "blacklist"),
  ],
)
def test_impossible_rules_are_refused(settings: dict, message: str) -> None:
  with pytest.raises(ValueError, match=message):
    filters.TaskRules(**settings)


def test_rouge_words_are_lower_cased_runs_of_letters_and_digits() -> None:
  assert filters.rouge_words("Don't count_2-3, Café!") == ["don", "t", "count", "2", "3", "caf"]
  assert filters.rouge_words("你好") == []


def test_nearest_agrees_with_the_textbook_table() -> None:
  rng = random.Random(0)

  def sentence() -> str:
    return " ".join(rng.choices("the a bird cat runs sees 3 home".split(), k=rng.randint(1, 12)))

  for _ in range(40):
    known, candidate = [sentence() for _ in range(8)], sentence()
    if rng.random() < 0.5:
      candidate += " unheard of"
    novelty = filters.NoveltyFilter()
    novelty.seed(known)
    rouges = [reference_rouge(candidate.split(), text.split()) for text in known]
    value, text = novelty.nearest(candidate)
    assert value == pytest.approx(max(rouges))
    assert text is None or rouges[known.index(text)] == pytest.approx(value)
    assert (novelty.check(candidate) in ("rouge", "duplicate")) == (max(rouges) > 0.7 + 1e-9)


def test_rouge_respects_order_and_counts_repetitions() -> None:
  novelty = filters.NoveltyFilter()
  novelty.add("a b c d")
  assert novelty.nearest("d c b a")[0] == pytest.approx(2 * 1 / 8)
  assert novelty.nearest("a a c")[0] == pytest.approx(2 * 2 / 7)
  assert novelty.nearest("x y z") == (0.0, None)


def test_a_rouge_of_exactly_the_limit_passes() -> None:
  novelty = filters.NoveltyFilter(max_rouge=0.7)
  novelty.add("a b c d e f g h i j")
  assert novelty.check("a b c d e f g x y z") is None  # 2·7 / 20.
  assert novelty.check("a b c d e f g x y") == "rouge"  # 2·7 / 19.
  for limit in (0.1, 0.2, 0.3, 0.4, 0.6, 0.9):
    novelty = filters.NoveltyFilter(max_rouge=limit)
    novelty.add("a b c d e f g h i j")
    same = round(limit * 10)
    assert novelty.check(" ".join("abcdefghij"[:same] + "0123456789"[same:])) is None, limit
    same += 1
    assert novelty.check(" ".join("abcdefghij"[:same] + "0123456789"[same:]) + " .") in ("rouge", "duplicate"), limit


def test_unknown_words_do_not_match_each_other() -> None:
  novelty = filters.NoveltyFilter()
  novelty.add("name some birds of prey")
  assert novelty.check("count many stars tonight please") is None
  novelty.add("count many stars tonight please")
  assert novelty.check("count many stars tonight quickly please") == "rouge"


def test_duplicates_are_told_from_near_ones() -> None:
  novelty = filters.NoveltyFilter()
  novelty.add("Name three small birds.")
  assert novelty.check("name  three small\nBIRDS!") == "duplicate"
  assert novelty.check("Name three, small birds") == "rouge"


def test_without_rouge_only_duplicates_are_rejected() -> None:
  novelty = filters.NoveltyFilter(max_rouge=1.0)
  novelty.seed(["What is 3 + 4 in words?", "What is C?"])
  assert novelty.check("What is 3 - 4 in words?") is None
  assert novelty.check("What is C++?") is None
  assert novelty.check("what is C") == "duplicate"


def test_tasks_in_another_script_are_compared_for_equality_alone() -> None:
  novelty = filters.NoveltyFilter()
  novelty.add("讲 一个 笑话 吧")
  assert novelty.check("讲 一个 故事 吧") is None
  assert novelty.check("讲 一个  笑话 吧") == "duplicate"


@pytest.mark.parametrize("limit", [-0.1, 1.5, float("nan")])
def test_an_impossible_rouge_is_refused(limit: float) -> None:
  with pytest.raises(ValueError, match="max_rouge"):
    filters.NoveltyFilter(max_rouge=limit)


def test_canary_demonstrations_handed_back_as_new_prompts_are_rejected() -> None:
  demonstrations = [
    "give me three birds then count from 9 to 12 .",
    "Explain why the sky\nis blue.",
    "What is the tallest mountain in Europe",
    "你 好 吗 朋友",
  ]
  for limit in (0.7, 1.0):
    novelty = filters.NoveltyFilter(max_rouge=limit)
    novelty.seed(demonstrations)
    kept, dropped = filters.keep_new([filters.clean(text) for text in demonstrations], novelty)
    assert kept == []
    assert dropped["duplicate"] == 3 and dropped["non_ascii_start"] == 1
    assert all(novelty.check(text) == "duplicate" for text in demonstrations)


def test_keep_new_counts_every_reason_and_compares_with_what_it_kept() -> None:
  novelty = filters.NoveltyFilter()
  novelty.seed(["List four ways to save water at home"])
  tasks = [
    "too short",
    words(151),
    "Draw a small red house",
    "Write a program that adds numbers",
    "(a) name five green fruits",
    "Über alles reden wir heute",
    "list four ways to save  water at home.",
    "List five ways to save water at home",
    " explain   how bees make honey ",
    "Explain how bees make their honey",
  ]
  kept, dropped = filters.keep_new(tasks, novelty)
  assert kept == ["Explain how bees make honey"]
  assert len(novelty) == 2
  assert dict(dropped) == {
      "too_short": 1, "too_long": 1, "blacklisted": 1, "starts_write_a_program": 1, "punctuation_start": 1,
      "non_ascii_start": 1, "duplicate": 1, "rouge": 2,
  }  # fmt: skip
  assert tuple(dropped) == filters.REASONS


def test_ten_thousand_known_tasks_are_compared_in_milliseconds() -> None:
  rng = random.Random(1)
  novelty = filters.NoveltyFilter()
  novelty.seed(" ".join(f"w{int(rng.paretovariate(0.6)) % 20000}" for _ in range(rng.randint(5, 30)))
               for _ in range(10_000))  # fmt: skip
  candidates = [" ".join(f"w{int(rng.paretovariate(0.6)) % 20000}" for _ in range(12)) for _ in range(100)]
  start = time.perf_counter()
  for candidate in candidates:
    novelty.check(candidate)
  # About 1 ms each on an idle core; the bound leaves room for a busy one and still fails a loop in Python.
  assert time.perf_counter() - start < 2.0
