"""Only what is particular to Sparsifiner; the rest is tests/conformance_test.py."""

import functools

import chex
import jax
import jax.numpy as jnp
import pytest

from attnjax.core import edit, masks
from attnjax.ops import dot_product_attention as ops
from attnjax.sparse import sparsifiner as lib

KEY = jax.random.key(0)


def example(T=12):
    return list(lib.SPEC.example(KEY, T).values())


def weights(args, **options):
    return jax.jit(lambda args: edit.matrix(lib.sparsifiner, *args, **options))(args)


@pytest.mark.parametrize("topk", [12, 99])
def test_all_keys_are_full_attention(topk):
    args = example()
    full = ops.dot_product_attention(*args[:3])
    chex.assert_trees_all_close(lib.sparsifiner(*args, topk=topk), full, rtol=1e-5, atol=1e-6)


def test_each_query_sees_as_many_keys_and_others_in_another_image():
    w = weights(example(), topk=4)
    assert ((w > 0).sum(-1) == 4).all() and not ((w[0] > 0) == (w[1] > 0)).all()
    chex.assert_trees_all_close(w.sum(-1), jnp.ones((2, 3, 12)), rtol=1e-5)


def test_a_guess_without_reduction_is_the_map_itself():
    """One pattern for each key, and gates that leave q and k as they are: the true best keys."""
    q, k, v, *_ = example()
    eye = jnp.eye(8), jnp.eye(8), jnp.eye(12), jnp.eye(12)
    chosen = weights([q, k, v, *eye], topk=4) > 0
    x = jnp.einsum("BTNH,BSNH->BNTS", q, k)
    best = x >= jnp.sort(x, -1)[..., -4:-3]
    chex.assert_trees_all_equal(chosen, best)
    loss = lib.reconstruction_loss(q, k, *eye)
    chex.assert_trees_all_close(loss, 0.0, atol=1e-10)


def test_the_loss_is_the_distance_of_the_guess_to_the_map():
    """Where all patterns are the same, the guess is that pattern."""
    q, k, _, *gates, down, _ = example()
    up = jnp.broadcast_to(jnp.linspace(0, 1, 12)[None], (5, 12))
    valid = jnp.ones((2, 12), bool).at[0, 3].set(False)
    x = jnp.einsum("BTNH,BSNH->BTNS", q, k) / 8**0.5
    w = jax.nn.softmax(jnp.where(valid[:, None, None], x, -jnp.inf))
    square = jnp.where(valid[:, None, None], (w - up[None, None, :1]) ** 2, 0)
    loss = lib.reconstruction_loss(q, k, *gates, down, up, mask=masks.Valid(valid))
    chex.assert_trees_all_close(loss, square.sum() / (2 * 12 * 3), rtol=1e-5)


def test_the_guess_learns_from_its_own_loss_alone():
    x = jax.random.normal(KEY, (2, 9, 16))
    options = dict(num_heads=2, head_dim=8, length=9, topk=3, patterns=4, gate_dim=4)
    modules = [lib.Sparsifiner(**options, reconstruct=w) for w in (0.0, 1.0, 2.0)]

    @jax.jit
    def grads():
        params = modules[0].init(KEY, x)
        return [jax.grad(lambda p, m=m: (m.apply(p, x) ** 2).sum())(params) for m in modules]

    none, once, twice = (g["params"] for g in grads())
    for name in ("gate_query", "gate_key", "down", "up"):
        a, b, c = (g.pop(name)["table"] for g in (none, once, twice))
        assert not a.any() and b.any()
        chex.assert_trees_all_close(c, 2 * b, rtol=1e-6)
    chex.assert_trees_all_equal(none, once)


def test_a_learned_guess_finds_where_attention_looks():
    """Maps that depend on the content of an image: tokens look at those of their own kind."""
    kinds = jax.random.randint(KEY, (16, 12), 0, 3)
    noise = jax.random.normal(jax.random.key(1), (16, 12, 1, 8))
    q = 5 * jax.nn.one_hot(kinds, 8)[:, :, None] + 0.3 * noise
    full = jax.nn.softmax(jnp.einsum("BTNH,BSNH->BNTS", q, q) / 8**0.5)

    def mass(learned):
        seen = edit.matrix(lib.sparsifiner, q, q, q, *learned, topk=4) > 0
        return jnp.where(seen, full, 0).sum(-1).mean()

    @jax.jit
    def run():
        keys = jax.random.split(KEY, 4)
        shapes = (8, 8), (8, 8), (12, 12), (12, 12)
        draw = zip(keys, shapes, strict=True)
        learned = [0.3 * jax.random.normal(key, shape) for key, shape in draw]
        loss = lambda x: lib.reconstruction_loss(q, q, *x)
        step = lambda x, _: (jax.tree.map(lambda x, g: x - 0.3 * g, x, jax.grad(loss)(x)), None)
        return mass(learned), mass(jax.lax.scan(step, learned, None, 400)[0])

    before, after = run()
    assert after > before + 0.1


def test_hidden_keys_are_not_chosen():
    valid = jnp.ones((2, 12), bool).at[:, jnp.array([1, 5])].set(False)
    q, k, *rest = example()
    w = weights([q, k, *rest], topk=4, mask=masks.Valid(valid))
    assert ((w > 0).sum(-1) == 4).all() and not w[..., jnp.array([1, 5])].any()
    other = jnp.where(valid[..., None, None], k, 50.0)
    chex.assert_trees_all_equal(weights([q, other, *rest], topk=4, mask=masks.Valid(valid)), w)


def test_refuses_what_it_cannot_do():
    args = example()
    with pytest.raises(NotImplementedError, match="sparsifiner can't honour Causal"):
        lib.sparsifiner(*args, mask=masks.Causal())
    with pytest.raises(ValueError, match="topk=0 must be at least 1"):
        functools.partial(lib.sparsifiner, topk=0)(*args)
    with pytest.raises(ValueError, match="T=7 must be at most length=6"):
        lib.Sparsifiner(num_heads=1, head_dim=4, length=6).init(KEY, jnp.zeros((1, 7, 8)))
