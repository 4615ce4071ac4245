"""A Google Cloud Storage of our own on the loopback: its JSON API as gcsfs, tensorstore and Google's client use it.

As in the real one, an object appears whole or not at all, listings are always up to date, there are no folders and
nothing can be renamed: that is a copy and a deletion. `Store.faults` makes requests fail, take long, or break off
half-way.
"""

import base64
from collections import Counter
from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import email
import hashlib
from http import server
import json
import re
import socket
import sys
import threading
import time
from typing import Any
from urllib import parse


@dataclasses.dataclass
class Fault:
  """What happens to matching requests.

  Attributes:
    operation: "insert", "get", "stat", "list", "delete" or "copy".
    name: a pattern that the object's name must contain.
    times: how many requests it happens to; it is counted down.
    status: an error of the store.
    torn: the connection breaks off half-way: in what is sent here, or in what is sent back.
    seconds: the request takes so long, and then goes well.
  """

  operation: str
  name: str = ""
  times: float = 1
  status: int = 0
  torn: bool = False
  seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Blob:
  """One object."""

  data: bytes
  generation: int
  kind: str
  made: float

  def paper(self, bucket: str, name: str) -> dict[str, Any]:
    """Its resource, as the JSON API shows it."""
    import google_crc32c  # Here, as only the extra gcs has it.

    stamp = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(self.made))
    return {
      "kind": "storage#object",
      "bucket": bucket,
      "name": name,
      "id": f"{bucket}/{name}/{self.generation}",
      "size": str(len(self.data)),
      "generation": str(self.generation),
      "metageneration": "1",
      "contentType": self.kind,
      "timeCreated": stamp,
      "updated": stamp,
      "md5Hash": base64.b64encode(hashlib.md5(self.data).digest()).decode(),
      "crc32c": base64.b64encode(google_crc32c.value(self.data).to_bytes(4, "big")).decode(),
      "etag": str(self.generation),
    }


