"""Human evaluation: the page is blind and safe, its votes come back, and what they say together is right."""

import base64
import hashlib
import html.parser
import json
import pathlib
import re
import shutil
import subprocess

from etils import epath
import pytest

from srlm_jax import human_eval, records, tables

EVIL = "</script><script>alert(1)</script> <img src=x onerror=alert(2)> <!-- ${x} \u2028 {{ 7 * 7 }}"


def response(prompt: str, text: str) -> records.Response:
  return records.Response(prompt_id=prompt, prompt=f"Task {prompt}", sample=0, text=text, tokens=(2,), finished=True)


def pairs(count: int = 6) -> list[tuple[records.Response, records.Response]]:
  return [(response(f"p{n}", f"ours {n}"), response(f"p{n}", f"theirs {n}")) for n in range(count)]


def made(count: int = 6, shown: int = 50, seed: int = 1) -> tuple[str, human_eval.Key]:
  digests = {"m2secret": "aa", "baselinesecret": "bb"}
  return human_eval.make(pairs(count), ("m2secret", "baselinesecret"), digests, shown, seed)


class Page(html.parser.HTMLParser):
  """Scripts by type, ids, and all tags of a page."""

  def __init__(self, text: str) -> None:
    super().__init__()
    self.scripts: dict[str, str] = {}
    self.tags: list[tuple[str, dict[str, str | None]]] = []
    self._type: str | None = None
    self.feed(text)

  def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
    self.tags.append((tag, dict(attrs)))
    self._type = (dict(attrs).get("type") or "script") if tag == "script" else None

  def handle_endtag(self, tag: str) -> None:
    self._type = None

  def handle_data(self, data: str) -> None:
    if self._type:
      self.scripts[self._type] = self.scripts.get(self._type, "") + data

  def items(self) -> list[dict[str, str]]:
    return json.loads(self.scripts["application/json"])["items"]


def test_the_page_shows_both_answers_and_tells_nothing_else() -> None:
  page, key = made()
  items = Page(page).items()
  assert len(items) == 6 and all(set(item) == {"id", "instruction", "left", "right"} for item in items)
  for item, hidden in zip(items, key.items, strict=True):
    number = hidden.prompt_id[1:]
    assert (item["id"], item["instruction"]) == (hidden.id, f"Task {hidden.prompt_id}")
    other = "right" if hidden.model == "left" else "left"
    assert (item[hidden.model], item[other]) == (f"ours {number}", f"theirs {number}")
  for secret in ("m2secret", "baselinesecret", "prompt_id", "seed", *(f'"{item.prompt_id}"' for item in key.items)):
    assert secret not in page
  data = json.loads(Page(page).scripts["application/json"])
  assert set(data) == {"page", "items"} and data["page"] == key.page


def test_the_seed_draws_instructions_and_sides() -> None:
  assert made() == made()
  orders = {tuple(item.prompt_id for item in made(seed=seed)[1].items) for seed in range(5)}
  assert len(orders) > 1 and all(sorted(order) == [f"p{n}" for n in range(6)] for order in orders)
  sides = [item.model for item in made(400, 400)[1].items]
  assert 150 < sides.count("left") < 250
  page, key = made(shown=3)
  assert len(key.items) == len(Page(page).items()) == 3
  assert made(shown=3)[1].page != made()[1].page


def test_nothing_can_be_shown_or_asked_for_in_vain() -> None:
  with pytest.raises(ValueError, match="--items=0: a page shows at least one"):
    made(shown=0)
  with pytest.raises(ValueError, match="m2secret and baselinesecret have answered no instruction in common"):
    made(0)


def test_texts_cannot_end_their_element_and_only_the_page_s_own_script_runs() -> None:
  page, _ = human_eval.make([(response("p", EVIL), response("p", EVIL))], ("a", "b"), {}, 1, 0)
  found = Page(page)
  assert found.items()[0]["left"] == EVIL == found.items()[0]["right"]
  assert [tag for tag, _ in found.tags].count("script") == 2 and page.count("</script>") == 2
  assert "img" not in {tag for tag, _ in found.tags}
  assert not [name for _, fields in found.tags for name in fields if name.startswith("on")]
  policy = next(fields["content"] for tag, fields in found.tags if fields.get("http-equiv"))
  assert policy is not None and policy.startswith("default-src 'none';")
  own = base64.b64encode(hashlib.sha256(found.scripts["script"].encode()).digest()).decode()
  assert f"script-src 'sha256-{own}';" in policy
  # Nothing is fetched: no address at all in the page.
  assert not re.search(r"https?:|url\(|@import|fetch\(|XMLHttpRequest|import\(", page)
  assert not {"src", "href", "action"} & {name for _, fields in found.tags for name in fields}


def test_every_element_that_the_script_asks_for_is_there() -> None:
  page, _ = made()
  found = Page(page)
  ids = [fields["id"] for _, fields in found.tags if "id" in fields]
  assert len(ids) == len(set(ids))
  asked = set(re.findall(r'byId\("([\w-]+)"\)', found.scripts["script"]))
  assert asked and asked <= set(ids)
  assert {"vote-left", "vote-right", "vote-tie"} <= set(ids)


@pytest.mark.skipif(not shutil.which("node"), reason="there is no node to read the page's script with")
def test_the_script_is_javascript(tmp_path: pathlib.Path) -> None:
  path = tmp_path / "page.js"
  path.write_text(Page(made()[0]).scripts["script"])
  checked = subprocess.run(["node", "--check", str(path)], capture_output=True, text=True, check=False)
  assert checked.returncode == 0, checked.stderr


