"""What is fuzzed: functions of drawn inputs that call the real code and assert what must hold, whatever comes.

A target fails by any exception that gets out of it. Documented errors, ValueErrors with a message, are met inside it by
`Draw.read` and counted there. TARGETS has all of them; `test_fuzz.py` runs them.
"""

from collections.abc import Callable, Sequence
import functools
import json
import math
import os
import pathlib
import tempfile
import types
from typing import Any
import unicodedata
from unittest import mock

from absl import flags
from etils import epath
from fuzz_draw import Draw
from ml_collections import config_dict, config_flags
import numpy as np
import safetensors.numpy
from skeleton import Skeleton
import test_report
import test_tokenizer

from srlm_jax import (
  artifacts,
  chat,
  classes,
  comparison,
  config,
  endpoint,
  generator,
  hf_files,
  human_eval,
  journal,
  oasst,
  pages,
  ranges,
  records,
  report,
  safety,
  sampling,
  server,
  service,
  tables,
  templates,
  tokenizer as tokenizer_lib,
)

KEY = "sk-fuzz/ed+key-0123456789"
HOW = sampling.Sampling(temperature=0.7, top_p=0.9, max_new=99)


@functools.cache
def _folder() -> epath.Path:
  """For this process's files; in memory where there is such a disk."""
  where = tempfile.TemporaryDirectory(prefix="srlm_fuzz", dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
  _KEPT.append(where)
  return epath.Path(where.name)


_KEPT: list[tempfile.TemporaryDirectory] = []


def _file(name: str, data: bytes) -> epath.Path:
  path = _folder() / name
  path.write_bytes(data)
  return path


# What judges and writers of tasks say


def score(draw: Draw) -> None:
  """A score lies in its range or has a reason, and a later line overrules it."""
  low, high = draw.choose(((0.0, 5.0), (1.0, 5.0), (1.0, 10.0)))
  text = draw.text(longest=20)
  value, reason = templates.parse_score(text, low, high)
  assert (value is None) == bool(reason) and reason in ("", "no_score", "out_of_range")
  assert value is None or (low <= value <= high and math.isfinite(value) and str(int(value)) in text)
  assert templates.parse_score(f"{text}\nScore: 3", low, high) == (3.0, "")


def verdicts(draw: Draw) -> None:
  """The last verdict, and the last rating, count."""
  text = draw.text(longest=20)
  assert templates.parse_verdict(text) in (None, "A", "B", "tie")
  value, reason = templates.parse_rating(text, 1, 10)
  assert (value is None) == bool(reason) and (value is None or 1 <= value <= 10)
  assert templates.parse_verdict(f"[[B]]{text}") and templates.parse_rating(f"[[7]]{text}", -1e9, 1e9)[0] is not None
  assert templates.parse_verdict(f"{text}[[B]]") == "B" and templates.parse_rating(f"{text}[[7]]", 1, 10) == (7.0, "")


def kinds_of_prompts(draw: Draw) -> None:
  """A class is whole, of the options, or has a reason; reading it again gives the same."""
  text, options = draw.text(longest=20), classes.load_template("classify").options
  found = classes.parse("p", text, options)
  fields = (found.category, found.complexity, found.length)
  assert all(one is not None for one in fields) != bool(found.reason) and (not found.reason or fields == (None,) * 3)
  if not found.reason:
    assert (
      found.category in options.categories and found.length in options.lengths and 1 <= (found.complexity or 0) <= 10
    )


def tasks(draw: Draw) -> None:
  """Tasks are stripped, not empty, of one line but where it announces more, and all from the text."""
  text, finished = draw.text(longest=24), bool(draw.number(1))
  found, cut = templates.split_tasks(text, finished)
  assert 0 <= cut <= len(found)
  for task in found:
    assert task == task.rstrip() and task.strip() and task in text
    assert "\n" not in task or task.split("\n", 1)[0].rstrip().endswith(":")


# Prompts that are filled


def few_shot(draw: Draw) -> None:
  """As many numbered lines as demonstrations, and one that is open."""
  given = [draw.text() for _ in range(draw.number(8))]
  head, *lines = templates.few_shot(given).split("\n")
  assert [line.partition(".")[0] for line in lines] == [str(place) for place in range(1, len(given) + 2)]
  assert head == templates.few_shot([]).split("\n")[0] and all(len(line.splitlines()) == 1 for line in lines)


OWN = (
  "Rate it.\n<question>{instruction}</question>\n<answer>{response}</answer>",
  "[Q] {instruction} [A]\n{response} [/A] ",
  "{instruction}{response}", "User: {instruction}\n<response>\n{response}\n</response>\n{instruction}",
)  # fmt: skip


@functools.cache
def _rubrics() -> tuple[templates.Rubric, ...]:
  names = ("judge_additive", "judge_five_bucket", "judge_tiny", "judge_tiny_five_bucket", "safety")
  return (*map(templates.load_rubric, names), *(templates.Rubric(text, 0, 5, "") for text in OWN))


def _bare(text: str) -> str:
  """A text as a reader sees it who looks through every disguise: plain letters, and nothing that has no width."""
  plain = (unicodedata.normalize("NFKC", one) for one in text)
  unseen = {
    "\u034f",
    "\u115f",
    "\u1160",
    "\u3164",
    *map(chr, range(0xFE00, 0xFE10)),
    *map(chr, range(0xE0100, 0xE01F0)),
  }
  return "".join(
    one
    for letters in plain
    for one in letters
    if one.isspace() or not (one in unseen or unicodedata.category(one) in ("Cc", "Cf"))
  )


def filled(draw: Draw) -> None:
  """No text ends its place or opens another: the template's own delimiters are all there are, plain or disguised."""
  rubric = draw.choose(_rubrics())
  instruction, response = draw.text(), draw.text()
  if not draw.number(3):  # One delimiter in two texts.
    cut = draw.number(len(response))
    instruction, response = response[:cut], response[cut:]
  delimiter, own = templates._guarded(rubric.text, ("instruction", "response"))
  text = rubric.fill(instruction, response)
  assert len(delimiter.findall(text)) == len(delimiter.findall(_bare(text))) == own
  if rubric.digest:
    inside = text.split("<response>")
    assert len(inside) == 2 and inside[1].count("</response>") == 1
    assert inside[1].partition("</response>")[2] == rubric.text.partition("</response>")[2]
  if not draw.number(3):
    plain = templates.load_pairwise("pairwise").fill(instruction, response, instruction)
    assert plain.count("<response>") == plain.count("</response>") == 2


def neutralised(draw: Draw) -> None:
  """Texts are changed where they must be, and once."""
  text = draw.text()
  for change in (templates.neutralise, templates.neutralise_chat, templates.neutralise_specials):
    found = change(text)
    assert change(found) == found
    assert found == text or any(bracket in templates._without_disguise(text) for bracket in "<[")
    assert "</s>" not in found or change is not templates.neutralise_specials


@functools.cache
def _words() -> tuple[tokenizer_lib.Tokenizer, ...]:
  folder = test_tokenizer.write_tokenizers(pathlib.Path(_folder()))
  return tokenizer_lib.load(folder / "small.model"), tokenizer_lib.load(folder / "bpe")


def tokens(draw: Draw) -> None:
  """No text yields a special token, all of it comes back, and half a surrogate pair is refused."""
  words, text = draw.choose(_words()), draw.text()
  ids = draw.read(lambda: words.encode(text))
  if ids is not None:
    assert words.special_ids.isdisjoint(ids) and all(0 <= one < words.vocab_size for one in ids)
    assert words.decode(ids) == (text.replace("▁", " ") if words.adds_space else text)


def turns(draw: Draw) -> None:
  """A conversation has the special tokens of an honest one, whatever is said in it, and as many marks of Llama 2's."""
  words, texts = draw.choose(_words()), [draw.text(whole=True) for _ in range(draw.choose((1, 1, 3)))]
  kind = draw.choose(("llama2", "plain") if words.chat_template is None else chat.KINDS)
  found, honest = (chat.conversation_tokens(words, one, kind) for one in (texts, ["hi"] * len(texts)))
  assert [one for one in found if one in words.special_ids] == [one for one in honest if one in words.special_ids]
  text = words.decode(found)
  assert text.count("[INST]") == text.count("[/INST]") == (kind == "llama2") * (len(texts) + 1) // 2


# Files


def _lines(*items: records.Record | dict[str, Any]) -> bytes:
  shown = [json.dumps(one) if isinstance(one, dict) else one.model_dump_json() for one in items]
  return "".join(f"{one}\n" for one in shown).encode()


PROMPTS = [records.Prompt(id=str(n), text=f"Say {n} – “é”\u2028", source="mine") for n in range(3)]
VOTE = records.Vote(text="Fine.\nScore: 4", score=4.0)
RECORDS: dict[type[records.Record], bytes] = {
  records.Prompt: _lines(*PROMPTS),
  records.Response: _lines(
    records.Response(prompt_id="1", prompt="a", sample=0, text="b", tokens=(1, 2), finished=True)
  ),
  records.Judgement: _lines(records.Judgement(prompt_id="1", sample=0, votes=(VOTE,), score=4.0)),
  records.SFTExample: _lines(records.SFTExample(id="1", kind="eft", prompt="a", response="b")),
  records.Document: _lines(records.Document(text="a"), records.Document(prompt="a", response="b")),
}


def record_lines(draw: Draw) -> None:
  """A file of ours is read or refused by its name; what was read is written and read again as it was."""
  kind = draw.choose(list(RECORDS))
  path = _file("records.jsonl", draw.edited([RECORDS[kind]]))
  found = draw.read(lambda: list(records.read(path, kind)), path)
  if found:
    assert list(records.read(_file("again.jsonl", records.dumps(found).encode()), kind)) == found


def record_texts(draw: Draw) -> None:
  """Any text makes a whole line of its own; half a surrogate pair makes none."""
  texts = [draw.text(whole=bool(draw.number(3))) for _ in range(3)]
  given = [records.Prompt(id=one, text=one, source=one) for one in texts]
  text = draw.read(lambda: records.dumps(given))
  assert (text is None) == any(0xD800 <= ord(one) <= 0xDFFF for one in "".join(texts))
  if text is not None:
    assert list(records.read(_file("texts.jsonl", text.encode()), records.Prompt)) == given


def user_prompts(draw: Draw) -> None:
  """A user's prompts have texts and names of their own, or are refused by the file's name."""
  path = _file("prompts.jsonl", draw.edited([RECORDS[records.Prompt]]))
  found = draw.read(lambda: list(records.read_prompts(path)), path)
  assert found is None or (found and all(one.text.strip() for one in found))
  assert found is None or len({one.id for one in found}) == len(found)


def annotators(draw: Draw) -> None:
  """Judgements that people wrote."""
  path = _file("judgements.jsonl", draw.edited([RECORDS[records.SFTExample]]))
  found = draw.read(lambda: list(records.read_given(path, records.SFTExample)), path)
  assert found is None or (found and all(isinstance(one, records.SFTExample) for one in found))


def _message(name: str, role: str, **more: Any) -> dict[str, Any]:
  plain = {"message_id": name, "text": f"text {name}", "role": role, "lang": "en", "review_result": True}
  return {**plain, "deleted": False, "synthetic": False, **more}


TREES = [
  {
    "message_tree_id": f"t{n}",
    "tree_state": "ready_for_export",
    "prompt": _message(
      f"t{n}",
      "prompter",
      replies=[_message(f"t{n}r{m}", "assistant", rank=m, parent_id=f"t{n}", replies=[]) for m in range(3)],
    ),
  }
  for n in range(3)
]


def trees(draw: Draw) -> None:
  """Each tree is kept or counted with its reason, or the file is refused by its name."""
  path = _file("a.trees.jsonl", draw.edited([_lines(*TREES), _lines(TREES[0]), _lines(*TREES, TREES[0])]))
  found = draw.read(lambda: oasst.read_trees(path), path)
  if found:
    kept, counts = found
    for name in ("trees", "replies"):
      assert counts[name] == sum(count for key, count in counts.items() if key.startswith(f"{name}/"))
    assert len(kept) == counts["trees/kept"] and len({one.id for one in kept}) == len(kept)
    for one in kept:
      assert one.prompt.strip() and [reply.rank for reply in one.replies] == sorted(
        {reply.rank for reply in one.replies}
      )


LOADERS: tuple[tuple[str, Callable[[str], Any]], ...] = (
  ("judge_additive", templates.load_rubric),
  ("pairwise", templates.load_pairwise),
  ("classify", classes.load_template),
  ("refusals", safety.load_openings),
)


def own_templates(draw: Draw) -> None:
  """A template of one's own works, in finite numbers, or is refused by its name."""
  name, load = draw.choose(LOADERS)
  path = _file("mine.txt", draw.edited([(templates.RUBRICS / f"{name}.txt").read_bytes(), b"{instruction}{response}"]))
  templates._load.cache_clear()
  found = draw.read(lambda: load(str(path)), path)
  if isinstance(found, templates.Rubric):
    assert math.isfinite(found.low) and math.isfinite(found.high) and found.low < found.high
    assert "{instruction}" in found.text and "x" in found.fill("x", "y")
  elif isinstance(found, safety.Openings):
    assert found.texts and not found.refuses("")


ITEMS = tuple(human_eval.Item(id=f"item-{n}", prompt_id=f"p{n}", sample=0, model="left") for n in range(3))
HUMAN = human_eval.Key(page="ab", model="m2", against="m1", seed=1, answers={"m2": "aa", "m1": "bb"}, items=ITEMS)
BALLOT = human_eval.Ballot(
  format="srlm human evaluation votes 1", page="ab", annotator="Ann", votes={"item-0": "left", "item-1": "tie"}
)


def human_votes(draw: Draw) -> None:
  """A key and its ballots say something together, or are refused by their names."""
  key_path = _file(
    "page.key.json", draw.edited([HUMAN.model_dump_json().encode()]) if draw.number(1) else _lines(HUMAN)
  )
  key = draw.read(lambda: human_eval.read_key(key_path), key_path) or HUMAN
  path = _file("votes.json", draw.edited([BALLOT.model_dump_json().encode()]))
  ballots = draw.read(lambda: human_eval.read_ballots([path], key), path)
  if ballots:
    found = human_eval.aggregate(key, ballots)
    assert found["voted"] <= len(key.items) and tables.markdown(human_eval.annotators_table(found, "a"))


CONFIG = json.dumps(
  {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32, "hidden_size": 8,
    "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4,
    "rope_theta": 10000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "max_position_embeddings": 64,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192},
  }, indent=1,
).encode()  # fmt: skip
WEIGHTS = safetensors.numpy.save({"a.weight": np.ones((2, 3), np.float32), "b": np.zeros(2, np.float16)})
INDEX = json.dumps({"metadata": {}, "weight_map": {"a.weight": "model-1.safetensors", "b": "model-1.safetensors"}})


