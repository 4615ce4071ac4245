"""Planning for a TPU slice: what is counted by hand, and real compilations where libtpu is there."""

import dataclasses
import importlib.util
import os
import pathlib

import jax
from jax.experimental import topologies
import pytest
import tiny_model

from srlm_jax import chips, config as config_lib, llama, mesh as mesh_lib, plan, programs

ROOT = pathlib.Path(__file__).parents[1]


def small(**changes: object):
  c = config_lib.base()
  c.model.update(max_length=256, logits_chunk=128)
  c.responses.sampling.max_new = 64
  for part in (c.sft, c.dpo):
    part.batch = 4
  c.generation.rows = 8
  c.update_from_flattened_dict(changes)
  return c


SHAPE = dataclasses.replace(
  llama.SIZES["llama2_7b"], layers=2, embed=256, ffw=512, heads=4, kv_heads=2, head_dim=64, vocab_size=512, remat="none"
)


def test_topologies_are_read() -> None:
  assert (chips.chip_of("v5p:4x4x4").name, chips.size_of("v5p:4x4x4"), chips.size_of("v5e:2x4")) == ("v5p", 64, 8)
  with pytest.raises(ValueError, match="'h100:2x2' is no topology: write one of v4, v5e, v5p, v6e"):
    chips.chip_of("h100:2x2")
  with pytest.raises(ValueError, match="'v5p:big' has no shape: write v5p:4x4x4"):
    chips.size_of("v5p:big")


def test_without_the_compiler_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
  def missing(**_: object) -> None:
    raise RuntimeError("JAX TPU support not installed; cannot generate TPU topology")

  monkeypatch.setattr(topologies, "get_topology_desc", missing)
  monkeypatch.setattr(os, "environ", dict(os.environ))  # What libtpu is told there.
  with pytest.raises(
    ValueError, match=r"no TPU compiler for v5p:2x2x1: JAX TPU .* pip install -e '\.\[tpu\]'; slices of v5p: "
  ):
    plan.describe("v5p:2x2x1")


def test_every_program_of_a_run_lowers() -> None:
  mesh = mesh_lib.make_mesh(fsdp=4, tensor=2)
  found = programs.programs(small(), SHAPE, mesh, mesh_lib.make_mesh(data=4, fsdp=1, tensor=2))
  assert [one.name for one in found] == ["sft", "reference", "dpo", "prefill", "decode"]
  for one in found:
    with jax.set_mesh(one.mesh):
      one.fn.lower(*one.args)
  assert {one.name: one.tokens for one in found} == {
    "sft": 4 * 256, "reference": 8 * 256, "dpo": 8 * 256, "prefill": 4 * 192, "decode": 8,
  }  # fmt: skip


def test_m1_alone_needs_no_more_than_sft() -> None:
  mesh = mesh_lib.make_mesh()
  assert [one.name for one in programs.programs(small(models=1), SHAPE, mesh, mesh)] == ["sft"]


def test_useful_flops() -> None:
  mesh = tiny_model.one_device()
  program = programs.programs(small(models=1), SHAPE, mesh, mesh)[0]
  layer = 256 * (4 + 2 * 2) * 64 + 4 * 64 * 256 + 3 * 256 * 512 + 2 * 256
  weights = 2 * layer + 256 + 256 * 512
  attention = 4 * 1024 * 128 * 2 * 4 * 64
  assert plan.useful_flops(SHAPE, program) == 3 * (2 * weights * 1024 + attention)


def test_no_room_names_the_sum_and_the_largest_arguments() -> None:
  message = "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 120.5G of 95.74G hbm. Exceeded hbm capacity by 24.8G."  # noqa: E501
  mesh = mesh_lib.make_mesh(fsdp=4, tensor=2)
  found = programs.programs(small(), SHAPE, mesh, mesh)[0]
  lines = plan._no_room(message, found.args).splitlines()
  assert lines[0].startswith("Used 120.5G of 95.74G hbm.")
  # Nothing is larger than gate, up and down: 2 layers of 256 × 512, a quarter by fsdp and half of that by tensor.
  assert len(lines) == 7 and all("float32[2, 256, 512]" in line or "float32[2, 512, 256]" in line for line in lines[1:])


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="the TPU compiler is not installed: '.[tpu]'")
def test_a_real_compilation_agrees_with_the_closed_form(capsys: pytest.CaptureFixture[str]) -> None:
  settings = small(**{"model.remat": "full"})
  shape = dataclasses.replace(SHAPE, attention="splash", head_dim=128)
  training, generation = plan.meshes(settings, "v5p:2x2x1")
  program = programs.programs(settings, shape, training, generation)[0]
  found = plan.measure(program, shape, chips.CHIPS["v5p"])
  assert not found.error and found.peak > found.arguments / 2
  # With full remat a step does between 3 and 4 forward passes.
  forward = plan.useful_flops(shape, program) / 3 / 4
  assert 3 * forward < found.flops < 4.3 * forward
  assert plan.run(settings, shape, "v5p:2x2x1", ["decode"], as_json=False)
  assert "decode" in capsys.readouterr().out
