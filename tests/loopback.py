"""A server on the loopback device, for what talks to an OpenAI-compatible service."""

from collections.abc import Callable, Mapping, Sequence
import http.server
import json
import threading
from typing import Any

Reply = tuple[int, dict[str, str], Any]  # Status, headers, and the body: JSON, or bytes as they are.


class Loopback(http.server.ThreadingHTTPServer):
  """Answers /v1/models with `models` and `path` by `reply`; `asked` has each request's body and headers."""

  daemon_threads = True

  def __init__(
    self, reply: Callable[[dict[str, Any]], Reply], models: Sequence[str] = ("m1",), path: str = "/v1/completions"
  ) -> None:
    self.reply, self.models, self.path = reply, list(models), path
    self.asked: list[tuple[dict[str, Any], Mapping[str, str]]] = []
    super().__init__(("127.0.0.1", 0), Handler)
    self.url = f"http://127.0.0.1:{self.server_port}"
    threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()


class Handler(http.server.BaseHTTPRequestHandler):
  server: Loopback

  def do_GET(self) -> None:
    assert self.path == "/v1/models"
    self.send((200, {}, {"object": "list", "data": [{"id": name, "object": "model"} for name in self.server.models]}))

  def do_POST(self) -> None:
    assert self.path == self.server.path
    body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
    self.server.asked.append((body, self.headers))
    self.send(self.server.reply(body))

  def send(self, reply: Reply) -> None:
    status, headers, body = reply
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    self.send_response(status)
    for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
      self.send_header(name, value)
    self.end_headers()
    self.wfile.write(data)

  def log_message(self, *_: object) -> None:
    pass


def chat(text: str | None, finish: str = "stop", **changes: Any) -> Reply:
  """What an endpoint answers to /v1/chat/completions: 100 tokens in, 7 out."""
  message = {"role": "assistant", "content": text}
  choice = {"index": 0, "message": message, "finish_reason": finish, "logprobs": None}
  usage = {"prompt_tokens": 100, "completion_tokens": 7, "total_tokens": 107}
  body = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "judge-1", "choices": [choice]}
  return 200, {}, body | {"usage": usage} | changes
