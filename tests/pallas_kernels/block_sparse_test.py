"""Which tiles there are, in which order they are visited, what fits; and that nothing races."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import block_sparse as kernels
from pallas_kernels.block_sparse import rows, walk


def select(U, R, A, L):
    """A random choice for each query, without any of the block before the last."""
    score = np.random.default_rng(0).random((U, R, L))
    score[..., L - 2] = -1
    return jnp.asarray(np.argsort(-score)[..., :A], jnp.int32)


@functools.partial(jax.jit, static_argnames=("L", "X"))
def lay(selected, *, L, X):
    return jax.vmap(functools.partial(rows.lay, L=L, X=X))(selected)


def visited(pairs, unit, **options):
    """The places that the grid visits for a unit, one after the other, as tuples."""
    plan = walk.walk(pairs, **options)
    ids = np.indices([int(n) for n in plan.grid])[:, unit].reshape(3, -1)
    places = jax.jit(jax.vmap(lambda *ids: plan.at(ids, plan.tables)))(*ids)
    size = ids.shape[1]
    return [walk.Place(*x) for x in zip(*(np.broadcast_to(y, size) for y in places), strict=True)]


@pytest.mark.parametrize(("R", "A", "X"), [(300, 3, 8), (7, 1, 8), (40, 4, 2)])
def test_every_pair_has_one_place_and_no_tile_is_there_in_vain(R, A, X):
    L = 6
    selected = select(2, R, A, L)
    tiles = jax.device_get(lay(selected, L=L, X=X))
    for u, chosen in enumerate(np.asarray(selected)):
        each = np.bincount(chosen.reshape(-1), minlength=L)
        assert tiles.count[u] == np.ceil(each / X).sum()
        assert (np.diff(tiles.block[u]) >= 0).all()
        query, slot = tiles.query[u].reshape(-1), tiles.slot[u].T
        assert len(np.unique(slot)) == R * A == (query < R).sum()
        np.testing.assert_array_equal(query[slot], np.arange(R)[:, None].repeat(A, 1))
        np.testing.assert_array_equal(tiles.block[u][slot // X], chosen)
        assert (tiles.query[u].min(1) < R).sum() == tiles.count[u]


def of_gathered():
    """One unit whose queries differ in what they select, and one in which they don't."""
    selected = jnp.concatenate([select(1, 40, 2, 6), jnp.full((1, 40, 2), jnp.array([1, 5]))])
    return rows.Gathered(lay(selected, L=6, X=8)).pairs


def of_cut():
    return rows.Cut(select(2, 5, 3, 6), heads=1, length=40, size=8).pairs


@pytest.mark.parametrize("make", [of_gathered, of_cut])
@pytest.mark.parametrize("parts", [1, 2])
def test_a_grid_visits_each_pair_once_and_nothing_else(make, parts):
    """So its length is that of what the longest unit selected; others stay where they are."""
    listed = jax.jit(make)()
    pairs = jax.device_get(listed)
    A = pairs.blocks.shape[2]
    for over, unit in itertools.product(("queries", "keys"), range(2)):
        steps = visited(listed, unit, parts=parts, over=over)
        assert len(steps) == pairs.count.max() * A * parts
        live = [x for x in steps if x.live]
        expected = {
            (m, int(block), part)
            for m in range(pairs.count[unit])
            for block in pairs.blocks[unit, m]
            for part in range(parts)
        }
        assert {x[1:4] for x in live} == expected and len(live) == len(expected)
        owner = (lambda x: x.tile) if over == "queries" else (lambda x: (x.part, x.block))
        groups = [list(group) for _, group in itertools.groupby(live, owner)]
        assert len(groups) == len({owner(x) for x in live})  # of one accumulator in a row
        for group in groups:
            assert [x.first for x in group] == [True] + [False] * (len(group) - 1)
            assert [x.last for x in group] == [False] * (len(group) - 1) + [True]
        for before, x in itertools.pairwise(steps):
            assert x.live or x[1:4] == before[1:4]


