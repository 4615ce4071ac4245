"""Fuzzed inputs from bytes: hypothesis and atheris choose the bytes, and the same bytes always give the same input."""

from collections.abc import Callable, Sequence
import dataclasses
from typing import TypeVar

T = TypeVar("T")

# What has a meaning somewhere: delimiters, special tokens, verdicts, markup, ends of lines, things nobody sees.
CLASS = "\nCategory: coding\nComplexity: 7\nLength: a few words"
FRAGMENTS = (
  *("<response>", "</response>", "< / RESPONSE >", "response", "<", ">", "/", "[", "]", "|", "\\", "</", "[/"),
  *("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "inst", "sys", "</s>", "<s>", "<unk>", "<pad>", "<0x0A>", "<0x3C>"),
  *("<|im_start|>", "<|im_end|>", "<|begin|>", "<|end|>", "<|eot_id|>", "foobar", "▁", "\uff1c", "\uff1e", "\uff0f"),
  *(
    "Score: 5",
    "Score:",
    "\nScore: ",
    "\nScore: 7",
    "5",
    "/5",
    " out of 5",
    "points",
    "**",
    "[[A]]",
    "[[B]]",
    "[[C]]",
    "[[7]]",
  ),
  *(
    "Category: coding",
    "\nComplexity: 7/10",
    "\nLength: a few words",
    CLASS,
    "\n9. ",
    "User:",
    "Answer:",
    "{response}",
  ),
  *("{instruction}", "{tasks}", "<b>", "<script>alert(1)</script>", "<!--", "-->", "&lt;", "&", "'", '"', "{{ 7 }}"),
  *("`", "```", "# ", "- ", "1. ", "> ", "](x)", "![", "$", "~~", "\n", "\r", "\r\n", "\n\n", "\t", " ", "  "),
  *("\u2028", "\u2029", "\x85", "\x0b", "\x1c", "\x00", "\x7f", "\ufeff", "\u200b", "\u200d", "\u202e", "\ufe0f"),
  *("\u034f", "\u0338", "\u0301", "\u3164", "\xad", "\u017f", "\ud800", "\udfff", "\U0001f642", "\u4f60", "\u0130"),
  *("null", "1e999", "NaN", "-1", "0", "%s", "\x1b[31m", "a", "word ", "x" * 40, "<answer>", "</answer>", "[answer]"),
)
HIDDEN = ("\u200b", "\ufe0f", "\x00", "\xad", "\u034f", "\u2060", "\x7f", "\U000e0041", " ", "▁", "\u0338", "\u3000")
# What breaks a file: JSON's own edges, other encodings, depths, ends.
PIECES = (
  *(
    b"null",
    b"true",
    b"1e999",
    b"NaN",
    b"-Infinity",
    b"-1",
    b"0.5",
    b"1" * 30,
    b'"\\ud800"',
    b'"\\u0000"',
    b"{}",
    b"[]",
  ),
  *(b"{" * 3, b"[" * 3000, b'{"a":' * 2000, b'"', b",", b":", b"\n", b"\r\n", b"\n\n", b"\x00", b"\xff\xfe", b"\xc3"),
  *(b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"\xed\xa0\x80", b"\x1f\x8b\x08", b"PK\x03\x04", b'"id": "1",', b'"id":"1"'),
  *(
    b'"rank": 0',
    b'"rank": null',
    b'"replies": []',
    b'"format": 1',
    b'"text": ""',
    b'"a": 1,',
    b" " * 50,
    b"# range: ",
  ),
  *(b"0 5", b"nan", b"-inf inf", b"{response}", b"{instruction}", b"\\", b"\\u", b"]", b"}", b"/etc/passwd", b"../x"),
)


@dataclasses.dataclass
class Draw:
  """Draws from bytes, smallest values once they are used up; `refused` counts the documented errors that were met."""

  data: bytes
  place: int = 0
  refused: int = 0

  def number(self, high: int) -> int:
    """From 0 to `high`, both included."""
    value = 0
    for _ in range((high.bit_length() + 7) // 8):
      value = value << 8 | (self.data[self.place] if self.place < len(self.data) else 0)
      self.place += 1
    return value % (high + 1)

  def choose(self, options: Sequence[T]) -> T:
    """One of them."""
    return options[self.number(len(options) - 1)]

  def character(self) -> str:
    """Any code point, half surrogate pairs included, the smaller ones more often."""
    return chr(self.number(self.choose((0x7F, 0x7F, 0xFF, 0x2FFF, 0xFFFF, 0x10FFFF))))

  def disguised(self) -> str:
    """A fragment with something unseen in it, or some of its letters in another form."""
    text = self.choose(FRAGMENTS)
    place = self.number(len(text))
    if self.number(1):
      return text[:place] + self.choose(HIDDEN) + text[place:]
    wide = "".join(chr(ord(one) + 0xFEE0) if "!" <= one <= "~" else one for one in text[place:])
    return text[:place] + wide

  def text(self, whole: bool = False, longest: int = 12) -> str:
    """Fragments and characters; `whole`: without half surrogate pairs, as all text that came out of a file."""
    pieces = []
    for _ in range(self.number(longest)):
      kind = self.number(7)
      pieces.append(self.character() if kind > 5 else self.choose(FRAGMENTS) if kind < 5 else self.disguised())
    text = "".join(pieces)
    return "".join(one for one in text if not 0xD800 <= ord(one) <= 0xDFFF) if whole else text

  def raw(self, longest: int = 64) -> bytes:
    """Bytes of no form."""
    return bytes(self.number(255) for _ in range(self.number(longest)))

  def edited(self, seeds: Sequence[bytes]) -> bytes:
    """A good file with some things done to it; now and then no good file at all."""
    if self.number(15) == 15:
      return self.choose((self.raw(200), self.choose(PIECES)))
    data = self.choose(seeds)
    for _ in range(self.number(4)):
      start = self.number(max(len(data), 1) - 1)
      stop = min(len(data), start + self.choose((0, 1, 2, 4, 16, 64, 1 << 20)))
      piece = self.choose(
        (self.choose(PIECES), self.raw(8), data[start:stop] * 2, self.text(whole=True, longest=4).encode())
      )
      how = self.number(3)
      if how == 0 and data:  # One bit.
        data = data[:start] + bytes([data[start] ^ 1 << self.number(7)]) + data[start + 1 :]
      else:
        data = data[:start] + (b"" if how == 1 else piece) + data[stop:]
    return data

  def read(self, call: Callable[[], T], *shown: object) -> T | None:
    """What a reader gives, or None where it refuses as documented: a ValueError whose message shows these."""
    try:
      return call()
    except ValueError as error:
      said = str(error)
      assert said.strip() and all(str(one) in said for one in shown), f"{type(error).__name__}: {said!r}"
      self.refused += 1
      return None
