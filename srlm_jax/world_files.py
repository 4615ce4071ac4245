"""Writes the tiny world's files: what a model is trained and tested on in place of the internet and of people.

| file | what it stands for |
|---|---|
| pretrain.jsonl | the text of the base model M0: `{"text"}` documents and `{"prompt", "response"}` forum exchanges |
| tokenizer.model | its SentencePiece tokenizer |
| trees.jsonl, heldout_trees.jsonl | Open Assistant trees: human replies, ranked |
| judgements.jsonl | EFT examples that annotators wrote by the rubric, scores balanced |
| heldout_prompts.jsonl | instructions to evaluate on |

Instructions are shared out by the hash of their text: a fifth is held out, and of the rest half is answered in IFT and
half judged in EFT, so that the two do not overlap (paper §3.1). No instruction has two trees.
"""

import collections
from collections.abc import Iterator, Sequence
import dataclasses
import io
import json
import re
import string
from typing import Any
import uuid

from etils import epath
import numpy as np
import sentencepiece

from srlm_jax import records, storage, templates, world, world_judges

HELDOUT, IFT, EFT = range(0, 4), range(4, 12), range(12, 20)  # Shares of `world.bucket`.
TRAINING = range(4, 20)
SYMBOLS = ("\n", "[INST]", "[/INST]", "<response>", "</response>", ".", ":", "!", "?", ",")  # Always single pieces.
_SYMBOL = re.compile("|".join(re.escape(symbol) for symbol in SYMBOLS))
_WORD = re.compile("▁?[^▁\n]+")
# Who often earns this score; of several, one at random.
JUDGED_AS = {
  0: ("lost",),
  1: ("worse",),
  2: ("careless", "careless", "worse"),
  3: ("human", "careless"),
  4: ("human", "careless"),
  5: ("flawless",),
}


@dataclasses.dataclass(frozen=True)
class Sizes:
  """How much of everything. The pretraining text is about 2 million tokens."""

  member_lists: int = 6000
  task_lists: int = 8000
  exchanges: int = 20000
  forum_judgements: int = 8000
  noise: float = 0.5  # Of the forum's judges, see `world_judges.noisy_judgement`.
  ift_trees: int = 1200  # Each with one reply, so the first-ranked is as mixed as people are.
  eft_trees: int = 1600
  heldout_trees: int = 400
  replies: tuple[int, int] = (3, 4)  # Fewest and most replies of an EFT tree; held-out trees have the most.
  judgements: int = 10000
  judged_instructions: int = 5000
  heldout_prompts: int = 512


def _draw(rng: np.random.Generator, share: range) -> str:
  """A random instruction of one share of the hash buckets."""
  while True:
    text = world.instruction(rng)
    if world.bucket(text) in share:
      return text


def _distinct(rng: np.random.Generator, share: range, count: int) -> list[str]:
  """`count` different instructions of a share; ValueError where a share does not hold so many (thousands)."""
  texts: dict[str, None] = {}
  for _ in range(20 * count + 1000):
    if len(texts) == count:
      return list(texts)
    texts[_draw(rng, share)] = None
  raise ValueError(f"{count} different instructions wanted, but 20 times as many draws gave {len(texts)}: want fewer.")


def _answer(rng: np.random.Generator, text: str, profile: str) -> str:
  """Somebody's answer to an instruction."""
  return world.answer(world.parts_of(text), rng, profile)


def _someone(rng: np.random.Generator) -> str:
  """A profile, for text of every quality."""
  return ("human", "human", "worse", "flawless")[int(rng.random() * 4)]


def _member_list(rng: np.random.Generator) -> str:
  """A line of common knowledge: some members of a kind, or a run of numbers."""
  if rng.random() < 0.5:
    label = tuple(world.KINDS)[int(rng.random() * len(world.KINDS))]
    members = world.KINDS[label]
    items = [members[place] for place in rng.permutation(len(members))[: 3 + int(rng.random() * 6)]]
  else:
    label, first, last = "numbers", *sorted(rng.choice(world.LARGEST + 1, 2, replace=False).tolist())
    items = [str(number) for number in range(first, last + 1)][:: 1 if rng.random() < 0.5 else -1]
  return f"{label}: {' '.join(items)}."


def _task_list(rng: np.random.Generator) -> str:
  """Nine tasks just as the 8-shot prompt lists them, so that M0 can propose the ninth."""
  tasks = [_draw(rng, TRAINING) for _ in range(9)]
  return templates.few_shot(tasks[:8]).rstrip() + " " + tasks[8]