class Store:
  """The buckets, made as they are named, and what shall go wrong."""

  def __init__(self) -> None:
    self.weather = 0  # Every so manieth request fails, and as many break off.
    self.blobs: dict[tuple[str, str], Blob] = {}
    self.faults: list[Fault] = []
    self.counts: Counter[str] = Counter()
    self.uploads: dict[str, tuple[str, str, dict[str, str], str, bytearray]] = {}
    self.lock = threading.RLock()
    self._generation = 1000

  def put(self, bucket: str, name: str, data: bytes, kind: str = "application/octet-stream") -> Blob:
    """Makes an object appear, whole."""
    with self.lock:
      self._generation += 1
      blob = self.blobs[bucket, name] = Blob(data, self._generation, kind, time.time())
      return blob

  def clear(self) -> None:
    """As new."""
    with self.lock:
      self.weather = 0
      self.blobs.clear()
      self.faults.clear()
      self.counts.clear()

  def names(self, bucket: str, prefix: str = "") -> list[str]:
    """Of all objects."""
    with self.lock:
      return sorted(name for place, name in self.blobs if place == bucket and name.startswith(prefix))

  def fault(self, operation: str, name: str) -> Fault | None:
    """What is to go wrong with this request."""
    with self.lock:
      self.counts[operation] += 1
      if self.weather and (number := self.counts.total() % self.weather) in (1, self.weather // 2 + 1):
        torn = number == 1 and operation in ("insert", "get")
        return Fault(operation, torn=torn, status=0 if torn else 503)
      for fault in self.faults:
        if fault.operation == operation and re.search(fault.name, name) and fault.times > 0:
          fault.times -= 1
          return fault
    return None


class _Torn(Exception):
  """The connection is to break off."""


class _Handler(server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"
  store: Store

  def log_message(self, *_: object) -> None:
    """Nothing: a test's output is its own."""

  def setup(self) -> None:
    """Answers go out at once."""
    super().setup()
    self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

  def handle_one(self) -> None:
    """Any request."""
    url = parse.urlsplit(self.path)
    self.query = {key: values[0] for key, values in parse.parse_qs(url.query, keep_blank_values=True).items()}
    parts = [parse.unquote(part) for part in url.path.strip("/").split("/")]
    try:
      self._route(parts)
    except _Torn:
      self.close_connection = True
      self.connection.shutdown(socket.SHUT_RDWR)

  do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = handle_one

  def _body(self, torn: bool = False) -> bytes:
    if self.headers.get("Transfer-Encoding") == "chunked":
      pieces = []
      while size := int(self.rfile.readline(), 16):
        pieces.append(self.rfile.read(size))
        self.rfile.readline()
      self.rfile.readline()
      return b"".join(pieces)
    length = int(self.headers.get("Content-Length") or 0)
    if torn:
      self.rfile.read(length // 2)
      raise _Torn
    return self.rfile.read(length)

  def _answer(self, status: int, data: bytes = b"", torn: bool = False, **headers: str) -> None:
    self.send_response(status)
    for key, value in headers.items():
      self.send_header(key.replace("_", "-"), value)
    self.send_header("Content-Length", str(len(data)))
    self.end_headers()
    self.wfile.write(data[: len(data) // 2] if torn else data)
    if torn:
      self.wfile.flush()
      raise _Torn

  def _json(self, content: Any, status: int = 200, **headers: str) -> None:
    self._answer(status, json.dumps(content).encode(), Content_Type="application/json; charset=UTF-8", **headers)

  def _error(self, status: int, message: str) -> None:
    self._json({"error": {"code": status, "message": message, "errors": [{"message": message}]}}, status)

  def _route(self, parts: list[str]) -> None:
    if parts[:1] == ["batch"]:
      self._batch()
    elif parts[:1] == ["upload"]:
      self._upload(parts[4])
    elif parts[:1] in (["storage"], ["download"]):
      parts = parts[parts.index("b") + 1 :]
      if len(parts) == 1:
        self._json({"kind": "storage#bucket", "name": parts[0], "id": parts[0], "location": "HERE"})
      elif len(parts) == 2:
        self._list(parts[0])
      elif len(parts) == 8:
        self._copy(parts)
      elif len(parts) > 3:  # moveTo is for buckets with real folders.
        self._body()
        self._error(400, "this bucket has no folders: nothing can be moved")
      else:
        self._object(parts[0], parts[2])
    else:
      self._error(404, f"no such address: {self.path}")

  def _trouble(self, operation: str, name: str) -> Fault | None:
    """The fault of this request, if any; one that is an error has been answered already, and is then gone through."""
    fault = self.store.fault(operation, name)
    if fault and fault.seconds:
      time.sleep(fault.seconds)
    if fault and fault.status:
      self._body()
      self._error(fault.status, "a fault")
    return fault

  def _unwanted(self, blob: Blob | None, query: dict[str, str]) -> bool:
    """Whether a precondition on the generation does not hold."""
    now = blob.generation if blob else 0
    if "ifGenerationMatch" in query and int(query["ifGenerationMatch"]) != now:
      return True
    return "ifGenerationNotMatch" in query and int(query["ifGenerationNotMatch"]) == now

  def _upload(self, bucket: str) -> None:
    if "upload_id" in self.query:
      self._resume(self.query["upload_id"])
      return
    name = self.query.get("name", "")
    fault = self._trouble("insert", name or self.query["uploadType"]) if name else None
    if fault and fault.status:
      return
    body, kind = self._body(torn=bool(fault and fault.torn)), self.headers.get("Content-Type", "")
    if self.query["uploadType"] == "resumable":
      name = name or json.loads(body)["name"]
      key = f"upload-{len(self.store.uploads)}"
      self.store.uploads[key] = bucket, name, self.query, self.headers.get("X-Upload-Content-Type") or "", bytearray()
      address = f"http://{self.headers['Host']}/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={key}"
      self._answer(200, Location=address)
      return
    if self.query["uploadType"] == "multipart":
      boundary = b"--" + re.search(r'boundary="?([^";]+)', kind)[1].encode()
      _, paper, media = re.split(rb"(?:^|\r?\n)" + re.escape(boundary) + rb"(?:--)?", body)[:3]  # The real one, too.
      name = json.loads(re.split(rb"\r?\n\r?\n", paper, maxsplit=1)[1])["name"]
      head, body = re.split(rb"\r?\n\r?\n", media, maxsplit=1)
      kind = email.message_from_bytes(head.strip()).get_content_type()
      fault = self._trouble_late(name)
      if fault:
        return
    self._insert(bucket, name, body, kind, self.query)

  def _trouble_late(self, name: str) -> Fault | None:
    """As `_trouble`, where the name was in the body."""
    fault = self.store.fault("insert", name)
    if fault and fault.torn:
      raise _Torn
    if fault and fault.seconds:
      time.sleep(fault.seconds)
    if fault and fault.status:
      self._error(fault.status, "a fault")
      return fault
    return None

  def _insert(self, bucket: str, name: str, data: bytes, kind: str, query: dict[str, str]) -> None:
    with self.store.lock:
      if self._unwanted(self.store.blobs.get((bucket, name)), query):
        self._error(412, "precondition")
        return
      paper = self.store.put(bucket, name, data, kind).paper(bucket, name)
    self._json(paper)

  def _resume(self, key: str) -> None:
    bucket, name, query, kind, data = self.store.uploads[key]
    if self.command == "DELETE":
      self._answer(499)
      return
    if self._trouble_of_part(name):
      return
    piece, place = self._body(), self.headers.get("Content-Range", "")
    where = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", place)
    if where:
      del data[int(where[1]) :]
    data += piece
    whole = where is None or (where[3] != "*" and len(data) == int(where[3]))
    if place == "bytes */*" or not whole:
      self._answer(308, Range=f"bytes=0-{len(data) - 1}")
    else:
      self._insert(bucket, name, bytes(data), kind, query)

  def _trouble_of_part(self, name: str) -> bool:
    fault = self._trouble("insert", name)
    if fault and fault.torn:
      self._body(torn=True)
    return bool(fault and fault.status)

  def _list(self, bucket: str) -> None:
    prefix, delimiter = self.query.get("prefix", ""), self.query.get("delimiter", "")
    fault = self._trouble("list", prefix)
    if fault and fault.status:
      return
    self._body()
    items, prefixes = [], []
    with self.store.lock:
      for name in self.store.names(bucket, prefix):
        cut = name.find(delimiter, len(prefix)) if delimiter else -1
        if cut >= 0 and not (self.query.get("includeTrailingDelimiter") and cut == len(name) - 1):
          prefixes.append(name[: cut + len(delimiter)])
        else:
          items.append(self.store.blobs[bucket, name].paper(bucket, name))
    low, high = self.query.get("startOffset", ""), self.query.get("endOffset", "")
    entries = [("items", item["name"], item) for item in items]
    entries += [("prefixes", name, name) for name in dict.fromkeys(prefixes)]
    entries = sorted(
      (one for one in entries if low <= one[1] and (not high or one[1] < high)), key=lambda one: (one[1], one[0])
    )
    start, size = int(self.query.get("pageToken", "0")), int(self.query.get("maxResults", "1000"))
    page: dict[str, Any] = {"kind": "storage#objects"}
    for kind, _, entry in entries[start : start + size]:
      page.setdefault(kind, []).append(entry)
    if start + size < len(entries):
      page["nextPageToken"] = str(start + size)
    self._json(page)

  def _object(self, bucket: str, name: str) -> None:
    media = self.query.get("alt") == "media"
    operation = {"GET": "get" if media else "stat", "DELETE": "delete"}.get(self.command, "stat")
    fault = self._trouble(operation, name)
    if fault and fault.status:
      return
    self._body()
    with self.store.lock:
      blob = self.store.blobs.get((bucket, name))
      wanted = self.query.get("generation")
      if blob is None or (wanted and int(wanted) != blob.generation):
        self._error(404, f"No such object: {bucket}/{name}")
        return
      if self._unwanted(blob, self.query):
        if "ifGenerationNotMatch" in self.query:
          self._answer(304)  # Such an answer has no body.
        else:
          self._error(412, "precondition")
        return
      if operation == "delete":
        del self.store.blobs[bucket, name]
    if operation == "delete":
      self._answer(204)
    elif media:
      self._media(blob, torn=bool(fault and fault.torn))
    else:
      self._json(blob.paper(bucket, name))

  def _media(self, blob: Blob, torn: bool) -> None:
    paper, size = blob.paper("", ""), len(blob.data)
    headers = {
      "Content_Type": blob.kind or "application/octet-stream",
      "X_Goog_Generation": str(blob.generation),
      "X_Goog_Hash": f"crc32c={paper['crc32c']},md5={paper['md5Hash']}",
    }
    where = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
    if not where:
      self._answer(200, blob.data, torn, **headers)
      return
    first = int(where[1]) if where[1] else max(size - int(where[2]), 0)
    last = min(int(where[2]) if where[1] and where[2] else size - 1, size - 1)
    if first >= size or first > last:
      self._answer(416, Content_Range=f"bytes */{size}")
      return
    self._answer(206, blob.data[first : last + 1], torn, Content_Range=f"bytes {first}-{last}/{size}", **headers)

  def _copy(self, parts: list[str]) -> None:
    """BUCKET o NAME rewriteTo (or copyTo) b BUCKET o NAME."""
    bucket, name, how, there, target = parts[0], parts[2], parts[3], parts[5], parts[7]
    fault = self._trouble("copy", target)
    if fault and fault.status:
      return
    self._body()
    with self.store.lock:
      blob = self.store.blobs.get((bucket, name))
      if blob is None:
        self._error(404, f"No such object: {bucket}/{name}")
        return
      paper = self.store.put(there, target, blob.data, blob.kind).paper(there, target)
    size = str(len(blob.data))
    done = {"kind": "storage#rewriteResponse", "done": True, "objectSize": size, "totalBytesRewritten": size}
    self._json({**done, "resource": paper} if how == "rewriteTo" else paper)

  def _batch(self) -> None:
    """Deletions in a bundle."""
    answers = []
    for line in self._body().decode().splitlines():
      found = re.match(r"DELETE (\S+) HTTP", line)
      if found:
        parts = [parse.unquote(part) for part in parse.urlsplit(found[1]).path.strip("/").split("/")]
        place = parts[parts.index("b") + 1], parts[-1]
        fault = self.store.fault("delete", place[1])
        with self.store.lock:
          status = fault.status if fault else 204 if self.store.blobs.pop(place, None) else 404
        text = json.dumps({"error": {"code": status, "message": "deletion"}}) if status != 204 else ""
        answers.append(f"\r\nContent-Type: application/http\r\n\r\nHTTP/1.1 {status} X\r\n\r\n{text}\r\n")
    body = "--end" + "--end".join(answers) + "--end--"
    self._answer(200, body.encode(), Content_Type="multipart/mixed; boundary=end")


class _Server(server.ThreadingHTTPServer):
  daemon_threads = True
  request_queue_size = 128

  def handle_error(self, request: Any, client_address: Any) -> None:
    """A client that has left is no error of the store's."""
    if not isinstance(sys.exc_info()[1], ConnectionError):
      super().handle_error(request, client_address)


@contextlib.contextmanager
def serving(set_environment: Callable[[str, str], None]) -> Iterator[Store]:
  """A store that every client in this process, and in those that it starts, takes for Google's.

  `set_environment` gets the names and values of the environment variables that make them do so.
  """
  store = Store()
  http = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"store": store}))
  address = f"http://127.0.0.1:{http.server_address[1]}"
  settings = {
    "STORAGE_EMULATOR_HOST": address,  # gcsfs and google-cloud-storage.
    "TENSORSTORE_GCS_HTTP_URL": address,
    "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",  # tensorstore looks for credentials elsewhere else.
    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # It asks Google, by gRPC, what kind of bucket this is.
    "GOOGLE_CLOUD_PROJECT": "here",
    "NO_GCE_CHECK": "true",
  }
  for name, value in settings.items():
    set_environment(name, value)
  thread = threading.Thread(target=http.serve_forever, daemon=True)
  thread.start()
  try:
    yield store
  finally:
    http.shutdown()
    http.server_close()
