"""The text of a compiled program (optimised HLO) as instructions."""

import dataclasses
import math
import re

import numpy as np

BYTES = {
  **{"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "s64": 8, "u64": 8},
  **{"bf16": 2, "f16": 2, "f32": 4, "f64": 8, "f8e4m3fn": 1, "f8e5m2": 1},
}

_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\dm\d(?:fn)?)?)\[([\d,]*)\](?:\{([^}]*)\})?")
_LINE = re.compile(r"\s+(?:ROOT )?%([\w.-]+) = ")
_HEAD = re.compile(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_NAME = re.compile(r"%([\w.-]+)")
_CALLED = re.compile(
  r"\b(calls|body|condition|to_apply|branch_computations|called_computations)=\{?((?:%[\w.-]+(?:, )?)+)"
)


@dataclasses.dataclass(frozen=True)
class Array:
  """One array of an instruction's result."""

  dims: tuple[int, ...]
  bytes: float
  in_hbm: bool  # Memory space S(1) is the chip's vector memory.


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of the text."""

  name: str
  opcode: str
  arrays: tuple[Array, ...]
  operands: tuple[str, ...]
  inside: str  # What stands in the brackets: operands, a constant's value, a parameter's number.
  rest: str  # The attributes behind them.
  root: bool

  @property
  def bytes(self) -> float:
    """Of the result, where it lies in HBM."""
    return sum(array.bytes for array in self.arrays if array.in_hbm)

  def called(self, kind: str) -> list[str]:
    """The computations that an attribute names."""
    return [name for key, names in _CALLED.findall(self.rest) if key == kind for name in _NAME.findall(names)]


def _closing(text: str, start: int) -> int:
  """The place of the bracket that closes the one at `start`."""
  depth = 0
  for place in range(start, len(text)):
    depth += (text[place] == "(") - (text[place] == ")")
    if not depth:
      return place
  raise ValueError(f"unbalanced brackets in the compiler's output: {text[:200]}")


def _arrays(text: str) -> tuple[Array, ...]:
  found = []
  for kind, dims, layout in _ARRAY.findall(text):
    if kind in BYTES:
      sizes = tuple(int(size) for size in dims.split(",") if size)
      found.append(Array(sizes, math.prod(sizes) * BYTES[kind], "S(" not in layout))
  return tuple(found)


def group(rest: str) -> tuple[int, ...]:
  """The chips of a collective's first group, given its attributes; of a permutation, its first sender and receiver."""
  if found := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", rest):
    sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
    among = re.findall(r"'(\w+)'", found[2])
    ids = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
    order = [*(axis for axis in sizes if axis not in among), *among]
    ids = ids.transpose([list(sizes).index(axis) for axis in order])
    return tuple(ids.reshape(-1, math.prod(sizes[axis] for axis in among))[0].tolist())
  if found := re.search(r"replica_groups=\[\d+,(\d+)\]<=\[([\d,]*)\](?:T\(([\d,]*)\))?", rest):
    dims = [int(size) for size in found[2].split(",")]
    order = [int(place) for place in found[3].split(",")] if found[3] else list(range(len(dims)))
    ids = np.arange(math.prod(dims)).reshape(dims).transpose(order)
    return tuple(ids.reshape(-1, int(found[1]))[0].tolist())
  if found := re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]*)\}", rest):
    return tuple(int(chip) for chip in found[1].split(","))
  return (0, 1)


def parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
  """The computations of a program by name, each an ordered {name: instruction}, and the entry's name."""
  computations: dict[str, dict[str, Instruction]] = {}
  entry, current = "", None
  for line in re.sub(r'\n(?="|\}\})', "", text).splitlines():  # A kernel's metadata may stand on lines of its own.
    if current is None or line.startswith(("%", "ENTRY")):
      head = _HEAD.match(line)
      if head:
        current = computations.setdefault(head[1], {})
        entry = head[1] if line.startswith("ENTRY") else entry
      continue
    if line == "}":
      current = None
      continue
    found = _LINE.match(line)
    if not found:
      continue
    start = found.end()
    end = _closing(line, start) + 1 if line[start] == "(" else line.index(" ", start)
    shape, rest = line[start:end], line[end:].lstrip()
    bracket = rest.index("(")
    close = _closing(rest, bracket)
    current[found[1]] = Instruction(
      name=found[1],
      opcode=rest[:bracket],
      arrays=_arrays(shape),
      operands=tuple(_NAME.findall(rest[bracket:close])),
      inside=rest[bracket + 1 : close],
      rest=rest[close + 1 :],
      root=line.lstrip().startswith("ROOT"),
    )
  if not entry:
    raise ValueError("the compiled program's text has no ENTRY computation.")
  return computations, entry
