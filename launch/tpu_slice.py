"""A Cloud TPU slice: the gcloud commands about it, and its life from the request to the deletion. For launch/tpu.py."""

import argparse
from collections.abc import Sequence
import dataclasses
import datetime
import json
import pathlib
import re
import shlex
import subprocess
import sys
import time

AGAIN = 75  # The exit code that says: give the same command again.
MISTAKES = "PERMISSION_DENIED|UNAUTHENTICATED|INVALID_ARGUMENT|ALREADY_EXISTS|active account|Reauthentication"


class Stop(Exception):
  """Ends the launcher with this exit code."""

  def __init__(self, why: str, code: int = 2):
    super().__init__(why)
    self.code = code


class Again(Exception):
  """Worth another try; `anew`: on a slice made anew."""

  def __init__(self, why: str, anew: bool = False):
    super().__init__(why)
    self.anew = anew


@dataclasses.dataclass(frozen=True)
class Worker:
  """One VM: `index` counts within its node, `number` over all slices."""

  number: int
  node: str
  index: int


def say(text: str) -> None:
  """Prints a message of the launcher's own; stdout is the first worker's log."""
  print(f"{datetime.datetime.now():%H:%M:%S} tpu: {text}", file=sys.stderr, flush=True)


def call(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
  """Runs a command to its end."""
  return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)


def check(what: str, done: subprocess.CompletedProcess[str], anew: bool = False) -> None:
  """Raises Again where a command failed, or Stop where gcloud names a mistake that another try would not mend."""
  if done.returncode:
    why = f"{what}: {(done.stdout + done.stderr).strip()[-2000:]}"
    usage = done.returncode == 2 and "ERROR: (gcloud" in done.stderr
    raise Stop(why) if usage or re.search(rf"ERROR: \(gcloud.*({MISTAKES})", done.stderr) else Again(why, anew)


class Slice:
  """The queued resource and its nodes."""

  def __init__(self, options: argparse.Namespace):
    self.options, name = options, options.name
    self.nodes = [f"{name}-{n}" for n in range(options.slices)] if options.slices > 1 else [name]
    self.describe = self.gcloud("queued-resources", "describe", name, "--format=json")
    self.delete = self.gcloud("queued-resources", "delete", name, "--force")  # --force: the nodes, too.
    many = [f"--node-count={options.slices}", f"--node-prefix={name}"]
    nodes = many if options.slices > 1 else [f"--node-id={name}"]
    self.create = self.gcloud("queued-resources", "create", name, *nodes)
    self.create += [f"--accelerator-type={options.type}", f"--runtime-version={options.version}"]
    self.create += ["--spot"] * options.spot + options.create_flag
    keep = ("ConnectTimeout=15", "ServerAliveInterval=15", "ServerAliveCountMax=4")
    self.ssh_flags = [f"--ssh-flag=-o{option}" for option in keep] + options.ssh_flag
    self.scp_flags = ["--scp-flag=-p", *(f"--scp-flag=-o{option}" for option in keep), *options.ssh_flag]

  def gcloud(self, *words: str) -> list[str]:
    """A command about this project and zone."""
    place = [f"--project={self.options.project}", f"--zone={self.options.zone}"]
    return ["gcloud", "compute", "tpus", *words, *place, "--quiet"]

  def describe_node(self, node: str) -> list[str]:
    """The command that tells a node's state and workers."""
    return self.gcloud("tpu-vm", "describe", node, "--format=json")

  def ssh(self, worker: Worker, *words: str) -> list[str]:
    """The command that runs a command of tpu_worker.sh on a worker."""
    remote = shlex.join(["bash", "tpu_worker.sh", *words])
    return self.gcloud("tpu-vm", "ssh", worker.node, f"--worker={worker.index}", f"--command={remote}") + self.ssh_flags

  def scp(self, worker: Worker, target: str, *sources: pathlib.Path | str) -> list[str]:
    """The command that copies files to a worker's home folder."""
    files = [*map(str, sources), f"{worker.node}:{target}"]
    return self.gcloud("tpu-vm", "scp", *files, f"--worker={worker.index}") + self.scp_flags

  def query(self, command: list[str]) -> dict:
    """What a describe command answers; empty where there is no such thing."""
    done = call(command)
    if done.returncode and "NOT_FOUND" in done.stderr:
      return {}
    check("gcloud cannot tell the state of the slice", done)
    return json.loads(done.stdout)

  def state(self) -> str:
    """The queued resource's state; empty where there is none."""
    return self.query(self.describe).get("state", {}).get("state", "")

  def workers(self) -> list[Worker]:
    """The workers of an ACTIVE slice; none while a node is being made. Raises Again where one is gone."""
    workers: list[Worker] = []
    for node in self.nodes:
      found = self.query(self.describe_node(node))
      state = found.get("state", "gone")
      if state in ("CREATING", "STARTING", "RESTARTING"):
        return []
      if state != "READY":
        raise Again(f"node {node} is {state}", anew=True)
      workers += [Worker(len(workers) + n, node, n) for n in range(len(found["networkEndpoints"]))]
    return workers

  def ensure(self) -> list[Worker]:
    """Asks for the slice where there is none, waits until it is ready, returns its workers."""
    deadline, last = time.monotonic() + self.options.wait, ""
    while time.monotonic() < deadline:
      try:
        found = self.query(self.describe)
        state = found.get("state", {}).get("state", "")
        if state != last:
          say(f"queued resource {self.options.name}: {state or 'gone'}")
        last = state
        if not state:
          say(f"asking for {self.options.slices} x {self.options.type}" + " (spot)" * self.options.spot)
          check("the slice was refused", call(self.create), anew=True)
        if state in ("FAILED", "SUSPENDING", "SUSPENDED"):
          meaning = "it could not be met" if state == "FAILED" else "its nodes were preempted or deleted"
          raise Again(f"the request is {state}, {meaning}: {json.dumps(found['state'])}", anew=True)
        if state == "ACTIVE":
          self.check_kind(found)
          if workers := self.workers():
            return workers
      except Again as again:
        if again.anew:
          raise
        say(str(again))
      time.sleep(self.options.poll)
    raise Stop(f"still {last or 'no slice'} after {self.options.wait:g} s; the request stays in the queue", AGAIN)

  def check_kind(self, found: dict) -> None:
    """Refuses a slice of the same name that is another kind."""
    wanted = {"acceleratorType": self.options.type, "runtimeVersion": self.options.version}
    for spec in found.get("tpu", {}).get("nodeSpec", []):
      got = {key: spec["node"].get(key, value) for key, value in wanted.items()}
      if got != wanted:
        raise Stop(f"{self.options.name} exists as {got}: take another --name, or `down` first")

  def remove(self) -> None:
    """Deletes the nodes and the queued resource and waits until they are gone."""
    deadline = time.monotonic() + self.options.wait
    while state := self.state():
      if time.monotonic() > deadline:
        raise Again(f"still {state} after {self.options.wait:g} s", anew=True)
      if state != "DELETING":
        say(f"deleting {self.options.name} ({state})")
        done = call(self.delete)
        if "NOT_FOUND" not in done.stderr:
          check("it could not be deleted", done, anew=True)
      time.sleep(self.options.poll if self.state() else 0)
