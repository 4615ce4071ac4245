"""A judge behind an OpenAI-compatible endpoint: asked over chat completions, paid for once, with every reply kept.

Replies are kept in an SQLite file as they come, by what was asked: address, model, sampling, messages and the number of
the sample. A run that was stopped, or judges the same texts again, takes them from there. Each has a digest: one that a
disk has changed is never taken for what was answered. The key is read from the environment (`service.KEY`) and written
nowhere.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent import futures
import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import logging
import sqlite3
import threading
import time
from typing import Any

from etils import epath
import pydantic

from srlm_jax import distributed, rollout, sampling, service as service_lib, templates

logger = logging.getLogger(__name__)

FILE = "replies.sqlite3"  # In the cache's folder.
_FIELDS = "text, finished, tokens_in, tokens_out"  # Of a reply as it is kept.
# What SQLite says where the disk fails, by its primary code, and what the disk itself would have said.
_OF_THE_DISK = {
  sqlite3.SQLITE_FULL: errno.ENOSPC,
  sqlite3.SQLITE_IOERR: errno.EIO,
  sqlite3.SQLITE_READONLY: errno.EROFS,
}
LIMITS = ("max_tokens", "max_completion_tokens")  # How endpoints call the longest reply.


class _Message(pydantic.BaseModel):
  content: str | None = None  # Null where the model refuses, or thought until the limit.


class _Choice(pydantic.BaseModel):
  message: _Message
  finish_reason: str | None = None


class _Tokens(pydantic.BaseModel):
  prompt_tokens: int
  completion_tokens: int


class _Answer(pydantic.BaseModel):
  """What is read of an answer of /v1/chat/completions."""

  choices: list[_Choice]
  usage: _Tokens | None = None


@dataclasses.dataclass(frozen=True)
class Terms:
  """How an endpoint is asked, and what it takes for it: the configuration's section `endpoint`, which says more.

  Attributes:
    service: where it is; one address, and a model's name there.
    requests_per_minute: of this process, tries included; 0 for no limit.
    price_in, price_out: of a million tokens of prompts and of replies, in whatever currency.
    limit: how it calls the longest reply.
  """

  service: service_lib.Service
  requests_per_minute: float
  price_in: float
  price_out: float
  limit: str

  def __post_init__(self) -> None:
    if len(self.service.urls) != 1:
      raise ValueError("endpoint.url names several addresses: one judge decides, so give one.")
    if not self.service.model:
      raise ValueError("endpoint.model is not set: give --config.endpoint.model=NAME, as the endpoint calls it.")
    for name in ("requests_per_minute", "price_in", "price_out"):
      if getattr(self, name) < 0:
        raise ValueError(f"endpoint.{name}={getattr(self, name)} must not be negative; 0 stands for none.")
    if self.limit not in LIMITS:
      raise ValueError(f"endpoint.limit={self.limit!r} must be one of {', '.join(LIMITS)}.")

  @property
  def url(self) -> str:
    """The endpoint's address."""
    return self.service.urls[0]

  @property
  def name(self) -> str:
    """Who answers, in words."""
    return f"{self.service.model} at {self.url}"


def terms(section: Mapping[str, Any]) -> Terms:
  """The Terms of the configuration's section `endpoint`; ValueError for what cannot be used."""
  asked = {name: section[name] for name in ("url", "model", "concurrency", "retries", "timeout")}
  priced = {name: section[name] for name in ("requests_per_minute", "price_in", "price_out", "limit")}
  return Terms(service_lib.Service(**asked, section="endpoint"), **priced)


