"""The traffic of compiled programs, against programs with known traffic."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from dn_detr_jax.errors import PreflightError
from dn_detr_jax.preflight.hlo import (
    count_rematerialized,
    parse_collectives,
    parse_host_transfers,
    parse_loops,
    total_bytes,
)
from dn_detr_jax.preflight.traffic import parse_traffic

# Runs in a separate process with eight simulated devices. Prints the texts of compiled programs.
_SCRIPT = """
import json
from functools import partial
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

line = jax.make_mesh((8,), ("data",), (AxisType.Auto,))
grid = jax.make_mesh((2, 4), ("a", "b"), (AxisType.Auto, AxisType.Auto))

def text(function, mesh, spec, shape, dtype=jnp.float32, out=None):
    argument = jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
    out = None if out is None else NamedSharding(mesh, out)
    return jax.jit(function, out_shardings=out).lower(argument).compile().as_text()

def on_each(function, mesh, spec, shape, out, dtype=jnp.float32):
    mapped = jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=out, check_vma=False)
    return text(mapped, mesh, spec, shape, dtype)

def sums(x):
    return jax.lax.scan(lambda c, _: (jax.lax.psum(jnp.sin(c), "data"), None), x, None, length=5)[0]

print(json.dumps({
    "sum": text(lambda x: x.sum(0), line, P("data"), (16, 6, 4), out=P()),
    "gather": text(jnp.sin, line, P("data"), (16, 3), out=P()),
    "scatter": on_each(partial(jax.lax.psum_scatter, axis_name="data"), line, P(), (8, 5),
                       P("data")),
    "shift": on_each(partial(jax.lax.ppermute, axis_name="data",
                             perm=[(i, (i + 1) % 8) for i in range(8)]),
                     line, P("data"), (16,), P("data")),
    "loop": on_each(sums, line, P("data"), (16,), P("data")),
    "group": on_each(partial(jax.lax.psum, axis_name="b"), grid, P("a", "b"), (4, 8), P("a", "b")),
    "nothing": text(jnp.sin, line, P("data"), (16,)),
}))
"""


@pytest.fixture(scope="module")
def programs():
    """Returns texts of compiled programs by name."""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
    command = [sys.executable, "-c", _SCRIPT]
    done = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("name", "kind", "size", "group", "count", "sent"),
    [
        ("sum", "all-reduce", 6 * 4 * 4, 8, 1, 2 * 7 / 8 * 96),
        ("gather", "all-gather", 16 * 3 * 4, 8, 1, 7 / 8 * 192),
        ("scatter", "reduce-scatter", 8 * 5 * 4, 8, 1, 7 / 8 * 160),
        ("shift", "collective-permute", 2 * 4, 2, 1, 8),
        ("loop", "all-reduce", 2 * 4, 8, 5, 5 * 2 * 7 / 8 * 8),
        ("group", "all-reduce", 2 * 2 * 4, 4, 1, 2 * 3 / 4 * 16),
    ],
)
def test_one_collective_of_known_size(programs, name, kind, size, group, count, sent):
    """Catches results taken for operands, and missed groups and loops."""
    (found,) = parse_collectives(programs[name], num_devices=8)
    assert (found.kind, found.bytes, found.group, found.count) == (kind, size, group, count)
    assert found.bytes_sent == sent
    assert total_bytes([found]) == count * size


def test_nothing_is_found_where_nothing_is_sent(programs):
    """Catches a pattern that matches names or metadata."""
    assert parse_collectives(programs["nothing"], num_devices=8) == []
    assert parse_loops(programs["nothing"]) == []
    assert sum(parse_host_transfers(programs["nothing"])) == 0


def test_loops_and_their_lengths(programs):
    """Catches missed loop lengths, which count the operations of a loop once."""
    assert parse_loops(programs["loop"]) == [5]


# The text of compilers for accelerators: tiled layouts, tuples of operands and results, meshes,
# transfers to the host, a loop without a noted length, an instruction computed again.
_ACCELERATOR = """HloModule jit_step, is_scheduled=true

