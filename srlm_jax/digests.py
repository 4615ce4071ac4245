"""SHA-256 of bytes and files, and sealed papers: small JSON files that carry a digest of their own content."""

from collections.abc import Mapping
import hashlib
import json
from typing import Any

from etils import epath


def sha256(data: bytes) -> str:
  """Hex digest of some bytes."""
  return hashlib.sha256(data).hexdigest()


def file_sha256(path: epath.Path) -> str:
  """Hex digest of a file, read in pieces."""
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _seal(content: Mapping[str, Any]) -> str:
  return sha256(json.dumps(content, sort_keys=True).encode())


def sealed(content: Mapping[str, Any], indent: int | None = None, by_name: bool = True) -> str:
  """The JSON text of `content` with its own digest as "seal"; its keys in order, or as they are."""
  plain = json.loads(json.dumps(content))  # As it will be read: keys are text, tuples are lists.
  return json.dumps({**plain, "seal": _seal(plain)}, indent=indent, sort_keys=by_name)


def parsed(text: str | bytes) -> Any:
  """A JSON text's value; ValueError for what is neither JSON nor UTF-8, or nested too deeply to read."""
  try:
    return json.loads(text)
  except RecursionError as error:
    raise ValueError("it is nested too deeply") from error


def unseal(text: str | bytes) -> dict[str, Any]:
  """The content of a sealed text, without the seal; ValueError, saying how, where it is not as it was written."""
  content = parsed(text)
  if not isinstance(content, dict) or "seal" not in content:
    raise ValueError("its seal is missing")
  seal = content.pop("seal")
  if seal != _seal(content):
    raise ValueError("its content does not fit its seal")
  return content