def _model_folder(**files: bytes) -> epath.Path:
  folder = _folder() / "model"
  folder.mkdir(exist_ok=True)
  for path in folder.iterdir():
    path.unlink()
  for name, data in files.items():
    (folder / name.replace("__", ".").replace("_1", "-1")).write_bytes(data)
  return folder


def model_config(draw: Draw) -> None:
  """config.json of a Hugging Face folder makes a shape that can be computed with, or is refused by its name."""
  folder = _model_folder(config__json=draw.edited([CONFIG]))
  found = draw.read(lambda: hf_files.read_config(folder), folder / "config.json")
  if found:
    sizes = (found.vocab_size, found.embed, found.ffw, found.layers, found.heads, found.kv_heads, found.head_dim)
    assert all(type(size) is int and size > 0 for size in sizes) and found.heads % found.kv_heads == 0
    assert found.norm_eps > 0 and math.isfinite(found.rope_theta) and found.rope_theta > 0


def model_weights(draw: Draw) -> None:
  """Headers of weights and their index name tensors that are there, or are refused by the folder's name."""
  if draw.number(1):
    files = {"model__safetensors": draw.edited([WEIGHTS])}
  else:
    index = draw.edited([INDEX.encode()])
    files = {"model_1__safetensors": WEIGHTS, "model__safetensors__index__json": index}
  folder = _model_folder(**files)
  for name, one in (draw.read(lambda: hf_files.tensors(folder), folder) or {}).items():
    assert name and one[tuple(slice(0, size) for size in one.shape)].shape == one.shape


