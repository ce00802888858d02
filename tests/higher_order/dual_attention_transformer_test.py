"""Dual attention: what it becomes, what relations know of, and what they are better at."""

import math

import chex
import jax
import jax.numpy as jnp
import pytest

from attnjax.core import masks
from attnjax.higher_order import dual_attention_transformer as lib
from attnjax.ops import dot_product_attention as ops
from attnjax.softmax import multi_head_attention as softmax
from tests import training

KEY = jax.random.key(0)
EXAMPLE = lib.SPEC.example(KEY, 7)
run = jax.jit(lib.dual_attention_transformer, static_argnames="mask")


def test_without_relations_it_is_multi_head_attention():
    o = run(**(EXAMPLE | dict(w=0 * EXAMPLE["w"])), mask=masks.Causal())
    expected = ops.dot_product_attention(*(EXAMPLE[x] for x in "qkv"), mask=masks.Causal())
    chex.assert_trees_all_close(o, expected, rtol=1e-5, atol=1e-5)


def test_a_relation_is_added_up_by_weight():
    """One query, one relation: by hand."""
    q, k, v = jnp.zeros((1, 1, 2, 4)), jnp.zeros((1, 2, 2, 4)), jnp.zeros((1, 2, 2, 3))
    rq, rk = jnp.full((1, 1, 1, 4), 2.0), jnp.arange(8.0).reshape(1, 2, 1, 4)
    w = jnp.array([[[1.0, 10, 100]]])
    o = run(q, k, v, rq, rk, w)
    relation = (2 * (0 + 1 + 2 + 3) / 2 + 2 * (4 + 5 + 6 + 7) / 2) / 2  # two halves of weight
    chex.assert_trees_all_close(o[0, 0], jnp.stack([0 * w[0, 0], relation * w[0, 0]]))


def test_relations_know_how_features_compare_and_not_what_they_are():
    turn = jnp.linalg.qr(jax.random.normal(KEY, (6, 6)))[0]
    turned = EXAMPLE | {name: EXAMPLE[name] @ turn for name in ("rq", "rk")}
    chex.assert_trees_all_close(run(**turned), run(**EXAMPLE), rtol=1e-4, atol=1e-5)
    one = EXAMPLE | dict(rq=EXAMPLE["rq"] @ turn)
    assert jnp.abs(run(**one) - run(**EXAMPLE))[:, :, 2:].max() > 0.1


def test_symbols_are_those_of_the_nearest_template():
    templates = jnp.eye(5, 8)[:, None].repeat(2, 1)  # M N H
    library = jax.random.normal(KEY, (5, 2, 3))
    chosen = jnp.array([[3, 0, 3, 1]])
    p = 100 * templates[chosen]
    symbols = lib.symbolic_attention(p, templates, library)
    chex.assert_trees_all_close(symbols, library[chosen], rtol=1e-5)
    near = lib.symbolic_attention(
        8**0.5 * templates[chosen], templates, library
    )  # weights e, 1, 1..
    expected = (library.sum(0)[None, None] + (jnp.e - 1) * library[chosen]) / (jnp.e + 4)
    chex.assert_trees_all_close(near, expected, rtol=1e-5, atol=1e-6)
    mean = lib.symbolic_attention(0 * p, templates, library)
    expected = jnp.broadcast_to(library.mean(0), mean.shape[1:])[None]
    chex.assert_trees_all_close(mean, expected, rtol=1e-5, atol=1e-6)


def test_symmetric_relations_have_one_projection():
    module = lib.DualAttentionTransformer(4, 8, num_symbols=3, symmetric=True)
    params = jax.eval_shape(module.init, KEY, jnp.ones((1, 4, 16)))["params"]
    assert "relation_query" in params and "relation_key" not in params
    asked = []
    spy = lambda q, k, v, rq, rk, w, **_: asked.append((rq, rk)) or v
    jax.jit(module.clone(fn=spy).init)(KEY, jnp.ones((1, 4, 16)))
    assert asked[0][0] is asked[0][1]


def test_sizes_of_the_module():
    module = lib.DualAttentionTransformer(
        4, 8, num_relational_heads=1, num_relations=3, relation_dim=5, num_symbols=6
    )
    params = jax.eval_shape(module.init, KEY, jnp.ones((1, 4, 16)))["params"]
    assert params["value"]["heads"]["kernel"].shape == (16, 3, 8)
    assert params["symbol_value"]["heads"]["kernel"].shape == (8, 1, 8)
    assert params["relation_key"]["heads"]["kernel"].shape == (16, 3, 5)
    assert params["relation_value"]["table"].shape == (1, 3, 8)
    assert params["symbols"]["library"]["table"].shape == (6, 1, 8)


def pairs(key, vectors):
    """Two tokens of D numbers, each drawn from `vectors`, and 1 where they are the same, or -1."""
    first, second, coin = jax.random.split(key, 3)
    count = len(vectors)
    a = jax.random.randint(first, (128,), 0, count)
    other = (a + jax.random.randint(second, (128,), 1, count)) % count
    same = jax.random.bernoulli(coin, shape=(128,))
    pair = vectors[jnp.stack([a, jnp.where(same, a, other)], 1)]
    return pair, jnp.where(same, 1.0, -1.0)


def accuracy_after_training(module):
    """Of same or different, for vectors that were not seen in training."""
    known, new = jax.random.rademacher(KEY, (2, 64, 16), jnp.float32)
    layer = jax.jit(module.init)(KEY, jnp.ones((128, 2, 16)))
    params = dict(layer=layer, read=jnp.zeros(16), bias=jnp.zeros(()))

    def logits(params, x):
        return module.apply(params["layer"], x).mean(1) @ params["read"] + params["bias"]

    def loss(params, key):
        x, label = pairs(key, known)
        return jax.nn.softplus(-label * logits(params, x)).mean()

    params = training.fit(loss, params, steps=200, learning_rate=0.01)
    x, label = pairs(jax.random.key(1), new)
    return (jax.jit(logits)(params, x) * label > 0).mean()


def size(module):
    params = jax.eval_shape(module.init, KEY, jnp.ones((1, 2, 16)))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def test_learns_same_and_different_of_tokens_it_has_not_seen():
    """The headline, in small: with as many heads and more parameters, values alone don't."""
    dual = lib.DualAttentionTransformer(2, 8, num_relations=4, relation_dim=16, num_symbols=4)
    values = softmax.MultiHeadAttention(2, 32)
    assert size(values) > size(dual)
    assert accuracy_after_training(dual) > 0.9
    assert accuracy_after_training(values) < 0.7


def test_arguments_that_do_not_fit():
    for A in (0, 4):
        with pytest.raises(ValueError, match="must be for 1 to 3 of the N=4 heads"):
            run(**(EXAMPLE | dict(w=jnp.ones((A, 3, 5)))))
        with pytest.raises(ValueError, match=f"num_relational_heads={A} must be 1 to 3"):
            module = lib.DualAttentionTransformer(4, 8, num_relational_heads=A)
            module.init(KEY, jnp.ones((1, 3, 8)))
    with pytest.raises(ValueError, match="mask for 4 heads must be for 1"):
        lib.dual_attention_transformer(**EXAMPLE, mask=masks.Dense(jnp.ones((1, 4, 7, 7), bool)))
