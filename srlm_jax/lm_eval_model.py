"""A model here as a language model of lm-eval, which asks for log-likelihoods of texts and for continuations.

lm-eval's own backend for Hugging Face is the measure: contexts and continuations are divided, cut and scored as it does
it, so that equal weights and token ids give equal figures. What differs is safety: a document that spells a special
token out does not get it.

In several processes each runs lm-eval from end to end, as rank 0 of 1, and makes the same requests: the model's part of
the work is one program over all devices, and all get the same answers.
"""

import collections
from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import hashlib
from typing import Any

import jax
from lm_eval import utils as lm_eval_utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models import utils as model_utils
import numpy as np

from srlm_jax import batching, chat, distributed, generator, llama, logprobs, mesh as mesh_lib, sampling
from srlm_jax.tokenizer import Tokenizer

CHOICES = 4  # Continuations of a row.
MAX_NEW = 256  # Tokens of a continuation whose task says nothing of its length, as in lm-eval's own backends.
KNOWN = {"until", "max_gen_toks", "do_sample", "temperature", "top_p"}  # Arguments of generation, by lm-eval's names.

Scored = tuple[float, bool]  # The log-likelihood of a continuation, and whether greedy decoding would give it.
Tokens = list[int]
Arrays = list[np.ndarray]


def sampling_of(arguments: Mapping[str, Any]) -> sampling.Sampling:
  """How a task wants its continuations; ValueError for an argument of generation that our sampler does not have."""
  given = model_utils.normalize_gen_kwargs(dict(arguments), MAX_NEW)
  if unknown := sorted(set(given) - KNOWN):
    raise ValueError(
      f"a task asks for continuations with {', '.join(f'{name}={given[name]!r}' for name in unknown)}: only "
      f"{', '.join(sorted(KNOWN))} are known here. Take them out of the task's generation_kwargs."
    )
  temperature = float(given.get("temperature", 0.0)) if given["do_sample"] else 0.0
  stop = tuple(dict.fromkeys(string for string in given["until"] if string))
  return sampling.Sampling(temperature, float(given.get("top_p", 1.0)), given["max_gen_toks"], stop)


@dataclasses.dataclass(frozen=True)
class Row:
  """Continuations that differ in their last token alone, and so go through the model together.

  Attributes:
    tokens: the text and the continuation without its last token.
    start: where the continuation begins.
    lasts: the last tokens, each with the number of its request.
  """

  tokens: tuple[int, ...]
  start: int
  lasts: tuple[tuple[int, int], ...]


def rows_of(texts: Sequence[tuple[Tokens, int]]) -> list[Row]:
  """The rows of texts, each with the place where its continuation begins; up to CHOICES of them share one."""
  groups: dict[tuple[tuple[int, ...], int], list[tuple[int, int]]] = {}
  for index, (tokens, start) in enumerate(texts):
    groups.setdefault((tuple(tokens[:-1]), start), []).append((tokens[-1], index))
  return [
    Row(tokens, start, tuple(lasts[first : first + CHOICES]))
    for (tokens, start), lasts in groups.items()
    for first in range(0, len(lasts), CHOICES)
  ]


def batches(rows: Sequence[Row], size: int, longest: int) -> Iterator[tuple[list[Row], Arrays]]:
  """The rows in batches of few static shapes, with the arrays of the scoring program; absent rows are padding.

  Those that need most memory come first.

  Args:
    rows: of up to `longest` tokens.
    size: rows of a batch.
    longest: tokens that go through the model at the most.
  """
  buckets: dict[int, list[Row]] = {}
  sizes = batching.doubling_buckets(32, longest)
  for row in rows:
    buckets.setdefault(batching.bucket(len(row.tokens), sizes), []).append(row)
  for length, alike in sorted(buckets.items(), reverse=True):
    for first in range(0, len(alike), size):
      part = alike[first : first + size]
      starts, lengths = np.ones(size, np.int32), np.zeros(size, np.int32)
      starts[: len(part)] = [row.start for row in part]
      lengths[: len(part)] = [len(row.tokens) for row in part]
      lasts = batching.pad([[last for last, _ in row.lasts] for row in part], CHOICES, size)
      yield part, [batching.pad([row.tokens for row in part], length, size), starts, lengths, lasts]


