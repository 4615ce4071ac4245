"""The fault campaign can fail: a careless program loses its data, and a blind one says nothing."""

import dataclasses
import pathlib
import random
import signal

import campaign
from campaign import Moment
import pytest

CALLS = (3, 6, 9)  # Changes of files in the first step before which it is killed.


def launcher(tmp_path: pathlib.Path, *arguments: str) -> campaign.Launcher:
  return campaign.Launcher(tmp_path / "programs", "fake_run", arguments)


@pytest.fixture
def wanted(tmp_path: pathlib.Path) -> dict[str, str]:
  """What the careful program ends with."""
  attempt = launcher(tmp_path).run(tmp_path / "whole")
  assert attempt.code == 0 and set(attempt.steps) == {"first", "second"} and not attempt.fired and not attempt.hung
  return files(tmp_path / "whole")


def files(workdir: pathlib.Path) -> dict[str, str]:
  return {str(path.relative_to(workdir)): path.read_text() for path in workdir.rglob("*.json")}


@pytest.mark.parametrize(("flaw", "lost"), [("", False), ("early", True)])
def test_a_kill_shows_who_commits_too_early(
  tmp_path: pathlib.Path, wanted: dict[str, str], flaw: str, lost: bool
) -> None:
  start, workdir = launcher(tmp_path, f"--flaw={flaw}"), tmp_path / "run"
  for call in CALLS:
    attempt = start.run(workdir, moment=Moment("first", call=call))
    if attempt.fired is None:
      break
    assert attempt.code == -signal.SIGKILL and attempt.fired["step"] == "first" and attempt.fired["call"] == call
  last = start.run(workdir)
  assert (last.code != 0 or files(workdir) != wanted) == lost


@pytest.mark.parametrize(("flaw", "verdict"), [("", "found"), ("blind", "silent")])
def test_a_flipped_bit_shows_who_does_not_look(
  tmp_path: pathlib.Path, wanted: dict[str, str], flaw: str, verdict: str
) -> None:
  start, workdir, path = launcher(tmp_path, f"--flaw={flaw}"), tmp_path / "run", "first/shard-1.json"
  assert start.run(workdir, moment=Moment("first", ended=True)).code == -signal.SIGKILL
  bad = (workdir / path).read_bytes().replace(b'"shard": 1', b'"shard": 3')  # One bit.
  (workdir / path).write_bytes(bad)
  attempt = start.run(workdir)
  same, whole = files(workdir) == wanted, (workdir / path).read_bytes() != bad
  assert campaign.judged(attempt, path, same, whole) == verdict


@pytest.mark.parametrize(("flaw", "code"), [("hangs", -signal.SIGTERM), ("deaf", -signal.SIGKILL)])
def test_what_hangs_is_told_to_stop_and_counts_as_lost(tmp_path: pathlib.Path, flaw: str, code: int) -> None:
  start = dataclasses.replace(launcher(tmp_path, f"--flaw={flaw}"), limit=5, grace=2)
  attempt = start.run(tmp_path / "run")
  assert attempt.hung and attempt.code == code and "first: stage first" in attempt.said
  assert campaign.judged(attempt, "first/shard-1.json", True, True) == "lost"


@pytest.mark.parametrize(
  ("code", "said", "same", "whole", "verdict"),
  [
    (2, "/w/m1/stage.json is damaged", True, False, "found"),
    (2, "something else", True, False, "lost"),
    (0, "/w/m1/stage.json is damaged: it is made again", True, True, "found"),
    (0, "/w/m1/stage.json is damaged: it is made again", False, True, "lost"),
    (0, "", True, True, "harmless"),
    (0, "", True, False, "silent"),
    (0, "", False, True, "silent"),
    (1, "Traceback: /w/m1/stage.json", True, False, "lost"),
  ],
)
def test_what_a_run_said_and_made_decides(code: int, said: str, same: bool, whole: bool, verdict: str) -> None:
  attempt = campaign.Attempt(code, said, None, {})
  assert campaign.judged(attempt, "m1/stage.json", same, whole) == verdict


def test_a_damage_within_weights_is_named_by_their_folder() -> None:
  inside = "m1/weights/d/0123456789abcdef0123456789abcdef"
  assert campaign.said_of("/w/m1/weights is damaged: delete /w/m1", inside)
  assert campaign.said_of(f"/w/{inside} is damaged (it has 9 bytes, not the recorded 10): delete /w/m1", inside)
  assert not campaign.said_of("/w/m2/weights is damaged: delete /w/m2", inside)
  assert campaign.said_of("/w/seed/ift.jsonl is damaged", "seed/ift.jsonl.done")
  assert not campaign.said_of("/w/seed/ift.jsonl is damaged", "seed/validation.jsonl")


def test_weights_of_another_size_are_not_harmless() -> None:
  attempt, inside = campaign.Attempt(0, "", None, {}), "m1/weights/d/0123456789abcdef0123456789abcdef"
  assert campaign.judged(attempt, inside, True, False) == "harmless"
  assert campaign.judged(attempt, inside, True, False, sized=True) == "silent"
  assert campaign.judged(attempt, "m1/dataset/x.array_record", True, False, sized=True) == "harmless"


def test_one_bit_is_flipped_and_a_cut_file_is_shorter() -> None:
  rng, data = random.Random(0), bytes(range(64))
  changed = campaign.flip(data, rng)
  assert sum((one ^ other).bit_count() for one, other in zip(data, changed, strict=True)) == 1
  assert (
    data.startswith(campaign.cut(data, rng)) and len(campaign.cut(data, rng)) < 64 and not campaign.empty(data, rng)
  )


@pytest.mark.parametrize(
  ("states", "done", "took", "may"),
  [
    ((), 49, 49, 49),
    (("50",), 99, 49, 49),
    (("50", "100.orbax-checkpoint-tmp"), 103, 53, 53),
    (("50",), 103, 53, 3),  # The second state is not there, and nobody was saving it.
    ((), 103, 103, 3),
    (("100.orbax-checkpoint-tmp",), 103, 103, 53),
  ],
)
def test_a_kill_takes_an_interval_and_what_is_done_while_a_state_is_saved(
  tmp_path: pathlib.Path, states: tuple[str, ...], done: int, took: int, may: int
) -> None:
  for name in states:
    (tmp_path / "m1" / "states" / name).mkdir(parents=True)
  fired = {"step": "m1", "training": {"done": done, "every": 50}}
  assert campaign.taken(tmp_path, fired) == (took, may)
  assert campaign.taken(tmp_path, {"step": "m1", "training": None}) == (0, 0)


def test_where_a_training_went_on_is_read_from_its_messages() -> None:
  said = "/w/m0: step 1 of 300, loss 5\n/w/m1: goes on from step 25 of 100\n/w/m1: goes on from step 50 of 100\n"
  assert campaign.began(said) == {"m0": 0, "m1": 25}


def test_files_are_drawn_by_kind(tmp_path: pathlib.Path) -> None:
  for name in ("m1/weights/d/0123456789abcdef0123456789abcdef", "m2/weights/d/00000000000000000000000000000000"):
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_text("bits")
  (tmp_path / "m1" / "empty").touch()
  assert list(campaign.kinds(tmp_path, random.Random(0))) == ["MODEL/weights/d/#"]


def test_the_table_counts_and_keeps_what_was_bad() -> None:
  table = campaign.Table()
  for verdict in ("survived", "survived", "lost"):
    table.add("kill -9", "m1", verdict, "said")
  assert "| kill -9 | m1 | 3 | 0 | 0 | 2 | 1 | 0 |" in table.markdown() and table.bad == ["lost: kill -9, m1\nsaid"]
