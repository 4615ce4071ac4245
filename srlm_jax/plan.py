"""Will a run fit its TPU slice, and how long will it take? The TPU compiler compiles every program, without a TPU.

Trust the memory: it is the compiler's own. The time is an estimate: of compute (its cycles for the fusions; attention
kernels, which carry none, by their FLOPs at half of the peak), of memory and of network the longest alone. What goes
between slices is counted apart and not in the time: nobody states that network's speed.
"""

from collections.abc import Sequence
import contextlib
import dataclasses
import json
import logging
import math
import os
import re
import time
from typing import Any

import jax
from jax.experimental import topologies
from ml_collections import config_dict

from srlm_jax import chips, hlo_cost, llama, mesh as mesh_lib, programs, steps

logger = logging.getLogger(__name__)

KERNEL_SHARE = 0.5  # Of peak FLOPs, what attention kernels are taken to reach.


@dataclasses.dataclass(frozen=True)
class Measured:
  """A compiled program, per chip and call: bytes, seconds, FLOPs; `error` is the compiler's where it does not fit."""

  name: str
  chips: int
  compile_seconds: float
  peak: float = 0.0
  arguments: float = 0.0
  flops: float = 0.0
  read: float = 0.0
  traffic: float = 0.0
  network: float = 0.0
  collectives: dict[str, float] = dataclasses.field(default_factory=dict)
  cycles_seconds: float = 0.0
  kernel_seconds: float = 0.0
  memory_seconds: float = 0.0
  network_seconds: float = 0.0
  utilisation: float = 0.0
  error: str = ""

  @property
  def seconds(self) -> float:
    """The longest of compute, memory and network."""
    return max(self.cycles_seconds + self.kernel_seconds, self.memory_seconds, self.network_seconds)


