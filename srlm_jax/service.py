"""An OpenAI-compatible HTTP service: where it is, how it is asked, and what its errors mean to a user."""

from collections.abc import Callable
import dataclasses
import importlib.util
import os
from typing import Any, TypeVar
import urllib.parse

import pydantic

KEY = "OPENAI_API_KEY"  # In the environment alone: a configuration is written down and shown.
SHORTEST_KEY = 8  # Words such as "none" and "EMPTY" stand where a server wants some key: they are no secrets.

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
    for parts in map(urllib.parse.urlsplit, self.urls):
      # Not shown: a name before the host may come with a password, and a query with a key.
      if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc or parts.query:
        raise ValueError(
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


def wrong(url: str, what: str) -> ValueError:
  """The error for an answer that arrived and is of no use."""
  return ValueError(f"{url} gave an answer that cannot be used: {what}.")


def hidden(text: str) -> str:
  """A service's text without the key: it may repeat what it was sent."""
  key = os.environ.get(KEY, "")
  return text.replace(key, "…") if len(key) >= SHORTEST_KEY else text