@dataclasses.dataclass(frozen=True)
class Kept:
  """A reply as it is kept; the token counts are None where the endpoint gave none."""

  text: str
  finished: bool
  tokens_in: int | None
  tokens_out: int | None

  def digest(self, key: str) -> str:
    """sha256 (hexadecimal) over the reply and what it answers."""
    fields = json.dumps([key, *dataclasses.astuple(self)], default=repr)  # A damaged file may give bytes, say.
    return hashlib.sha256(fields.encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Cache:
  """Replies in an SQLite file, which threads and processes may read and write at once."""

  path: epath.Path

  @contextlib.contextmanager
  def _open(self) -> Iterator[sqlite3.Connection]:
    """A connection for one thing to do, committed at its end.

    Raises:
      OSError: the disk is full, read-only or broken.
      ValueError: the file cannot be used.
    """
    try:
      with contextlib.closing(sqlite3.connect(self.path, timeout=60)) as connection, connection:
        connection.text_factory = lambda data: data.decode(errors="replace")  # The digest says whether it is whole.
        yield connection
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:  # The names in it are text, too.
      if number := _OF_THE_DISK.get(getattr(error, "sqlite_errorcode", 0) & 0xFF):
        raise OSError(number, str(error), str(self.path)) from error
      if isinstance(error, sqlite3.OperationalError) and error.sqlite_errorname != "SQLITE_ERROR":
        raise ValueError(
          f"{self.path} cannot be read or written ({error}): endpoint.cache must be a folder of a local disk with room."
        ) from error
      raise ValueError(
        f"{self.path} is damaged ({error}): move it away, and the endpoint is asked, and paid, again; or bring back a "
        "copy of it."
      ) from error

  def prepare(self) -> None:
    """Makes the file where it is missing, and checks it."""
    try:
      self.path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise ValueError(
        f"endpoint.cache: {self.path.parent} cannot be made ({error}). Name a folder that can be written."
      ) from error
    with self._open() as connection:
      connection.execute(
        "CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, model TEXT NOT NULL, text TEXT NOT NULL, "
        "finished INTEGER NOT NULL, tokens_in INTEGER, tokens_out INTEGER, made TEXT NOT NULL, digest TEXT)"
      )
      [found] = connection.execute("PRAGMA quick_check(1)").fetchone()
      if found != "ok":
        raise sqlite3.DatabaseError(" ".join(found.split()))
      connection.execute("BEGIN IMMEDIATE")  # Another process may find the older file, too.
      if "digest" not in [column[1] for column in connection.execute("PRAGMA table_info(replies)")]:
        connection.execute("ALTER TABLE replies ADD COLUMN digest TEXT")
        rows = connection.execute(f"SELECT key, {_FIELDS} FROM replies").fetchall()
        digests = [(Kept(row[1], bool(row[2]), *row[3:]).digest(row[0]), row[0]) for row in rows]
        connection.executemany("UPDATE replies SET digest = ? WHERE key = ?", digests)

  def get(self, keys: Iterable[str]) -> dict[str, Kept]:
    """What is kept of these keys; ValueError where a reply is not what was kept."""
    found = {}
    with self._open() as connection:
      for key in keys:
        row = connection.execute(f"SELECT {_FIELDS}, digest FROM replies WHERE key = ?", (key,)).fetchone()
        if row:
          found[key] = Kept(row[0], bool(row[1]), row[2], row[3])
          if found[key].digest(key) != row[4]:
            raise ValueError(
              f"{self.path}: a kept reply is damaged, its SHA-256 is not the recorded one (key {key}). Bring back a "
              "copy of the file, or delete this one, and it is asked, and paid, again: "
              f"sqlite3 {self.path} \"DELETE FROM replies WHERE key = '{key}'\""
            )
    return found

  def put(self, key: str, model: str, reply: Kept) -> None:
    """Keeps a reply; where another process was first, its reply stays."""
    made = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    with self._open() as connection:
      connection.execute(
        "INSERT OR IGNORE INTO replies (key, model, made, digest, text, finished, tokens_in, tokens_out) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (key, model, made, reply.digest(key), *dataclasses.astuple(reply)),
      )


@dataclasses.dataclass(frozen=True)
class Usage:
  """What some replies took.

  Attributes:
    replies: their number, those not in the cache left out.
    tokens_in, tokens_out: of their prompts and of themselves, as the endpoint counted.
    uncounted: replies without such a count, which the others leave out.
    cost: by the prices of the configuration.
  """

  replies: int
  tokens_in: int
  tokens_out: int
  uncounted: int
  cost: float


class _Pace:
  """Lets so many callers a minute pass, at even distances."""

  def __init__(self, per_minute: float) -> None:
    self.distance = 60 / per_minute if per_minute else 0.0
    self.lock, self.next = threading.Lock(), 0.0

  def wait(self) -> None:
    with self.lock:
      now = time.monotonic()
      mine = max(now, self.next)
      self.next = mine + self.distance
    time.sleep(mine - now)


@dataclasses.dataclass(frozen=True)
class Endpoint:
  """A model behind an endpoint as a `rollout.Judge`. Made by `connect`.

  Each sample is a request of its own: not all endpoints write several texts at once.
  """

  terms: Terms
  cache: Cache
  pace: _Pace = dataclasses.field(repr=False)

  def ask(self, questions: Sequence[rollout.Question], how: sampling.Sampling) -> list[list[rollout.Reply]]:
    """The replies to each question, from the cache or from the endpoint (see `rollout.Judge`).

    Raises:
      ValueError: the endpoint cannot be asked, or its answer cannot be used. What came before is kept.
    """
    if how.stop:
      raise ValueError(f"stop strings {how.stop}: an endpoint leaves them out of its texts. Leave sampling.stop empty.")
    keys = [self._keys(question, how) for question in questions]
    turns = {key: one.turns for one, own in zip(questions, keys, strict=True) for key in own}
    found: dict[str, Kept | None] = {**self.cache.get(turns)}
    missing = {key: text for key, text in turns.items() if key not in found}
    if missing:
      found |= self._asked(missing, how)
    fresh = [reply for key in missing if (reply := found[key])]
    taken, spent = len(turns) - len(missing), self._usage(fresh)
    logger.info(
      "%s: %d replies, %d of them from %s; %d asked for: %d tokens in, %d out, cost %.4f",
      *(self.terms.name, taken + len(fresh), taken, self.cache.path, spent.replies),
      *(spent.tokens_in, spent.tokens_out, spent.cost),
    )
    if spent.uncounted:
      logger.warning("%s gave %d replies without token counts: they cost more", self.terms.name, spent.uncounted)
    return [
      [rollout.Reply(reply.text, reply.finished) for key in own if (reply := found[key])]
      if all(found[key] for key in own)
      else []
      for own in keys
    ]

  def usage(self, questions: Sequence[rollout.Question], how: sampling.Sampling) -> Usage:
    """What the kept replies to these questions took, whenever they were paid."""
    return self._usage(self.cache.get({key for one in questions for key in self._keys(one, how)}).values())

  def _usage(self, replies: Iterable[Kept]) -> Usage:
    kept = list(replies)
    tokens_in, tokens_out = sum(one.tokens_in or 0 for one in kept), sum(one.tokens_out or 0 for one in kept)
    cost = (tokens_in * self.terms.price_in + tokens_out * self.terms.price_out) / 1e6
    return Usage(len(kept), tokens_in, tokens_out, sum(reply.tokens_in is None for reply in kept), cost)

  def _keys(self, question: rollout.Question, how: sampling.Sampling) -> list[str]:
    """The keys of a question's samples; of the greedy text there is one."""
    asked = [self.terms.url, self.terms.service.model, dataclasses.asdict(how), _messages(question.turns)]
    numbers = [0 if how.temperature == 0 else sample for sample in range(question.samples)]
    return [hashlib.sha256(json.dumps([*asked, number]).encode()).hexdigest() for number in numbers]

  def _asked(self, missing: Mapping[str, tuple[str, ...]], how: sampling.Sampling) -> dict[str, Kept | None]:
    """Asks for what is missing, by key, and keeps each reply as it comes; None where a question is too long."""
    found: dict[str, Kept | None] = {}
    service = self.terms.service
    pool = futures.ThreadPoolExecutor(service.concurrency)
    with service.client(self.terms.url, self.pace.wait) as client:
      asked = {pool.submit(self._one, client, key, turns, how): key for key, turns in missing.items()}
      try:
        for future in futures.as_completed(asked):
          found[asked[future]] = future.result()
          distributed.progress(f"{self.terms.name}: {len(found)} of {len(missing)}")
      finally:
        if waiting := sum(future.running() for future in asked):
          logger.warning("%s: waiting for %d replies that are on their way, and kept", self.terms.name, waiting)
        pool.shutdown(wait=True, cancel_futures=True)  # What is on its way is paid for.
    return found

  def _one(self, client: Any, key: str, turns: Sequence[str], how: sampling.Sampling) -> Kept | None:
    """Asks for one reply and keeps it."""
    options = {self.terms.limit: how.max_new} | ({"top_p": how.top_p} if how.top_p < 1 else {})
    call = functools.partial(
      client.chat.completions.with_raw_response.create,
      model=self.terms.service.model,
      messages=_messages(turns),
      temperature=how.temperature,
      **options,
    )
    try:
      answer = self.terms.service.ask(self.terms.url, call, _Answer)
    except service_lib.TooLong as error:
      logger.info("%s", error)
      return None
    reply = self._read(answer)
    self.cache.put(key, self.terms.service.model, reply)
    return reply

  def _read(self, answer: _Answer) -> Kept:
    """The reply of an answer; one that a filter of the endpoint stopped has not ended by itself."""
    if len(answer.choices) != 1:
      raise service_lib.wrong(self.terms.url, f"{len(answer.choices)} choices where 1 was asked for")
    [choice] = answer.choices
    if choice.finish_reason not in ("stop", "length", "content_filter"):
      raise service_lib.wrong(self.terms.url, f"finish_reason {choice.finish_reason!r}")
    usage = answer.usage
    return Kept(
      text=service_lib.hidden(choice.message.content or ""),
      finished=choice.finish_reason == "stop",
      tokens_in=usage.prompt_tokens if usage else None,
      tokens_out=usage.completion_tokens if usage else None,
    )


def _messages(turns: Sequence[str]) -> list[dict[str, str]]:
  """The turns as the endpoint is sent them: it may read special tokens in them, which are not theirs to bring in."""
  roles = ("user", "assistant")
  return [
    {"role": roles[place % 2], "content": templates.neutralise_specials(text)} for place, text in enumerate(turns)
  ]


def check_local(folder: epath.Path) -> None:
  """ValueError where a cache's folder is not on a disk of this machine."""
  if "://" in str(folder):
    raise ValueError(
      f"endpoint.cache: {folder} is remote, and an SQLite file needs a local disk: give --config.endpoint.cache=FOLDER."
    )


def connect(how: Terms, folder: epath.Path) -> Endpoint:
  """An endpoint with its cache in a folder, which is made where it is missing; ValueError where the cache is no use."""
  check_local(folder)
  cache = Cache(folder / FILE)
  cache.prepare()
  return Endpoint(how, cache, _Pace(how.requests_per_minute))
