"""What is read off compiled programs: of programs whose work is known, and in the TPU's ways to write it."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from fundus_jax import sharding
from launch import hlo

M, K, N, STEPS = 8, 16, 32, 5


def compiled(function: Any, *arguments: Any) -> str:
    return jax.jit(function).lower(*arguments).compile().as_text()


def test_a_loops_body_counts_as_often_as_it_runs() -> None:
    def program(x: jax.Array, weights: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    text = compiled(program, jnp.ones((M, K)), jnp.ones((STEPS, K, K)))
    assert hlo.report(text).flops == STEPS * 2 * M * K * K
    assert not hlo.report(text).open_loops


def test_a_loop_that_ends_by_its_data_counts_once_and_is_named() -> None:
    def program(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda x: x.sum() < 1e6, lambda x: x @ w, x)

    report = hlo.report(compiled(program, jnp.ones((M, K)), jnp.ones((K, K))))
    assert report.flops == 2 * M * K * K
    assert len(report.open_loops) == 1


def test_loops_within_loops_multiply() -> None:
    def inner(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 3, lambda _, x: jnp.tanh(x @ w), x)

    def program(x: jax.Array, weights: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (inner(x, w), None), x, weights)[0]

    text = compiled(program, jnp.ones((M, K)), jnp.ones((STEPS, K, K)))
    assert hlo.report(text).flops == STEPS * 3 * 2 * M * K * K


@pytest.mark.parametrize(
    ("mesh", "kind", "sent"),
    [
        ("fsdp:8", "all-gather", 7 * (N // 8) * K * 4),  # 7 times the own part of the weight
        ("tensor:8", "all-reduce", 2 * M * N * 4 * 7 / 8),
    ],
)
def test_bytes_over_the_wires(mesh: str, kind: str, sent: float) -> None:
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices: run the suite on the CPU")
    grid = sharding.parse_mesh(mesh, jax.devices()[:8])
    weight_axes = ("fsdp", None) if mesh == "fsdp:8" else (None, "tensor")
    row_axes = (("data", "fsdp"), None) if mesh == "fsdp:8" else (None, "tensor")

    def place(shape: tuple[int, ...], axes: Any) -> Any:
        spec = jax.sharding.PartitionSpec(*axes)
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=jax.NamedSharding(grid, spec))

    out = jax.NamedSharding(grid, jax.sharding.PartitionSpec(row_axes[0] if mesh == "fsdp:8" else None))
    run = jax.jit(lambda x, w: x @ w.T, out_shardings=out)
    text = run.lower(place((M, K), row_axes), place((N, K), weight_axes)).compile().as_text()
    report = hlo.report(text)
    assert [one.kind for one in report.collectives] == [kind]
    assert report.sent() == (sent, 0)
    assert report.sent(chips_per_node=4) == (0, sent), "the group does not fit into a node of four"


TPU = """HloModule jit_step

%condition (p: (s32[], f32[8,16])) -> pred[] {
  %p = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}) parameter(0)
  %bound = s32[]{:T(128)} constant(12)
  %counter = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%counter, %bound), direction=LT
}

%body (q: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %q = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%q), index=0
  %step = s32[]{:T(128)} constant(STEP)
  %next = s32[]{:T(128)} add(%i, %step)
  %x = f32[8,16]{1,0:T(8,128)} get-tuple-element(%q), index=1
  %w = f32[16,16]{1,0:T(8,128)} constant({...})
  %y = f32[8,16]{1,0:T(8,128)} convolution(%x, %w), dim_labels=bf_io->bf, metadata={op_name="jit(step)/dot"}
  ROOT %out = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}) tuple(%next, %y)
}

%start (a: bf16[4,8]) -> (bf16[4,8], bf16[16,8]) {
  %a = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  %g1 = bf16[16,8]{1,0:T(8,128)(2,1)} all-gather(%a), channel_id=7, replica_groups=GROUPS, dimensions={0}, frontend_attributes={chain_id="3"}
  ROOT %s = (bf16[4,8]{1,0}, bf16[16,8]{1,0}) custom-call(%g1), custom_call_target="AsyncCollectiveStart"
}

