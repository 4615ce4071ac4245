"""Artifacts: the folders through which the stages hand each other their results.

A folder holds `stage.json` (written first: what it is made from), its shards (each written whole, then a small `.done`
beside it with records, bytes and SHA-256), and `manifest.json` (written last: its presence is the only commit). What an
artifact is made from is its configuration and its inputs' digests: a folder made from others is refused, never mixed.

Of several processes all make the same calls, and process 0 alone looks at what is there and writes: a written file is
there for all of them once the call returns.  Shards alone may be shared out (`map_shards`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import difflib
import functools
import hashlib
import json
import logging
import time
from typing import Any, TypeVar

from etils import epath
import jax

from srlm_jax import distributed, records

logger = logging.getLogger(__name__)

FORMAT = 3  # Of the files described here; a change makes older folders refused, by name.


def sha256(data: bytes) -> str:
  """Hex digest of some bytes."""
  return hashlib.sha256(data).hexdigest()


def file_sha256(path: epath.Path) -> str:
  """Hex digest of a file, read in pieces."""
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """{"a": {"b": 1}} → {"a.b": 1}; sequences become JSON lists."""
  flat: dict[str, Any] = {}
  for key, value in tree.items():
    if isinstance(value, Mapping):
      flat.update(flatten(value, f"{prefix}{key}."))
    else:
      flat[prefix + key] = json.loads(json.dumps(value))
  return flat


@dataclasses.dataclass(frozen=True)
class Artifact:
  """One folder of the work directory.

  Attributes:
    folder: where it lies.
    config: the part of the configuration that decides its content, flat.
    inputs: the artifacts that it is made from, by role.
  """

  folder: epath.Path
  config: dict[str, Any]
  inputs: dict[str, "Artifact"]

  @property
  def name(self) -> str:
    """The folder's last part."""
    return self.folder.name

  def identity(self) -> dict[str, Any]:
    """What it is made from, as stage.json holds it."""
    return {
      "format": FORMAT,
      "config": self.config,
      "inputs": {role: artifact.digest() for role, artifact in self.inputs.items()},
    }

  @property
  def done(self) -> bool:
    """Whether it is committed."""
    return distributed.first(f"look at {self.folder}", (self.folder / "manifest.json").exists)

  @functools.cached_property
  def _manifest(self) -> dict[str, Any]:
    path = self.folder / "manifest.json"
    try:
      return json.loads(path.read_text())
    except FileNotFoundError as error:
      raise ValueError(f"{self.folder} is not finished (it has no manifest.json): run its stage first.") from error
    except ValueError as error:  # Neither JSON nor UTF-8.
      raise ValueError(f"{path} is damaged ({error}): delete {self.folder} and run its stage again.") from error

  def manifest(self) -> dict[str, Any]:
    """The committed manifest; ValueError where there is none or it is damaged."""
    return self._manifest

  def digest(self) -> str:
    """Of the committed content: file digests and identity, not the time of making."""
    return self.manifest()["digest"]

  def check_config(self) -> None:
    """ValueError, naming the keys, where the folder was begun with another configuration."""
    path = self.folder / "stage.json"
    if not path.exists():
      return
    try:
      found = json.loads(path.read_text())
    except ValueError as error:  # Neither JSON nor UTF-8.
      raise ValueError(f"{path} is damaged ({error}): delete {self.folder} and run its stage again.") from error
    if found["format"] != FORMAT:
      raise ValueError(
        f"{self.folder} has artifact format {found['format']}, this version writes {FORMAT}: use a new --workdir."
      )
    theirs, ours = found["config"], self.config
    changed = sorted(key for key in {*theirs, *ours} if theirs.get(key) != ours.get(key))
    if changed:
      lines = "\n".join(f"  {key}: {theirs.get(key)!r} there, {ours.get(key)!r} here" for key in changed)
      raise ValueError(
        f"{self.folder} was made with another configuration:\n{lines}\n"
        "Use those values, another --workdir, or delete the folder to make it again."
      )

  def begin(self) -> None:
    """Creates the folder and its stage.json, or checks that an existing one was begun from the same things."""
    self.check_config()
    path = self.folder / "stage.json"
    identity = self.identity()
    if distributed.first(f"look at {path}", path.exists):
      found = json.loads(path.read_text())["inputs"]
      changed = sorted(
        role for role in {*found, *identity["inputs"]} if found.get(role) != identity["inputs"].get(role)
      )
      if changed:
        sources = ", ".join(f"{role} ({self.inputs[role].folder})" if role in self.inputs else role for role in changed)
        raise ValueError(
          f"{self.folder} was made from other inputs: {sources} changed since. Delete {self.folder} (and what follows "
          "from it) to make it again."
        )
      if self.done:
        return
    self.folder.mkdir(parents=True, exist_ok=True)
    distributed.first(f"begin {self.folder}", lambda: write_whole(path, json.dumps(identity, indent=2, sort_keys=True)))

  def commit(self, facts: Mapping[str, Any], folders: Sequence[str] = ()) -> None:
    """Writes manifest.json: digests of all shards and of the files in `folders`, and `facts` for people and reports."""
    distributed.barrier(f"commit {self.folder}")
    distributed.first(f"commit {self.folder}", lambda: self._commit(facts, folders))

  def _commit(self, facts: Mapping[str, Any], folders: Sequence[str]) -> None:
    files = {}
    for done in sorted(self.folder.glob("*.done")):
      files[done.name.removesuffix(".done")] = json.loads(done.read_text())
    for folder in folders:
      for path in sorted(_files(self.folder / folder)):
        data = path.read_bytes()
        files[str(path.relative_to(self.folder))] = {"bytes": len(data), "sha256": sha256(data)}
    identity = self.identity()
    content = {"identity": identity, "files": {name: entry["sha256"] for name, entry in files.items()}}
    manifest = {
      **identity,
      "digest": sha256(json.dumps(content, sort_keys=True).encode()),
      "files": files,
      "facts": dict(facts),
      "made": {
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": self._seconds(),
        "jax": jax.__version__,
      },
    }
    write_whole(self.folder / "manifest.json", json.dumps(manifest, indent=2, sort_keys=True))

  def _seconds(self) -> float:
    """Since the session that finishes it began it: stage.json is written then."""
    path = self.folder / "stage.json"
    return round(time.time() - path.stat().mtime, 1) if path.exists() else 0.0

  def write(self, name: str, text: str, count: int | None = None) -> None:
    """Writes one file whole, then its `.done`."""
    distributed.first(f"write {self.folder / name}", lambda: self._write(name, text, count))

  def _write(self, name: str, text: str, count: int | None) -> None:
    data = text.encode()
    write_whole(self.folder / name, text)
    entry = {"records": count, "bytes": len(data), "sha256": sha256(data)}
    write_whole(self.folder / f"{name}.done", json.dumps(entry))

  def write_records(self, name: str, items: Sequence[records.Record]) -> None:
    """Writes a JSON Lines file of records."""
    self.write(name, records.dumps(items), len(items))

  def has(self, name: str) -> bool:
    """Whether a file is complete: its `.done` is there and its size fits."""
    return distributed.first(f"look at {self.folder / name}", lambda: self._has(name))

  def _has(self, name: str) -> bool:
    done, path = self.folder / f"{name}.done", self.folder / name
    if not done.exists() or not path.exists():
      return False
    return path.stat().length == json.loads(done.read_text())["bytes"]

  def read_text(self, name: str) -> str:
    """The content of a written file; ValueError where it differs from its digest."""
    path, done = self.folder / name, self.folder / f"{name}.done"
    if not done.exists():
      raise ValueError(f"{path} is missing or was never finished: run its stage again.")
    data = path.read_bytes()
    if sha256(data) != json.loads(done.read_text())["sha256"]:
      raise ValueError(
        f"{path} is damaged (its SHA-256 is not the recorded one): delete {self.folder} and run its stage again."
      )
    return data.decode()

  def read(self, name: str, kind: type[records.R]) -> list[records.R]:
    """The records of one written file."""
    self.read_text(name)
    return list(records.read(self.folder / name, kind))

  def read_shards(self, stem: str, kind: type[records.R]) -> Iterator[records.R]:
    """The records of all shards of `stem`, in order."""
    for done in sorted(self.folder.glob(f"{stem}-*.jsonl.done")):
      yield from self.read(done.name.removesuffix(".done"), kind)