def _sealed(name: str) -> tuple[artifacts.Artifact, bytes]:
  """A finished artifact of one shard, and a file of it as it was written."""
  made = artifacts.Artifact(_folder() / "made", {"seed": 0}, {})
  if not made.folder.exists():
    made.begin()
    made.write_records("prompts.jsonl", PROMPTS)
    made.commit({"prompts": 3})
    for path in made.folder.iterdir():
      (_folder() / f"whole {path.name}").write_bytes(path.read_bytes())
  for path in _folder().glob("whole *"):
    (made.folder / path.name.removeprefix("whole ")).write_bytes(path.read_bytes())
  return artifacts.Artifact(made.folder, made.config, {}), (_folder() / f"whole {name}").read_bytes()


def artifact_files(draw: Draw) -> None:
  """A changed file of a finished artifact changes nothing, or is refused by its name before work starts."""
  name = draw.choose(("manifest.json", "stage.json", "prompts.jsonl", "prompts.jsonl.done"))
  made, whole = _sealed(name)
  data = draw.edited([whole])
  (made.folder / name).write_bytes(data)

  def use() -> list[records.Prompt]:
    made.begin()
    assert made.done and made.manifest()["facts"] == {"prompts": 3}
    return made.read("prompts.jsonl", records.Prompt)

  found = draw.read(use, made.folder)
  assert found is None or found == PROMPTS
  assert name != "prompts.jsonl" or (found is None) == (data != whole)


