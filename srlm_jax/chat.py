"""Instructions as prompt tokens: the chat template around them, the same function for training and for generation.

A chat prompt is made of parts that are encoded apart: the template's are trusted and may hold special tokens, the
instruction is not and cannot bring any in, nor a `[INST]` of its own (`templates.neutralise_chat`), nor what a template
writes in brackets as ordinary text (`<|user|>` in some models' templates). Labels such as "USER:" it can write: prefer
a template with special tokens. Prompt and response are encoded apart, too, so the prompt's tokens do not depend on what
follows.

What the parts join to is what the whole would have been encoded to, wherever tokenizers break at spaces: a space at the
end of a part goes to the part behind it (" hello" is one piece), and a part that goes on without one gets none from
SentencePiece. A response is encoded by itself, so SentencePiece puts its space before it, in all templates alike.

Llama 2 Chat is best served by "llama2": transformers 5 encodes the "[" behind the begin token of the model's own
template without the space (29961) with which Meta's code trained it (518).
"""

from collections.abc import Sequence
import functools
import re

from srlm_jax import templates
from srlm_jax.tokenizer import Tokenizer

KINDS = ("llama2", "model", "plain")
_MARK = re.compile(r"<[^<>\[\]\n]{1,64}>|\[[^<>\[\]\n]{1,64}\]")
_MESSAGE = "Srlm7Message{}Placeholder"  # Letters that no template changes or has of its own.


def chat_tokens(tokenizer: Tokenizer, prompt: str, kind: str) -> list[int]:
  """The prompt's tokens, ready for a response to follow.

  Args:
    tokenizer: the model's.
    prompt: an instruction, or a filled judge prompt; untrusted. White space around it is left out, as in Llama 2's
      template.
    kind: "llama2": begin token, `[INST] prompt [/INST]`. "model": the chat template in the tokenizer's folder, with a
      begin token only where the template has one. "plain": begin token, the prompt, a new line; for base models.

  Raises:
    ValueError: an unknown kind, or "model" without a template that shows the message exactly once.
  """
  return conversation_tokens(tokenizer, [prompt], kind)


def conversation_tokens(tokenizer: Tokenizer, turns: Sequence[str], kind: str) -> list[int]:
  """The tokens of several turns, ready for the next response to follow; of one turn, those of `chat_tokens`.

  Args:
    tokenizer: the model's.
    turns: messages of user and assistant by turns, the first and the last the user's; all of them untrusted.
    kind: as in `chat_tokens`. "llama2" is Meta's form, `[INST] a [/INST] b </s><s>[INST] c [/INST]`; in "plain" each
      exchange is what one is in training, begin and end token included.

  Raises:
    ValueError: as `chat_tokens`, or an even number of turns.
  """
  if len(turns) % 2 == 0:
    raise ValueError(f"{len(turns)} turns: the first and the last must be the user's. Leave out the last answer.")
  texts = [templates.neutralise_chat(turn).strip() for turn in turns]
  if kind == "model":
    parts = _own_template(tokenizer, len(texts))
    return _spliced(tokenizer, parts, [templates.neutralise_marks(text, _marks(tokenizer, parts)) for text in texts])
  if kind not in KINDS:
    raise ValueError(f"unknown chat template {kind!r}: choose one of {', '.join(KINDS)}.")
  ids = []
  for place, text in enumerate(texts):
    if place % 2 == 0:
      before, after = ("[INST] ", " [/INST]") if kind == "llama2" else ("", "\n")
      ids += [tokenizer.bos_id, *_spliced(tokenizer, (before, after), [text])]
    else:
      answer = going_on(tokenizer, f" {text} ", trusted=False) if kind == "llama2" else tokenizer.encode(text)
      ids += [*answer, tokenizer.eos_id]
  return ids


@functools.lru_cache(maxsize=16)
def _own_template(tokenizer: Tokenizer, count: int) -> tuple[str, ...]:
  """What the folder's template has before, between and behind so many messages."""
  if tokenizer.chat_template is None:
    raise ValueError(
      "chat kind 'model': the tokenizer has no chat template; choose 'llama2' or 'plain', or add the file."
    )
  messages = [_MESSAGE.format(place) for place in range(count)]
  rest, parts = tokenizer.chat_template(*messages), []
  for place, message in enumerate(messages):
    who = "the user's message" if count == 1 else f"message {place + 1} of {count}"
    if (times := rest.count(message)) != 1:
      raise ValueError(
        f"chat kind 'model': the chat template shows {who} {times} times, once is needed, in their order. "
        "Choose 'llama2' or 'plain', or mend the template."
      )
    before, rest = rest.split(message)
    parts.append(before)
  return (*parts, rest)


@functools.lru_cache(maxsize=16)
def _marks(tokenizer: Tokenizer, parts: tuple[str, ...]) -> tuple[str, ...]:
  """What the template has in brackets as ordinary text: encoding alone would not keep it out of a message."""
  found = dict.fromkeys(mark for part in parts for mark in _MARK.findall(part))
  return tuple(mark for mark in found if tokenizer.special_ids.isdisjoint(tokenizer.encode_trusted(mark)))


def _spliced(tokenizer: Tokenizer, trusted: Sequence[str], texts: Sequence[str]) -> list[int]:
  """Ids of trusted and untrusted texts by turns; of the trusted ones there is one more."""
  ids: list[int] = []
  for before, text in zip(trusted, texts, strict=False):
    first = not ids
    if before.endswith(" "):
      before, text = before[:-1], " " + text
    ids += tokenizer.encode_trusted(before) if first else going_on(tokenizer, before, trusted=True)
    ids += going_on(tokenizer, text, trusted=False, first=first and not before)
  return [*ids, *going_on(tokenizer, trusted[-1], trusted=True)]


def going_on(tokenizer: Tokenizer, text: str, trusted: bool, first: bool = False) -> list[int]:
  """Ids of a text that stands behind another one, or is the `first` one: only then the tokenizer may add a space."""
  encode = tokenizer.encode_trusted if trusted else tokenizer.encode
  if first or not tokenizer.adds_space:
    return encode(text)
  if text.startswith(" "):
    return encode(text[1:])  # The space that the tokenizer adds is this one.
  line = encode("\n")  # A token that nothing merges with: behind it no space is added.
  both = encode("\n" + text)
  return both[len(line) :] if both[: len(line)] == line else encode(text)
