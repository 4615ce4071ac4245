"""Configurations for slices: each divides, and is what the file says; that it fits is for `srlm plan` to say."""

import types

import pytest

from srlm_jax import chips, config, llama, slices, steps

FITS = [(size, topology) for size, known in slices.FITS.items() for topology in known]


@pytest.mark.parametrize(("size", "topology"), FITS)
def test_every_line_divides(size: str, topology: str) -> None:
  c = slices.llama2(f"{size},{topology}")
  shape, count = llama.SIZES[size], chips.size_of(topology)
  assert (c.base.size, c.topology) == (size, topology) and topology.split(":")[1] in chips.chip_of(topology).slices
  for tensor in (c.mesh.tensor, c.generation.mesh.tensor):
    assert count % tensor == shape.kv_heads % tensor == shape.ffw % tensor == shape.vocab_size % tensor == 0
  fsdp = count // c.mesh.tensor
  assert c.sft.batch % fsdp == 0 and 2 * c.dpo.batch // c.dpo.accumulate % fsdp == 0 and shape.embed % fsdp == 0


@pytest.mark.parametrize(
  ("name", "batch", "accumulate", "ways", "least"),
  [("dpo", 16, 2, 16, 0), ("dpo", 16, 1, 32, 32), ("dpo", 16, 4, 16, 32), ("sft", 16, 2, 16, 32), ("sft", 16, 2, 8, 0)],
)
def test_what_a_batch_must_be(name: str, batch: int, accumulate: int, ways: int, least: int) -> None:
  c = config.base()
  c[name].update(batch=batch, accumulate=accumulate)
  mesh = types.SimpleNamespace(size=2 * ways, shape={"tensor": 2})
  if not least:
    steps.check_batches(c, mesh, [name])
    return
  with pytest.raises(ValueError, match=f"{name}.batch=16 does not divide .* a multiple of {least}, or raise"):
    steps.check_batches(c, mesh, [name])


def test_every_size_has_a_slice_of_every_chip() -> None:
  for size, known in slices.FITS.items():
    assert {topology.split(":")[0] for topology in known} == set(chips.CHIPS), size


def test_without_a_slice_the_papers_values_stay() -> None:
  assert slices.llama2("llama2_70b").to_dict() == config.base().to_dict()


def test_what_is_not_known_is_refused() -> None:
  with pytest.raises(ValueError, match="'llama2_7' is not a model size. Did you mean 'llama2_7b'?"):
    slices.llama2("llama2_7")
  with pytest.raises(ValueError, match="'v5p:4x4' is not a slice that is known to hold llama2_70b. Did you mean"):
    slices.llama2("llama2_70b,v5p:4x4")
