"""Instructions as prompt tokens: the chat template around them, the same function for training and for generation.

A chat prompt is made of parts that are encoded apart: the template's are trusted and may hold special tokens, the
instruction is not and cannot bring any in, nor a `[INST]` of its own (`templates.neutralise_chat`). Prompt and response
are encoded apart, too, so the prompt's tokens do not depend on what follows.

What the parts join to is what the whole would have been encoded to, wherever tokenizers break at spaces: a space at the
end of a part goes to the part behind it (" hello" is one piece), and a part that goes on without one gets none from
SentencePiece. A response is encoded by itself, so SentencePiece puts its space before it, in all templates alike.

Llama 2 Chat is best served by "llama2": transformers 5 encodes the "[" behind the begin token of the model's own
template without the space (29961) with which Meta's code trained it (518).
"""

import functools

from srlm_jax import templates
from srlm_jax.tokenizer import Tokenizer

KINDS = ("llama2", "model", "plain")
_MESSAGE = "Srlm7Message7Placeholder"  # Letters that no template changes or has of its own.


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
  text = templates.neutralise_chat(prompt).strip()
  if kind == "llama2":
    return [tokenizer.bos_id, *_around(tokenizer, "[INST] ", text, " [/INST]")]
  if kind == "plain":
    return [tokenizer.bos_id, *_around(tokenizer, "", text, "\n")]
  if kind == "model":
    before, after = _own_template(tokenizer)
    return _around(tokenizer, before, text, after)
  raise ValueError(f"unknown chat template {kind!r}: choose one of {', '.join(KINDS)}.")


@functools.lru_cache(maxsize=4)
def _own_template(tokenizer: Tokenizer) -> tuple[str, str]:
  """What the folder's template has before the message, and what it has behind it."""
  if tokenizer.chat_template is None:
    raise ValueError(
      "chat kind 'model': the tokenizer has no chat template; choose 'llama2' or 'plain', or add the file."
    )
  rendered = tokenizer.chat_template(_MESSAGE)
  if (count := rendered.count(_MESSAGE)) != 1:
    raise ValueError(
      f"chat kind 'model': the chat template shows the user's message {count} times, once is needed. "
      "Choose 'llama2' or 'plain', or mend the template."
    )
  before, after = rendered.split(_MESSAGE)
  return before, after


def _around(tokenizer: Tokenizer, before: str, text: str, after: str) -> list[int]:
  """Ids of the trusted `before`, the untrusted `text` and the trusted `after`."""
  if before.endswith(" "):
    before, text = before[:-1], " " + text
  return [
    *tokenizer.encode_trusted(before),
    *going_on(tokenizer, text, trusted=False, first=not before),
    *going_on(tokenizer, after, trusted=True),
  ]


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
