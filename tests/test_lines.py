"""Files from outside: what is read, and that everything else is refused by name, place, rule and remedy."""

import gzip
import json
import pathlib
import tracemalloc
from typing import Any

import pytest

from srlm_jax import lines


def write(folder: pathlib.Path, data: bytes, name: str = "given.jsonl") -> pathlib.Path:
  path = folder / name
  path.write_bytes(data)
  return path


def read(path: pathlib.Path) -> list[Any]:
  return [lines.parse(f"{path}, line {number}", line) for number, line in lines.numbered(path)]


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("name", ["given.jsonl", "given.jsonl.gz"])
def test_good_lines_are_read_with_their_numbers(tmp_path: pathlib.Path, name: str, mark: bytes, end: bytes) -> None:
  values = [{"a": "caf\u00e9\u2028\U0001f426", "b": [1, -2.5e3, None, True]}, {"a": "\\ud800 is spelt so"}]
  escaped = b'{"a": "\\ud83d\\udc26"}'
  texts = [json.dumps(values[0], ensure_ascii=False).encode(), b" ", json.dumps(values[1]).encode(), escaped]
  data = mark + end.join(texts)
  path = write(tmp_path, gzip.compress(data) if name.endswith(".gz") else data, name)
  assert [number for number, _ in lines.numbered(path)] == [1, 3, 4]
  assert read(path) == [*values, {"a": "\U0001f426"}]


