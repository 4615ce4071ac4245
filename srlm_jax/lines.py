"""Text files from outside, read strictly: JSON Lines, one JSON document, or plain text.

Whatever such a file holds, it is either read as its author meant it or refused by a ValueError that says where, which
rule, and what to do. Python's and pydantic's JSON readers are kinder than that: they take NaN, and the last of two
equal keys. Lines are streamed: memory is bounded by the longest one that is allowed.
"""

from collections.abc import Iterator
import contextlib
import gzip
import io
import json
import math
import re
from typing import IO, Any, TypeVar, cast
import zlib

from etils import epath
import pydantic

LONGEST_LINE = 64 << 20  # Bytes. A line is one record: a thousand times what fits any model's context.
LONGEST_DOCUMENT = 256 << 20  # Bytes of a file that is read whole.

T = TypeVar("T")

_BOM = b"\xef\xbb\xbf"
_FORMATS = {  # What a file begins with that is not what it should be, and what to do.
  b"\xff\xfe\x00\x00": "UTF-32, by its first bytes, and not UTF-8: convert it, as by iconv -f UTF-32 -t UTF-8",
  b"\xff\xfe": "UTF-16, by its first bytes, and not UTF-8: convert it, as by iconv -f UTF-16 -t UTF-8",
  b"\xfe\xff": "UTF-16, by its first bytes, and not UTF-8: convert it, as by iconv -f UTF-16 -t UTF-8",
  b"\x00\x00\xfe\xff": "UTF-32, by its first bytes, and not UTF-8: convert it, as by iconv -f UTF-32 -t UTF-8",
  b"\x1f\x8b": "compressed by gzip, but its name does not end in .gz: rename it, or unpack it",
  b"PK\x03\x04": "a zip archive: unpack it",
}
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_DIGITS = 19  # Of an integer of 64 bits.


def numbered(path: epath.PathLike, data: bytes | None = None) -> Iterator[tuple[int, bytes]]:
  """Yields the lines of a plain or gzip (.gz) file that are not blank, with their numbers from 1; a UTF-8 mark is cut.

  Args:
    path: of the file.
    data: its content, unpacked, where that was read already.

  Raises:
    ValueError: no such file, another format, a damaged archive, a NUL byte, or a line longer than LONGEST_LINE.
  """
  path = epath.Path(path)
  number = 0
  with _opened(path) if data is None else io.BytesIO(data) as file:
    try:
      while line := file.readline(LONGEST_LINE + 1):
        number += 1
        if number == 1:
          line = _without_mark(path, line)
        if len(line) > LONGEST_LINE:
          raise ValueError(
            f"{path}, line {number}: longer than {LONGEST_LINE >> 20} MiB, which no record is: are its line ends "
            "missing? Write one record a line."
          )
        _check_bytes(f"{path}, line {number}", line)
        if line.strip():
          yield number, line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
      raise ValueError(
        f"{path}: damaged or cut-off gzip file after line {number}: {error}. Fetch it again, or take .gz from its name "
        "if it is plain text."
      ) from error


@contextlib.contextmanager
def _opened(path: epath.Path) -> Iterator[IO[bytes]]:
  """The bytes of a file, unpacked where its name ends in .gz."""
  try:
    file = path.open("rb")
  except FileNotFoundError as error:
    raise ValueError(f"{path}: there is no such file. Give one that is there.") from error
  except (IsADirectoryError, NotADirectoryError, PermissionError) as error:
    raise ValueError(f"{path}: cannot be read: {error.strerror or error}. Give a file that can.") from error
  with file:
    # A file of an object store reads lines of any length alone.
    plain = file if isinstance(file, io.BufferedReader) else io.BufferedReader(cast(io.RawIOBase, file))
    yield cast(IO[bytes], gzip.open(plain)) if path.name.endswith(".gz") else plain


def _without_mark(path: epath.Path, start: bytes) -> bytes:
  """The start of a file without its UTF-8 mark; ValueError where it begins as another format does."""
  for mark, what in _FORMATS.items():
    if start.startswith(mark):
      raise ValueError(f"{path}: this is {what}.")
  return start.removeprefix(_BOM)


def _check_bytes(where: str, data: bytes) -> None:
  if (place := data.find(b"\0")) >= 0:
    raise ValueError(
      f"{where}, byte {place + 1}: a NUL byte, which no text has: is it UTF-16, or no text? Convert it to UTF-8, or "
      "fetch it again."
    )


