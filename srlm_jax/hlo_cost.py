"""What a compiled TPU program costs: a walk over its optimised HLO that counts a loop's body as often as it runs.

The compiler's own `cost_analysis` counts a scanned body once. Here FLOPs are those of matrix products (TPU programs
write them as convolutions), cycles the compiler's estimates of fusions, bytes what each instruction moves to and from
HBM, and network what one chip sends in each collective, by a ring. A Pallas kernel costs what its author stated; of
those without such an estimate the number is given, and the caller adds their cost.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
import dataclasses
import functools
import math
import re

from srlm_jax.hlo import Instruction, group, parse

FREE = {
  *(
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "iota",
    "after-all",
    "partition-id",
    "replica-id",
  ),
  *("copy-done", "async-done", "all-gather-done", "all-reduce-done", "collective-permute-done", "opt-barrier"),
}
BETWEEN = " between slices"  # Ends the kind of a transfer by the slower network: what a chip hands to its host for it.
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_MEGASCALE = re.compile(r'xla_megascale_runtime.*_xla_megascale_transfer_type="(\w+)"')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_STATED = re.compile(r'"cost_estimate":\{"flops":"(\d+)".*?"bytes_accessed":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Cost:
  """Of one chip.

  `network`: bytes sent by kind of collective and size of group (0 between slices); `kernels`: those that state no cost.
  """

  flops: float = 0.0
  cycles: float = 0.0
  read: float = 0.0
  written: float = 0.0
  network: Counter[tuple[str, int]] = dataclasses.field(default_factory=Counter)
  kernels: Counter[str] = dataclasses.field(default_factory=Counter)

  def __add__(self, other: "Cost") -> "Cost":
    return Cost(
      self.flops + other.flops,
      self.cycles + other.cycles,
      self.read + other.read,
      self.written + other.written,
      self.network + other.network,
      self.kernels + other.kernels,
    )

  def times(self, count: float) -> "Cost":
    """The cost of doing it so often."""
    return Cost(
      self.flops * count,
      self.cycles * count,
      self.read * count,
      self.written * count,
      Counter({key: value * count for key, value in self.network.items()}),
      Counter({key: int(value * count) for key, value in self.kernels.items()}),
    )


def _window(rest: str) -> dict[str, list[tuple[int, int]]]:
  """{"size": [...], "pad": [(low, high), ...], ...} of a convolution."""
  found = re.search(r"window=\{([^}]*)\}", rest)
  fields = {}
  for part in (found[1] if found else "").split():
    key, value = part.split("=")
    pairs = [tuple(int(number) for number in piece.split("_")) for piece in value.split("x")]
    fields[key] = [(pair[0], pair[-1]) for pair in pairs]
  return fields


def _convolution_flops(op: Instruction, left: Instruction, right: Instruction) -> float:
  """2 · multiplications; a tap that falls on padding is none (products of matrices are often written with such)."""
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.rest)
  assert labels, op.rest
  lhs, rhs, out = labels.groups()
  left_dims, right_dims, dims = left.arrays[0].dims, right.arrays[0].dims, op.arrays[0].dims
  window = _window(op.rest)
  total = dims[out.index("b")] * dims[out.index("f")] * right_dims[rhs.index("i")]
  spatial = sorted(label for label in out if label.isdigit())
  for index, label in enumerate(spatial):

    def field(name: str, default: int, index: int = index) -> tuple[int, int]:
      return window[name][index] if name in window else (default, default)

    size, length, steps = right_dims[rhs.index(label)], left_dims[lhs.index(label)], dims[out.index(label)]
    stride, low, spread, holes = (
      field("stride", 1)[0],
      field("pad", 0)[0],
      field("rhs_dilate", 1)[0],
      field("lhs_dilate", 1)[0],
    )
    last = (length - 1) * holes
    places = (step * stride - low + tap * spread for step in range(steps) for tap in range(size))
    total *= sum(1 for place in places if 0 <= place <= last and place % holes == 0)
  return 2.0 * total


def _dot_flops(op: Instruction, left: Instruction) -> float:
  contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", op.rest)
  sizes = [left.arrays[0].dims[int(place)] for place in (contracted[1] if contracted else "").split(",") if place]
  return 2.0 * math.prod(op.arrays[0].dims) * math.prod(sizes)


def _sent(kind: str, op: Instruction) -> float:
  """Bytes that one chip sends, by a ring among its group; `op` is the collective, its last array the result."""
  size, among = sum(array.bytes for array in op.arrays), len(group(op.rest))
  if op.opcode.endswith("-start"):  # (operand, result, …)
    size = max(array.bytes for array in op.arrays)
  share = (among - 1) / among
  return {
    "all-gather": size * share,
    "all-reduce": 2 * size * share,
    "reduce-scatter": size * (among - 1),
    "all-to-all": size * share,
    "collective-permute": size,
  }[kind]


def _whole(instructions: Iterable[Instruction]) -> list[int]:
  """The whole-number constants among some instructions."""
  return [int(op.inside) for op in instructions if op.opcode == "constant" and re.fullmatch(r"-?\d+", op.inside)]


class _Walk:
  """Costs of computations, each computed once."""

  def __init__(self, computations: dict[str, dict[str, Instruction]]) -> None:
    self.computations = computations
    self.of = functools.cache(self._of)

  def trips(self, loop: Instruction) -> int:
    """How often a loop runs: from its condition's limit, its body's step and its start; 1 where they cannot be read."""
    condition, body = (self.computations[loop.called(kind)[0]] for kind in ("condition", "body"))
    limits = _whole(condition.values())
    counter = next((op for op in condition.values() if op.opcode == "get-tuple-element"), None)
    if len(limits) != 1 or counter is None:
      return 1
    index = re.search(r"index=(\d+)", counter.rest)
    step = 1
    if index:
      root = next(op for op in body.values() if op.root)
      if root.opcode == "tuple" and int(index[1]) < len(root.operands):
        added = body.get(root.operands[int(index[1])])
        while added and added.opcode in ("copy", "bitcast"):
          added = body.get(added.operands[0])
        steps = _whole(body[name] for name in (added.operands if added else ()) if name in body)
        step = steps[0] if steps else 1
    return max(-(-limits[0] // max(step, 1)), 1)

  def _of(self, name: str) -> Cost:
    total = Cost()
    for op in self.computations[name].values():
      total += self.instruction(op, self.computations[name])
    return total

  def instruction(self, op: Instruction, around: dict[str, Instruction]) -> Cost:
    """The cost of one instruction of a computation."""
    if op.opcode in FREE:
      return Cost()
    if op.opcode == "while":
      return self.of(op.called("body")[0]).times(self.trips(op))
    if op.opcode == "conditional":
      branches = [self.of(name) for name in op.called("branch_computations")]
      return max(branches, key=lambda cost: cost.cycles, default=Cost())
    if op.opcode in ("call", "async-start"):
      return sum((self.of(name) for kind in ("calls", "to_apply") for name in op.called(kind)), Cost())
    network = self._network(op)
    read, written = self._traffic(op, around)
    cycles = _CYCLES.search(op.rest)
    kernel = 'custom_call_target="tpu_custom_call"' in op.rest
    stated = _STATED.search(op.rest) if kernel else None
    if stated:
      return Cost(flops=float(stated[1]), read=float(stated[2]), written=op.bytes)
    label = re.search(r'op_name="([^"]*)"', op.rest)
    return Cost(
      flops=self._flops(op, around),
      cycles=float(cycles[1]) if cycles else 0.0,
      read=read,
      written=written,
      network=network,
      kernels=Counter([label[1] if label else op.name]) if kernel else Counter(),
    )

  def _network(self, op: Instruction) -> Counter[tuple[str, int]]:
    """What an instruction sends; the compiler writes a reduce-scatter as a fusion of an all-reduce and a slice."""
    if op.opcode == "fusion":
      name = op.called("calls")[0]
      found = sum((self._network(one) for one in self.computations[name].values()), Counter())
      if name.startswith("all-reduce-scatter"):  # Half of an all-reduce.
        return Counter({("reduce-scatter", among): size / 2 for (_, among), size in found.items()})
      return found
    if op.opcode == "send" and (far := _MEGASCALE.search(op.rest)):
      return Counter({(far[1].lower().replace("_", "-") + BETWEEN, 0): op.arrays[0].bytes})
    kind = op.opcode.removesuffix("-start")
    return Counter({(kind, len(group(op.rest))): _sent(kind, op)}) if kind in COLLECTIVES else Counter()

  def _flops(self, op: Instruction, around: dict[str, Instruction]) -> float:
    if op.opcode == "convolution":
      return _convolution_flops(op, around[op.operands[0]], around[op.operands[1]])
    if op.opcode == "dot":
      return _dot_flops(op, around[op.operands[0]])
    if op.opcode == "fusion":
      inner = self.computations[op.called("calls")[0]]
      return sum(self._flops(one, inner) for one in inner.values())
    return 0.0

  def _traffic(self, op: Instruction, around: dict[str, Instruction]) -> tuple[float, float]:
    """Bytes read from and written to HBM: of a slice only the slice, of an update in place only what is new."""
    sources = [around[name] for name in op.operands if name in around]
    if op.opcode == "copy-start":
      return sources[0].bytes, op.arrays[0].bytes if op.arrays[0].in_hbm else 0.0
    if op.opcode == "dynamic-update-slice":
      return sources[1].bytes, sources[1].bytes
    if op.opcode in ("dynamic-slice", "slice", "gather"):
      return min(op.arrays[0].bytes, sources[0].bytes), op.bytes
    if op.opcode == "custom-call" and "AllocateBuffer" in op.rest:
      return 0.0, 0.0
    if op.opcode != "fusion":
      return sum(one.bytes for one in sources), op.bytes
    inner = self.computations[op.called("calls")[0]]
    order = {int(one.inside): one for one in inner.values() if one.opcode == "parameter"}
    read = 0.0
    for place, source in enumerate(sources):
      if source.bytes:
        read += min(source.bytes, self._used(order[place], inner)) if place in order else source.bytes
    return read, _stored(op, inner)

  def _used(self, source: Instruction, inner: dict[str, Instruction]) -> float:
    """Bytes of a fusion's operand that it reads."""
    total, whole = 0.0, source.arrays[0].bytes
    for user in _users(source.name, inner):
      if user.opcode in ("dynamic-slice", "slice", "gather"):
        total += user.arrays[0].bytes
      elif user.opcode == "fusion":
        nested = self.computations[user.called("calls")[0]]
        place = str(user.operands.index(_operand(user, source.name, inner)))
        total += self._used(
          next(one for one in nested.values() if one.opcode == "parameter" and one.inside == place), nested
        )
      elif user.opcode != "dynamic-update-slice" or not _reaches(user.operands[0], source.name, inner):
        return whole
    return total