class LlamaLM(TemplateLM):
  """What lm-eval calls; give it to `lm_eval.simple_evaluate(model=...)`.

  With a chat template (`apply_chat_template=True`, and fewshot_as_multiturn=False, as training is on single turns) what
  lm-eval asks is put around by the model's own one, and answers are encoded by themselves, both as in training.
  """

  def __init__(
    self,
    model: llama.Llama,
    words: Tokenizer,
    mesh: jax.sharding.Mesh,
    *,
    chat_kind: str = "llama2",
    rows: int = 64,
    max_length: int | None = None,
    chunk: int = 512,
    add_bos: bool = True,
    seed: int = 0,
  ) -> None:
    """Wraps a model.

    Args:
      model: without dropout, on `mesh`.
      words: its tokenizer.
      mesh: the devices.
      chat_kind: the template that `apply_chat_template` puts around a prompt, see chat.chat_tokens.
      rows: texts that go through the model at once, rounded up to fill the devices.
      max_length: longest text in tokens; by default the model's own limit.
      chunk: see logprobs.next_token_logprobs.
      add_bos: whether texts begin with the begin token, as Llama's tokenizers have it.
      seed: of tasks that draw.
    """
    super().__init__()
    ways = mesh.size // mesh.shape["tensor"]
    self.model, self.words, self.mesh, self.chat_kind = model, words, mesh, chat_kind
    self.rows, self.chunk, self.add_bos, self.seed = -(-rows // ways) * ways, chunk, add_bos, seed
    self.max_length = max_length or model.config.max_length
    self._chats: dict[str, tuple[int, ...]] = {}  # Prompts in the chat template: as lm-eval carries them → tokens.

  @property
  def eot_token_id(self) -> int:
    """The end token."""
    return self.words.eos_id

  @property
  def prefix_token_id(self) -> int:
    """What stands before a text that has no context: the begin token."""
    return self.words.bos_id

  @property
  def tokenizer_name(self) -> str:
    """Tokenizer and chat template, for lm-eval's caches."""
    return f"srlm_jax-{self.words.digest[:16]}-{self.chat_kind}"

  def chat_template(self, chat_template: bool | str = False) -> str | None:
    """The name of the template that `apply_chat_template` takes, None where none is asked for."""
    return f"srlm_jax {self.chat_kind}" if chat_template else None

  def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
    """One prompt in the chat template, as text; its tokens are kept, as they do not come back from the text.

    Args:
      chat_history: a user's message, maybe behind a system's, which is then put before it.
      add_generation_prompt: must be True.

    Raises:
      ValueError: several turns, or an answer that is begun already.
    """
    before = [message["content"] for message in chat_history if message["role"] == "system"]
    turns = [message for message in chat_history if message["role"] != "system"]
    if [message["role"] for message in turns] != ["user"] or not add_generation_prompt:
      roles = ", ".join(message["role"] for message in chat_history)
      raise ValueError(
        f"a chat of the turns {roles}: here a prompt is one message of the user, as in training. Give lm-eval "
        "fewshot_as_multiturn=False; a task with a gen_prefix goes without the chat template alone."
      )
    tokens = chat.chat_tokens(self.words, "\n\n".join([*before, turns[0]["content"]]), self.chat_kind)
    text = self.words.decode(tokens)
    self._chats[text] = tuple(tokens)
    return text

  def tok_encode(
    self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **_: Any
  ) -> Tokens:
    """Token ids of a text, which is untrusted: only the begin token before it is special.

    Args:
      string: the text, or a prompt from `apply_chat_template`.
      add_special_tokens: whether the begin token comes first; None: as `add_bos` says.
      left_truncate_len: keeps so many tokens, the last ones.
    """
    ids = list(self._chats.get(string, ()))
    if not ids:
      begin = self.add_bos if add_special_tokens is None else add_special_tokens
      ids = [*([self.words.bos_id] if begin else []), *self.words.encode(string)]
    return ids[-left_truncate_len:] if left_truncate_len else ids

  def _encode_pair(self, context: str, continuation: str) -> tuple[Tokens, Tokens]:
    """Context and continuation; behind a chat prompt the latter is encoded by itself, as a response in training is."""
    if context in self._chats:
      return list(self._chats[context]), self.words.encode(continuation.removeprefix(" "))
    return super()._encode_pair(context, continuation)

  def _text(self, context: Tokens, continuation: Tokens) -> tuple[Tokens, int]:
    """A text of max_length + 1 tokens at the most, cut on the left, and where its continuation begins."""
    if not 0 < len(continuation) <= self.max_length:
      raise ValueError(
        f"a continuation of {len(continuation)} tokens, {self.words.decode(continuation)[:80]!r}: it needs one at the "
        f"least, and {self.max_length} at the most. Take the document out of the task, or raise model.max_length."
      )
    tokens = [*(context or [self.prefix_token_id]), *continuation][-(self.max_length + 1) :]
    return tokens, len(tokens) - len(continuation)

  def _loglikelihood_tokens(
    self, requests: Sequence[tuple[tuple[str, str] | None, Tokens, Tokens]], disable_tqdm: bool = False, **more: Any
  ) -> list[Scored]:
    """The log-likelihood of each continuation after its context, and whether greedy decoding gives it.

    Args:
      requests: what to remember the answer by (None: not at all), the context's tokens and the continuation's.
      disable_tqdm: there is no progress bar here.
      more: what other backends take.
    """
    rows = rows_of([self._text(context, continuation) for _, context, continuation in requests])
    sharding = jax.sharding.NamedSharding(self.mesh, mesh_lib.spec(("batch",)))
    found: dict[int, Scored] = {}

    def read(part: list[Row], scored: tuple[jax.Array, jax.Array]) -> None:
      sums, greedy = jax.device_get(distributed.whole(scored))
      for number, row in enumerate(part):
        for place, (_, index) in enumerate(row.lasts):
          found[index] = float(sums[number, place]), bool(greedy[number, place])
      distributed.progress(f"log-likelihood {len(found)} of {len(requests)}")

    with jax.set_mesh(self.mesh):
      pending: tuple[list[Row], tuple[jax.Array, jax.Array]] | None = None
      for part, arrays in batches(rows, self.rows, self.max_length):
        placed = distributed.place(arrays, sharding)
        scored = logprobs.continuation_scores(self.model, *placed, chunk=self.chunk)
        if pending is not None:  # One batch late, so that the device never waits for the host.
          read(*pending)
        pending = part, scored
      if pending is not None:
        read(*pending)
    answers = [found[index] for index in range(len(requests))]
    for (key, _, _), answer in zip(requests, answers, strict=True):
      if key is not None:
        self.cache_hook.add_partial("loglikelihood", key, answer)
    return answers

  def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
    """The log-likelihood of each whole text, in windows of max_length tokens, each token predicted once.

    The text's own begin token is among those predicted, as in lm-eval's backend for Hugging Face.
    """
    windows: list[tuple[None, Tokens, Tokens]] = []
    owners: list[int] = []
    for index, request in enumerate(requests):
      (text,) = request.args
      pairs = lm_eval_utils.get_rolling_token_windows(
        token_list=self.tok_encode(text), prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
      )
      windows += [(None, *lm_eval_utils.make_disjoint_window(pair)) for pair in pairs]
      owners += [index] * (len(windows) - len(owners))
    totals = [0.0] * len(requests)
    for index, (likelihood, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
      totals[index] += likelihood
    for request, total in zip(requests, totals, strict=True):
      self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
    return totals

  def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
    """A continuation of each prompt, up to a stop string, the end token or the longest that its task allows.

    A prompt that leaves no room for it is cut on the left, as in lm-eval's backend for Hugging Face. ValueError where
    the longest continuation leaves no room for any prompt.
    """
    groups: dict[sampling.Sampling, list[int]] = {}
    for index, request in enumerate(requests):
      groups.setdefault(sampling_of(request.args[1]), []).append(index)
    texts: dict[int, str] = {}
    for how, indices in groups.items():
      contexts = [requests[index].args[0] for index in indices]
      texts.update(zip(indices, self._continuations(contexts, how), strict=True))
    for index, request in enumerate(requests):
      self.cache_hook.add_partial("generate_until", request.args, texts[index])
    return [texts[index] for index in range(len(requests))]

  def _continuations(self, contexts: Sequence[str], how: sampling.Sampling) -> list[str]:
    """The texts behind prompts, all asked for in one way, without the stop strings that end them."""
    limit = self.max_length - how.max_new
    if limit < 1:
      raise ValueError(
        f"a task asks for continuations of up to {how.max_new} tokens, and prompt and continuation have "
        f"{self.max_length}: lower max_gen_toks in the task's generation_kwargs, or raise model.max_length."
      )
    asked, seen = [], collections.Counter[str]()
    for context in contexts:
      tokens = tuple(self.tok_encode(context)[-limit:]) or (self.prefix_token_id,)
      digest = hashlib.sha256(np.asarray(tokens, np.int32).tobytes()).hexdigest()[:16]
      asked.append(generator.Request(f"lm-eval {digest} {seen[digest]}", tokens, 1))  # Repeats are other draws.
      seen[digest] += 1
    engine = generator.Generator(
      self.model, self.words.eos_id, how, self.rows, limit, self.seed, decode=self.words.decode
    )
    with jax.set_mesh(self.mesh):
      drawn = {request.name: completions[0].tokens for request, completions in engine.generate(asked)}
    return [
      model_utils.postprocess_generated_text(self.words.decode(drawn[request.name]), list(how.stop), None)
      for request in asked
    ]
