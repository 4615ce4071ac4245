"""TPU chips: what the makers state of them, and the slices that can be had.

Figures per chip from Google Cloud's pages on each TPU version (read 2026-11); memory is what the compiler allows.
"""

import dataclasses
import math

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """One TPU version.

  Attributes:
    name: as in a topology, "v5p" of "v5p:4x4x4".
    hbm: bytes of memory that a program may use.
    flops: peak bfloat16 operations a second.
    bandwidth: of the memory, bytes a second.
    network: of all links to other chips, bytes a second.
    clock: cycles a second, for the compiler's estimates.
    slices: the topologies that can be had, smallest first: that of one host.
  """

  name: str
  hbm: float
  flops: float
  bandwidth: float
  network: float
  clock: float
  slices: tuple[str, ...]


_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
_SQUARES = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")

CHIPS = {
  chip.name: chip
  for chip in (
    Chip("v4", 31.75 * GIB, 275e12, 1.228e12, 300e9, 1.05e9, _CUBES),
    Chip("v5e", 15.75 * GIB, 197e12, 0.819e12, 200e9, 1.5e9, _SQUARES),
    Chip("v5p", 95.74 * GIB, 459e12, 2.765e12, 600e9, 1.75e9, _CUBES),
    Chip("v6e", 31.25 * GIB, 918e12, 1.640e12, 448e9, 1.75e9, _SQUARES),
  )
}


def chip_of(topology: str) -> Chip:
  """The chip of a topology such as "v5p:4x4x4"; ValueError where there is none."""
  name = slices_of(topology)[1].split(":")[0]
  if name not in CHIPS:
    raise ValueError(
      f"{topology!r} is no topology: write one of {', '.join(CHIPS)}, a colon and its shape (v5p:4x4x4), and before it "
      "2* where there are two such slices."
    )
  return CHIPS[name]


def slices_of(topology: str) -> tuple[int, str]:
  """The number of slices, and one of them: "2*v5p:4x4x4" is two."""
  count, star, one = topology.rpartition("*")
  return (int(count) if star and count.isdigit() else 1), one


def size_of(topology: str) -> int:
  """The number of chips of a topology, of all slices; ValueError where its shape cannot be read."""
  count, one = slices_of(topology)
  sizes = one.partition(":")[2].split("x")
  if not all(size.isdigit() and int(size) for size in sizes):
    raise ValueError(f"{topology!r} has no shape: write {one.split(':')[0]}:4x4x4, say, or --topology=auto.")
  return count * math.prod(int(size) for size in sizes)