def _operand(fusion: Instruction, name: str, inner: dict[str, Instruction]) -> str:
  """Which of a fusion's operands comes from an instruction, through bitcasts and the like."""
  return next(one for one in fusion.operands if _reaches(one, name, inner))


def _users(name: str, inner: dict[str, Instruction]) -> Iterator[Instruction]:
  for one in inner.values():
    if name in one.operands:
      if one.opcode in ("bitcast", "copy", "reshape", "transpose"):
        nested = list(_users(one.name, inner))
        yield from nested or [one]
      else:
        yield one


def _reaches(name: str, target: str, inner: dict[str, Instruction]) -> bool:
  while name != target and name in inner and inner[name].opcode in ("bitcast", "copy", "reshape", "transpose"):
    name = inner[name].operands[0]
  return name == target


def _stored(op: Instruction, inner: dict[str, Instruction]) -> float:
  """Bytes that a fusion writes to HBM."""
  root = next(one for one in inner.values() if one.root)
  ends = [inner[name] for name in root.operands] if root.opcode == "tuple" else [root]
  total = 0.0
  for end, array in zip(ends, op.arrays, strict=False):
    while end.opcode in ("bitcast", "copy", "reshape") and end.operands and end.operands[0] in inner:
      end = inner[end.operands[0]]
    if array.in_hbm:
      total += inner[end.operands[1]].arrays[0].bytes if end.opcode == "dynamic-update-slice" else array.bytes
  return total


def walk(text: str) -> Cost:
  """The cost of one run of a compiled program on one chip.

  Args:
    text: `compiled.as_text()`.
  """
  computations, entry = parse(text)
  return _Walk(computations).of(entry)
