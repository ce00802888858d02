import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from attnjax.core import edit, masks
from attnjax.cross import ip_adapter as ip
from attnjax.ops import dot_product_attention as ops
from tests.cotangents import like

KEY = jax.random.key(0)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def arrays():
    k, v = draw(2, 2, 9, 4, 8, seed=1)
    return draw(2, 5, 4, 8), k, v


def begin(module, *args):
    params = like(jax.eval_shape(module.init, KEY, *args))
    return jax.tree.map(lambda p: p / 4, jax.device_get(params))


@jax.jit
def outputs(q, k, v, strength):
    """Of the adapter; of attention to the text, to the image, and to both in one."""
    text = ops.dot_product_attention(q, k[:, :5], v[:, :5])
    image = ops.dot_product_attention(q, k[:, 5:], v[:, 5:])
    together = ops.dot_product_attention(q, k, v)
    return ip.ip_adapter(q, k, v, strength=strength), text, image, together


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_strength_zero_is_cross_attention_to_the_text(dtype):
    actual, expected, *_ = outputs(*(x.astype(jnp.dtype(dtype)) for x in arrays()), 0.0)
    chex.assert_trees_all_equal(actual, expected)


def test_output_is_linear_in_the_strength():
    at = lambda strength: jax.device_get(outputs(*arrays(), strength))
    (zero, *_), (one, _, image, _), (part, *_) = at(0.0), at(1.0), at(0.3)
    chex.assert_trees_all_close(part, zero + np.float32(0.3) * (one - zero), rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(one - zero, image, rtol=1e-5, atol=1e-6)


def test_there_are_two_softmaxes():
    attend = functools.partial(ip.ip_adapter, strength=0.5)
    w = jax.device_get(jax.jit(functools.partial(edit.matrix, attend))(*arrays()))
    ones = np.ones(w.shape[:-1], np.float32)
    chex.assert_trees_all_close(w[..., :5].sum(-1), ones, rtol=1e-5)
    chex.assert_trees_all_close(w[..., 5:].sum(-1), 0.5 * ones, rtol=1e-5)
    o, _, _, together = jax.device_get(outputs(*arrays(), 1.0))
    assert abs(o - together).max() > 0.1


def test_masks_and_score_mods_go_by_positions_in_the_whole_context():
    kept = np.array([0, 2, 4, 6, 8])  # text 0, 2, 4; image 6, 8
    closed = lambda score, b, n, t, s: jnp.where(s % 2 == 0, score, -jnp.inf)

    @jax.jit
    def run(q, k, v, valid):
        short = ip.ip_adapter(q, k[:, kept], v[:, kept], num_image_tokens=2)
        options = dict(mask=masks.Valid(valid)), dict(score_mod=closed)
        return [ip.ip_adapter(q, k, v, **option) for option in options], [short, short]

    actual, expected = run(*arrays(), np.arange(9)[None] % 2 == 0)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [0, 9])
def test_needs_both_kinds_of_token(count):
    with pytest.raises(ValueError, match=f"num_image_tokens={count} must be positive and less"):
        jax.eval_shape(functools.partial(ip.ip_adapter, num_image_tokens=count), *arrays())


def test_module_begins_with_the_projections_of_the_text():
    """Then the same tokens as text and as image double the output; before, they don't."""
    x, tokens = draw(2, 5, 12), draw(2, 4, 12, seed=1)
    twice = np.concatenate([tokens, tokens], 1)

    @jax.jit
    def run(params, x, twice):
        of = lambda params, **options: ip.IPAdapter(4, 8, **options).apply(params, x, twice)
        return of(params), 2 * of(params, strength=0.0)

    params = begin(ip.IPAdapter(4, 8), x, twice)
    copied = ip.copy_projections(params)
    chex.assert_trees_all_equal_structs(copied, params)
    for start, expected in ((copied, True), (params, False)):
        doubled, base = jax.device_get(run(start, x, twice))
        assert np.allclose(doubled, base, rtol=1e-5, atol=1e-6) is expected


def test_an_update_changes_only_the_new_projections():
    adapter, project = ip.IPAdapter(4, 8), ip.ImageTokens(12)
    x, text, embedding = draw(2, 5, 12), draw(2, 6, 12, seed=1), draw(2, 20, seed=2)
    params = dict(block=begin(adapter, x, draw(2, 9, 12)), image_tokens=begin(project, embedding))

    def loss(params, x, text, embedding):
        image = project.apply(params["image_tokens"], embedding)
        return (adapter.apply(params["block"], x, jnp.concatenate([text, image], 1)) ** 2).sum()

    grads = jax.device_get(jax.jit(jax.grad(loss))(params, x, text, embedding))
    frozen = jax.tree.map(lambda new: not new, ip.trainable(params))
    optimizer = optax.chain(optax.sgd(0.1), optax.masked(optax.set_to_zero(), frozen))
    update = jax.jit(lambda grads: optimizer.update(grads, optimizer.init(grads))[0])
    changed = {
        jax.tree_util.keystr(path, simple=True, separator="/").split("/params/")[1]
        for path, update in jax.tree.leaves_with_path(jax.device_get(update(grads)))
        if update.any()
    }
    assert all(grad.any() for grad in jax.tree.leaves(grads))
    assert changed == {
        "image_key/heads/kernel",
        "image_value/heads/kernel",
        "project/dense/kernel",
        "project/dense/bias",
        "norm/scale",
        "norm/bias",
    }


def test_image_tokens_are_normalised():
    """By a norm that begins with scales of 1."""
    module, embedding = ip.ImageTokens(12, num_image_tokens=3), draw(2, 20)
    run = jax.jit(lambda x: module.init_with_output(KEY, x)[0])
    tokens = jax.device_get(run(100 * embedding))
    assert tokens.shape == (2, 3, 12)
    chex.assert_trees_all_close((tokens**2).mean(-1), np.ones((2, 3), np.float32), rtol=1e-4)
    assert abs(tokens[:, 0] - tokens[:, 1]).max() > 0.1