STEPS = "".join(journal.line({"step": n, "loss": 1.5 / n, "skipped": n == 2}) for n in range(1, 5)).encode()


def metrics(draw: Draw) -> None:
  """Each line of a journal is as it was written, or left out; training goes on behind the steps that are asked for."""
  path, written = _file("metrics.jsonl", draw.edited([STEPS])), journal.parse(STEPS.decode())
  steps = draw.number(5)
  assert all(row in written for row in journal.read(path))
  went_on = journal.Journal(path, steps)
  went_on.add({"step": 9, "loss": 0.5, "skipped": False})
  went_on.flush()
  found = journal.read(path)
  assert found[-1]["step"] == 9 and all(row in written and row["step"] <= steps for row in found[:-1])


# Settings


@functools.cache
def _leaves() -> tuple[str, ...]:
  return tuple(artifacts.flatten(config.base().to_dict()))


def overrides(draw: Draw) -> None:
  """What a command line makes of the configuration lies in its ranges, or is refused."""
  values = (
    "",
    "0",
    "-1",
    "1",
    "0.5",
    "nan",
    "inf",
    "1e400",
    "True",
    "None",
    "('a',)",
    "('',)",
    "(1,)",
    "[" * 200,
    "1" * 5000,
  )
  arguments = []
  for _ in range(draw.number(2) + 1):
    key = draw.choose(_leaves()) if draw.number(7) else draw.text(longest=3)
    arguments.append(f"--config.{key}={draw.choose(values) if draw.number(1) else draw.text(longest=4)}")

  def parse() -> config_dict.ConfigDict:
    found, argv = flags.FlagValues(), ["srlm", *arguments]
    try:
      holder = config_flags.DEFINE_config_dict("config", config.base(), flag_values=found, sys_argv=argv)
      found(argv)
    except (flags.Error, AttributeError, KeyError, TypeError) as error:  # What main._parse tells in a sentence.
      raise ValueError(str(error)) from error
    ranges.check(holder.value)
    return holder.value

  settings = draw.read(parse)
  assert settings is None or not list(ranges.wrong(settings))