%done (b: bf16[4,8]) -> bf16[16,8] {
  %b = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  %g2 = bf16[16,8]{1,0:T(8,128)(2,1)} all-gather(%b), channel_id=7, replica_groups=GROUPS, dimensions={0}, frontend_attributes={chain_id="3"}
  ROOT %d = bf16[16,8]{1,0} custom-call(%g2), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (x: f32[8,16], a: bf16[4,8]) -> f32[8,16] {
  %x = f32[8,16]{1,0:T(8,128)} parameter(0)
  %a = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %f1 = (bf16[4,8], bf16[16,8]) fusion(%a), kind=kLoop, calls=%start
  %f2 = bf16[16,8]{1,0} fusion(%a), kind=kLoop, calls=%done
  %g3 = bf16[16,8]{1,0:T(8,128)(2,1)} all-gather(%a), channel_id=7, replica_groups=GROUPS, dimensions={0}
  %info = s8[1,2,2]{2,1,0:T(8,128)} constant({...})
  %q = bf16[2,4,256,128]{3,2,1,0:T(8,128)(2,1)} constant({...})
  %kv = bf16[2,2,512,128]{3,2,1,0:T(8,128)(2,1)} constant({...})
  %splash_mha_KERNEL.3 = (f32[2,256,128]{2,1,0}, bf16[2,4,256,128]{3,2,1,0}) custom-call(%info, %info, %q, %kv, %kv), custom_call_target="tpu_custom_call"
  %send = (bf16[32]{0}, u32[], token[]) send(%a, %zero), channel_id=9, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  %t = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}) tuple(%zero, %x)
  %while = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}) while(%t), condition=%condition, body=%body
  ROOT %r = f32[8,16]{1,0:T(8,128)} get-tuple-element(%while), index=1
}
"""  # noqa: E501


@pytest.mark.parametrize(
    ("groups", "first"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", (0, 1, 2, 3)),
        ("[2,4]<=[8]", (0, 1, 2, 3)),
        ("[2,4]<=[4,2]T(1,0)", (0, 2, 4, 6)),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", (0, 2, 4, 6)),
    ],
)
def test_what_a_tpu_writes(groups: str, first: tuple[int, ...]) -> None:
    report = hlo.report(TPU.replace("GROUPS", groups).replace("STEP", "1").replace("KERNEL", "fwd_residuals"))
    assert report.flops == 12 * 2 * 8 * 16 * 16
    assert report.kernels == {"pallas": 1}
    assert report.dcn_sent == 64
    assert [(one.kind, one.group, one.sent) for one in report.collectives] == 2 * [
        ("all-gather", first, 3 * 4 * 8 * 2)
    ], "one that two fusions hold, and one of the same channel, as in a loop that was laid out"


def test_what_a_loop_sends_out_of_its_slice_counts_each_round() -> None:
    text = TPU.replace("GROUPS", "[2,4]<=[8]").replace("STEP", "5")  # 3 rounds
    (send,) = [line for line in text.splitlines() if line.startswith("  %send")]
    text = text.replace(send + "\n", "")
    inside = send.replace("%a", "%p").replace("%zero", "%i")
    text = text.replace("  %y = ", f"  %p = bf16[32]{{0}} constant({{...}})\n{inside}\n  %y = ")
    assert hlo.report(text).dcn_sent == 3 * 64


def test_a_loop_whose_first_round_was_peeled() -> None:
    text = TPU.replace("GROUPS", "[2,4]<=[8]").replace("STEP", "1")
    first = "  %one = s32[]{:T(128)} constant(1)\n  %c = s32[]{:T(128)} copy(%one)\n  %t = "
    text = text.replace("tuple(%zero, %x)", "tuple(%c, %x)").replace("  %t = ", first)
    assert hlo.report(text).flops == 11 * 2 * 8 * 16 * 16


@pytest.mark.parametrize(("kernel", "products"), [("fwd_segmented", 2), ("dq_no_residuals", 3), ("dkv", 4)])
def test_splash_is_counted_by_its_operands(kernel: str, products: int) -> None:
    report = hlo.report(TPU.replace("GROUPS", "[2,4]<=[8]").replace("KERNEL", kernel).replace("STEP", "1"))
    assert report.kernel_flops == products * 2 * 2 * 4 * 256 * 512 * 128
    assert report.kernels == {"pallas": 1}


def test_the_step_of_a_counter_is_read() -> None:
    report = hlo.report(TPU.replace("GROUPS", "[2,4]<=[8]").replace("STEP", "5"))
    assert report.flops == 3 * 2 * 8 * 16 * 16, "0, 5, 10"


def test_batched_products_that_a_tpu_writes_as_dilated_convolutions() -> None:
    """Four products [2,3] x [3,5], whose batch is a spatial dimension."""
    text = """HloModule batched

ENTRY %main (l: f32[4,2,3], r: f32[4,3,5]) -> f32[4,2,5] {
  %l = f32[4,2,3]{2,1,0} parameter(0)
  %r = f32[4,3,5]{2,1,0} parameter(1)
  ROOT %c = f32[4,2,5]{2,1,0} convolution(%l, %r), window={size=4 stride=3 lhs_dilate=4}, dim_labels=0bf_0io->0bf
}
"""  # noqa: E501
    assert hlo.report(text).flops == 4 * 2 * 2 * 3 * 5


def test_sizes() -> None:
    assert hlo.size("(bf16[2,3]{1,0}, /*index=1*/f32[4], pred[5], token[])") == 12 + 16 + 5
    assert hlo.size("s4[8]") == 4
    assert hlo.size("f32[]") == 4
    assert functools.reduce(lambda total, one: total + len(one[1]), hlo.arrays("u8[1,2]{1,0}"), 0) == 2
