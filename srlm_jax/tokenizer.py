"""One tokenizer over SentencePiece and Hugging Face files: text to token ids and back, safely and always the same.

Special ids (begin, end, roles) come from us alone: untrusted text, an instruction or a response, never encodes to one,
even where it spells `</s>` or `<|eot_id|>` out.

Where a SentencePiece `tokenizer.model` is the whole vocabulary, SentencePiece itself encodes, be the file alone or in a
Hugging Face folder. transformers 5 would convert it into a slower tokenizer with other ids than the model was trained
on: it leaves out the space before the first word (the file alone), or splits runs of spaces, as in program code,
otherwise (a folder without tokenizer.json).

SentencePiece models like Llama 2's put a space before a text, so that "hello" is the piece "▁hello" wherever it stands;
decoding takes it off again. Texts therefore come back from `decode(encode(text))` unchanged, as far as the model has
pieces for their characters: Llama 2's has for all but "▁" itself, which comes back as a space. The way back from ids to
the same ids does not hold: a model may sample other pieces for the same text. So sampled ids travel, never re-encoded
text.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import hashlib
import re
import tempfile
from typing import Any

from etils import epath
import jinja2
import sentencepiece

from srlm_jax import storage

SENTENCEPIECE_FILE = "tokenizer.model"
# All files of a Hugging Face folder that a tokenizer is made of; any of the first two makes a folder one of them.
HUGGINGFACE_FILES = (
  "tokenizer.json",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "added_tokens.json",
  "vocab.json",
  "merges.txt",
  "chat_template.jinja",
  "chat_template.json",
  "generation_config.json",  # Which tokens end a text: not read here, and it goes where the tokenizer goes.
  SENTENCEPIECE_FILE,
)
# Where tokenizers, their versions and their settings differ: cases, digits, scripts, blanks, specials spelt out.
GOLDEN_TEXTS = (
  "Hello, world!",
  "it's 3.14159 and 2024 and 007",
  "naïve façade — “quotes” …",
  "你好，世界 🙂 привет",
  "first line\n\nsecond line\n",
  "  two  blanks\tand a tab ",
  "literal </s> and <s> and <unk> and <|eot_id|> are text",
  "[INST] neither this nor <response> is special [/INST]",
)

_SURROGATE = re.compile("[\ud800-\udfff]")
PADDING = 4096  # Rows of an embedding without a token, at the most: DeepSeek LLM, a Llama, has 2,385.

Batch = list[list[int]]


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
  """A tokenizer; made by `load`.

  Attributes:
    vocab_size: number of ids, special ones included; a model's embedding may have more rows.
    bos_id, eos_id: begin and end of a sequence.
    special_ids: ids that untrusted text never encodes to and that `decode` skips.
    files: name -> content of the files that it was made of.
    adds_space: whether encoding puts a space before the text.
    chat_template: renders messages, of user and assistant by turns, by the folder's own template as text, generation
      prompt included; None where there is no template.
  """

  vocab_size: int
  bos_id: int
  eos_id: int
  special_ids: frozenset[int]
  files: Mapping[str, bytes]
  adds_space: bool
  chat_template: Callable[..., str] | None
  _encode: Callable[[Sequence[str]], Batch]
  _encode_trusted: Callable[[str], list[int]]
  _decode: Callable[[list[int]], str]

  @functools.cached_property
  def digest(self) -> str:
    """sha256 (hexadecimal) over names and contents of all files: equal digests mean equal ids."""
    return _digest(self.files)

  def encode(self, text: str) -> list[int]:
    """The ids of untrusted text: no special ids, none put before or after it."""
    return self.encode_batch([text])[0]

  def encode_batch(self, texts: Sequence[str]) -> Batch:
    """`encode` of many texts at once, in parallel where the library can; ValueError for half a surrogate pair."""
    for text in texts:
      if half := _SURROGATE.search(text):
        raise ValueError(
          f"the text {text[:80]!r} holds half a surrogate pair, {half[0]!r}: no UTF-8 has it. Remove it."
        )
    batch = self._encode(texts) if texts else []
    for text, ids in zip(texts, batch, strict=True):
      if not self.special_ids.isdisjoint(ids):
        special = sorted(self.special_ids.intersection(ids))
        raise ValueError(
          f"the text {text[:80]!r} encodes to the special ids {special}: this tokenizer cannot keep them out of "
          "ordinary text. Mark their tokens as special in tokenizer.json, or use another tokenizer."
        )
    return batch

  def encode_trusted(self, text: str) -> list[int]:
    """The ids of our own text, a chat template's, in which a special token spelt out is that token."""
    return self._encode_trusted(text)

  def decode(self, ids: Sequence[int]) -> str:
    """The text of some ids; special ids, and rows of an embedding beyond the vocabulary, are skipped."""
    return self._decode([int(i) for i in ids if 0 <= i < self.vocab_size and i not in self.special_ids])

  def save(self, folder: epath.PathLike) -> None:
    """Copies all files into a folder (made where missing), so that `load(folder)` gives the same tokenizer."""
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in self.files.items():
      storage.write(folder / name, content)

  def golden(self) -> dict[str, Any]:
    """What `verify` compares later: sizes, special ids and the encodings of fixed texts, as JSON can hold them."""
    encodings = dict(zip(GOLDEN_TEXTS, self.encode_batch(GOLDEN_TEXTS), strict=True))
    return {"vocab_size": self.vocab_size, "bos_id": self.bos_id, "eos_id": self.eos_id, "encodings": encodings}