def test_steps_grow_with_what_is_selected():
    """Lined up, tiles are of half the queries of a block: at most twice as many as if all full."""
    T, block = 8192, 64
    for A in (2, 4, 8):
        q = jax.ShapeDtypeStruct((1, T, 1, 64), "float32")
        selected = select(1, T, A, T // block)
        plan = kernels.plan_of(q, q, q, selected[:, :, None], block=block)
        pairs = rows.Gathered(lay(selected, L=T // block, X=plan.size)).pairs
        steps = int(walk.walk(pairs, parts=plan.parts, over="queries").grid[2])
        assert T * A <= steps * plan.size <= 1.6 * T * A
        runs = jax.ShapeDtypeStruct((1, T // 128, 1, A), "int32")
        assert kernels.plan_of(q, q, q, runs, block=block, query_block=128).pairs == T // 128 * A


def test_sizes_of_tiles():
    shape = lambda T, N=1, H=128: jax.ShapeDtypeStruct((1, T, N, H), "bfloat16")
    q, selected = shape(2**17), jax.ShapeDtypeStruct((1, 2**17, 1, 3), "int32")
    assert kernels.plan_of(q, q, q, selected, block=512)[:3] == (1, 512, 1)
    assert kernels.plan_of(q, q, q, selected, block=4096)[:3] == (1, 512, 8)
    assert kernels.plan_of(q, q, q, selected, block=128)[:3] == (1, 128, 1)
    assert kernels.plan_of(shape(1), q, q, selected, block=512)[:3] == (1, 8, 1)
    by_run = functools.partial(kernels.plan_of, q, q, q, selected, block=64)
    assert by_run(query_block=96)[:2] == (96, 96)
    assert by_run(query_block=2048)[:2] == (2048, 512)
    assert by_run(query_block=16)[0] == by_run(query_block=521)[0] == 1  # no tile worth a step
    wide = shape(4096, H=1024)
    assert kernels.plan_of(wide, wide, wide, selected, block=512).size == 128
    assert not kernels.plan_of(q, q, q, selected, block=4).fits


def test_more_than_scalar_memory_has_room_for():
    q, selected = jnp.zeros((1, 2**17, 1, 8)), jnp.zeros((1, 2**17, 1, 3), int)
    attend = lambda q: kernels.block_sparse_attention(
        q, q, q, selected, jnp.arange(2**17), kernels.Mask(), block=4, interpret=True
    )
    with pytest.raises(NotImplementedError, match="pairs of a tile and a block must be at most"):
        jax.eval_shape(attend, q)


def test_has_no_races(capfd):
    """With memory that is NaN until it is written, and the pipeline's copies simulated."""
    q, k, v = jnp.asarray(np.random.default_rng(0).standard_normal((3, 1, 12, 2, 8), "f4"))
    selected = select(2, 12, 2, 3).swapaxes(0, 1)[None]
    mask = kernels.Mask(lambda t, s: s <= t)
    simulated = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)

    def attend(q, k, v):
        options = dict(block=5, interpret=simulated)
        return kernels.block_sparse_attention(q, k, v, selected, jnp.arange(12), mask, **options)

    def dense(q, k, v):
        own = (jnp.arange(12) // 5)[None, None, None, None]
        seen = (selected[..., None] == own).any(3).swapaxes(1, 2)
        seen = seen & jnp.tri(12, dtype=bool)[None, None]
        x = jnp.einsum("BTNH,BSNH->BNTS", q, jnp.repeat(k, 2, 2)) / jnp.sqrt(8)
        w = jnp.where(seen, jax.nn.softmax(jnp.where(seen, x, -1e30)), 0)
        return jnp.einsum("BNTS,BSNV->BTNV", w, jnp.repeat(v, 2, 2))

    def run(fn):
        o, pull = jax.vjp(fn, q, k[:, :, :1], v[:, :, :1])
        return o, pull(jnp.cos(o))

    actual, expected = jax.jit(lambda: [run(fn) for fn in (attend, dense)])()
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert "race" not in capfd.readouterr().out.lower()
