"""What agents do to rank and cost, their cells, and how biases fit any grid."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import edit
from attnjax.linear_recurrent import agent_attention as lib
from attnjax.ops import dot_product_attention, linear_attention
from tests import cost

KEY = jax.random.key(0)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def draw(X, Y, side, N=2, H=4):
    q, k, v = normal(3, 2, X, Y, N, H)
    biases = normal(2, N, side**2, X, Y, seed=1)
    return q, k, v, *biases


def flat(x):
    return x.reshape(2, -1, *x.shape[3:])


def test_weights_sum_to_one_and_have_the_rank_of_the_agents():
    kernel = jnp.zeros((3, 3, 2, 30))  # without the convolution
    run = jax.jit(lambda *args: edit.matrix(lib.agent_attention, *args, kernel))
    w = jax.device_get(run(*draw(6, 5, 2)))
    assert (w > 0).all()
    chex.assert_trees_all_close(w.sum(-1), np.ones((2, 2, 30), np.float32), rtol=1e-5)
    singular = np.linalg.svd(w, compute_uv=False)
    assert (singular[..., 3] > 1e-3).all() and (singular[..., 4:] < 1e-5).all()


def test_is_linear_attention_with_softmax_features():
    """phi(q) = softmax(q A^T) over agents, phi(k) = softmax(A k^T) over keys."""

    @jax.jit
    def both(q, k, v, agent_bias, query_bias):
        agents = q.reshape(2, 2, 3, 5, 2, 4).mean(2)
        left, right = agents[:, :, :3].mean(2), agents[:, :, 2:].mean(2)  # the middle is in both
        agents = jnp.stack([left, right], 2).reshape(2, 4, 2, 4)
        logits = lambda x, bias: (
            jnp.einsum("BTNH,BMNH->BTNM", flat(x), agents) / 2
            + bias.reshape(2, 4, 30).transpose(2, 0, 1)[None]
        )
        phi_k = jax.nn.softmax(logits(k, agent_bias), axis=1)
        features = jax.nn.softmax(logits(q, query_bias)), phi_k
        expected, _ = linear_attention.linear_attention(*features, flat(v))
        o = lib.agent_attention(q, k, v, agent_bias, query_bias, jnp.zeros((3, 3, 2, 4)))
        return flat(o), expected

    chex.assert_trees_all_close(*both(*draw(6, 5, 2)), rtol=1e-5, atol=1e-5)


def test_a_single_agent_gives_every_query_the_same():
    @jax.jit
    def both(q, k, v, agent_bias, query_bias):
        o = lib.agent_attention(q, k, v, agent_bias, query_bias, jnp.zeros((3, 3, 2, 4)))
        mean, bias = q.mean((1, 2))[:, None], agent_bias.reshape(1, 2, 1, 12)
        same = dot_product_attention.dot_product_attention(mean, flat(k), flat(v), bias=bias)
        return flat(o), jnp.broadcast_to(same, (2, 12, 2, 4))

    chex.assert_trees_all_close(*both(*draw(3, 4, 1)), rtol=1e-5, atol=1e-5)


def test_the_convolution_restores_the_diversity_that_agents_lack():
    """Of the outputs, as the rank of the positions' features in a head."""
    kernel, run = normal(3, 3, 2, 8), jax.jit(lib.agent_attention)

    def diversity(kernel):
        o = jax.device_get(run(*draw(6, 5, 1, H=8), kernel))
        singular = np.linalg.svd(flat(o).swapaxes(1, 2), compute_uv=False)
        return (singular > 1e-4 * singular[..., :1]).sum(-1)

    assert (diversity(0 * kernel) == 1).all() and (diversity(kernel) == 8).all()


def test_implementations_agree():
    args = *draw(6, 5, 2), normal(3, 3, 2, 4)
    run = lambda name: functools.partial(lib.agent_attention, implementation=name)
    dense, blocked = jax.jit(lambda *args: (run("dense")(*args), run("blocked")(*args)))(*args)
    chex.assert_trees_all_close(blocked, dense, rtol=1e-5, atol=1e-5)
    program = lambda name: str(jax.make_jaxpr(run(name))(*args))
    assert "while" in program("blocked") and "while" not in program("dense")


