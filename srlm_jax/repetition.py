"""How varied texts are, and how far they repeat themselves: figures that fall or rise when a model's answers collapse.

Words are runs of letters and digits, in lower case, and single marks. A script without spaces has few of them: there
`compression` alone says something.
"""

from collections.abc import Iterator, Sequence
import re
import zlib

_WORD = re.compile(r"\w+|[^\w\s]")
REPEATING = 0.3  # Of its 4-grams that were there before: above it a text repeats itself. Human text lies below 0.05.


def words(text: str) -> list[str]:
  """The words and marks of a text, in lower case."""
  return _WORD.findall(text.casefold())


def _grams(parts: Sequence[str], n: int) -> Iterator[tuple[str, ...]]:
  return zip(*(parts[start:] for start in range(n)), strict=False)


def distinct(texts: Sequence[str], n: int, longest: int = 100) -> float | None:
  """Distinct n-grams over all n-grams of some texts (distinct-n); None where there are none.

  The share falls with the amount of text alone, so that each text counts with its first `longest` words: growth of
  length is then no loss of variety. Compare it only between answers to the same prompts.
  """
  grams = [gram for text in texts for gram in _grams(words(text)[:longest], n)]
  return len(set(grams)) / len(grams) if grams else None


def repeated(text: str, n: int = 4) -> float | None:
  """The share of a text's n-grams that occurred before in the same text; None where it has none."""
  grams = list(_grams(words(text), n))
  return 1 - len(set(grams)) / len(grams) if grams else None


def compression(texts: Sequence[str]) -> float | None:
  """How many times fewer bytes all texts have under zlib: it rises as they repeat themselves and each other."""
  whole = "\n".join(texts).encode()
  return len(whole) / len(zlib.compress(whole, 9)) if whole else None


def summary(texts: Sequence[str]) -> dict[str, float | None]:
  """The figures of some texts: distinct_1, distinct_2, distinct_3; repeated; repeating; compression.

  `repeated` is the mean over texts that have a 4-gram, `repeating` the share of all texts that repeat themselves.
  """
  shares = [share for text in texts if (share := repeated(text)) is not None]
  return {
    **{f"distinct_{n}": distinct(texts, n) for n in (1, 2, 3)},
    "repeated": sum(shares) / len(shares) if shares else None,
    "repeating": sum(share > REPEATING for share in shares) / len(texts) if texts else None,
    "compression": compression(texts),
  }