def _decoded(where: str, data: bytes) -> str:
  try:
    return data.decode()
  except UnicodeDecodeError as error:
    raise ValueError(
      f"{where}, byte {error.start + 1}: 0x{data[error.start]:02x} is no UTF-8 ({error.reason}): is it Latin-1? "
      "Convert it, as by iconv -f LATIN1 -t UTF-8."
    ) from error


class _Refused(ValueError):
  """A value that JSON's grammar allows, or Python's, and we do not."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  found = dict(pairs)
  if len(found) < len(pairs):
    names = [name for name, _ in pairs]
    twice = next(name for name in names if names.count(name) > 1)
    raise _Refused(f"the key {twice[:80]!r} is there twice in one object: remove one of the two")
  return found


def _constant(name: str) -> float:
  raise _Refused(f"{name} is no number of JSON: write null, or a number")


def _integer(digits: str) -> int:
  if len(digits) > _DIGITS + digits.startswith("-"):
    raise _Refused(f"an integer of {len(digits)} digits: give one of at most {_DIGITS}")
  return int(digits)


def _float(digits: str) -> float:
  value = float(digits)
  if not math.isfinite(value):
    raise _Refused(f"the number {digits[:40]} is too large for a float of 64 bits: give a smaller one")
  return value


def parse(where: str, data: bytes) -> Any:
  """The value of a JSON text.

  Raises:
    ValueError, beginning with `where`: not UTF-8, not JSON, a key twice in an object, NaN or an infinity, an integer of
      more than 64 bits, half of a surrogate pair, or nesting that is too deep to read.
  """
  text = _decoded(where, data)
  try:
    value = json.loads(
      text, object_pairs_hook=_object, parse_constant=_constant, parse_int=_integer, parse_float=_float
    )
    if _SURROGATE.search(text):
      json.dumps(value, ensure_ascii=False).encode()
  except json.JSONDecodeError as error:
    cut = " It ends there: is the file cut off?" if error.pos >= len(text.rstrip()) else ""
    raise ValueError(
      f"{where}, character {error.pos + 1}: not JSON: {error.msg}.{cut} Repair or remove it, or fetch the file again."
    ) from error
  except RecursionError as error:
    raise ValueError(f"{where}: nested too deeply to read. Repair or remove it.") from error
  except UnicodeEncodeError as error:
    raise ValueError(
      f"{where}: half of a surrogate pair (\\u{ord(error.object[error.start]):04x}), which is no character. Write the "
      "whole pair, or remove it."
    ) from error
  except _Refused as error:
    raise ValueError(f"{where}: {error}.") from error
  return value


def fault(error: pydantic.ValidationError, whole: str) -> str:
  """The first thing that pydantic found wrong, as "field: rule"; `whole` names what a rule of no field is about."""
  first = error.errors()[0]
  return f"{'.'.join(str(part) for part in first['loc']) or whole}: {first['msg']}"


def document(path: epath.PathLike, kind: type[T], what: str) -> T:
  """A file that is one JSON document, validated as `kind`.

  Args:
    path: of the file.
    kind: a pydantic model, or any type that pydantic knows.
    what: the file to give, for the error: "the .key.json beside the page".

  Raises:
    ValueError: what `parse` refuses, an empty or too long file, or one that is no such document.
  """
  path = epath.Path(path)
  data = _whole(path, LONGEST_DOCUMENT)
  parse(str(path), data)
  try:
    return pydantic.TypeAdapter(kind).validate_json(data)
  except pydantic.ValidationError as error:
    raise ValueError(f"{path}: not {what}: {fault(error, 'the file')}. Give another file.") from error


def text(path: epath.PathLike, longest: int) -> str:
  """The text of a file in UTF-8, its line ends as "\\n"; ValueError where it is another format, empty or too long."""
  path = epath.Path(path)
  decoded = _decoded(str(path), _whole(path, longest))
  return decoded.replace("\r\n", "\n").replace("\r", "\n")


def _whole(path: epath.Path, longest: int) -> bytes:
  with _opened(path) as file:
    try:
      data = file.read(longest + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
      raise ValueError(f"{path}: damaged or cut-off gzip file: {error}. Fetch it again.") from error
  if len(data) > longest:
    raise ValueError(f"{path}: longer than {longest:,} bytes, which no such file is. Give another one.")
  data = _without_mark(path, data)
  _check_bytes(str(path), data)
  if not data.strip():
    raise ValueError(f"{path}: is empty. Give the whole file.")
  return data