# Services


def _said(draw: Draw, seeds: Sequence[bytes]) -> types.SimpleNamespace:
  """What a raw call of a client gives; the key may be in it."""
  data = draw.edited(seeds)
  return types.SimpleNamespace(content=data.replace(b"Fine", KEY.encode()) if draw.number(1) else data)


CHAT = json.dumps(
  {
    "id": "1", "choices": [{"index": 0, "message": {"role": "assistant", "content": "Fine.\nScore: 4"},
    "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 3, "completion_tokens": 2},
  }
).encode()  # fmt: skip


@functools.cache
def _judge() -> endpoint.Endpoint:
  section = {**config.base().endpoint, "url": "http://127.0.0.1:9", "model": "judge", "retries": 0}
  return endpoint.connect(endpoint.terms(section), _folder())


def endpoint_replies(draw: Draw) -> None:
  """A reply that is kept, without the key, or a refusal, without the key."""
  body = _said(draw, [CHAT])
  with mock.patch.dict(os.environ, {service.KEY: KEY}):
    judge = _judge()
    try:
      answer = judge.terms.service.ask(judge.terms.url, lambda: body, endpoint._Answer)
      reply = judge._read(answer)
      assert KEY not in reply.text and isinstance(reply.finished, bool)
      reply.digest("key")
    except ValueError as error:
      assert str(error).startswith("http://127.0.0.1:9/v1") and KEY not in str(error)
      draw.refused += 1


def kept_replies(draw: Draw) -> None:
  """A changed file of paid replies gives what was paid, or is refused by its name."""
  path = _folder() / "kept" / endpoint.FILE
  kept, cache = endpoint.Kept("Fine.\nScore: 4", True, 3, 2), endpoint.Cache(path)
  if not path.parent.exists():
    cache.prepare()
    cache.put("key", "judge", kept)
    (_folder() / "kept.whole").write_bytes(path.read_bytes())
  data = bytearray((_folder() / "kept.whole").read_bytes())
  near = data.index(b"Fine")
  for _ in range(draw.number(2) + 1):
    place = near + draw.number(120) - 80 if draw.number(1) else draw.number(len(data) - 1)
    data[place] ^= 1 << draw.number(7)
  path.write_bytes(data)

  def use() -> dict[str, endpoint.Kept]:
    cache.prepare()
    return cache.get(["key"])

  found = draw.read(use, path)
  assert found in (None, {}, {"key": kept})


COMPLETION = json.dumps(
  {"choices": [{"index": 0, "text": "Fine", "finish_reason": "stop", "token_ids": [5, 6, 2], "stop_reason": None}]}
).encode()


def server_replies(draw: Draw) -> None:
  """Ids of the vocabulary that end once, or a refusal without the key."""
  body = _said(draw, [COMPLETION, COMPLETION.replace(b"[5, 6, 2]", b"null")])
  client = types.SimpleNamespace()
  client.completions = types.SimpleNamespace(with_raw_response=types.SimpleNamespace(create=lambda **_: body))
  words = _words()[0]
  with mock.patch.dict(os.environ, {service.KEY: KEY}):
    asked = service.Service("http://127.0.0.1:9", "", 1, 0, 10.0)
    one = server.Server(asked, asked.urls[0], "m1", words, words.vocab_size, HOW, 32, 0, server.Counter())

    try:
      [completion], counts = one._ask(client, generator.Request("q", (1, 5), 1))
      assert counts["texts"] == 1 and len(completion.tokens) <= HOW.max_new
      assert all(0 <= token < words.vocab_size for token in completion.tokens)
      assert words.eos_id not in completion.tokens[:-1] and KEY not in words.decode(completion.tokens)
    except ValueError as error:
      assert str(error).strip() and KEY not in str(error)
      draw.refused += 1


# Pages


def _page(text: str) -> str:
  table = tables.Table("t", text, ("", text), (tables.row(text, tables.Cell(text, text)),), note=text)
  section = report.Section("s", text, text, (table,))
  return pages.render("comparison.html.jinja", comparison=comparison.Comparison((text, "b"), (section,)))


@functools.cache
def _plain_page() -> list[tuple[str, ...]]:
  return Skeleton(_page("harmless")).found


def page(draw: Draw) -> None:
  """A page has the elements that it would have without the texts in it."""
  assert Skeleton(_page(f"a{draw.text(longest=16)}")).found == _plain_page()


@functools.cache
def _plain_blind_page() -> list[tuple[str, ...]]:
  return Skeleton(human_eval.html("ab", [{"instruction": "a", "left": "b", "right": "c"}])).found


def blind_page(draw: Draw) -> None:
  """The page of a human evaluation holds its texts as data, and all of them."""
  item = {side: draw.text(whole=True) for side in ("instruction", "left", "right")}
  found = human_eval.html("ab", [item])
  assert Skeleton(found).found == _plain_blind_page()
  data = found.partition('id="data">')[2].partition("</script>")[0]
  assert json.loads(data)["items"] == [item]


def cells(draw: Draw) -> None:
  """A Markdown table keeps its columns and lines, and its cells their words."""
  texts = [draw.text() for _ in range(3)]
  table = tables.Table("t", texts[0], (texts[1], "b"), (tables.row(texts[2], tables.Cell("x", texts[0])),), texts[1])
  text = tables.markdown(table)
  [rows] = test_report.markdown_tables(text)
  plain = [" ".join(one.split()) for one in texts]
  assert [[" ".join(cell.split()) for cell in row] for row in rows] == [
    [plain[1], "b"],
    [plain[2], f"x {plain[0]}".strip()],
  ]
  assert len(text.rstrip("\n").split("\n")) == (5 + 2 * bool(texts[1]) if plain[1] or not texts[1] else 5)


TARGETS: tuple[Callable[[Draw], None], ...] = (
  *(score, verdicts, kinds_of_prompts, tasks, few_shot, filled, neutralised, tokens, turns),
  *(
    record_lines,
    record_texts,
    user_prompts,
    annotators,
    trees,
    own_templates,
    human_votes,
    model_config,
    model_weights,
  ),
  *(artifact_files, metrics, overrides, endpoint_replies, kept_replies, server_replies, page, blind_page, cells),
)
