"""A program of two steps for `test_campaign.py` to hurt: it says what `srlm` says of its steps, and can be careless.

--flaw=early: it commits a step before its shards are there; --flaw=blind: it reads what it finds, without a look at it;
--flaw=hangs: it waits for ever; --flaw=deaf: it does so even if it is told to stop.
"""

import hashlib
import json
import logging
import pathlib
import signal
import sys
import threading

SHARDS = 4


def digest(text: str) -> str:
  return hashlib.sha256(text.encode()).hexdigest()


def write(path: pathlib.Path, text: str) -> None:
  beside = path.with_suffix(".part")
  beside.write_text(text)
  beside.replace(path)


def run() -> None:
  flags = dict(one.lstrip("-").split("=", 1) for one in sys.argv[1:] if "=" in one)
  workdir, flaw = pathlib.Path(flags["workdir"]), flags.get("flaw", "")
  log = logging.getLogger("srlm_jax.main")
  log.handlers, log.propagate = [logging.StreamHandler()], False
  log.setLevel(logging.INFO)
  for number, step in enumerate(("first", "second"), 1):
    folder = workdir / step
    if (folder / "manifest.json").exists():
      continue
    folder.mkdir(parents=True, exist_ok=True)
    log.info("[%d/%d] %s: stage %s", number, 2, step, step)
    if flaw == "deaf":
      signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if flaw in ("hangs", "deaf"):
      threading.Event().wait()
    source = [""] * SHARDS
    if step == "second":
      source = [path.read_text() for path in sorted((workdir / "first").glob("shard-*.json"))]
      known = json.loads((workdir / "first" / "manifest.json").read_text())["files"]
      for place, text in enumerate(source):
        if flaw != "blind" and digest(text) != known[place]:
          print(f"srlm all: {workdir}/first/shard-{place}.json is damaged", file=sys.stderr)
          sys.exit(2)
    texts = [json.dumps({"step": step, "shard": place, "from": text}) for place, text in enumerate(source)]
    files = [digest(text) for text in texts]
    manifest = json.dumps({"files": files, "digest": digest(str(files))})
    if flaw == "early":
      write(folder / "manifest.json", manifest)
    for place, text in enumerate(texts):
      write(folder / f"shard-{place}.json", text)
    write(folder / "manifest.json", manifest)
    log.info("[%d/%d] %s: finished in %.1f s", number, 2, step, 0)
