"""What several test files share: a tokenizer and a model so small that compiling it is the only cost, and a mesh."""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
import io
import tempfile

from etils import epath
import jax
import sentencepiece

from srlm_jax import generator, llama, mesh, rollout, sampling, tokenizer as tokenizer_lib
from srlm_jax.tokenizer import Tokenizer

TEXT = (
  "Review the response, five points.\nUser: Name a bird.\n<response> A crow.</response>",
  "It is fine.\nScore: 4",
  "The quick brown fox jumps over the lazy dog. Say owl twice: owl owl. Count to 5: 0 1 2 3 4 5.",
)


@functools.cache
def words(vocab_size: int = 320) -> Tokenizer:
  """A SentencePiece tokenizer like Llama 2's, unknown characters as bytes; another size is another tokenizer."""
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(TEXT * 20),
    model_writer=model,
    vocab_size=vocab_size,
    model_type="bpe",
    byte_fallback=True,
    split_digits=True,
    normalization_rule_name="identity",
    remove_extra_whitespaces=False,
    minloglevel=2,
  )
  with tempfile.TemporaryDirectory() as folder:
    path = epath.Path(folder) / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return tokenizer_lib.load(path)


CONFIG = llama.LlamaConfig(
  vocab_size=320, embed=16, layers=2, heads=2, kv_heads=2, head_dim=8, ffw=32, max_length=128, tied=True
)


def model(seed: int = 0, **changes: object) -> llama.Llama:
  """Random weights, sharper than the usual ones, so that texts differ and log-probs are not all alike."""
  fresh = llama.Llama(dataclasses.replace(CONFIG, **changes), jax.random.key(seed))
  return jax.tree.map(lambda leaf: leaf * 4, fresh)


def one_device() -> jax.sharding.Mesh:
  """A mesh of the first device alone: it compiles faster than one of eight."""
  return mesh.make_mesh(devices=jax.devices()[:1])


def eight_devices() -> jax.sharding.Mesh:
  """All of them, divided in each way."""
  return mesh.make_mesh(data=2, fsdp=2, tensor=2)


Script = Callable[[str, int], str | None]  # (prompt, sample) → what is written; None: cut off by the length limit.


@dataclasses.dataclass(frozen=True)
class _Engine:
  """Says what a script says, in place of a model."""

  script: "Script"
  asked: list[str]
  max_prompt: int

  def generate(
    self, requests: Sequence[generator.Request]
  ) -> Iterator[tuple[generator.Request, list[generator.Completion]]]:
    """Last request first: nobody may rely on the order."""
    encode, eos = words().encode, words().eos_id
    for request in reversed(requests):
      assert len(request.tokens) <= self.max_prompt
      prompt = words().decode(request.tokens)
      self.asked.append(prompt)
      texts = [self.script(prompt, sample) for sample in range(request.samples)]
      cut = tuple(encode("[[A]] at first sight.\nScore: 5"))
      whole = [None if text is None else (*encode(text), eos) for text in texts]
      yield request, [generator.Completion(cut if ids is None else ids, ids is not None) for ids in whole]


@dataclasses.dataclass(frozen=True)
class Actor(rollout.Speaker):
  """A speaker who says what its script says; `asked` collects the prompts."""

  asked: list[str]


def actor(script: Script, max_length: int = 400, chat_kind: str = "llama2") -> Actor:
  """A speaker without a model."""
  asked: list[str] = []
  return Actor(lambda how, limit: _Engine(script, asked, limit), words(), chat_kind, max_length, asked)


def speaker(weights: llama.Llama, rows: int = 8, seed: int = 0, max_length: int = 128) -> rollout.Speaker:
  """A speaker with a model."""

  def engine(how: sampling.Sampling, limit: int) -> generator.Generator:
    return generator.Generator(weights, words().eos_id, how, rows, limit, seed, words().decode)

  return rollout.Speaker(engine, words(), "llama2", max_length)
