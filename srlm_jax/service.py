"""An OpenAI-compatible HTTP service: where it is, how it is asked, and what its errors mean to a user."""

from collections.abc import Callable
import dataclasses
import importlib.util
import json
import logging
import os
import re
from typing import Any, TypeVar
import urllib.parse

import pydantic

KEY = "OPENAI_API_KEY"  # In the environment alone: a configuration is written down and shown.
SHORTEST_KEY = 8  # Words such as "none" and "EMPTY" stand where a server wants some key: they are no secrets.

# With more, these write headers and what a service makes of them into the log; requests are counted in ours.
_QUIET = dict.fromkeys(("httpx", "httpx2", "httpcore", "httpcore2"), logging.WARNING) | {"openai": logging.INFO}
_KEY_LIKE = re.compile(r"/(?:sk|pk|key|token)[-_=][\w-]{16,}", re.IGNORECASE)

# What services say of a prompt that their model cannot read whole.
_TOO_LONG = (
  "context_length_exceeded",
  "context length",
  "context size",
  "context window",
  "maximum model length",
  "prompt is too long",
)

Answer = TypeVar("Answer", bound=pydantic.BaseModel)


class TooLong(ValueError):
  """The prompt is longer than what the service's model can read."""


@dataclasses.dataclass(frozen=True)
class Service:
  """Where services are and how they are asked: fields of the configuration's sections `server` and `endpoint`.

  Attributes:
    url: of one service, or of several with commas between.
    model: its name there.
    concurrency: requests on their way at once.
    retries: of a request that got no answer, or status 408, 409, 429 or 5xx.
    timeout: seconds of one try.
    section: of the configuration, for messages.
  """

  url: str
  model: str
  concurrency: int
  retries: int
  timeout: float
  section: str = "server"

  def __post_init__(self) -> None:
    name = self.section
    if not importlib.util.find_spec("openai"):
      raise ValueError(f"{name}.url needs the package openai, which is not installed: pip install -e '.[server]'.")
    key = secret()
    if not all(map(_is_address, self.url.split(","))) or (key and key in self.url):
      raise ValueError(  # The address is not shown: it may hold a key or a password.
        f"{name}.url must be http://HOST:PORT or https://HOST/PATH, or several with commas between; a key goes into "
        f"{KEY}."
      )
    if self.concurrency < 1 or self.retries < 0 or self.timeout <= 0:
      found = f"{name}.concurrency={self.concurrency}, retries={self.retries}, timeout={self.timeout}"
      raise ValueError(f"{found}: they must be at least 1, at least 0, and above 0.")

  @property
  def urls(self) -> list[str]:
    """Each service's address; /v1 where no path is given."""
    given = [url.strip().rstrip("/") for url in self.url.split(",")]
    return [url if urllib.parse.urlsplit(url).path else f"{url}/v1" for url in given]

  def client(self, url: str, before: Callable[[], None] | None = None) -> Any:
    """An openai.OpenAI, which retries by itself. `before` is called before each try, and may wait."""
    import openai  # An extra, which nothing else needs.

    for name, level in _QUIET.items():
      logging.getLogger(name).setLevel(level)
    timeout = openai.Timeout(self.timeout, connect=min(self.timeout, 10.0))
    key = os.environ.get(KEY) or "none"
    http = openai.DefaultHttpxClient(event_hooks={"request": [lambda _: before()]}) if before else None
    return openai.OpenAI(base_url=url, api_key=key, max_retries=self.retries, timeout=timeout, http_client=http)

  def ask(self, url: str, call: Callable[[], Any], kind: type[Answer]) -> Answer:
    """What a raw call of a client brings; ValueError, which never shows the key, where that is of no use."""
    import openai

    name = self.section
    try:
      return kind.model_validate_json(call().content)
    except pydantic.ValidationError as error:
      first = error.errors()[0]
      raise wrong(url, f"{'.'.join(map(str, first['loc'])) or 'all of it'}: {first['msg']}") from None
    except openai.APIStatusError as error:
      said, remedy = error.message, "It will not take this another time either: see its log and its limits."
      if error.status_code in (400, 413, 422) and any(sign in f"{error.code} {said}".lower() for sign in _TOO_LONG):
        raise TooLong(f"{url}: {hidden(said)[:500]} Leave the prompt out.") from None
      if error.status_code in (401, 403):
        remedy = f"Give its key in the environment variable {KEY}."
      elif error.status_code in (408, 409, 429) or error.status_code >= 500:
        remedy = f"{name}.retries={self.retries} did not help: see its log, lower {name}.concurrency, and start again."
    except openai.APIConnectionError as error:
      said, remedy = error.message, f"{name}.retries={self.retries} did not help: is it there? And see {name}.timeout."
    raise ValueError(f"{url}: {hidden(said)[:500]} {remedy}")


def _is_address(url: str) -> bool:
  """Whether it can be asked, and shown: a name before the host may come with a password, a query with a key."""
  try:
    parts = urllib.parse.urlsplit(url.strip())
    known = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
  except ValueError:  # Of a port or an address in brackets.
    return False
  plain = url.isprintable() and " " not in url.strip()
  return known and plain and not ("@" in parts.netloc or parts.query or parts.fragment or _KEY_LIKE.search(parts.path))


def wrong(url: str, what: str) -> ValueError:
  """The error for an answer that arrived and is of no use; `what` may quote it."""
  return ValueError(f"{url} gave an answer that cannot be used: {hidden(what)[:500]}.")


def secret() -> str:
  """The key, or "" where there is none, or only a word in its place.

  Raises:
    ValueError: it holds what no key does; libraries would show the whole of it in their errors.
  """
  key = os.environ.get(KEY, "")
  if not (key.isascii() and key.isprintable()) or " " in key:
    raise ValueError(f"{KEY} holds a blank, a line break or a character beyond ASCII, as no key does: set it anew.")
  return key if len(key) >= SHORTEST_KEY else ""


def hidden(text: str) -> str:
  """A service's text without the key: it may repeat what it was sent, as it stands or quoted."""
  if key := secret():
    for spelling in {
      key,
      json.dumps(key)[1:-1],
      repr(key)[1:-1],
      urllib.parse.quote(key),
      urllib.parse.quote_plus(key),
    }:
      text = text.replace(spelling, "…")
  return text
