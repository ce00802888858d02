"""Gates, losses and layout against counting by hand, and that skipping is skipping."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import masks
from attnjax.ops import dot_product_attention as ops
from attnjax.ops import routing
from tests import cost


def draw(i, *shape):
    return jnp.asarray(np.random.default_rng(i).standard_normal(shape, np.float32))


def choices(most, *shape):
    return jnp.asarray(np.random.default_rng(9).integers(most, size=shape))


def shapes(*all_shapes):
    return [jax.ShapeDtypeStruct(shape, "float32") for shape in all_shapes]


def with_gradients(fn, args):
    out, pull = jax.vjp(fn, *args)
    return out, pull(jnp.cos(out))


def assert_same(fn, other, args):
    both = jax.jit(lambda *args: [with_gradients(x, args) for x in (fn, other)])
    chex.assert_trees_all_close(*both(*args), rtol=1e-5, atol=1e-5)


# ---- gates ----


def test_gates_are_shares_of_the_best():
    logits = jnp.asarray(np.log([[0.1, 0.4, 0.2, 0.3], [0.25, 0.25, 0.25, 0.25]]), "float32")
    gates, chosen = routing.choose(logits, topk=2)
    assert chosen.tolist() == [[1, 3], [0, 1]]
    chex.assert_trees_all_close(gates, jnp.array([[4 / 7, 3 / 7], [0.5, 0.5]]), rtol=1e-6)


def test_a_constant_total_lets_the_best_alone_learn():
    logits, choose = draw(0, 3, 4), functools.partial(routing.choose, topk=1)

    @jax.jit
    def grads(logits):
        learned = lambda **options: jax.grad(lambda z: choose(z, **options)[0].sum())(logits)
        constant = dict(total="constant")
        best = jax.nn.one_hot(logits.argmax(-1), 4)  # d log p of the best
        expected = best - jax.nn.softmax(logits)
        return choose(logits, **constant)[0], learned(), learned(**constant), expected

    gates, by_one, by_constant, expected = grads(logits)
    chex.assert_trees_all_close(gates, np.ones((3, 1)), rtol=1e-6)
    assert abs(np.asarray(by_one)).max() < 1e-6
    chex.assert_trees_all_close(by_constant, expected, rtol=1e-5, atol=1e-6)


def test_refuses_what_cannot_be_chosen():
    for topk in (0, 5):
        with pytest.raises(ValueError, match=f"topk={topk} must be 1 to the 4 experts"):
            routing.choose(draw(0, 3, 4), topk=topk)


# ---- losses ----


@pytest.mark.parametrize("topk", [1, 2, 4])
def test_balance_is_one_where_all_share_alike(topk):
    logits = jnp.asarray([np.roll(np.arange(4.0), i) for i in range(4)], "float32")
    loss = lambda z: routing.load_balance_loss(z, routing.choose(z, topk=topk)[1])
    chex.assert_trees_all_close(jax.jit(loss)(logits), 1.0, rtol=1e-6)


def test_balance_of_a_collapse_is_the_number_of_experts():
    logits = 30 * np.tile(np.arange(4) == 2, (5, 1)).astype(np.float32)
    loss = lambda z: routing.load_balance_loss(z, routing.choose(z, topk=1)[1])
    run = jax.jit(jax.value_and_grad(loss))
    chex.assert_trees_all_close(run(logits)[0], 4.0, rtol=1e-6)
    grad = np.asarray(run(logits / 30)[1])
    assert (grad[:, 2] > 0).all() and (grad[:, [0, 1, 3]] < 0).all()


def test_z_loss_is_the_mean_square_of_the_normaliser():
    logits = draw(0, 2, 5, 4)
    expected = np.mean(np.log(np.exp(logits).sum(-1)) ** 2)
    loss = jax.jit(routing.router_z_loss)
    chex.assert_trees_all_close(loss(logits), expected, rtol=1e-5)
    assert loss(logits + 5) > loss(logits)


# ---- layout ----


@pytest.mark.parametrize("E, tile", [(1, 4), (5, 1), (5, 3), (5, 50)])
def test_each_pair_has_a_place_in_a_tile_of_its_expert(E, tile):
    lay = jax.jit(functools.partial(routing.lay, num_experts=E, tile=tile))
    for seed in range(3):
        expert = np.random.default_rng(seed).integers(E, size=23)
        tiles = jax.device_get(lay(jnp.asarray(expert)))
        assert len(set(tiles.place.tolist())) == 23
        np.testing.assert_array_equal(tiles.pair.reshape(-1)[tiles.place], np.arange(23))
        np.testing.assert_array_equal(tiles.expert[tiles.place // tile], expert)


def test_tiles_suffice_for_the_worst_choice():
    """A single pair for each of four experts, and all others for the fifth."""
    expert = jnp.array([0, 1, 2, 3] + [4] * 13)
    lay = jax.jit(functools.partial(routing.lay, num_experts=5, tile=3))
    tiles = jax.device_get(lay(expert))
    assert len(tiles.pair) == 9 and (tiles.place < 9 * 3).all()  # 4 and ceil(13 / 3)
    np.testing.assert_array_equal(tiles.pair.reshape(-1)[tiles.place], np.arange(17))


# ---- experts ----


@pytest.mark.parametrize("shape", [(1,), (2, 9)])
def test_expert_dense_is_a_product_by_the_chosen_matrices(shape):
    x, kernel = draw(0, *shape, 4), draw(1, 5, 4, 3)
    chosen = choices(5, *shape, 2)
    actual = lambda x, kernel: routing.expert_dense(x, kernel, chosen)
    assert_same(actual, lambda x, w: jnp.einsum("...D,...ADF->...AF", x, w[chosen]), (x, kernel))


def test_mixture_mlp_is_a_sum_over_all_with_gates_of_zero():
    args = draw(0, 2, 7, 4), draw(1, 3, 4, 6), draw(2, 3, 6, 4), draw(3, 2, 7, 3)

    def dense(x, up, down, logits):
        p = jnp.where(logits > logits.min(-1, keepdims=True), jax.nn.softmax(logits), 0)
        each = jnp.stack([jax.nn.gelu(x @ up[e]) @ down[e] for e in range(3)], 2)
        return jnp.einsum("BTE,BTED->BTD", p / p.sum(-1, keepdims=True), each)

    assert_same(functools.partial(routing.mixture_mlp, topk=2), dense, args)


def test_more_experts_cost_no_more():
    def count(E, topk):
        args = shapes((1, 1024, 32), (E, 32, 64), (E, 64, 32), (1, 1024, E))
        mlp = functools.partial(routing.mixture_mlp, topk=topk)
        return cost.operations(jax.grad(lambda *x: mlp(*x).sum(), (0, 1, 2, 3)), *args)

    products = 3 * 2 * 2 * 1024 * 32 * 64  # of one expert, with both gradients
    assert count(4, 2) < 1.5 * 2 * products
    assert count(32, 2) < 1.2 * count(4, 2)
    assert count(32, 4) > 1.5 * count(32, 2)


# ---- attention ----


def dense_heads(q, k, v, chosen, **options):
    """Every query in each of four heads, and then the heads that it chose."""
    attend = functools.partial(ops.dot_product_attention, **options)
    outputs = jax.vmap(lambda q: attend(q[:, :, None].repeat(4, 2), k, v), 2, 2)(q)
    return jnp.take_along_axis(outputs, chosen[..., None, None], 3)[:, :, :, 0]


@pytest.mark.parametrize("T, S", [(9, 9), (1, 12)])
def test_routed_attention_is_attention_in_the_chosen_heads(T, S):
    args = draw(0, 2, T, 2, 8), draw(1, 2, S, 2, 8), draw(2, 2, S, 2, 6)
    chosen = choices(4, 2, T, 2)
    valid = jnp.asarray(np.arange(S)[None] % 5 != np.array([[2], [3]]))
    options = dict(mask=masks.Causal() & masks.Valid(valid), q_offset=S - T)
    routed = functools.partial(routing.routed_attention, num_heads=4)
    assert_same(
        lambda *x: routed(*x, chosen, **options),
        lambda *x: dense_heads(*x, chosen, **options),
        args,
    )


def test_routed_attention_of_long_sequences_holds_no_tile_whole():
    T, chosen = 800, jnp.zeros((1, 800, 1), int)
    causal = dict(mask=masks.Causal())
    routed = lambda *x: routing.routed_attention(*x, chosen, num_heads=1, **causal)
    full = functools.partial(ops.dot_product_attention, implementation="dense", **causal)
    assert_same(routed, full, [draw(i, 1, T, 1, 4) for i in range(3)])
    sizes = [cost.largest_array(fn, *shapes(*[(1, T, 1, 4)] * 3)) for fn in (routed, full)]
    assert sizes[0] < sizes[1] / 8


def test_routed_attention_reads_no_head_that_is_not_chosen():
    q, k, v = draw(0, 1, 6, 1, 8), draw(1, 1, 6, 3, 8), draw(2, 1, 6, 3, 8)
    chosen = jnp.array([0, 2, 0, 2, 2, 0])[None, :, None]
    k, v = (jnp.asarray(np.where(np.arange(3)[:, None] == 1, np.nan, x)) for x in (k, v))
    routed = jax.jit(functools.partial(routing.routed_attention, num_heads=3))
    assert np.isfinite(routed(q, k, v, chosen)).all()


def test_routed_attention_costs_by_the_heads_of_a_token():
    heads = lambda N: shapes(*[(1, 1024, N, 32)] * 3)
    full = functools.partial(ops.dot_product_attention, implementation="dense")

    def count(A, N):
        (q, *_), (_, k, v), chosen = heads(A), heads(N), jnp.zeros((1, 1024, A), int)
        return cost.operations(
            lambda *x: routing.routed_attention(*x, chosen, num_heads=N), q, k, v
        )

    assert count(2, 16) < 1.15 * count(2, 4)
    assert count(2, 16) < 1.3 * cost.operations(full, *heads(2))
    assert count(4, 16) > 1.7 * count(2, 16)


def test_routed_attention_refuses_masks_by_head():
    mask = masks.Dense(jnp.ones((1, 4, 3, 3), bool))
    args = draw(0, 1, 3, 1, 8), draw(1, 1, 3, 4, 8), draw(2, 1, 3, 4, 8), jnp.zeros((1, 3, 1), int)
    with pytest.raises(NotImplementedError, match="mine can't honour Dense"):
        routing.routed_attention(*args, num_heads=4, mask=mask, by="mine")
