"""Only what is particular to FlexPrefill; the rest is tests/conformance_test.py."""

import functools

import chex
import jax
import jax.numpy as jnp
import pytest

from attnjax.core import masks
from attnjax.ops import dot_product_attention as ops
from attnjax.sparse import flexprefill as lib

KEY = jax.random.key(0)
C, L = 8, 8  # tokens of a block, blocks
T = C * L


def example(T=T):
    return lib.SPEC.example(KEY, T).values()


def select(q, k, **options):
    return jax.jit(functools.partial(lib.select, block=C, **options))(q, k)


def recall(q, k, selected):
    """The share of full causal attention that lies in the selected blocks, by head."""
    k = jnp.repeat(k, q.shape[2] // k.shape[2], 2)
    x = jnp.einsum("BTNH,BSNH->BNTS", q, k) * q.shape[-1] ** -0.5
    w = jax.nn.softmax(jnp.where(masks.dense(masks.Causal(), T, T), x, -jnp.inf))
    at = jnp.arange(T) // C
    return jnp.where(selected[:, :, at][:, :, :, at], w, 0).sum(-1).mean(-1)


def stripe_head():
    """Every query looks at token 26, which alone is loud in its block, and at its own block."""
    own = jax.nn.one_hot(jnp.arange(T) // C, 16)
    q = (9 * own).at[:, 15].set(9.0)
    k = (2 * own).at[26, 15].set(5.0)
    return q[None, :, None], k[None, :, None]


def aware_head():
    """Each block of queries looks at a block of its own: that of half its number."""
    number = jnp.arange(T) // C
    q, k = 16 * jax.nn.one_hot(number // 2, 16), jax.nn.one_hot(number, 16)
    return q[None, :, None], k[None, :, None]


@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_the_whole_mass_is_full_attention(tau):
    q, k, v = example(61)
    q = q.at[:, -C:].set(1e3 * jnp.repeat(k[:, :1], 2, 2))  # they look at nothing but token 0
    full = functools.partial(ops.dot_product_attention, mask=masks.Causal())
    run = functools.partial(lib.flexprefill, block=C, gamma=1.0, tau=tau)
    both = jax.jit(lambda *x: (run(*x), full(*x)))
    chex.assert_trees_all_close(*both(q, k, v), rtol=1e-5, atol=1e-6)


def test_heads_are_told_apart():
    columns = lambda q, k: lib.observe(q, k, C)[0]
    surprise = lambda q, k: lib.surprise(q, k, columns(q, k), C)[0, 0]
    assert surprise(*stripe_head()) > 0.4  # the mean of a block hides its loud token
    assert surprise(*aware_head()) < 0.1


def test_surprise_is_the_root_of_a_divergence():
    q, k = aware_head()
    at = lambda j: lib.surprise(5 * q, k, jax.nn.one_hot(j, L)[None, None], C)[0, 0]
    chex.assert_trees_all_close(at(3), 0.0, atol=1e-3)  # the last block looks at block 3
    chex.assert_trees_all_close(at(0), jnp.sqrt(jnp.log(2.0)), rtol=1e-4)


def test_a_stripe_head_gets_its_column_and_its_diagonals():
    q, k = stripe_head()
    selected = select(q, k, gamma=0.95)[0, 0]
    i, j = jnp.arange(L)[:, None], jnp.arange(L)[None]
    column = (j == 0) | (j == 3)
    diagonal = (i == j) | (i - j == 3) | (i - j == 4)  # token 26 is 30 to 37 before the last ones
    assert (selected == (j <= i) & (column | diagonal)).all()


def test_a_query_aware_head_gets_blocks_that_no_stripe_holds():
    q, k = aware_head()
    selected = select(q, k, gamma=0.9)
    i = jnp.arange(L)
    assert selected[0, 0, i, i // 2].all() and selected.sum() < 0.8 * L * (L + 1) / 2
    assert recall(q, k, selected) > 0.9
    blind = select(q, k, gamma=0.9, tau=0.0)  # columns and diagonals of the last queries
    assert recall(q, k, blind) < recall(q, k, selected) - 0.1


def test_more_mass_is_more_blocks_and_less_error():
    q, k, v = example()
    q = 3 * q

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def measure(gamma, tau):
        selected = lib.select(q, k, block=C, gamma=gamma, tau=tau)
        mask = masks.Blocks(selected, C, C) & masks.Causal()
        error = ops.dot_product_attention(q, k, v, mask=mask) - full
        return selected.sum(), recall(q, k, selected).mean(), -jnp.abs(error).mean()

    full = ops.dot_product_attention(q, k, v, mask=masks.Causal())
    for tau in (0.0, 1.0):
        few, some, every = (measure(gamma, tau) for gamma in (0.3, 0.7, 1.0))
        assert all(a < b < c for a, b, c in zip(few, some, every, strict=True))


def test_finds_more_than_a_random_choice_of_the_same_size():
    for q, k in (stripe_head(), aware_head()):
        selected = select(q, k, gamma=0.9)
        past = jnp.tril(jnp.ones((L, L), bool))[None, None]
        order = jnp.where(past, jax.random.uniform(KEY, (20, 1, L, L)), 2.0).reshape(20, 1, -1)
        rank = jnp.argsort(jnp.argsort(order)).reshape(20, 1, L, L)
        at_random = recall(q, k, rank < selected.sum()).mean()
        assert recall(q, k, selected) > at_random + 0.2


def test_every_query_keeps_a_key_and_sees_no_later_one():
    q, k, v = example(43)
    run = functools.partial(lib.flexprefill, block=C, gamma=0.0)
    selected = select(q, k, gamma=0.0)
    assert selected[..., 0].all() and jnp.diagonal(selected, axis1=2, axis2=3).all()
    grad = jax.jit(jax.grad(lambda v: (run(q, k, v)[:, 20] ** 2).sum()))(v)
    assert grad[:, :21].any() and not grad[:, 21:].any()


def test_going_on_is_full_attention():
    module = lib.FlexPrefill(num_heads=2, head_dim=8, block=4, gamma=0.0, rotary_base=100.0)
    dense = module.clone(fn=lambda *x, mask, **_: ops.dot_product_attention(*x, mask=mask))
    x = jax.random.normal(KEY, (2, 20, 16))

    @jax.jit
    def run(x):
        params = module.init(KEY, x)
        state = module.apply(params, 2, 24, method="init_state")
        state, a = module.apply(params, state, x[:, :15], method="extend")
        state, b = module.apply(params, state, x[:, 15:], method="extend")
        full = dense.apply(params, x, mask=masks.Causal())
        return jnp.concatenate([a, b], 1), full, module.apply(params, x)

    steps, full, sparse = run(x)
    chex.assert_trees_all_close(steps, full, rtol=1e-5, atol=1e-5)
    assert jnp.abs(sparse - full).max() > 1e-2


def test_refuses_what_it_cannot_do():
    q, k, v = example(6)
    with pytest.raises(NotImplementedError, match="flexprefill can't honour Window"):
        lib.flexprefill(q, k, v, mask=masks.Window(2))
    for options in (dict(gamma=1.1), dict(tau=-1.0), dict(block=0), dict(least=0)):
        with pytest.raises(ValueError, match="must be in"):
            lib.flexprefill(q, k, v, **options)
    with pytest.raises(ValueError, match="must be of the tokens of"):
        lib.flexprefill(q[:, :3], k, v)