@pytest.mark.parametrize("length, side", [(6, 3), (7, 3), (5, 4), (2, 3), (1, 2)])
def test_cells_cover_the_grid_and_repeat_where_it_is_small(length, side):
    x = np.arange(1, length + 1, dtype=np.float32)
    cells = [
        [s for s in range(length) if (c * length) // side <= s and s * side < (c + 1) * length]
        for c in range(side)
    ]
    expected = np.stack([x[cell].mean() for cell in cells])
    grid = x.reshape(1, length, 1, 1, 1)
    pooled = jax.device_get(jax.jit(lib.pool, static_argnums=1)(grid, side))
    assert pooled.shape == (1, side, side, 1, 1)
    for column in range(side):
        chex.assert_trees_all_close(pooled[0, :, column, 0, 0], expected, rtol=1e-6)
    assert {s for cell in cells for s in cell} == set(range(length))


def biases_of(shape, *tables):
    """What the module gives for each of some tables, where all others are zero; one program."""
    module = lib.AgentBias(num_heads=2, agents=4, grid=(6, 5), block=3)
    zero = jax.eval_shape(lambda: module.init(KEY, (6, 5)))["params"]
    zero = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), zero)
    with_table = lambda name, table: dict(table=zero[name]["table"] + table)
    params = [zero | {name: with_table(name, table)} for name, table in tables]
    stacked = jax.tree.map(lambda *x: np.stack(x), *params)
    run = jax.jit(jax.vmap(lambda params: module.apply(dict(params=params), shape)))
    return jax.device_get(run(stacked))


@pytest.mark.parametrize("shape", [(6, 5), (12, 5), (3, 9)])
def test_tables_of_biases_are_resized_to_the_grid(shape):
    ramp = lambda n: np.linspace(0.0, 1.0, n, dtype=np.float32)
    rows, columns, blocks, one = biases_of(
        shape,
        ("rows", ramp(6).reshape(1, 1, 6, 1)),
        ("columns", ramp(5).reshape(1, 1, 1, 5)),
        ("blocks", ramp(3).reshape(1, 1, 3, 1)),
        ("rows", np.eye(6, dtype=np.float32)[1].reshape(1, 1, 6, 1)),
    )
    for bias in (rows, columns, blocks):
        assert bias.shape == (2, 4, *shape) and bias.min() >= 0 and bias.max() <= 1
    assert (np.diff(rows, axis=2) > 0).all() and not np.ptp(rows, axis=3).any()
    assert (np.diff(columns, axis=3) > 0).all() and not np.ptp(columns, axis=2).any()
    assert (np.diff(blocks, axis=2) >= 0).all() and np.ptp(blocks, axis=2).any()
    if shape == (6, 5):
        chex.assert_trees_all_equal(rows[0, 0, :, 0], ramp(6))
        middle = np.array([0.0, 0.125, 0.375, 0.625, 0.875, 1.0], np.float32)  # halves of pixels
        chex.assert_trees_all_close(blocks[0, 0, :, 0], middle, atol=1e-6)

    if shape == (3, 9):  # each of three rows lies between two of six, and nothing is smoothed
        chex.assert_trees_all_close(one[0, 0, :, 0], np.float32([0.5, 0.0, 0.0]), atol=1e-6)


def test_one_model_works_on_any_grid():
    module = lib.AgentAttention(num_heads=2, head_dim=4, pool=3)
    ones = lambda *shape: np.ones(shape, np.float32)
    params = jax.eval_shape(module.init, KEY, ones(1, 14, 14, 8))
    for shape in ((1, 2, 2, 8), (1, 20, 9, 8)):
        assert jax.eval_shape(module.apply, params, ones(*shape)).shape == shape


def test_cost_is_linear_and_a_fraction_of_softmax():
    """49 agents on grids of 16, 32 and 64 positions a side."""
    shape = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    dense = functools.partial(dot_product_attention.dot_product_attention, implementation="dense")
    agents = functools.partial(lib.agent_attention, implementation="dense")

    def operations(side):
        images, biases = shape(1, side, side, 2, 32), shape(2, 49, side, side)
        return cost.operations(agents, *[images] * 3, *[biases] * 2, shape(3, 3, 2, 32))

    assert operations(32) < 4.1 * operations(16) and operations(64) < 4.1 * operations(32)
    assert 10 * operations(64) < cost.operations(dense, *[shape(1, 64**2, 2, 32)] * 3)


def test_refuses_agents_that_make_no_square():
    q, k, v, *biases = draw(3, 3, 2)
    with pytest.raises(ValueError, match="must have a square number of agents, M=3"):
        three = (b[:, :3] for b in biases)
        jax.eval_shape(lib.agent_attention, q, k, v, *three, normal(3, 3, 2, 4))