def pretraining(rng: np.random.Generator, sizes: Sizes, rubric: templates.Rubric) -> list[dict[str, str]]:
  """The base model's text in random order: plain documents and exchanges."""
  lines = [{"text": _member_list(rng)} for _ in range(sizes.member_lists)]
  lines += [{"text": _task_list(rng)} for _ in range(sizes.task_lists)]
  for _ in range(sizes.exchanges):
    text = _draw(rng, TRAINING)
    lines.append({"prompt": text, "response": _answer(rng, text, _someone(rng))})
  for _ in range(sizes.forum_judgements):
    text = _draw(rng, TRAINING)
    response = _answer(rng, text, _someone(rng))
    verdict = world_judges.noisy_judgement(text, response, rng, sizes.noise, int(rubric.low))
    lines.append({"prompt": rubric.fill(text, response), "response": verdict})
  return [lines[place] for place in rng.permutation(len(lines))]


def train_tokenizer(texts: Sequence[str]) -> bytes:
  """A SentencePiece unigram model in which every word of the texts is one piece; ids as in Llama (unk 0, bos 1, eos 2).

  A word is a piece with the space before it, which SentencePiece puts in itself at the start of a text; a word that
  stands right behind a symbol is another piece. Newlines and the delimiters in `SYMBOLS` are pieces of their own, and
  all printable ASCII can be spelt.
  """
  words = set().union(*map(_words, texts))
  letters = sorted(set(string.printable.strip()) - set(SYMBOLS))
  # Each word by itself as well: how often it occurs must not decide whether it becomes a piece.
  sentences = list(texts[:6000]) + [word[1:] if word[0] == "▁" else "\n" + word for word in sorted(words)] * 50
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(sentences),
    model_writer=model,
    model_type="unigram",
    vocab_size=4 + len(SYMBOLS) + len(set(letters) | words),
    hard_vocab_limit=False,
    normalization_rule_name="identity",
    remove_extra_whitespaces=False,
    byte_fallback=False,
    user_defined_symbols=list(SYMBOLS),
    required_chars="".join(letters),
    unk_id=0,
    bos_id=1,
    eos_id=2,
    pad_id=-1,
    max_sentence_length=100_000,
    num_threads=1,
    minloglevel=2,
  )
  return model.getvalue()


def _words(text: str) -> set[str]:
  """The words of a text as SentencePiece writes them: "▁owl", or "owl" right behind one of `SYMBOLS`."""
  return set(_WORD.findall("▁" + _SYMBOL.sub("\n", text).replace(" ", "▁")))


def _node(rng: np.random.Generator, text: str, role: str, parent: str | None, rank: int | None) -> dict[str, Any]:
  """A message of the Open Assistant schema, without replies."""
  return {
    "message_id": str(uuid.UUID(bytes=rng.bytes(16), version=4)),
    "parent_id": parent,
    "text": text,
    "role": role,
    "lang": "en",
    "review_count": 3,
    "review_result": True,
    "deleted": False,
    "rank": rank,
    "synthetic": False,
    "model_name": None,
    "emojis": {},
    "replies": [],
  }


def _tree(rng: np.random.Generator, text: str, replies: Sequence[str]) -> dict[str, Any]:
  """A tree of a root and its replies, best first."""
  root = _node(rng, text, "prompter", None, None)
  root["replies"] = [_node(rng, reply, "assistant", root["message_id"], rank) for rank, reply in enumerate(replies)]
  return {"message_tree_id": root["message_id"], "tree_state": "ready_for_export", "prompt": root, "origin": "world"}


def _ranked(rng: np.random.Generator, text: str, count: int, profiles: Sequence[str]) -> list[str]:
  """`count` different replies, ranked best first by the oracle as annotator; of different scores where possible."""
  by_score: dict[int, list[str]] = collections.defaultdict(list)
  seen: set[str] = set()
  tries = 0
  while len(by_score) < count and tries < 8 * count or len(seen) < count:
    reply = _answer(rng, text, profiles[int(rng.random() * len(profiles))])
    tries += 1
    if reply not in seen:
      seen.add(reply)
      by_score[world.oracle(text, reply)].append(reply)
  # One reply of each score in random order of the scores, then the rest.
  scores = [list(by_score)[place] for place in rng.permutation(len(by_score))]
  queue = [(score, reply) for score in scores for reply in by_score[score][:1]]
  queue += [(score, reply) for score in scores for reply in by_score[score][1:]]
  return [reply for _, reply in sorted(queue[:count], key=lambda pair: -pair[0])]


