"""Programs whose work can be counted by hand."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import forked
import jax
import jax.numpy as jnp
import pytest
from compiled_programs import devices

from r1jax.models.experts import Exchange, run_experts
from r1jax.planner import hlo

SCRIPT = Path(__file__).parents[1] / "planned_programs.py"


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What is read in programs for eight devices, which this process may not have."""
    done = forked.run(str(SCRIPT), env=os.environ | devices(8))
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout))


def test_products_in_a_loop_count_as_often_as_they_run(found: dict[str, Any]) -> None:
    one = 2 * 64 * 16 * 16
    assert found["scan"]["flops"] == 5 * one
    # Backwards: each product again with the weights, and with the activations.
    assert found["grad"]["flops"] == 3 * 5 * one
    assert found["scan"]["collectives"] == []


def test_turns_that_depend_on_the_data_are_the_callers(found: dict[str, Any]) -> None:
    assert found["until"]["flops"] == 7 * 2 * 64 * 16 * 16


def test_a_sum_is_laid_to_its_mesh_axis(found: dict[str, Any]) -> None:
    # A device has 8 rows of 16 floats, and sends each of the 4 parts but one, twice.
    assert found["psum"]["collectives"] == [["all-reduce", ["b"], 8 * 16 * 4 * 2 * 3 / 4, 1.0]]
    ((kind, axes, _, times),) = found["in a loop"]["collectives"]
    assert (kind, axes, times) == ("all-reduce", ["b"], 3.0)


def test_a_gathering_is_laid_to_its_mesh_axis(found: dict[str, Any]) -> None:
    assert found["gather"]["collectives"] == [["all-gather", ["a"], 8 * 16 * 4, 1.0]]


def test_scopes_say_what_the_data_decides() -> None:
    """Products of a loop whose turns are given, and of a branch that is taken now and then."""

    def program(x: jax.Array, turns: jax.Array, flag: jax.Array) -> jax.Array:
        def step(_: int, x: jax.Array) -> jax.Array:
            with jax.named_scope("inner"):
                x = jax.vmap(lambda x: jax.lax.fori_loop(0, turns, lambda _, x: x @ x, x))(x)
            with jax.named_scope("sometimes"):
                return jax.lax.cond(flag, lambda x: x @ x, lambda x: x, x)

        return jax.lax.fori_loop(0, turns, step, x)

    arguments = jnp.ones((3, 16, 16)), jnp.int32(2), jnp.bool_(True)
    module = hlo.parse(jax.jit(program).lower(*arguments).compile().as_text())
    scopes = {"inner": 2.5, "sometimes": 0.25}
    found = hlo.cost(module, unknown_trips=4, scopes=scopes)
    assert found.flops == 4 * (2.5 + 0.25) * 3 * 2 * 16**3
    assert hlo.cost(module, unknown_trips=4).flops == 4 * (4 + 1) * 3 * 2 * 16**3


def test_turns_of_a_name_count_in_a_gradient_too() -> None:
    """JAX writes `transpose(jvp(turns_if_even_7))` where the scope is differentiated."""

    def program(x: jax.Array) -> jax.Array:
        with jax.named_scope("turns_if_even_7"):
            return jax.lax.scan(lambda x, _: (jnp.sin(x @ x), None), x, length=3)[0].sum()

    x = jnp.ones((16, 16))
    for function, products in (program, 1), (jax.grad(program), 3):
        module = hlo.parse(jax.jit(function).lower(x).compile().as_text())
        assert hlo.cost(module).flops == products * 7 * 2 * 16**3


