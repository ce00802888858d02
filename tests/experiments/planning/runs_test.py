import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from attnjax.core import sharding
from experiments.planning import cost, hlo, program
from experiments.planning import runs as plan_runs


def module_of(fn, *args):
    return hlo.read(program.text(jax.jit(fn).lower(*args).compile()))


def products(module, devices=(0,)):
    """How many matrix products of the smallest size run, on each device, and what is unknown."""
    runs, total = plan_runs.runs(module, devices), 0
    for name, times in runs.times.items():
        where = module.computations[name]
        total += times * sum(cost.flops(i, where, module) for i in where.instructions)
    return (total / (2 * 4**3)).tolist(), runs.unknown


X = jnp.eye(4)
twice = lambda x: jnp.tanh(x @ x)
loop = lambda start, end, body, x: lax.fori_loop(start, end, lambda i, x: body(i, x), x)


def test_nested_loops_multiply():
    def fn(x):
        inner = lambda x, _: (twice(x), None)
        outer = lambda x, _: (twice(lax.scan(inner, x, length=7)[0]), None)
        return lax.scan(outer, x, length=5)[0]

    assert products(module_of(fn, X)) == ([5 * (7 + 1)], ())


def test_a_bound_may_depend_on_the_outer_loop():
    fn = lambda x: loop(0, 9, lambda i, x: loop(i // 2, i, lambda _, x: twice(x), x), x)
    assert products(module_of(fn, X)) == ([sum(i - i // 2 for i in range(9))], ())


def test_a_bound_may_come_from_a_table_of_constants():
    table = np.arange(40) ** 2 % 11  # more numbers than a text shows by default

    def fn(x):
        row = lambda x, end: (loop(0, end, lambda _, x: twice(x), x), None)
        return lax.scan(row, x, jnp.asarray(table))[0]

    assert products(module_of(fn, X)) == ([table.sum()], ())


def test_a_bound_may_come_from_a_table_that_a_loop_writes():
    def fn(x):
        write = lambda i, table: table.at[i].set(i * i % 5)
        table = loop(0, 6, write, jnp.zeros(6, int))
        row = lambda x, end: (loop(0, end, lambda _, x: twice(x), x), None)
        return lax.scan(row, x, table)[0]

    assert products(module_of(fn, X)) == ([0 + 1 + 4 + 4 + 1 + 0], ())


def test_steps_other_than_one_and_downwards():
    cond = lambda carry: carry[0] > 3
    fn = lambda x: lax.while_loop(cond, lambda c: (c[0] - 4, twice(c[1])), (20, x))[1]
    assert products(module_of(fn, X)) == ([5], ())


def test_devices_differ():
    mesh = sharding.make_mesh(context=4)

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P(), out_specs=P("context"))
    def fn(x):
        x = lax.pcast(x, "context", to="varying")
        return loop(0, 2 * lax.axis_index("context") + 1, lambda _, x: twice(x), x)

    assert products(module_of(fn, X), range(4)) == ([1, 3, 5, 7], ())


def test_what_depends_on_data_is_counted_once_and_named():
    cond = lambda x: x.sum() < 100
    fn = lambda x: loop(0, 3, lambda _, x: lax.while_loop(cond, lambda x: twice(x) + 1, x), x)
    count, unknown = products(module_of(fn, X))
    assert count == [3]
    assert len(unknown) == 1 and "while" in unknown[0]


@pytest.mark.parametrize("case", [0, 1, 2])
def test_the_branch_that_is_taken(case):
    branches = [lambda x: x, twice, lambda x: twice(twice(x))]
    fn = lambda x: loop(0, 5, lambda i, x: lax.switch(jnp.where(i < 4, case, 0), branches, x), x)
    assert products(module_of(fn, X)) == ([4 * case], ())


COUNT_TO = """
%body.{0} (p: (s32[], s32[2])) -> (s32[], s32[2]) {{
  %p = (s32[], s32[2]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %ends = s32[2] get-tuple-element(%p), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  ROOT %r = (s32[], s32[2]) tuple(%next, %ends)
}}

%condition.{0} (p: (s32[], s32[2])) -> pred[] {{
  %p = (s32[], s32[2]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %ends = s32[2] get-tuple-element(%p), index=1
  %last = s32[1] slice(%ends), slice={{[1:2]}}
  %end = s32[] reshape(%last)
  ROOT %lt = pred[] compare(%i, %end), direction=LT
}}
"""
TWO_LOOPS = """
ENTRY %main () -> (s32[], s32[2]) {
  %zero = s32[] constant(0)
  %table = s32[2,3]{1,0} constant({ {1, 2, 3}, {4, 5, 6} })
  %turned = s32[3,2]{0,1} bitcast(%table)
  %part = s32[1,2]{0,1} slice(%turned), slice={[2:3], [0:2]}
  %ends = s32[2]{0} reshape(%part)
  %start = (s32[], s32[2]) tuple(%zero, %ends)
  %first = (s32[], s32[2]) while(%start), condition=%condition.1, body=%body.1
  %carried = s32[2] get-tuple-element(%first), index=1
  %again = (s32[], s32[2]) tuple(%zero, %carried)
  ROOT %second = (s32[], s32[2]) while(%again), condition=%condition.2, body=%body.2
}
"""


def test_a_bound_may_come_from_another_layout_and_through_another_loop():
    module = hlo.read(COUNT_TO.format(1) + COUNT_TO.format(2) + TWO_LOOPS)
    runs = plan_runs.runs(module, (0,))
    assert runs.times["body.1"] == runs.times["body.2"] == 6 and not runs.unknown


@pytest.mark.parametrize(
    ("states", "share", "full"), [("constant({0, 2, 1, 0})", 0.5, 0), ("parameter(0)", 1, 1)]
)
def test_a_kernel_that_skips_tiles_counts_for_those_that_it_computes(states, share, full):
    module = hlo.read(
        "ENTRY %main (p: s32[4]) -> f32[8] {\n"
        "  %grid = s32[] constant(2)\n"
        "  %steps = s32[4] constant({1, 2, 3, 4})\n"
        f"  %states = s32[4] {states}\n"
        "  ROOT %flash_attention.7 = f32[8] custom-call(%grid, %steps, %states), "
        'custom_call_target="tpu_custom_call", backend_config={"cost_estimate":{"flops":"100"}}\n}'
    )
    runs = plan_runs.runs(module, (0,))
    main = module.computations["main"]
    assert runs.of(main, main.root) == share and len(runs.full) == full
