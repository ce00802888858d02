"""Dual attention: what it becomes, what relations know of, and what they are better at."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import masks
from attnjax.higher_order import dual_attention_transformer as lib
from attnjax.ops import dot_product_attention as ops
from attnjax.softmax import multi_head_attention as softmax
from tests import training
from tests.initial import initial

KEY = jax.random.key(0)
EXAMPLE = jax.device_get(initial(lambda key: lib.SPEC.example(key, 7), KEY))
run = jax.jit(lib.dual_attention_transformer, static_argnames="mask")


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_without_relations_it_is_multi_head_attention():
    @jax.jit
    def both(args):
        expected = ops.dot_product_attention(*(args[x] for x in "qkv"), mask=masks.Causal())
        return lib.dual_attention_transformer(**args, mask=masks.Causal()), expected

    chex.assert_trees_all_close(*both(EXAMPLE | dict(w=0 * EXAMPLE["w"])), rtol=1e-5, atol=1e-5)


def test_a_relation_is_added_up_by_weight():
    """One query, one relation: by hand."""
    q, k = np.zeros((1, 1, 2, 4), np.float32), np.zeros((1, 2, 2, 4), np.float32)
    rk = np.arange(8, dtype=np.float32).reshape(1, 2, 1, 4)
    w = np.float32([[[1, 10, 100]]])
    o = jax.device_get(run(q, k, k[..., :3], q[:, :, :1] + 2, rk, w))
    relation = (2 * (0 + 1 + 2 + 3) / 2 + 2 * (4 + 5 + 6 + 7) / 2) / 2  # two halves of weight
    chex.assert_trees_all_close(o[0, 0], np.stack([0 * w[0, 0], relation * w[0, 0]]))


def test_relations_know_how_features_compare_and_not_what_they_are():
    turn = np.linalg.qr(normal(6, 6))[0]
    turned = {name: EXAMPLE[name] @ turn for name in ("rq", "rk")}
    one = EXAMPLE | dict(rq=turned["rq"])
    same, both, other = jax.device_get([run(**x) for x in (EXAMPLE, EXAMPLE | turned, one)])
    chex.assert_trees_all_close(both, same, rtol=1e-4, atol=1e-5)
    assert np.abs(other - same)[:, :, 2:].max() > 0.1


def test_symbols_are_those_of_the_nearest_template():
    templates = np.eye(5, 8, dtype=np.float32)[:, None].repeat(2, 1)  # M N H
    library, chosen = normal(5, 2, 3), np.array([[3, 0, 3, 1]])
    attend = jax.jit(lib.symbolic_attention)
    of = lambda scale: jax.device_get(attend(scale * templates[chosen], templates, library))
    chex.assert_trees_all_close(of(100), library[chosen], rtol=1e-5)
    expected = (library.sum(0) + (np.e - 1) * library[chosen]) / (np.e + 4)  # weights e, 1, 1..
    near, mean = of(np.float32(8**0.5)), of(0)
    chex.assert_trees_all_close(near, expected.astype(np.float32), rtol=1e-5, atol=1e-6)
    expected = np.broadcast_to(library.mean(0), mean.shape)
    chex.assert_trees_all_close(mean, expected, rtol=1e-5, atol=1e-6)


def test_symmetric_relations_have_one_projection():
    module = lib.DualAttentionTransformer(4, 8, num_symbols=3, symmetric=True)
    params = jax.eval_shape(module.init, KEY, normal(1, 4, 16))["params"]
    assert "relation_query" in params and "relation_key" not in params
    asked = []
    spy = lambda q, k, v, rq, rk, w, **_: asked.append((rq, rk)) or v
    jax.eval_shape(module.clone(fn=spy).init, KEY, normal(1, 4, 16))
    assert asked[0][0] is asked[0][1]


def test_sizes_of_the_module():
    module = lib.DualAttentionTransformer(
        4, 8, num_relational_heads=1, num_relations=3, relation_dim=5, num_symbols=6
    )
    params = jax.eval_shape(module.init, KEY, normal(1, 4, 16))["params"]
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


def accuracies_after_training(*modules):
    """Of same or different, for vectors that were not seen; modules learn side by side."""
    known, new = np.random.default_rng(0).choice(np.float32([-1, 1]), (2, 64, 16))
    x = jnp.ones((128, 2, 16))
    begin = lambda module: dict(
        layer=initial(module.init, KEY, x), read=np.zeros(16, np.float32), bias=np.float32(0)
    )

    def margins(params, key, vectors):
        """Of each module; above zero it is right."""
        x, label = pairs(key, jnp.asarray(vectors))
        for module, p in zip(modules, params, strict=True):
            y = module.apply(p["layer"], x).mean(1)
            yield label * (y @ p["read"] + p["bias"])

    loss = lambda params, key: sum(jax.nn.softplus(-m).mean() for m in margins(params, key, known))
    params = training.fit(loss, [*map(begin, modules)], steps=200, learning_rate=0.01)
    final = jax.jit(lambda params: [*margins(params, jax.random.key(1), new)])(params)
    return [(margin > 0).mean() for margin in jax.device_get(final)]


def size(module):
    params = jax.eval_shape(module.init, KEY, normal(1, 2, 16))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def test_learns_same_and_different_of_tokens_it_has_not_seen():
    """The headline, in small: with as many heads and more parameters, values alone don't."""
    dual = lib.DualAttentionTransformer(2, 8, num_relations=4, relation_dim=16, num_symbols=4)
    values = softmax.MultiHeadAttention(2, 32)
    assert size(values) > size(dual)
    of_dual, of_values = accuracies_after_training(dual, values)
    assert of_dual > 0.9 and of_values < 0.7


def test_arguments_that_do_not_fit():
    for A in (0, 4):
        with pytest.raises(ValueError, match="must be for 1 to 3 of the N=4 heads"):
            run(**(EXAMPLE | dict(w=np.ones((A, 3, 5), np.float32))))
        with pytest.raises(ValueError, match=f"num_relational_heads={A} must be 1 to 3"):
            module = lib.DualAttentionTransformer(4, 8, num_relational_heads=A)
            jax.eval_shape(module.init, KEY, normal(1, 3, 8))
    with pytest.raises(ValueError, match="mask for 4 heads must be for 1"):
        mask = masks.Dense(jnp.asarray(np.ones((1, 4, 7, 7), bool)))
        jax.eval_shape(lambda args: lib.dual_attention_transformer(**args, mask=mask), EXAMPLE)
