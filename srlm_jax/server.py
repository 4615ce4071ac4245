"""Rollouts from an OpenAI-compatible HTTP server, such as vLLM, that serves a model of the run.

A prompt goes out as token ids, so that no template and no special token is put around it a second time, and the sampled
ids come back where the server gives them, as vLLM does for `return_token_ids`. The server draws with generators of its
own: its texts are not those of `generator`, and the seed repeats them only as far as its arithmetic is the same again.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
import dataclasses
import functools
import logging
import shlex
from typing import Any

import numpy as np
import pydantic

from srlm_jax import chat, distributed, sampling as sampling_lib
from srlm_jax.generator import Completion, Request, row_key
from srlm_jax.service import Service, hidden, wrong
from srlm_jax.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


class _Choice(pydantic.BaseModel):
  index: int
  text: str
  finish_reason: str
  stop_reason: int | str | None = None  # This and the ids are vLLM's.
  token_ids: list[int] | None = None
  prompt_token_ids: list[int] | None = None


class _Answer(pydantic.BaseModel):
  """What is read of an answer: `data` of /v1/models, `choices` of /v1/completions."""

  data: list[dict[str, Any]] = []
  choices: list[_Choice] = []


@dataclasses.dataclass(frozen=True)
class Server:
  """Asks one served model for many continuations, in place of a `generator.Generator`. Made by `connect`.

  Attributes:
    service, url, model: how it is asked, where it is, and its name there.
    words, vocab_size: the model's tokenizer, and the rows of its embedding.
    sampling: temperature, top-p and the longest continuation.
    max_prompt: longest prompt in tokens, for the caller to hold.
    seed: of all draws.
    counts: is added to: "texts", and those of them "without_ids".
  """

  service: Service
  url: str
  model: str
  words: Tokenizer
  vocab_size: int
  sampling: sampling_lib.Sampling
  max_prompt: int
  seed: int
  counts: Counter[str]

  def generate(self, requests: Sequence[Request]) -> Iterator[tuple[Request, list[Completion]]]:
    """Yields each request with its completions, as they come; ValueError at the first that cannot be had."""
    warned = self.counts["without_ids"] > 0
    client, pool = self.service.client(self.url), futures.ThreadPoolExecutor(self.service.concurrency)
    asked = {pool.submit(self._ask, client, request): request for request in requests}
    try:
      for future in futures.as_completed(asked):
        completions, counts = future.result()
        self.counts.update(counts)
        distributed.progress(f"generation: {asked[future].name}")
        yield asked[future], completions
    finally:
      if waiting := sum(future.running() for future in asked):
        logger.warning(
          "%s: %d requests are still on their way; ending waits for them, at most %g s",
          self.url,
          waiting,
          self.service.timeout,
        )
      pool.shutdown(wait=False, cancel_futures=True)  # After an error what is on its way is of no use.
      client.close()
    if self.counts["without_ids"] and not warned:
      logger.warning(
        "%s gave %d of %d texts without token ids: they are encoded again, and DPO trains on ids that were not sampled",
        *(self.url, self.counts["without_ids"], self.counts["texts"]),
      )

  def option_probs(self, requests: Sequence[Request], options: Sequence[int]) -> Iterator[tuple[Request, np.ndarray]]:
    """ValueError: a server shows the probabilities of the likeliest tokens alone."""
    raise ValueError("a server does not give the probabilities of all scores: judge.method='sampled' needs none.")

  def _ask(self, client: Any, request: Request) -> tuple[list[Completion], Counter[str]]:
    """The completions of a request, and what they add to the counts."""
    how = self.sampling
    limits = [min(limit, how.max_new) for limit in request.longest or [how.max_new] * request.samples]
    count = 1 if how.temperature == 0 else request.samples  # vLLM refuses to write the one greedy text several times.
    extra = {"return_token_ids": True, "stop_token_ids": [self.words.eos_id]}
    extra |= {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}  # Or generation_config.json would say.
    stop = {"stop": list(how.stop), "include_stop_str_in_output": True} if how.stop else {}
    call = functools.partial(
      client.completions.with_raw_response.create,
      model=self.model,
      prompt=list(request.tokens),
      n=count,
      temperature=how.temperature,
      top_p=how.top_p,
      max_tokens=max(limits),
      seed=int(row_key(self.seed, request.name, 0)[0]) >> 1,  # 31 bits; vLLM adds the sample's number.
      extra_body=extra | stop,
    )
    choices = sorted(self.service.ask(self.url, call, _Answer).choices, key=lambda choice: choice.index)
    if [choice.index for choice in choices] != list(range(count)):
      raise wrong(self.url, f"{len(choices)} choices where {count} were asked for")
    without_ids = sum(choice.token_ids is None for choice in choices)
    if without_ids not in (0, count):
      raise wrong(self.url, f"{without_ids} of {count} choices without token_ids")
    texts = [self._ids(choice, request, max(limits)) for choice in choices] * (request.samples // count)
    counts = Counter(texts=len(texts), without_ids=len(texts) if without_ids else 0)
    return [self._cut(ids[:limit]) for ids, limit in zip(texts, limits, strict=True)], counts

  def _cut(self, ids: list[int]) -> Completion:
    """A text that ends, as our own sampler's does, with the end token or the token that completes a stop string."""

    def stopped(count: int) -> bool:
      text = self.words.decode(ids[:count])
      return any(string in text for string in self.sampling.stop)

    if self.sampling.stop and stopped(len(ids)):
      return Completion(tuple(ids[: next(filter(stopped, range(1, len(ids) + 1)))]), True)
    return Completion(tuple(ids), ids[-1:] == [self.words.eos_id])

  def _ids(self, choice: _Choice, request: Request, longest: int) -> list[int]:
    """The sampled ids of a choice; of a text that ended by itself with the end token, which not all servers give."""
    eos, ids, ended = self.words.eos_id, choice.token_ids, choice.finish_reason == "stop"
    at_string = isinstance(choice.stop_reason, str)
    if hidden(choice.text) != choice.text:
      raise wrong(self.url, "a text repeats the key that it was sent")
    if choice.finish_reason not in ("stop", "length"):
      raise wrong(self.url, f"finish_reason {choice.finish_reason!r}")
    if ids is None:
      return [*chat.going_on(self.words, choice.text, trusted=False), *([eos] if ended and not at_string else [])]
    if choice.prompt_token_ids not in (None, list(request.tokens)):
      raise wrong(self.url, f"the prompt that it continued is not the one that it was sent, {request.name!r}")
    if ended and not at_string and ids[-1:] != [eos]:
      if isinstance(choice.stop_reason, int) and choice.stop_reason != eos:  # One that our own sampler goes on behind.
        remedy = f"leave {eos} alone as eos_token_id in config.json and generation_config.json of the served folder"
        raise wrong(self.url, f"a text ended with {choice.stop_reason}, the end token is {eos}; {remedy}")
      ids = [*ids, eos]
    if eos in ids[:-1] or not all(0 <= token < self.vocab_size for token in ids):
      raise wrong(self.url, f"token_ids behind the end token {eos}, or outside 0 … {self.vocab_size - 1}")
    if not ended and ids[-1:] != [eos] and len(ids) < longest:
      remedy = "raise --max-model-len, and start it with --generation-config vllm"
      raise wrong(self.url, f"a text was cut after {len(ids)} tokens, {longest} were asked for; {remedy}")
    return ids


