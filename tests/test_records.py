"""Files of records: our own, and a user's, which are read more strictly."""

import pathlib

import pytest

from srlm_jax import records

LINE = '{"id": "a", "text": "Name a bird.", "source": "mine"}\n'


def write(folder: pathlib.Path, text: str) -> pathlib.Path:
  path = folder / "mine.jsonl"
  path.write_text(text, encoding="utf-8")
  return path


def test_what_is_written_is_read(tmp_path: pathlib.Path) -> None:
  texts = ("crow\u2028owl", "caf\u00e9 \U0001f426", "tab\tand\nline", "")
  made = [records.Prompt(id=str(number), text=text, source="mine") for number, text in enumerate(texts)]
  path = write(tmp_path, records.dumps(made))
  assert list(records.read(path, records.Prompt)) == list(records.read_given(path, records.Prompt)) == made


def test_our_own_file_may_be_empty_and_a_users_not(tmp_path: pathlib.Path) -> None:
  path = write(tmp_path, " \n\n")
  assert not list(records.read(path, records.Prompt))
  with pytest.raises(ValueError, match=r'mine.jsonl holds nothing: write one Prompt a line, with "id", "text"'):
    list(records.read_given(path, records.Prompt))


def test_a_line_that_does_not_fit_is_named(tmp_path: pathlib.Path) -> None:
  path = write(tmp_path, LINE + '\n{"id": "b", "text": 7, "source": "mine"}\n')
  for read in (records.read, records.read_given):
    with pytest.raises(ValueError, match=r"mine.jsonl, line 3: not a Prompt: text: .*Repair or remove the line"):
      list(read(path, records.Prompt))


@pytest.mark.parametrize(
  ("text", "message"),
  [
    (LINE + "\n" + LINE, "line 3: the id 'a' is on line 1, too: give every line its own"),
    (LINE.replace('"a"', '" "'), "line 1: its id is empty"),
    (LINE.replace('"id": "a"', '"id": "a", "id": "b"'), "line 1: the key 'id' is there twice"),
    (LINE.replace("Name a bird.", " "), "the prompt 'a' has no text: write one, or remove its line"),
  ],
)
def test_a_users_prompts_that_cannot_be_used(tmp_path: pathlib.Path, text: str, message: str) -> None:
  with pytest.raises(ValueError, match=message):
    list(records.read_prompts(write(tmp_path, text)))


def test_records_without_a_name_may_be_alike(tmp_path: pathlib.Path) -> None:
  path = write(tmp_path, '{"text": "crow"}\n' * 2)
  assert len(list(records.read_given(path, records.Document, name=""))) == 2
