"""Sealed papers: what is read is what was written, or it is refused."""

import json

import pytest

from srlm_jax import digests


def test_a_sealed_paper_gives_its_content_back() -> None:
  content = {"b": [1, 2.5e-7, None], "a": {"naïve": "\x00\ud7ff"}, "n": float("inf")}
  assert digests.unseal(digests.sealed(content)) == content
  assert digests.unseal(digests.sealed(content, indent=2)) == content
  assert digests.unseal(digests.sealed({10: (1,), 9: ()})) == {"10": [1], "9": []}  # As JSON has it.


def test_the_order_and_the_spaces_are_not_sealed() -> None:
  plain = json.loads(digests.sealed({"a": 1, "b": 2}))
  assert digests.unseal(json.dumps(dict(reversed(plain.items())), indent=7)) == {"a": 1, "b": 2}


@pytest.mark.parametrize(
  ("text", "why"),
  [
    (digests.sealed({"a": 1}).replace("1", "2", 1), "does not fit its seal"),
    (digests.sealed({"a": 1}).replace('"a"', '"b"'), "does not fit its seal"),
    (digests.sealed({"a": 1}).replace("seal", "seam"), "its seal is missing"),
    ("[]", "its seal is missing"),
    ("{}", "its seal is missing"),
    ("", "Expecting value"),
    (b"\xff{}", "decode"),
  ],
)
def test_what_was_changed_is_refused(text: str | bytes, why: str) -> None:
  with pytest.raises(ValueError, match=why):
    digests.unseal(text)


def test_the_digest_of_a_file_is_that_of_its_bytes(tmp_path: object) -> None:
  path = digests.epath.Path(str(tmp_path)) / "a"
  path.write_bytes(b"abc" * 100_000)
  assert digests.file_sha256(path) == digests.sha256(b"abc" * 100_000)