def describe(topology: str) -> list[jax.Device]:
  """The devices of a topology, for compiling alone; ValueError where libtpu is missing or does not know it."""
  chips.size_of(topology)
  kind, (count, one) = chips.chip_of(topology), chips.slices_of(topology)
  # libtpu looks for a TPU's own metadata server otherwise; the type need not be the topology's.
  quiet = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5p-8", "TPU_WORKER_HOSTNAMES": "localhost"}
  os.environ.update(
    {key: os.environ.get(key, value) for key, value in {**quiet, "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}.items()}
  )
  try:
    how: dict[str, Any] = {"num_slices": count} if count > 1 else {}
    if kind.name == "v4":
      how |= {"chip_config_name": "megacore"}  # A chip's two cores are one device, as everywhere since.
    return list(topologies.get_topology_desc(platform="tpu", topology_name=one, **how).devices)
  except RuntimeError as error:
    raise ValueError(
      f"no TPU compiler for {topology}: {error}. It comes with pip install -e '.[tpu]'; slices of {kind.name}: "
      f"{', '.join(kind.slices)}."
    ) from error


def attention_flops(config: llama.LlamaConfig, tokens: int, length: int) -> float:
  """Of one forward pass over causal sequences: scores and mixing, the half below the diagonal."""
  return 4 * tokens * length / 2 * config.layers * config.heads * config.head_dim


def useful_flops(config: llama.LlamaConfig, program: programs.Program) -> float:
  """What the model itself needs, on all chips: 2 a parameter and token in each forward pass, and attention's."""
  model = jax.eval_shape(lambda: llama.Llama(config, jax.random.key(0)))
  weights = sum(leaf.size for leaf in jax.tree.leaves(model)) - config.vocab_size * config.embed
  return program.passes * (2 * weights * program.tokens + attention_flops(config, program.tokens, program.length))


def measure(program: programs.Program, config: llama.LlamaConfig, chip: chips.Chip) -> Measured:
  """Compiles a program and walks over what came out."""
  started, count = time.monotonic(), program.mesh.size
  with jax.set_mesh(program.mesh):
    lowered = program.fn.lower(*program.args)
    try:
      compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      return Measured(program.name, count, time.monotonic() - started, error=_no_room(str(error), program.args))
  cost = hlo_cost.walk(compiled.as_text())
  memory = compiled.memory_analysis()
  # A kernel of the forward pass does a forward's FLOPs for its part; of the backward pass two and a half times that.
  forward = attention_flops(config, program.tokens, program.length) / config.layers / count
  kernels = sum(number * forward * (2.5 if "_dkv_" in name else 1.0) for name, number in cost.kernels.items())
  network = sum(size for (kind, _), size in cost.network.items() if not kind.endswith(hlo_cost.BETWEEN))
  found = Measured(
    name=program.name,
    chips=count,
    compile_seconds=time.monotonic() - started,
    peak=memory.peak_memory_in_bytes,
    arguments=memory.argument_size_in_bytes,
    flops=cost.flops + kernels,
    read=cost.read,
    traffic=cost.read + cost.written,
    network=network,
    collectives={
      f"{kind} among {group}" if group else kind: size for (kind, group), size in sorted(cost.network.items())
    },
    cycles_seconds=cost.cycles / chip.clock if program.name != "decode" else 0.0,  # Far too many where memory-bound.
    kernel_seconds=kernels / (chip.flops * KERNEL_SHARE),
    memory_seconds=(cost.read + cost.written) / chip.bandwidth,
    network_seconds=network / chip.network,
  )
  return dataclasses.replace(
    found, utilisation=useful_flops(config, program) / (found.seconds * count * chip.flops) if found.seconds else 0.0
  )


def _no_room(message: str, arguments: Any) -> str:
  """The compiler's complaint, cut to its sum and its largest buffers; where it lists none, the largest arguments."""
  used = re.search(r"Used [\d.]+\w of [\d.]+\w hbm[^.\n]*\.[^\n]*", message)
  buffers = re.findall(
    r"\d+\. Size: ([\d.]+\w+)\n(?:.*\n)*?\s*Operator: op_name=\"([^\"]*)\"(?:.*\n)*?\s*Shape: ([^\n]*)", message
  )
  lines = [used[0] if used else message.splitlines()[0][:300]]
  lines += [f"  {size}  {shape.strip()[:60]}  {name[-80:]}" for size, name, shape in buffers[:6]]
  if not buffers:
    sizes = {
      jax.tree_util.keystr(path): (math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize, leaf)
      for path, leaf in jax.tree_util.tree_leaves_with_path(arguments)
    }
    largest = sorted(sizes.items(), key=lambda item: item[1][0], reverse=True)[:6]
    lines += [f"  {size / chips.GIB:.2f}G  {leaf.dtype}{list(leaf.shape)}  {name}" for name, (size, leaf) in largest]
  return "\n".join(lines)


def meshes(settings: config_dict.ConfigDict, topology: str) -> tuple[jax.sharding.Mesh, jax.sharding.Mesh]:
  """Training's and sampling's mesh over the devices of a topology; of hosts that sample apart, one."""
  training = mesh_lib.make_mesh(**settings.mesh, devices=describe(topology))
  sampling = steps.sampling_mesh(settings, training)
  if sampling.size < training.size:  # The compiler wants the devices that a program is for, and no others.
    chip = chips.chip_of(topology)
    sampling = mesh_lib.make_mesh(**settings.generation.mesh, devices=describe(f"{chip.name}:{chip.slices[0]}"))
  return training, sampling


def calls(settings: config_dict.ConfigDict) -> dict[str, float]:
  """How often a run calls each program, every text at its longest and every proposed prompt needed."""
  c, iterations = settings, settings.models - 1
  answers = c.prompts.count * c.responses.n
  votes = answers * c.judge.votes
  rows = max(c.generation.rows, 1)
  prompts = max(rows // c.responses.n // 2, 1)  # Of the prefill that is measured.
  decoded = c.prompts.max_proposals * c.prompts.sampling.max_new
  decoded += answers * c.responses.sampling.max_new + votes * c.judge.sampling.max_new
  steps = {name: c[name].steps or -(-count * c[name].epochs // c[name].batch) for name, count in _examples(c).items()}
  return {
    "sft": 2.0 * steps["sft"],  # The baseline and M1.
    "dpo": iterations * steps["dpo"],
    "reference": iterations * c.prompts.count / c.dpo.batch,
    "prefill": iterations * (c.prompts.max_proposals + c.prompts.count + answers) / prompts,
    "decode": iterations * decoded / rows,
  }


def _examples(settings: config_dict.ConfigDict) -> dict[str, int]:
  return {"sft": settings.data.ift_examples, "dpo": settings.prompts.count}


def _cells(one: Measured, chip: chips.Chip, often: float, share: float) -> dict[str, str]:
  """A line of the table, by column.

  Args:
    one: the program.
    chip: what it runs on.
    often: its calls in a run.
    share: of these calls, those that each of the groups of chips makes that run it apart.
  """
  if one.error:
    return {"program": one.name, "GiB": "no room", "compiled s": f"{one.compile_seconds:.0f}"}
  return {
    "program": one.name,
    "GiB": f"{one.peak / chips.GIB:.2f}",
    "of": f"{chip.hbm / chips.GIB:.2f}",
    "FLOPs": f"{one.flops:.3g}",
    "HBM GB": f"{one.traffic / 1e9:.1f}",
    "network GB": f"{one.network / 1e9:.1f}",
    "cycles s": f"{one.cycles_seconds:.3f}",
    "attention s": f"{one.kernel_seconds:.3f}",
    "memory s": f"{one.memory_seconds:.3f}",
    "network s": f"{one.network_seconds:.3f}",
    "call s": f"{one.seconds:.3f}",
    "MFU %": f"{one.utilisation * 100:.1f}",
    "hours": f"{one.seconds * often * share / 3600:.1f}",
    "compiled s": f"{one.compile_seconds:.0f}",
  }


def table(topology: str, found: Sequence[Measured], settings: config_dict.ConfigDict) -> str:
  """The report in plain text."""
  chip, often = chips.chip_of(topology), calls(settings)
  size = chips.size_of(topology)
  cells = [_cells(one, chip, often[one.name], one.chips / size) for one in found]
  columns = max(cells, key=len)
  rows = [list(columns), *([line.get(name, "") for name in columns] for line in cells)]
  widths = [max(len(row[place]) for row in rows) for place in range(len(columns))]
  lines = [f"{topology}: {size} chips of {chip.hbm / chips.GIB:.2f} GiB", ""]
  lines += ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
  for one in found:
    if one.error:
      lines += ["", f"{one.name} does not fit: {one.error}"]
    else:
      parts = ", ".join(f"{kind}: {sent / 1e9:.2f}" for kind, sent in one.collectives.items() if sent > 1e7)
      lines += ["", f"{one.name}, network GB: {parts or 'none'}"]
      if one.name == "decode":  # Its arguments are weights and cache.
        lines += [f"decode reads {one.read / one.arguments:.3f} times the bytes of weights and cache"]
  note = (
    "All per chip and call. Call: the longest of compute, memory and network. Hours: of the whole run, every text at "
  )
  return "\n".join([*lines, "", note + "its longest. MFU: the model's own FLOPs over the peak."])


def run(
  settings: config_dict.ConfigDict, config: llama.LlamaConfig, topology: str, only: Sequence[str], as_json: bool
) -> bool:
  """Compiles the programs for a topology ("auto:v5p": the smallest slice that holds them), prints; whether all fit."""
  if not topology.startswith("auto"):
    found = _one(settings, config, topology, only)
    print(json.dumps([dataclasses.asdict(one) for one in found]) if as_json else table(topology, found, settings))
    return not any(one.error for one in found)
  names = [topology.partition(":")[2]] if ":" in topology else list(chips.CHIPS)
  fits = False
  for name in names:
    for shape in chips.chip_of(name).slices:
      slice_ = f"{name}:{shape}"
      with contextlib.suppress(_Uneven):
        found = _one(settings, config, slice_, only, stop=True)
        if any(one.error for one in found):
          logger.info("%s: too small: %s", slice_, found[-1].error.splitlines()[0])
          continue
        fits = True
        print(json.dumps([dataclasses.asdict(one) for one in found]) if as_json else table(slice_, found, settings))
        break
    else:
      print(f"{name}: no listed slice holds it.")
  return fits


class _Uneven(ValueError):
  """The mesh of a configuration does not divide a slice."""


def _one(
  settings: config_dict.ConfigDict, config: llama.LlamaConfig, topology: str, only: Sequence[str], stop: bool = False
) -> list[Measured]:
  chip = chips.chip_of(topology)
  describe(topology)  # Where that fails, no other slice will do.
  try:
    training, generation = meshes(settings, topology)
    steps.check_batches(settings, training, ["sft", "dpo"] if settings.models > 1 else ["sft"])
    built = programs.programs(settings, config, training, generation)
  except ValueError as error:
    if stop:
      logger.info("%s: %s", topology, error)
      raise _Uneven from error
    raise
  found: list[Measured] = []
  for program in built:
    if only and program.name not in only:
      continue
    logger.info("%s: compiling %s", topology, program.name)
    found.append(measure(program, config, chip))
    if stop and found[-1].error:
      break
  return found