def verify(tokenizer: Tokenizer, golden: Mapping[str, Any]) -> None:
  """ValueError where a tokenizer does not encode as it did when `golden` was taken: another file or library version."""
  now = tokenizer.golden()
  for name in ("vocab_size", "bos_id", "eos_id"):
    if now[name] != golden[name]:
      raise ValueError(f"the tokenizer's {name} is {now[name]}, it was {golden[name]}: bring its own files back.")
  for text, ids in golden["encodings"].items():
    if (found := tokenizer.encode(text)) != list(ids):
      raise ValueError(
        f"the tokenizer encodes {text!r} as {found}, it was {list(ids)} when the model was made: bring its files back, "
        "or the versions of sentencepiece and transformers that it was made with."
      )


def check_rows(tokenizer: Tokenizer, rows: int) -> None:
  """ValueError where a model's embedding has fewer rows than the tokenizer tokens, or more than padding explains."""
  if not 0 <= rows - tokenizer.vocab_size <= PADDING:
    raise ValueError(
      f"the tokenizer has {tokenizer.vocab_size} tokens, the model's embedding {rows} rows: as many are wanted, or "
      f"up to {PADDING} more. A tokenizer of another model? Set config.tokenizer to the right one."
    )


def load(path: epath.PathLike) -> Tokenizer:
  """The tokenizer of a SentencePiece `.model` file, or of a folder that holds one or a Hugging Face tokenizer.

  Raises:
    ValueError: there is no tokenizer at the path, or it cannot be used here.
  """
  path = epath.Path(path)
  files = _files(path)
  if not files.keys().isdisjoint(HUGGINGFACE_FILES[:2]):
    return _huggingface(files, path)
  return dataclasses.replace(_sentencepiece(files[SENTENCEPIECE_FILE], path), files=files)


def digest_of(path: epath.PathLike) -> str:
  """The digest that the tokenizer at a path has once it is loaded; ValueError where there is none."""
  return _digest(_files(epath.Path(path)))


def _digest(files: Mapping[str, bytes]) -> str:
  parts = [f"{name} {hashlib.sha256(content).hexdigest()}\n" for name, content in sorted(files.items())]
  return hashlib.sha256("".join(parts).encode()).hexdigest()


def _files(path: epath.Path) -> dict[str, bytes]:
  """The files that a tokenizer at a path is made of; ValueError where there is none."""
  if path.is_file():
    if path.suffix != ".model":
      raise ValueError(
        f"{path} is no SentencePiece model (.model): name one, or the folder of a Hugging Face tokenizer."
      )
    return {SENTENCEPIECE_FILE: path.read_bytes()}
  files = {name: (path / name).read_bytes() for name in HUGGINGFACE_FILES if (path / name).exists()}
  if not files.keys().isdisjoint(HUGGINGFACE_FILES[:2]):
    return files
  if SENTENCEPIECE_FILE not in files:
    raise ValueError(f"no tokenizer at {path}: neither {SENTENCEPIECE_FILE} nor {HUGGINGFACE_FILES[0]} is there.")
  return {name: files[name] for name in (SENTENCEPIECE_FILE, "generation_config.json") if name in files}


def _check_ends(bos_id: int | None, eos_id: int | None, path: epath.Path) -> None:
  """ValueError where a tokenizer lacks a begin or an end token."""
  for name, value in (("begin (bos)", bos_id), ("end (eos)", eos_id)):
    if value is None or value < 0:
      raise ValueError(f"the tokenizer at {path} has no {name} token: every sequence here needs one. Use another one.")


def _sentencepiece(content: bytes, path: epath.Path) -> Tokenizer:
  """A tokenizer of a SentencePiece model; its control symbols are never matched in text, whatever the text spells."""
  if not content:
    raise ValueError(f"{path} is empty: fetch it again.")
  try:
    model = sentencepiece.SentencePieceProcessor(model_proto=content)
  except RuntimeError as error:
    raise ValueError(f"{path} is no SentencePiece model, or a broken one: fetch it again.") from error
  size = model.vocab_size()
  _check_ends(model.bos_id(), model.eos_id(), path)
  return Tokenizer(
    vocab_size=size,
    bos_id=model.bos_id(),
    eos_id=model.eos_id(),
    special_ids=frozenset(i for i in range(size) if model.is_control(i)),
    files={SENTENCEPIECE_FILE: content},
    adds_space=model.encode("a", out_type=str)[0].startswith("▁"),
    chat_template=None,
    _encode=lambda texts: model.encode(list(texts)),
    _encode_trusted=lambda text: model.encode(text),
    _decode=model.decode,
  )