# As the TPU compiler writes them.
LOOP = """HloModule jit_f, is_scheduled=true, num_partitions=8

%body (p: (s32[], bf16[4,8], bf16[6,8,8])) -> (s32[], bf16[4,8], bf16[6,8,8]) {
  %p = (s32[]{:T(128)}, bf16[4,8]{1,0:T(8,128)S(1)}, /*index=2*/bf16[6,8,8]{2,1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = bf16[4,8]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%p), index=1
  %w = bf16[6,8,8]{2,1,0} get-tuple-element(%p), index=2
  %step = s32[]{:T(128)} constant(STEP)
  %next = s32[]{:T(128)} add(%i, %step)
  %slice = bf16[8,8]{1,0} fusion(%w, %i), kind=kLoop, calls=%take
  %dot = bf16[4,8]{1,0:T(8,128)(2,1)S(1)} convolution(%x, %slice), dim_labels=bf_io->bf
  ROOT %out = (s32[], bf16[4,8], bf16[6,8,8]) tuple(%next, %dot, %w)
}

%take (param_0: bf16[6,8,8], param_1: s32[]) -> bf16[8,8] {
  %param_0 = bf16[6,8,8]{2,1,0} parameter(0)
  %param_1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %cut = bf16[1,8,8]{2,1,0} dynamic-slice(%param_0, %param_1, %zero, %zero)
  ROOT %flat = bf16[8,8]{1,0} bitcast(%cut)
}

%condition (p: (s32[], bf16[4,8], bf16[6,8,8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(6)
  %p.1 = (s32[]{:T(128)}, bf16[4,8]{1,0}, bf16[6,8,8]{2,1,0}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%i.1, %limit), direction=LT, metadata={op_name="a (b"}
}

ENTRY %main (x: bf16[4,8], w: bf16[6,8,8]) -> bf16[4,8] {
  %x.1 = bf16[4,8]{1,0} parameter(0)
  %w.1 = bf16[6,8,8]{2,1,0} parameter(1)
  %first = s32[]{:T(128)} constant(FIRST)
  %begin = s32[]{:T(128)} copy(%first)
  %state = (s32[], bf16[4,8], bf16[6,8,8]) tuple(%begin, %x.1, %w.1)
  %while.1 = (s32[], bf16[4,8], bf16[6,8,8]) while(%state), condition=%condition, body=%body
  ROOT %y = bf16[4,8]{1,0} get-tuple-element(%while.1), index=1
}
"""


@pytest.mark.parametrize(("first", "step", "turns"), [(0, 1, 6), (2, 1, 4), (0, 2, 3), (1, 2, 3)])
def test_turns_are_read_off_the_condition_where_nothing_else_tells(
    first: int, step: int, turns: int
) -> None:
    text = LOOP.replace("FIRST", str(first)).replace("STEP", str(step))
    assert hlo.cost(hlo.parse(text)).flops == turns * 2 * 4 * 8 * 8


def test_bytes_are_those_of_hbm_and_of_slices() -> None:
    text = LOOP.replace("FIRST", "0").replace("STEP", "1")
    body = [each for each in hlo.cost(hlo.parse(text)).operations if each.times == 6]
    # The counter is 4 bytes three times; a slice of 128 bytes is read and written, and read again
    # by the product, whose other operand and result stay on the chip.
    moved = {each.flops: each.bytes for each in body if each.bytes >= 100}
    assert moved == {0.0: 128 + 128 + 4, 2 * 4 * 8 * 8: 128}


def test_a_batched_product_is_no_more_than_its_products() -> None:
    """The TPU compiler makes a dimension of a batch a padded, reversed window."""
    text = """HloModule jit_f, num_partitions=1

ENTRY %main (a: bf16[2,5,7,1], b: bf16[3,11,7,1]) -> bf16[2,5,3,11] {
  %a = bf16[2,5,7,1]{3,2,1,0} parameter(0)
  %b = bf16[3,11,7,1]{3,2,1,0} parameter(1)
  ROOT %c = bf16[2,5,3,11]{3,2,1,0} convolution(%a, %b), window={WINDOW}, dim_labels=0bf1_1oi0->0b1f
}
""".replace("WINDOW", "size=1x3 pad=0_0x2_2 rhs_reversal=0x1")
    assert hlo.cost(hlo.parse(text)).flops == 2 * (2 * 5) * 7 * (3 * 11)


def test_holes_of_a_dilation_are_no_products() -> None:
    # Inputs at places 0, 2, 4 of 5; each of 3 outputs (stride 2) meets one with one tap.
    options = {"stride": 2, "low": 0, "left_dilation": 2, "right_dilation": 1}
    assert hlo._valid_products(inputs=3, taps=1, outputs=3, **options) == 3
    brute = sum(
        0 <= o * 3 - 2 + t * 2 <= 8 and (o * 3 - 2 + t * 2) % 4 == 0
        for o in range(4)
        for t in range(3)
    )
    options = {"stride": 3, "low": 2, "left_dilation": 4, "right_dilation": 2}
    assert hlo._valid_products(inputs=3, taps=3, outputs=4, **options) == brute > 0