def serve_command(folder: str, name: str) -> str:
  """Starts vLLM on an exported model, without defaults of sampling from its folder."""
  return f"vllm serve {shlex.quote(folder)} --served-model-name {name} --generation-config vllm"


def connect(
  service: Service, wanted: str, words: Tokenizer, vocab_size: int, seed: int
) -> Callable[[sampling_lib.Sampling, int], Server]:
  """Looks for the server of a model; gives what makes a Server of sampling parameters and the longest prompt.

  `wanted` is the name that says which weights answer (`modelstore.served_name`); service.model goes before it.
  ValueError where no server has it, with what they serve and the commands that start one.
  """
  name, counts, found = service.model or wanted, Counter[str](), []
  if service.model:
    logger.warning("server.model=%s answers for %s: nothing shows that it is the same model", service.model, wanted)
  for url in service.urls:
    try:
      with service.client(url) as client:
        served = [str(one.get("id")) for one in service.ask(url, client.models.with_raw_response.list, _Answer).data]
    except ValueError as error:
      found.append(f"  {error}\n")
      continue
    if name in served:
      return lambda how, limit: Server(service, url, name, words, vocab_size, how, limit, seed, counts)
    found.append(f"  {url} serves {hidden(', '.join(served)) or 'nothing'}\n")
  export = f"srlm export --config=… --workdir=… --model={wanted.rpartition('-')[0]} --out=FOLDER"
  raise ValueError(
    f"no server of server.url serves {name}:\n{''.join(found)}Two commands start one:\n"
    f"  {export}\n  {serve_command('FOLDER', wanted)}"
  )
