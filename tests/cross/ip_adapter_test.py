import functools

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

from attnjax.core import edit, masks
from attnjax.cross import ip_adapter as ip
from attnjax.ops import dot_product_attention as ops

KEY = jax.random.key(0)


def draw(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def arrays(dtype="float32"):
    k, v = draw(2, 2, 9, 4, 8, seed=1)
    return [x.astype(dtype) for x in (draw(2, 5, 4, 8), k, v)]


def init(module):
    return jax.jit(module.init)(KEY, draw(2, 5, 12), draw(2, 9, 12))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_strength_zero_is_cross_attention_to_the_text(dtype):
    q, k, v = arrays(dtype)
    chex.assert_trees_all_equal(
        ip.ip_adapter(q, k, v, strength=0.0), ops.dot_product_attention(q, k[:, :5], v[:, :5])
    )


def test_output_is_linear_in_the_strength():
    at = jax.jit(lambda strength: ip.ip_adapter(*arrays(), strength=strength))
    zero, one = at(0.0), at(1.0)
    chex.assert_trees_all_close(at(0.3), zero + 0.3 * (one - zero), rtol=1e-5, atol=1e-6)
    q, k, v = arrays()
    image = ops.dot_product_attention(q, k[:, 5:], v[:, 5:])
    chex.assert_trees_all_close(one - zero, image, rtol=1e-5, atol=1e-6)


def test_there_are_two_softmaxes():
    attend = functools.partial(ip.ip_adapter, strength=0.5)
    w = edit.matrix(attend, *arrays())
    ones = jnp.ones(w.shape[:-1])
    chex.assert_trees_all_close(w[..., :5].sum(-1), ones, rtol=1e-5)
    chex.assert_trees_all_close(w[..., 5:].sum(-1), 0.5 * ones, rtol=1e-5)
    together = ops.dot_product_attention(*arrays())
    assert abs(ip.ip_adapter(*arrays()) - together).max() > 0.1


def test_masks_and_score_mods_go_by_positions_in_the_whole_context():
    q, k, v = arrays()
    valid = jnp.arange(9)[None] % 2 == 0  # text 0, 2, 4; image 6, 8
    kept = jnp.array([0, 2, 4, 6, 8])
    short = ip.ip_adapter(q, k[:, kept], v[:, kept], num_image_tokens=2)
    closed = lambda score, b, n, t, s: jnp.where(s % 2 == 0, score, -jnp.inf)
    for options in (dict(mask=masks.Valid(valid)), dict(score_mod=closed)):
        chex.assert_trees_all_close(ip.ip_adapter(q, k, v, **options), short, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [0, 9])
def test_needs_both_kinds_of_token(count):
    with pytest.raises(ValueError, match=f"num_image_tokens={count} must be positive and less"):
        ip.ip_adapter(*arrays(), num_image_tokens=count)


def test_module_begins_with_the_projections_of_the_text():
    """Then the same tokens as text and as image double the output; before, they don't."""
    module = ip.IPAdapter(4, 8)
    x, tokens = draw(2, 5, 12), draw(2, 4, 12, seed=1)
    params = init(module)
    twice = jnp.concatenate([tokens, tokens], 1)
    for copied, expected in ((ip.copy_projections(params), True), (params, False)):
        doubled = module.apply(copied, x, twice)
        base = ip.IPAdapter(4, 8, strength=0.0).apply(copied, x, twice)
        assert bool(jnp.allclose(doubled, 2 * base, rtol=1e-5, atol=1e-6)) is expected
    chex.assert_trees_all_equal_structs(ip.copy_projections(params), params)


def test_an_update_changes_only_the_new_projections():
    adapter, project = ip.IPAdapter(4, 8), ip.ImageTokens(12)
    x, text, embedding = draw(2, 5, 12), draw(2, 6, 12, seed=1), draw(2, 20, seed=2)
    params = dict(block=init(adapter), image_tokens=project.init(KEY, embedding))

    def loss(params):
        image = project.apply(params["image_tokens"], embedding)
        return (adapter.apply(params["block"], x, jnp.concatenate([text, image], 1)) ** 2).sum()

    grads = jax.jit(jax.grad(loss))(params)
    frozen = jax.tree.map(lambda new: not new, ip.trainable(params))
    optimizer = optax.chain(optax.sgd(0.1), optax.masked(optax.set_to_zero(), frozen))
    updates, _ = optimizer.update(grads, optimizer.init(params))
    changed = {
        jax.tree_util.keystr(path, simple=True, separator="/").split("/params/")[1]
        for path, update in jax.tree.leaves_with_path(updates)
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
    module = ip.ImageTokens(12, num_image_tokens=3)
    params = module.init(KEY, draw(2, 20))
    tokens = module.apply(params, 100 * draw(2, 20))
    assert tokens.shape == (2, 3, 12)
    chex.assert_trees_all_close((tokens**2).mean(-1), jnp.ones((2, 3)), rtol=1e-4)
    assert abs(tokens[:, 0] - tokens[:, 1]).max() > 0.1