@pytest.mark.parametrize(
    ("written", "group", "axes"),
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}, x", (0, 1), ("b",)),
        ("replica_groups=[4,2]<=[8], x", (0, 1), ("b",)),
        ("replica_groups=[2,4]<=[4,2]T(1,0), x", (0, 2, 4, 6), ("a",)),
        ("replica_groups=[1,8]<=[8], x", tuple(range(8)), ("a", "b")),
        ("replica_groups={}, x", tuple(range(8)), ("a", "b")),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, x", (0, 2, 4, 6), ("a",)),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_1'}, x", (0, 1), ("b",)),
        ("replica_groups=mesh['axis_0'=8] {'axis_0':(4)2}, x", (0, 1), ("b",)),
        ("source_target_pairs={{0,0},{1,3},{3,1}}, x", (1, 3), ("a",)),
    ],
)
def test_groups_of_devices_in_every_notation(
    written: str, group: tuple[int, ...], axes: tuple[str, ...]
) -> None:
    assert hlo._first_group(written, 8) == group
    assert hlo.axes_of(group, {"a": 4, "one": 1, "b": 2}) == axes


def test_attention_kernels_count_blocks_below_the_diagonal() -> None:
    """Two rows, 1,024 tokens in two blocks: three of the four squares are computed.

    4 query heads share 2 key heads of 256, whose values have 128.
    """
    blocks = hlo._Shape("s8", (1, 2, 2))
    queries, keys, values = (
        hlo._Shape("bf16", (2, heads, 1024, width))
        for heads, width in ((4, 256), (2, 256), (2, 128))
    )
    arrays = [blocks, queries, keys, values]
    square = 2 * (2 * 4) * 1024 * 1024
    assert hlo._kernel_flops("splash_mha_fwd_segmented.2", arrays) == square * (256 + 128) * 3 / 4
    assert hlo._kernel_flops("splash_mha_dq_segmented.2", arrays) == square * (512 + 128) * 3 / 4
    assert hlo._kernel_flops("splash_mha_dkv_segmented.2", arrays) == square * (512 + 256) * 3 / 4
    assert hlo._kernel_flops("another_kernel", arrays) is None


def test_the_kernel_over_pages_reads_those_that_are_listed() -> None:
    # 3 slots of 2 key heads and 16 query rows; a pool of 100 pages in each of 7 layers.
    pool, query = "bf16[7,1,100,2,64,128]", "bf16[3,2,16,128]"
    target = 'custom_call_target="tpu_custom_call"'
    text = f"""HloModule jit_f, num_partitions=1

ENTRY %main (q: {query}, k: {pool}, v: {pool}) -> f32[3,2,16,128] {{
  %q = {query}{{3,2,1,0}} parameter(0)
  %k = {pool}{{5,4,3,2,1,0}} parameter(1)
  %v = {pool}{{5,4,3,2,1,0}} parameter(2)
  ROOT %paged_attention.1 = f32[3,2,16,128]{{3,2,1,0}} custom-call(%q, %k, %v), {target}
}}
"""
    one = 2 * (2 * 64 * 128)  # values of a page's keys and values
    rest = 3 * 2 * 16 * 128 * (2 + 4)
    for scopes, pages in ({}, 100), ({"paged_attention": 12.5}, 12.5):
        found = hlo.cost(hlo.parse(text), scopes=scopes)
        assert found.bytes == pages * one * 2 + rest
        assert found.flops == pages * one * 16 * 2
        assert not found.unknown


def test_the_kernels_of_a_gpu_read_the_listed_pages_and_all_that_are_being_filled() -> None:
    pool, filling = "bf16[7,1,100,2,64,128]", "bf16[7,1,3,2,64,128]"
    query, hidden = "bf16[3,2,6,128]", "f32[3,1,64]"
    path = 'metadata={op_name="jit(f)/NAME/pallas_call"}'
    text = f"""HloModule jit_f, num_partitions=1

ENTRY %main (q: {query}, k: {pool}, v: {pool}, h: {hidden}) -> {query} {{
  %q = {query}{{3,2,1,0}} parameter(0)
  %k = {pool}{{5,4,3,2,1,0}} parameter(1)
  %v = {pool}{{5,4,3,2,1,0}} parameter(2)
  %h = {hidden}{{2,1,0}} parameter(3)
  %a = {filling}{{5,4,3,2,1,0}} parameter(4)
  %b = {filling}{{5,4,3,2,1,0}} parameter(5)
  ROOT %pallas_call.3 = {query}{{3,2,1,0}} custom-call(%q, %k, %v, %h, %a, %b),
    custom_call_target="__gpu$xla.gpu.triton", {path}
}}
""".replace(",\n   ", ",")
    one = 2 * (2 * 64 * 128)
    rest = 2 * (3 * 2 * 6 * 128 * 2) + 3 * 64 * 4
    scopes = {"paged_attention": 12.5, "paged_attention_of_groups": 4.0}
    for name, listed in scopes.items():
        found = hlo.cost(hlo.parse(text.replace("NAME", name)), scopes=scopes)
        assert found.bytes == (listed + 3) * one * 2 + rest
        assert found.flops == (listed + 3) * one * 6 * 2
        assert [each.kernel for each in found.operations] == [name]