%add (x.1: f32[], y.1: f32[]) -> f32[] {
  %x.1 = f32[] parameter(0)
  %y.1 = f32[] parameter(1)
  ROOT %sum.1 = f32[] add(%x.1, %y.1)
}

%body (p.1: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p.1 = (s32[]{:T(128)}, f32[8]{0:T(128)}) parameter(0)
  %v.1 = f32[8]{0:T(128)} get-tuple-element(%p.1), index=1
  %all-reduce.2 = f32[8]{0:T(128)S(1)} all-reduce(%v.1), channel_id=4, replica_groups=mesh['x'=2,'y'=4] {'y'}, to_apply=%add
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  ROOT %tuple.1 = (s32[]{:T(128)}, f32[8]{0:T(128)}) tuple(%i.1, %all-reduce.2)
}

%condition (p.2: (s32[], f32[8])) -> pred[] {
  %bound = s32[]{:T(128)} constant(3)
  %p.2 = (s32[]{:T(128)}, f32[8]{0:T(128)}) parameter(0)
  %i.2 = s32[]{:T(128)} get-tuple-element(%p.2), index=0
  ROOT %less = pred[]{:T(512)} compare(%i.2, %bound), direction=LT
}

ENTRY %main (a: f32[4,2], b: (s32[], f32[8])) -> f32[32,2] {
  %a = f32[4,2]{1,0:T(4,128)} parameter(0)
  %b = (s32[]{:T(128)}, f32[8]{0:T(128)}) parameter(1)
  %start = (f32[4,2]{1,0:T(4,128)}, /*index=1*/f32[32,2]{1,0:T(8,128)S(1)}) all-gather-start(%a), channel_id=1, replica_groups=[1,8]<=[8], dimensions={0}, metadata={op_name="jit(step)/gather"}
  %done = f32[32,2]{1,0:T(8,128)} all-gather-done(%start), channel_id=1
  %token.1 = token[] after-all()
  %send.1 = (f32[4,2]{1,0:T(4,128)}, u32[], token[]) send(%a, %token.1), channel_id=2, is_host_transfer=true
  %recv.1 = (s32[5]{0:T(128)}, u32[], token[]) recv(%token.1), channel_id=3, is_host_transfer=true
  %while.1 = (s32[]{:T(128)}, f32[8]{0:T(128)}) while(%b), condition=%condition, body=%body
  %fusion.7.remat2 = f32[32,2]{1,0:T(8,128)} copy(%done)
  %all-reduce.3 = (f32[], bf16[3,2]{1,0:T(4,128)(2,1)}) all-reduce(%x.9, %y.9), channel_id=5, replica_groups=mesh['x'=2,'y'=4] {'x','y'}, to_apply=%add
  %alone = f32[] all-reduce(%x.9), channel_id=6, replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, to_apply=%add
  ROOT %copy = f32[32,2]{1,0:T(8,128)} copy(%fusion.7.remat2)
}
"""  # noqa: E501


def test_the_text_of_accelerators():
    """Catches operands counted with results, tiles taken for dimensions, meshes read wrongly."""
    loop, gather, together, alone = parse_collectives(_ACCELERATOR, num_devices=8)
    assert (loop.kind, loop.bytes, loop.group, loop.count) == ("all-reduce", 32, 4, 3)
    assert (gather.kind, gather.shapes, gather.bytes) == ("all-gather", ("f32[32,2]",), 256)
    assert (gather.group, gather.where) == (8, "jit(step)/gather")
    assert (together.shapes, together.bytes) == (("f32[]", "bf16[3,2]"), 4 + 12)
    assert together.group == 8
    assert (alone.group, alone.bytes_sent) == (1, 0)
    assert parse_host_transfers(_ACCELERATOR) == (32, 20)
    assert parse_loops(_ACCELERATOR) == [3]
    assert count_rematerialized(_ACCELERATOR) == 1


_PLACED = """HloModule jit_step, is_scheduled=true

