import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.ops import dot_product_attention as ops
from attnjax.ops import ragged_block_attention
from attnjax.sparse import vmoba
from tests.sparse import helpers

GRID = (5, 3, 4)
CELLS = [(2, None, None), (None, 2, 3), (2, 2, 3)]


def example(N=4, K=2, H=8):
    q, k, v = helpers.normal(3, 2, *GRID, N, H)
    return q, k[..., :K, :], v[..., :K, :]


def flat(x):
    return x.reshape(x.shape[0], -1, *x.shape[-2:])


def select(q, k, cell, tau):
    """(own block, members, chosen) for a grid of queries and keys."""
    own, members = vmoba.partition(q.shape[1:-2], cell)
    exists = jnp.asarray(members >= 0)
    run = helpers.program(lambda q, k: vmoba.select(q, k, exists, own, tau))
    return own, members, run(flat(q), flat(k)[:, members])


@pytest.mark.parametrize("cell", CELLS)
def test_all_blocks_are_full_attention(cell):
    """In the output; gradients are alike in all of them, so those of one are enough."""
    full = lambda *x: ops.dot_product_attention(*map(flat, x)).reshape(2, *GRID, 4, 8)
    run = functools.partial(vmoba.vmoba, cell=cell, tau=1.0)
    if cell == CELLS[2]:  # whose last blocks are not full
        helpers.assert_same(run, full, example())
    else:
        both = helpers.program(lambda *args: (run(*args), full(*args)))(*example())
        chex.assert_trees_all_close(*both, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cell", CELLS)
def test_blocks_are_cells_of_the_grid_and_hold_each_token_once(cell):
    own, members = vmoba.partition(GRID, cell)
    tokens = members[members >= 0]
    np.testing.assert_array_equal(np.sort(tokens), np.arange(60))
    at = np.stack(np.unravel_index(np.arange(60), GRID))
    for block, row in enumerate(members):
        row = row[row >= 0]
        assert (own[row] == block).all()
        for axis, size in enumerate(cell):
            inside = np.unique(at[axis, row])
            whole = size is None and len(inside) == GRID[axis]
            assert whole or len(set(inside // (size or 99))) == 1


def test_the_pairs_of_a_head_reach_its_threshold_and_none_could_be_spared():
    q, k, _ = example()
    own, members, chosen = select(q, k, CELLS[2], 0.3)
    k = np.repeat(flat(k), 2, 2)
    means = np.stack([k[:, row[row >= 0]].mean(1) for row in members], 1)
    gate = np.einsum("BTNH,BLNH->BNTL", flat(q), means)
    home = (own[:, None] == np.arange(len(members)))[None, None]
    for b, n in np.ndindex(gate.shape[:2]):
        w = (gate[b, n] - gate[b, n].min()) / np.ptp(gate[b, n])
        falling = np.sort(w.ravel())[::-1]
        count = next(i for i in range(w.size) if falling[:i].sum() >= 0.3 * w.sum())
        expected = (w >= falling[count - 1]) | home[0, 0]
        np.testing.assert_array_equal(chosen[b, n], expected)
    assert len(set(np.asarray(chosen).sum(-1).ravel().tolist())) > 2, "a query has its own number"


def test_a_peaked_head_chooses_fewer_blocks_and_does_less_work():
    q, k = np.abs(helpers.normal(2, 2, *GRID, 2, 8))
    q[:, 0, 0, 0, 1] *= 1e3  # all that head 1 cares for is the first token
    _, _, chosen = select(q, k, CELLS[2], 0.25)
    pairs = chosen.sum((2, 3))
    assert (pairs[:, 1] < pairs[:, 0] / 2).all()
    total = helpers.program(lambda x: ragged_block_attention.lay(x, 4).total)
    tiles = [total(chosen[:, n]) for n in (0, 1)]
    assert tiles[1] < 0.75 * tiles[0]


def test_finds_the_block_that_full_attention_looks_at():
    own, members = vmoba.partition(GRID, (1, None, None))
    code = helpers.one_hot(own, 8).reshape(1, *GRID, 1, 8)
    q, v = 40 * np.roll(code, 1, 1), helpers.normal(*code.shape)  # looks for the frame before
    w = helpers.weights(flat(q), flat(code), is_causal=False)[0, 0]
    run = lambda tau: helpers.program(vmoba.vmoba, cell=(1, None, None), tau=tau)(q, code, v)
    error = lambda tau: np.abs(flat(run(tau))[0, :, 0] - w @ flat(v)[0, :, 0]).max()
    assert error(0.99) < 1e-5 and error(0.0) > 0.5


def test_a_layer_takes_its_turn_of_the_cells():
    x, seen = helpers.normal(1, *GRID, 16), []

    def spy(q, k, v, **options):
        seen.append(options)
        return v

    for layer in range(4):
        options = dict(cells=tuple(CELLS), layer=layer, tau=0.1, fn=spy)
        module = vmoba.Vmoba(num_heads=1, head_dim=8, **options)
        jax.eval_shape(module.init, helpers.KEY, x)
    assert seen == [dict(cell=cell, tau=0.1) for cell in (*CELLS, CELLS[0])]


@pytest.mark.parametrize(
    "options", [dict(cell=(2, 2)), dict(cell=(0, 2, 2)), dict(cell=CELLS[0], tau=-0.1)]
)
def test_refuses_what_it_cannot_do(options):
    with pytest.raises(ValueError, match="must"):
        vmoba.vmoba(*map(jnp.asarray, example()), **options)