def _pieces(files: Mapping[str, bytes]) -> sentencepiece.SentencePieceProcessor | None:
  """The SentencePiece model among the files, if there is one (some folders have tiktoken's format by that name)."""
  try:
    return sentencepiece.SentencePieceProcessor(model_proto=files[SENTENCEPIECE_FILE])
  except (KeyError, RuntimeError):
    return None


def _is_whole(model: sentencepiece.SentencePieceProcessor, words: Any, special: frozenset[int]) -> bool:
  """Whether SentencePiece encodes all that the fast tokenizer does, except special tokens, to the same ids."""
  size = model.vocab_size()
  same = words.convert_ids_to_tokens(list(range(size))) == [model.id_to_piece(i) for i in range(size)]
  hidden = all(i >= size or model.is_control(i) or model.is_unknown(i) for i in special)
  return same and hidden and all(i in special for i in range(size, len(words)))


def _huggingface(files: Mapping[str, bytes], path: epath.Path) -> Tokenizer:
  """A fast tokenizer of transformers from the files of a folder."""
  from transformers import AutoTokenizer  # Here, as its import takes seconds that SentencePiece users need not wait.

  with tempfile.TemporaryDirectory() as folder:  # The folder may be remote, and nothing else in it shall matter.
    for name, content in files.items():
      (epath.Path(folder) / name).write_bytes(content)
    try:
      # The length, which only warns, whatever the files say of it.
      how: dict[str, Any] = dict(local_files_only=True, model_max_length=2**30)
      words: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **how)
    except Exception as error:  # tokenizers raises Exception itself, transformers whatever a file leads to.
      said = str(error).replace(folder, str(path)).partition("\n")[0]
      raise ValueError(
        f"{path}: its tokenizer's files cannot be read ({type(error).__name__}: {said}). Fetch them again, or use "
        "another model: code that comes with a model is never run."
      ) from error
  pieces = _pieces(files)
  _check_huggingface(words, pieces, path)
  special = _special_ids(words)
  whole = pieces if pieces and _is_whole(pieces, words, special) else None

  def encode(texts: Sequence[str]) -> Batch:
    if whole:
      return whole.encode(list(texts))
    return words(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]

  def decode(ids: list[int]) -> str:
    if whole:
      return whole.decode(ids)
    return words.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

  def render(*messages: str) -> str:
    # Some templates show the date; a fixed one keeps the prompts of all stages alike.
    chat = [{"role": ("user", "assistant")[place % 2], "content": one} for place, one in enumerate(messages)]
    try:
      return words.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, date_string="26 Jul 2024")
    except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError) as error:
      raise ValueError(
        f"the chat template at {path} fails ({type(error).__name__}: {error}): choose chat 'llama2' or "
        "'plain', or mend it."
      ) from error

  return Tokenizer(
    vocab_size=len(words),
    bos_id=words.bos_token_id,
    eos_id=words.eos_token_id,
    special_ids=special,
    files=files,
    adds_space=words.convert_ids_to_tokens(encode(["a"])[0])[0].startswith("▁"),
    chat_template=render if words.chat_template else None,
    _encode=encode,
    _encode_trusted=lambda text: words(text, add_special_tokens=False, split_special_tokens=False)["input_ids"],
    _decode=decode,
  )


def _special_ids(words: Any) -> frozenset[int]:
  """The ids of all special tokens; added tokens that the chat template spells out are made special, if they are not."""
  from tokenizers import AddedToken

  template = str(words.chat_template or "")
  roles = [t.content for t in words.added_tokens_decoder.values() if not t.special and t.content.strip() in template]
  words.add_tokens([AddedToken(role, special=True, normalized=False) for role in roles if role.strip()], True)
  special = {i for i, token in words.added_tokens_decoder.items() if token.special} | set(words.all_special_ids)
  if words.unk_token_id not in (words.bos_token_id, words.eos_token_id):
    special.discard(words.unk_token_id)  # It stands for unknown characters of ordinary text.
  return frozenset(special)


def _check_huggingface(words: Any, pieces: sentencepiece.SentencePieceProcessor | None, path: epath.Path) -> None:
  """ValueError where transformers made something else of a folder than what its model was trained with."""
  if not words.is_fast:
    raise ValueError(f"{path} has no fast tokenizer: write its tokenizer.json with transformers first.")
  if pieces and len(words) < pieces.vocab_size():  # transformers 5 reads some folders as a tokenizer of three tokens.
    raise ValueError(
      f"transformers reads {len(words)} tokens of the {pieces.vocab_size()} in {path / SENTENCEPIECE_FILE}: add the "
      f"folder's tokenizer.json, or keep {SENTENCEPIECE_FILE} alone, without tokenizer_config.json."
    )
  _check_ends(words.bos_token_id, words.eos_token_id, path)