def test_grouped_products_count_all_rows() -> None:
    # What XLA makes of a ragged product on TPU: 4,096 rows by four matrices. And its gradient.
    tiles = [hlo._Shape("s32", (5,)), hlo._Shape("s32", (35,))]
    rows, matrices = hlo._Shape("bf16", (4096, 64)), hlo._Shape("bf16", (4, 64, 32))
    product = 2 * 4096 * 64 * 32
    assert hlo._kernel_flops("ragged-dot-none.3", [*tiles, rows, matrices]) == product
    gradient = hlo._Shape("f32", (4096, 32))
    assert hlo._kernel_flops("tgmm.1", [*tiles, rows, gradient]) == product
    assert hlo._kernel_flops("ragged-dot-metadata", tiles[:1]) == 0


def test_tokens_go_to_their_experts_as_often_as_if_all_were_even() -> None:
    shapes = [((13, 6), "float32"), ((13, 2), "int32"), ((13, 2), "float32")]
    weights = {"gate": (5, 6, 4), "up": (5, 6, 4), "down": (5, 4, 6)}
    arguments = [
        *(jax.ShapeDtypeStruct(*each) for each in shapes),
        {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in weights.items()},
    ]
    exchange = Exchange(1, 100, buffer=7)
    compiled = jax.jit(run_experts, static_argnums=4).lower(*arguments, exchange).compile()
    module = hlo.parse(compiled.as_text())
    turns = [
        hlo._trip_count(each, computation, module)
        for computation in module.computations.values()
        for each in computation.instructions.values()
        if each.opcode == "while"
    ]
    assert turns.count(4) == 1  # 26 rows, room for 7


def test_a_slice_in_a_fusion_in_a_fusion_is_all_that_is_read() -> None:
    """A decode step multiplies by one layer of stacked weights, without a copy of the layer."""
    text = """HloModule jit_f, num_partitions=1

%layer (p: bf16[28,4,2], i: s32[]) -> bf16[4,2] {
  %p = bf16[28,4,2]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %z = s32[] constant(0)
  %d = bf16[1,4,2]{2,1,0} dynamic-slice(%p, %i, %z, %z), dynamic_slice_sizes={1,4,2}
  ROOT %b = bf16[4,2]{1,0} bitcast(%d)
}

%product (w: bf16[28,4,2], j: s32[], x: bf16[8,4]) -> bf16[8,2] {
  %w = bf16[28,4,2]{2,1,0} parameter(0)
  %j = s32[] parameter(1)
  %x = bf16[8,4]{1,0} parameter(2)
  %same = bf16[28,4,2]{2,1,0} bitcast(%w)
  %n = bf16[4,2]{1,0} fusion(%same, %j), kind=kLoop, calls=%layer
  ROOT %r = bf16[8,2]{1,0} dot(%x, %n), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (a: bf16[28,4,2], k: s32[], y: bf16[8,4]) -> bf16[8,2] {
  %a = bf16[28,4,2]{2,1,0} parameter(0)
  %k = s32[]{:S(6)} parameter(1)
  %y = bf16[8,4]{1,0} parameter(2)
  ROOT %o = bf16[8,2]{1,0} fusion(%a, %k, %y), kind=kOutput, calls=%product
}
"""
    found = hlo.cost(hlo.parse(text))
    assert found.flops == 2 * 8 * 4 * 2
    assert found.bytes == 2 * (4 * 2 + 8 * 4 + 8 * 2)
    # Used as a whole beside it, all of it is read.
    both = text.replace("ROOT %r =", "%t = bf16[28,4,2]{2,1,0} negate(%w)\n  ROOT %r =")
    assert hlo.cost(hlo.parse(both)).bytes == 2 * (28 * 4 * 2 + 8 * 4 + 8 * 2)
    # As a TPU7x's: the weights are first laid out anew, of which no more is done than is taken.
    again = """%again (q: bf16[28,4,2]) -> bf16[28,4,2] {
  %q = bf16[28,4,2]{2,1,0:T(16,128)(2,1)} parameter(0)
  ROOT %c = bf16[28,4,2]{2,1,0:T(8,128)(2,1)} copy(%q)
}

%product"""
    assert text.count("bitcast(%w)") == 1
    tiled = text.replace("%product", again, 1).replace(
        "bitcast(%w)", "fusion(%w), kind=kLoop, calls=%again"
    )
    assert hlo.cost(hlo.parse(tiled)).bytes == found.bytes