def ballot(key: human_eval.Key, name: str, votes: dict[str, str]) -> dict[str, object]:
  """As the page saves it; votes by prompt: "model", "against" or "tie"."""
  sides = {item.prompt_id: (item.id, item.model) for item in key.items}
  other = {"left": "right", "right": "left"}
  chosen = {}
  for prompt, vote in votes.items():
    item, side = sides[prompt]
    chosen[item] = {"model": side, "against": other[side], "tie": "tie"}[vote]
  return {"format": "srlm human evaluation votes 1", "page": key.page, "annotator": name, "votes": chosen}


def written(folder: pathlib.Path, *ballots: dict[str, object]) -> list[epath.Path]:
  paths = []
  for number, one in enumerate(ballots):
    paths.append(epath.Path(folder) / f"votes{number}.json")
    paths[-1].write_text(json.dumps(one))
  return paths


def test_votes_come_back_and_are_put_together_as_by_hand(tmp_path: pathlib.Path) -> None:
  _, key = made()
  (tmp_path / "key.json").write_text(key.model_dump_json())
  assert human_eval.read_key(epath.Path(tmp_path / "key.json")) == key
  paths = written(
    tmp_path,
    ballot(key, "Ann", {"p0": "model", "p1": "model", "p2": "tie", "p3": "against", "p4": "model"}),
    ballot(key, "Ben", {"p0": "model", "p1": "against", "p2": "tie", "p3": "against", "p4": "tie"}),
    ballot(key, "Cem", {"p0": "model", "p1": "model", "p2": "model", "p3": "tie", "p4": "against"}),
  )
  found = human_eval.aggregate(key, human_eval.read_ballots(paths, key))
  # p0 and p1 are won, p2 is a tie, p3 is lost, p4 has no majority and is a tie; nobody voted on p5.
  assert [found[name]["value"] for name in ("win", "tie", "loss")] == pytest.approx([2 / 5, 2 / 5, 1 / 5])
  assert found["net"]["value"] == pytest.approx(1 / 5) and found["net"]["low"] < 1 / 5 < found["net"]["high"]
  assert (found["prompts"], found["voted"], found["no majority"]) == (6, 5, 1)
  # Equal pairs: 3, 1, 1, 1, 0 of 3 each. 7 votes for the model, 4 ties, 4 against.
  assert (found["agreement"]["pairwise"], found["agreement"]["pairs"]) == (6 / 15, 15)
  chance = (49 + 16 + 16) / 225
  assert found["agreement"]["kappa"] == pytest.approx((6 / 15 - chance) / (1 - chance))
  assert [(one["annotator"], one["win"], one["tie"], one["loss"]) for one in found["annotators"]] == [
    *(("Ann", 3, 1, 1), ("Ben", 1, 2, 2), ("Cem", 3, 1, 1))
  ]
  left = [list(json.loads(path.read_text())["votes"].values()).count("left") for path in paths]
  assert [one["left"] for one in found["annotators"]] == left
  text = tables.markdown(human_eval.result_table(found, "human", "M2 over M1"))
  assert "| win, % | 40.0 \\[0.0, 80.0\\] |" in text and "| pairs of votes that agree, % | 40.0 of 15 |" in text
  assert "| Ann | 3 | 1 | 1 |" in tables.markdown(human_eval.annotators_table(found, "annotators"))


def test_one_annotator_and_no_votes_are_no_error(tmp_path: pathlib.Path) -> None:
  _, key = made()
  [path] = written(tmp_path, ballot(key, "Ann", {}))
  found = human_eval.aggregate(key, human_eval.read_ballots([path], key))
  assert found["win"]["value"] is None and found["voted"] == 0 and found["agreement"]["kappa"] is None
  assert "| win, % | – |" in tables.markdown(human_eval.result_table(found, "human", "title"))


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"page": "another"}, r"votes0\.json holds votes on another page than the key's"),
    ({"votes": {"item-99": "left"}}, r"votes0\.json: a vote on 'item-99', which the page does not have"),
    ({"votes": {"item-1": "m2"}}, r"votes0\.json: not a file that the page saved: votes\.item-1: .*'left', 'right'"),
    ({"annotator": ""}, r"votes0\.json: not a file that the page saved: annotator"),
    ({"format": "other"}, r"votes0\.json: not a file that the page saved: format"),
    ({"more": 1}, r"votes0\.json: not a file that the page saved: more"),
  ],
)
def test_files_of_something_else_are_refused_by_name(
  tmp_path: pathlib.Path, change: dict[str, object], message: str
) -> None:
  _, key = made()
  paths = written(tmp_path, ballot(key, "Ann", {}) | change)
  with pytest.raises(ValueError, match=message):
    human_eval.read_ballots(paths, key)


def test_two_files_of_one_annotator_and_none_are_refused(tmp_path: pathlib.Path) -> None:
  _, key = made()
  paths = written(tmp_path, ballot(key, "Ann B", {}), ballot(key, " ann  b", {}))
  with pytest.raises(ValueError, match=r"votes1\.json and .*votes0\.json are both of annotator ' ann  b'"):
    human_eval.read_ballots(paths, key)
  with pytest.raises(ValueError, match="no votes: give --votes=FILE"):
    human_eval.read_ballots([], key)
  with pytest.raises(ValueError, match=r"nowhere\.json: there is no such file"):
    human_eval.read_key(epath.Path(tmp_path / "nowhere.json"))
  with pytest.raises(ValueError, match=r"votes0\.json: not the \.key\.json beside a page: format"):
    human_eval.read_key(paths[0])
  path = epath.Path(tmp_path / "page.key.json")
  path.write_text(key.model_copy(update={"items": (*key.items, key.items[0])}).model_dump_json())
  with pytest.raises(ValueError, match=rf"page\.key\.json: the item '{key.items[0].id}' is there twice"):
    human_eval.read_key(path)
