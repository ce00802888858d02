import functools

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from attnjax.core import sharding
from experiments.planning import collectives, hlo, program

N = 6 * 8 * 4  # bytes of a device's piece in the tests below
SHIFT = [(i, (i + 1) % 4) for i in range(4)]


def found(text, islands=(0, 0, 0, 0)):
    module = hlo.read(text)
    return collectives.found(module.computations[module.entry], module, islands)


@pytest.mark.parametrize(
    ("kind", "fn", "sent", "between"),
    [
        ("all-gather", lambda x: lax.all_gather(x, "context"), 3 * N, N),
        ("all-reduce", lambda x: lax.psum(x, "context"), 2 * N * 3 / 4, 2 * N / 4),
        ("reduce-scatter", lambda x: lax.psum_scatter(x, "context", scatter_dimension=1,
                                                      tiled=True), N * 3 / 4, N / 4),
        ("all-to-all", lambda x: lax.all_to_all(x, "context", 1, 0, tiled=True), N * 3 / 4, N / 2),
        ("collective-permute", lambda x: lax.ppermute(x, "context", SHIFT), N, N),
    ],
)  # fmt: skip
def test_bytes_against_formulas(kind, fn, sent, between):
    mesh = sharding.make_mesh(context=4)
    spread = functools.partial(jax.shard_map, mesh=mesh, in_specs=P("context"), check_vma=False)
    run = jax.jit(spread(fn, out_specs=P("context")))
    text = program.text(run.lower(jnp.ones((4 * 6, 8))).compile())
    (one,) = found(text, islands=(0, 0, 1, 1))
    assert (one.kind, one.sent, one.between, one.overlapped) == (kind, sent, between, False)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{{0,2},{1,3}}", [[0, 2], [1, 3]]),
        ("[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2] {'a','b'}", [[0, 1, 2, 3]]),
        ("mesh['a'=4] {'a':(2)2}", [[0, 1], [2, 3]]),
        ("mesh['a'=4] {'a':(1)2}", [[0, 2], [1, 3]]),
        ("{}", [[0, 1, 2, 3]]),
    ],
)
def test_groups_in_every_form(text, expected):
    (i,) = hlo.read(
        "ENTRY %main () -> f32[] {\n"
        f"  ROOT %x = f32[] all-reduce(), replica_groups={text}, dimensions={{0}}\n}}"
    ).computations["main"].instructions  # fmt: skip
    assert collectives.groups(i, 4).tolist() == expected


PERMUTE = """HloModule m, is_scheduled=true

ENTRY %main (x: f32[4,4]) -> f32[4,4] {{
  %x = f32[4,4] parameter(0)
  %s = (f32[4,4], f32[4,4], u32[], u32[]) collective-permute-start(%x), {pairs}
  {between}
  %d = f32[4,4] collective-permute-done(%s)
  ROOT %r = f32[4,4] add(%d, %w)
}}
"""
PAIRS = "source_target_pairs={{0,1},{1,2},{2,3},{3,0}}"


@pytest.mark.parametrize(
    ("between", "overlapped"),
    [
        ("%w = f32[4,4] dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}", True),
        ("%w = f32[4,4] negate(%x)", False),
        ('%w = f32[4,4] custom-call(%x), custom_call_target="tpu_custom_call"', True),
    ],
)
def test_work_between_start_and_done_overlaps(between, overlapped):
    (one,) = found(PERMUTE.format(between=between, pairs=PAIRS))
    assert one == ("collective-permute", "s", 64, 0, overlapped)
    (apart,) = found(PERMUTE.format(between=between, pairs=PAIRS), islands=(0, 0, 1, 1))
    assert apart.between == 64


CHAIN = """HloModule m, is_scheduled=true

%first (p: f32[4]) -> f32[4] {{
  %p = f32[4] parameter(0)
  %g = f32[8] all-gather(%p), channel_id=3, replica_groups={{{{0,1}},{{2,3}}}}, dimensions={{0}}
  ROOT %c = f32[4] custom-call(%p, %g), custom_call_target="AsyncCollectiveStart"
}}

%async_collective_fusion.1 (p: f32[4], m: f32[4,4]) -> f32[4] {{
  %p = f32[4] parameter(0)
  %m = f32[4,4] parameter(1)
  %g = f32[8] all-gather(%p), channel_id=3, replica_groups={{{{0,1}},{{2,3}}}}, dimensions={{0}}
  ROOT %w = f32[4,4] {work}
}}

%last (p: f32[4]) -> f32[8] {{
  %p = f32[4] parameter(0)
  %g = f32[8] all-gather(%p), channel_id=3, replica_groups={{{{0,1}},{{2,3}}}}, dimensions={{0}}
  ROOT %c = f32[8] custom-call(%p, %g), custom_call_target="AsyncCollectiveDone"
}}

%cut (p: f32[8]) -> f32[4] {{
  %p = f32[8] parameter(0)
  %z = s32[] constant(0)
  %r = f32[8] all-reduce(%p), channel_id=5, replica_groups={{{{0,1}},{{2,3}}}}
  ROOT %s = f32[4] dynamic-slice(%r, %z), dynamic_slice_sizes={{4}}
}}

ENTRY %main (x: f32[4], m: f32[4,4]) -> f32[4] {{
  %x = f32[4] parameter(0)
  %m = f32[4,4] parameter(1)
  %a = f32[4] fusion(%x), kind=kCustom, calls=%first
  %b = f32[4,4] fusion(%a, %m), kind=kOutput, calls=%async_collective_fusion.1
  %c = f32[8] fusion(%b), kind=kCustom, calls=%last
  ROOT %d = f32[4] fusion(%c), kind=kCustom, calls=%cut
}}
"""


@pytest.mark.parametrize("busy", [True, False])
def test_a_chain_of_fusions_is_one_collective(busy):
    dot = "dot(%m, %m), lhs_contracting_dims={1}, rhs_contracting_dims={0}"
    gather, scatter = found(CHAIN.format(work=dot if busy else "negate(%m)"))
    names = gather.kind, gather.sent, gather.overlapped
    assert names == ("all-gather", 16, busy)
    assert (scatter.kind, scatter.sent, scatter.overlapped) == ("reduce-scatter", 16, False)