def test_a_scatter_in_a_fusion_writes_its_updates_in_place() -> None:
    text = """HloModule jit_f, num_partitions=1

%fused (a: f32[1000,8], i: s32[3], u: f32[3,8]) -> f32[1000,8] {
  %a = f32[1000,8]{1,0} parameter(0)
  %i = s32[3]{0} parameter(1)
  %u = f32[3,8]{1,0} parameter(2)
  ROOT %scatter = f32[1000,8]{1,0} scatter(%a, %i, %u), update_window_dims={1}
}

ENTRY %main (a: f32[1000,8], i: s32[3], u: f32[3,8]) -> f32[1000,8] {
  %a = f32[1000,8]{1,0} parameter(0)
  %i = s32[3]{0} parameter(1)
  %u = f32[3,8]{1,0} parameter(2)
  ROOT %put = f32[1000,8]{1,0} fusion(%a, %i, %u), kind=kCustom, calls=%fused
}
"""
    updates = 3 * 8 * 4
    assert hlo.cost(hlo.parse(text)).bytes == 3 * updates + 3 * 4


def test_what_another_unit_of_the_chip_does_counts() -> None:
    """A v5p's and v6e's SparseCore runs computations of its own, beside the others."""
    text = """HloModule jit_f, num_partitions=1

%other (p: f32[4,8], q: f32[8,2]) -> f32[4,2] {
  %p = f32[4,8]{1,0} parameter(0)
  %q = f32[8,2]{1,0} parameter(1)
  ROOT %d = f32[4,2]{1,0} dot(%p, %q), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}, execution_thread="sparsecore"

%next (r: f32[4,2]) -> f32[4,2] {
  ROOT %r = f32[4,2]{1,0} parameter(0)
}

ENTRY %main (a: f32[4,8], b: f32[8,2]) -> f32[4,2] {
  %a = f32[4,8]{1,0} parameter(0)
  %b = f32[8,2]{1,0} parameter(1)
  %s = ((f32[4,8], f32[8,2]), f32[4,2]) call-start(%a, %b), \
async_execution_thread="sparsecore", to_apply=%other
  ROOT %e = f32[4,2]{1,0} call-done(%s)
}
"""
    module = hlo.parse(text)
    assert list(module.computations) == ["other", "next", "main"]
    assert hlo.cost(module).flops == 2 * 4 * 8 * 2
    assert hlo.cost(module).bytes == 4 * (4 * 8 + 8 * 2 + 4 * 2)


def test_what_leaves_a_slice_is_sent_by_one_device_of_each() -> None:
    """Between slices, a TPU's compiler writes transfers by way of the hosts, and no collectives."""
    text = """HloModule jit_f, num_partitions=4

ENTRY %main (a: bf16[4,8]) -> bf16[4,8] {
  %a = bf16[4,8]{1,0} parameter(0)
  %t = token[] after-all()
  %s = (bf16[4,8]{1,0}, u32[], token[]) send(%a, %t), channel_id=1, is_host_transfer=true, \
frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",\
_xla_megascale_target="{1,2,3,4}x{0:3}",_xla_megascale_transfer_type="ALL_GATHER"}
  %d = token[] send-done(%s), channel_id=1, is_host_transfer=true
  ROOT %r = bf16[4,8]{1,0} copy(%a)
}
"""
    (found,) = hlo.cost(hlo.parse(text)).collectives
    assert (found.kind, found.bytes, found.times) == ("all-gather", 3 * 4 * 8 * 2, 1)
    assert hlo.axes_of(found.group, {"fsdp": 4, "tensor": 4}) == ("fsdp",)
    alone = text.replace("ALL_GATHER", "REDUCE_SCATTER")
    (found,) = hlo.cost(hlo.parse(alone)).collectives
    assert (found.kind, found.bytes) == ("reduce-scatter", 4 * 8 * 2 * 3 / 4)


def test_text_that_is_no_module_is_refused() -> None:
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("x = 1\n")