def _files(folder: epath.Path) -> Iterator[epath.Path]:
  """All files below a folder."""
  for path in folder.iterdir():
    if path.is_dir():
      yield from _files(path)
    else:
      yield path


def write_whole(path: epath.Path, text: str) -> None:
  """Writes beside the final name and renames, so that a reader sees all of it or none."""
  beside = path.parent / f".{path.name}.part"
  beside.write_text(text)
  beside.replace(path)


Item = TypeVar("Item")
Tool = TypeVar("Tool")


def map_shards(
  out: Artifact,
  stem: str,
  items: Sequence[Item],
  size: int,
  mesh: jax.sharding.Mesh,
  load: Callable[[], Tool],
  work: Callable[[Tool, Sequence[Item]], Sequence[records.Record]],
) -> None:
  """Works through `items` in shards of `size`, each written when done; finished shards are not done again.

  Args:
    out: gets the files STEM-00000-of-00012.jsonl and so on.
    stem: of their names.
    items: what is worked on; processes on meshes of their own share the shards out, all others do each together.
    size: items of a shard.
    mesh: of the work.
    load: gives what the work needs (a model, say); called once, by all processes, and only if a shard is missing.
    work: the records of one shard.
  """
  total = -(-len(items) // size)
  names = [f"{stem}-{index:05d}-of-{total:05d}.jsonl" for index in range(total)]
  missing = distributed.first(
    f"look at {out.folder / stem}", lambda: [index for index, name in enumerate(names) if not out._has(name)]
  )
  if not missing:
    return
  tool = load()
  apart = distributed.apart(mesh)
  mine = missing[jax.process_index() :: jax.process_count()] if apart else missing
  started, fresh = time.monotonic(), 0
  with distributed.alone() if apart else contextlib.nullcontext():
    for number, index in enumerate(mine, 1):
      part = items[index * size : (index + 1) * size]
      out.write_records(names[index], work(tool, part))
      fresh += len(part)
      rate = fresh / (time.monotonic() - started)
      logger.info(
        "%s: %s, shard %d of %d%s, %.1f a second, %.0f s left",
        out.folder,
        stem,
        number,
        len(mine),
        f" of this process ({len(missing)} of all)" if apart else "",
        rate,
        (len(mine) - number) * size / rate,
      )
  distributed.barrier(f"all of {out.folder / stem}")


def unknown(name: str, valid: Sequence[str], what: str) -> ValueError:
  """The error for a name that is not one of `valid`, with the nearest one."""
  near = difflib.get_close_matches(name, valid, 1)
  hint = f" Did you mean {near[0]!r}?" if near else ""
  return ValueError(f"{name!r} is not a {what}.{hint} Valid: {', '.join(valid)}.")