%fused (p.0: f32[8,4], p.1: f32[4,2]) -> f32[8,2] {
  %p.0 = f32[8,4]{1,0:T(8,128)S(1)} parameter(0)
  %p.1 = f32[4,2]{1,0:T(4,128)} parameter(1)
  ROOT %dot.1 = f32[8,2]{1,0:T(8,128)} dot(%p.0, %p.1), metadata={op_name="jit(step)/inside"}
}

ENTRY %main (x: f32[64,4], k: f32[4,2]) -> f32[8,2] {
  %x = f32[64,4]{1,0:T(8,128)} parameter(0)
  %k = f32[4,2]{1,0:T(4,128)} parameter(1)
  %slice-start = ((f32[64,4]{1,0:T(8,128)}), f32[8,4]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[0:8], [0:4]}
  %slice-done = f32[8,4]{1,0:T(8,128)S(1)} slice-done(%slice-start)
  %fusion.1 = f32[8,2]{1,0:T(8,128)S(1)} fusion(%slice-done, %k), kind=kOutput, calls=%fused, metadata={op_name="jit(step)/jvp(Detector)/dot_general"}
  %fusion.2 = f32[8,2]{1,0:T(8,128)} fusion(%fusion.1), kind=kLoop, calls=%fused, metadata={op_name="jit(step)/add"}
  %copy-start = (f32[8,2]{1,0:T(8,128)S(1)}, f32[8,2]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%fusion.2)
  %copy-done = f32[8,2]{1,0:T(8,128)S(1)} copy-done(%copy-start)
  ROOT %out = f32[8,2]{1,0:T(8,128)} fusion(%copy-done), kind=kLoop, calls=%fused, metadata={op_name="jit(step)/add"}
}
"""  # noqa: E501


def test_traffic_is_what_crosses_the_boundary_of_the_chip():
    """Catches copies counted twice, whole arrays for slices, and results that stay in the chip."""
    add, product = parse_traffic(_PLACED)
    # The second fusion writes 64 bytes, the copy reads them, the third fusion writes 64.
    assert add == ("jit(step)/add", 3 * 64, 3)
    # A slice of 8 x 4 is read for the first fusion, and the kernel of 4 x 2; its result stays.
    assert product == ("jit(step)/jvp(Detector)/dot_general", 8 * 4 * 4 + 4 * 2 * 4, 2)


def test_a_workspace_is_no_traffic():
    """Catches megabytes that a library reserves for every small product on a GPU."""
    program = """HloModule jit_step

ENTRY %main (a: f32[8,4], b: f32[4,2]) -> f32[8,2] {
  %a = f32[8,4]{1,0} parameter(0)
  %b = f32[4,2]{1,0} parameter(1)
  %product = (f32[8,2]{1,0}, s8[8388608]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm"
  ROOT %first = f32[8,2]{1,0} get-tuple-element(%product), index=0
}
"""
    assert [traffic.bytes for traffic in parse_traffic(program)] == [4 * (32 + 8 + 16)]


def test_traffic_of_a_real_program():
    """Catches operands or results that are left out, and rounds of a loop."""

    def loop(x, k):
        return jax.lax.fori_loop(0, 5, lambda _, x: jnp.tanh(x @ k), x)

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((300, 200), (200, 200))]
    program = jax.jit(loop).lower(*shapes).compile().as_text()
    size = 4 * (300 * 200 + 200 * 200 + 300 * 200)  # of one product
    extra = 4 * 2 * 300 * 200  # the function after it, unless it is fused
    total = sum(traffic.bytes for traffic in parse_traffic(program))
    assert 5 * size <= total <= 5 * (size + extra) + 4 * size


def test_text_that_is_no_program_is_refused():
    """Catches an empty answer for an unreadable program; it means a program without collectives."""
    with pytest.raises(PreflightError, match="ENTRY"):
        parse_collectives("error: no such program", num_devices=8)