GOOD = b'{"a": 1}\n'
REFUSED = {
  "cut": (GOOD + b'{"a": "b', "line 2, character 7: not JSON: Unterminated string"),
  "cut behind a comma": (GOOD + b'{"a": 1,', "line 2, character 9: not JSON: .* It ends there: is the file cut off"),
  "two on a line": (b'{"a": 1} {"a": 2}', "line 1, character 10: not JSON: Extra data"),
  "single quotes": (b"{'a': 1}", "line 1, character 2: not JSON"),
  "latin-1": (GOOD + '{"a": "caf\u00e9"}'.encode("latin-1"), "line 2, byte 11: 0xe9 is no UTF-8 .*is it Latin-1"),
  "cut inside a letter": ('{"a": "caf\u00e9'.encode()[:-1], "line 1, byte 11: 0xc3 is no UTF-8"),
  "utf-16": ('{"a": 1}\n'.encode("utf-16"), "given.jsonl: this is UTF-16.*iconv"),
  "utf-16, big end first": (b"\xfe\xff" + '{"a": 1}\n'.encode("utf-16-be"), "given.jsonl: this is UTF-16"),
  "utf-32": ('{"a": 1}\n'.encode("utf-32"), "given.jsonl: this is UTF-32"),
  "utf-16 without a mark": ('{"a": 1}'.encode("utf-16-le"), "line 1, byte 2: a NUL byte, which no text has"),
  "gzip under another name": (gzip.compress(GOOD), "given.jsonl: this is compressed by gzip.*rename it, or unpack"),
  "zip": (b"PK\x03\x04rest", "given.jsonl: this is a zip archive: unpack it"),
  "key twice": (GOOD + b'{"b": [{"a": 1, "a": 2}]}', "line 2: the key 'a' is there twice in one object: remove one"),
  "NaN": (b'{"a": NaN}', "line 1: NaN is no number of JSON: write null"),
  "infinity": (b'{"a": -Infinity}', "line 1: -Infinity is no number of JSON"),
  "a float too large": (b'{"a": 1e999}', "line 1: the number 1e999 is too large for a float"),
  "an integer too large": (b'{"a": ' + b"9" * 5000 + b"}", "line 1: an integer of 5000 digits: give one of at most 19"),
  "half a pair": (b'{"a": "\\ud83d"}', r"line 1: half of a surrogate pair .\\ud83d., which is no character"),
  "deep": (b"[" * 100_000 + b"]" * 100_000, "line 1: nested too deeply to read"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_lines_are_refused(tmp_path: pathlib.Path, case: str) -> None:
  data, message = REFUSED[case]
  with pytest.raises(ValueError, match=message):
    read(write(tmp_path, data))


def test_blank_files_give_nothing(tmp_path: pathlib.Path) -> None:
  assert not read(write(tmp_path, b"")) and not read(write(tmp_path, b"\n \r\n\n"))
  assert not read(write(tmp_path, b"", "given.jsonl.gz"))


def test_damaged_archives(tmp_path: pathlib.Path) -> None:
  whole = gzip.compress(b"".join(b'{"a": %d}\n' % number for number in range(2000)), mtime=0)
  flipped = bytearray(whole)
  flipped[-6] ^= 1  # Of the checksum.
  for data in (whole[:-9], whole[:1000], bytes(flipped), b"plain text", GOOD):
    path = write(tmp_path, data, "given.jsonl.gz")
    with pytest.raises(
      ValueError, match=r"given.jsonl.gz: damaged or cut-off gzip file after line \d+.*Fetch it again"
    ):
      read(path)
    with pytest.raises(ValueError, match=r"given.jsonl.gz: damaged or cut-off gzip file: .*Fetch it again"):
      lines.text(path, 1 << 20)


def test_a_line_without_an_end_is_not_read_into_memory(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(lines, "LONGEST_LINE", 1 << 20)
  path = write(tmp_path, gzip.compress(GOOD + b"x" * (1 << 26)), "given.jsonl.gz")  # 64 MiB in 64 kiB.
  tracemalloc.start()
  with pytest.raises(ValueError, match="line 2: longer than 1 MiB, which no record is: are its line ends missing"):
    read(path)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 8 << 20
  at_the_limit = b'"' + b"x" * ((1 << 20) - 3) + b'"\n'
  assert len(read(write(tmp_path, at_the_limit))) == 1


def test_what_cannot_be_opened(tmp_path: pathlib.Path) -> None:
  with pytest.raises(ValueError, match=r"nowhere.jsonl: there is no such file"):
    read(tmp_path / "nowhere.jsonl")
  with pytest.raises(ValueError, match=r"cannot be read: Is a directory. Give a file that can"):
    read(tmp_path)


def test_one_document(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  path = write(tmp_path, b"\xef\xbb\xbf[1,\n2]", "given.json")
  assert lines.document(path, list[int], "a list") == [1, 2]
  for data, message in {
    b'["a"]': r"given.json: not a list of numbers: 0: .*valid integer.*Give another file",
    b"{}": r"given.json: not a list of numbers: the file: ",
    b"[1,": r"given.json, character 4: not JSON",
    b" \n": r"given.json: is empty. Give the whole file",
    b"\xff\xfe[": r"given.json: this is UTF-16",
  }.items():
    with pytest.raises(ValueError, match=message):
      lines.document(write(tmp_path, data, "given.json"), list[int], "a list of numbers")
  monkeypatch.setattr(lines, "LONGEST_DOCUMENT", 5)
  with pytest.raises(ValueError, match=r"given.json: longer than 5 bytes, which no such file is"):
    lines.document(write(tmp_path, b"[1, 2]", "given.json"), list[int], "a list")


def test_plain_text(tmp_path: pathlib.Path) -> None:
  assert lines.text(write(tmp_path, b"\xef\xbb\xbfcaf\xc3\xa9\r\nowl\rcrow\n"), 100) == "caf\u00e9\nowl\ncrow\n"
  for data, message in {b"caf\xe9": "byte 4: 0xe9 is no UTF-8", b"a\0": "byte 2: a NUL", b"": "is empty"}.items():
    with pytest.raises(ValueError, match=message):
      lines.text(write(tmp_path, data), 100)
  with pytest.raises(ValueError, match="longer than 100 bytes"):
    lines.text(write(tmp_path, b"x" * 101), 100)
