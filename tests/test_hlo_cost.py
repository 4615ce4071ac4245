"""Costs of compiled programs, against counts by hand on small pieces of text."""

import pytest

from srlm_jax import hlo, hlo_cost

LOOP = """HloModule jit_f, is_scheduled=true

%cond (p: (s32[], f32[8,16])) -> pred[] {
  %p = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %limit = s32[]{:T(128)} constant(6)
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%body (p.1: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %p.1 = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  %x = f32[8,16]{1,0:T(8,128)} get-tuple-element(%p.1), index=1
  %two = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%i.1, %two)
  %reduced = f32[8,16]{1,0:T(8,128)} all-reduce(%x), channel_id=1, replica_groups=[2,4]<=[8], to_apply=%sum
  ROOT %t = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}) tuple(%next, %reduced)
}

%fused (a: f32[4,32,64], i.2: s32[], b: f32[64,128]) -> f32[32,128] {
  %a = f32[4,32,64]{2,1,0:T(8,128)} parameter(0)
  %i.2 = s32[]{:T(128)} parameter(1)
  %b = f32[64,128]{1,0:T(8,128)} parameter(2)
  %zero = s32[]{:T(128)} constant(0)
  %layer = f32[1,32,64]{2,1,0:T(8,128)} dynamic-slice(%a, %i.2, %zero, %zero), dynamic_slice_sizes={1,32,64}
  %flat = f32[32,64]{1,0:T(8,128)} bitcast(%layer)
  ROOT %product = f32[32,128]{1,0:T(8,128)} convolution(%flat, %b), dim_labels=bf_io->bf
}

ENTRY %main (w: f32[4,32,64], v: f32[64,128], x0: f32[8,16]) -> f32[32,128] {
  %w = f32[4,32,64]{2,1,0:T(8,128)} parameter(0)
  %v = f32[64,128]{1,0:T(8,128)} parameter(1)
  %x0 = f32[8,16]{1,0:T(8,128)} parameter(2)
  %start = s32[]{:T(128)} constant(0)
  %init = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}) tuple(%start, %x0)
  %loop = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}) while(%init), condition=%cond, body=%body
  %kernel = f32[8,16]{1,0:T(8,128)S(1)} custom-call(%x0), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"block": 1
}}, metadata={op_name="attention/splash"}
  ROOT %out = f32[32,128]{1,0:T(8,128)S(1)} fusion(%w, %start, %v), kind=kOutput, calls=%fused, backend_config={"window_config":{"estimated_cycles":"100"}}
}
"""  # noqa: E501  as the compiler writes it


@pytest.fixture(scope="module")
def cost() -> hlo_cost.Cost:
  return hlo_cost.walk(LOOP)


def test_a_loop_counts_as_often_as_it_runs(cost: hlo_cost.Cost) -> None:
  # From 0 below 6 by 2: three times; an all-reduce among 4 sends 2 · 3/4 of its 512 bytes.
  assert cost.network == {("all-reduce", 4): 3 * 2 * 512 * 3 / 4}


def test_products_and_cycles(cost: hlo_cost.Cost) -> None:
  assert cost.flops == 2 * 32 * 64 * 128
  assert cost.cycles == 100


def test_of_a_slice_only_the_slice_is_read(cost: hlo_cost.Cost) -> None:
  fusion = 32 * 64 * 4 + 4 + 64 * 128 * 4  # A layer, its index, the other factor; the result stays on the chip.
  assert cost.read == fusion + 3 * (512 + 4 + 4) + 512  # The loop's all-reduce and counter; the kernel's operand.


def test_kernels_are_named(cost: hlo_cost.Cost) -> None:
  assert cost.kernels == {"attention/splash": 1}


@pytest.mark.parametrize(
  ("text", "first"),
  [
    ("replica_groups={{0,2,1},{3,4,5}}, x", (0, 2, 1)),
    ("replica_groups=[2,8]<=[16], x", tuple(range(8))),
    ("replica_groups=[4,2]<=[2,2,2]T(0,2,1), x", (0, 2)),
    ("replica_groups=mesh['a'=2,'b'=4,'c'=3] {'a','c'}, x", (0, 1, 2, 12, 13, 14)),
    ("channel_id=2, source_target_pairs={{0,4},{4,0}}, x", (0, 4)),
  ],
)
def test_groups_of_chips(text: str, first: tuple[int, ...]) -> None:
  assert hlo.group(text) == first


def test_what_takes_the_slower_network_is_told_apart() -> None:
  text = """ENTRY %main (x: f32[8,16]) -> token[] {
  %x = f32[8,16]{1,0:T(8,128)} parameter(0)
  %before = token[] after-all()
  ROOT %send.1 = (f32[8,16]{1,0:T(8,128)}, u32[], token[]) send(%x, %before), channel_id=3, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
}
"""  # noqa: E501  as the compiler writes it
  assert hlo_cost.walk(text).network == {("all-reduce between slices", 0): 8 * 16 * 4}


def test_taps_on_padding_are_no_products() -> None:
  # [2, 16] · [16, 3, 5] written as a convolution over a spatial dimension of one: each output place has one real tap.
  text = """
ENTRY %main (x: bf16[1,2,16], w: bf16[3,16,5]) -> bf16[3,2,5] {
  %x = bf16[1,2,16]{2,1,0} parameter(0)
  %w = bf16[3,16,5]{2,1,0} parameter(1)
  ROOT %y = bf16[3,2,5]{2,1,0} convolution(%x, %w), window={size=3 pad=2_2 rhs_reversal=1}, dim_labels=0bf_0io->0bf
}
"""
  assert hlo_cost.walk(text).flops == 2 * 2 * 16 * 3 * 5


def test_brackets_that_do_not_close_are_an_error() -> None:
  with pytest.raises(ValueError, match="unbalanced brackets in the compiler's output"):
    hlo._closing("f(a, (b)", 1)


def test_a_text_without_its_entry_is_an_error() -> None:
  with pytest.raises(ValueError, match="the compiled program's text has no ENTRY computation"):
    hlo.parse(LOOP.partition("ENTRY")[0])