def training_trees(rng: np.random.Generator, sizes: Sizes) -> list[dict[str, Any]]:
  """IFT trees of a single reply, and EFT trees of several ranked ones, all by the "human" profile."""
  trees = []
  for text in _distinct(rng, IFT, sizes.ift_trees):
    trees.append(_tree(rng, text, [_answer(rng, text, "human")]))
  for text in _distinct(rng, EFT, sizes.eft_trees):
    count = int(rng.integers(sizes.replies[0], sizes.replies[1] + 1))
    trees.append(_tree(rng, text, _ranked(rng, text, count, ("human",))))
  return [trees[place] for place in rng.permutation(len(trees))]


def heldout_trees(rng: np.random.Generator, sizes: Sizes) -> list[dict[str, Any]]:
  """Held-out instructions with ranked replies of every quality, for the reward-model metrics."""
  profiles = ("human", "human", "worse", "flawless")
  return [
    _tree(rng, text, _ranked(rng, text, sizes.replies[1], profiles))
    for text in _distinct(rng, HELDOUT, sizes.heldout_trees)
  ]


def judgements(rng: np.random.Generator, sizes: Sizes, rubric: templates.Rubric) -> Iterator[records.SFTExample]:
  """EFT examples that annotators wrote, as many of each score that the rubric has."""
  low = int(rubric.low)
  pool = [_draw(rng, EFT) for _ in range(sizes.judged_instructions)]
  for number in range(sizes.judgements):
    score = low + number % (6 - low)
    # The lowest category is also that of every response that would have earned less.
    writers = JUDGED_AS[score] if score > low else sum((JUDGED_AS[less] for less in range(low + 1)), ())
    profile = world.pick(rng, writers)
    while True:
      text = pool[int(rng.random() * len(pool))]
      response = _answer(rng, text, profile)
      if max(world.oracle(text, response), low) == score:
        break
    yield records.SFTExample(
      id=f"judgement-{number}",
      kind="eft",
      prompt=rubric.fill(text, response),
      response=world_judges.judgement(text, response, low),
    )


def _json_lines(items: Sequence[dict[str, Any]]) -> str:
  """One object a line."""
  return "".join(json.dumps(item) + "\n" for item in items)


def write_world(
  folder: epath.PathLike, seed: int = 0, sizes: Sizes = Sizes(), rubric: str = "judge_tiny"
) -> dict[str, Any]:
  """Writes all files of the world into `folder` (made where missing); the same arguments give the same bytes.

  The world's people judge by the rubric of that name or path: points that add up where its scores are 0 to 5, one of
  five categories where they are 1 to 5. ValueError for another range.

  Returns facts for the report: how many lines each file has, the vocabulary's size, and how good the IFT answers are.
  """
  folder = epath.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  form = templates.load_rubric(rubric)
  if (form.low, form.high) not in ((0, 5), (1, 5)):
    raise ValueError(
      f"judge.rubric={rubric} has scores {form.low:g} to {form.high:g}, but the tiny world's people give 0 to 5 or "
      "1 to 5: write one of these as its range, or take judge_tiny or judge_tiny_five_bucket."
    )
  streams = [np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(5)]
  text = pretraining(streams[0], sizes, form)
  storage.write(folder / "pretrain.jsonl", _json_lines(text))
  storage.write(folder / "tokenizer.model", train_tokenizer([value for line in text for value in line.values()]))
  trees = training_trees(streams[1], sizes)
  storage.write(folder / "trees.jsonl", _json_lines(trees))
  storage.write(folder / "heldout_trees.jsonl", _json_lines(heldout_trees(streams[2], sizes)))
  storage.write(folder / "judgements.jsonl", records.dumps(judgements(streams[3], sizes, form)))
  prompts = _distinct(streams[4], HELDOUT, sizes.heldout_prompts)
  storage.write(
    folder / "heldout_prompts.jsonl",
    records.dumps(
      records.Prompt(id=f"heldout-{number}", text=prompt, source="world") for number, prompt in enumerate(prompts)
    ),
  )
  return _facts(folder, trees)


def _facts(folder: epath.Path, trees: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """What `write_world` returns."""
  vocabulary = sentencepiece.SentencePieceProcessor(model_proto=(folder / "tokenizer.model").read_bytes())
  lines = {path.name: path.read_text().count("\n") for path in sorted(folder.glob("*.jsonl"))}
  roots = [tree["prompt"] for tree in trees if len(tree["prompt"]["replies"]) == 1]
  scores = [world.oracle(root["text"], root["replies"][0]["text"]) for root in roots]
  return {
    "lines": lines,
    "vocabulary": vocabulary.vocab_size(),
    "ift_mean": float(np.mean(scores)),
    "ift_perfect": float(np.mean(np.equal(scores, 5))),
  }
