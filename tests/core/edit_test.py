"""Reading and rewriting attention of a small stack, by layer and by head."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import edit, layers, masks
from attnjax.ops import dot_product_attention as ops
from attnjax.softmax import multi_head_attention as mha
from tests.cotangents import like

B, T, D, N, H = 2, 6, 16, 4, 8
KEY = jax.random.key(0)


class Stack(nn.Module):
    """Three attention layers with residual connections."""

    mask: masks.Mask | None = None

    @nn.compact
    def __call__(self, x):
        for i in range(3):
            x = x + mha.MultiHeadAttention(N, H, name=f"block_{i}")(x, mask=self.mask)
        return x


class Scanned(nn.Module):
    """One attention layer used twice, in a scan."""

    @nn.compact
    def __call__(self, x):
        step = lambda layer, x, _: (layer(x), None)
        scan = nn.scan(step, {"params": 0}, split_rngs={"params": True}, length=2)
        return scan(mha.MultiHeadAttention(N, H, name="layers"), x, None)[0]


class OverGrid(nn.Module):
    """Attention whose queries, keys and values have two axes (X Y)."""

    @nn.compact
    def __call__(self, x):
        heads = [layers.HeadProjection(N, H, name=name)(x) for name in ("q", "k", "v")]
        return layers.Attend(over_grid)(*heads)


def over_grid(q, k, v):
    """Softmax attention of each cell (X Y) to all."""
    flat = lambda x: x.reshape(x.shape[0], -1, *x.shape[-2:])
    return ops.dot_product_attention(flat(q), flat(k), flat(v)).reshape(*q.shape[:-1], v.shape[-1])


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.fixture(scope="module")
def setting():
    model, x = Stack(masks.Causal()), draw(B, T, D)
    params = like(jax.eval_shape(model.init, KEY, x))
    return model, jax.tree.map(lambda p: np.asarray(p) / 4, params), x


def test_reads_the_softmax_of_each_layer(setting):
    model, params, x = setting
    run = lambda params, x: (model.apply(params, x), edit.read(model.apply)(params, x))
    plain, (y, maps) = jax.jit(run)(params, x)
    chex.assert_trees_all_equal(plain, y)
    assert list(maps) == [f"block_{i}/attend" for i in range(3)]
    kernel = lambda name: params["params"]["block_0"][name]["heads"]["kernel"]
    q, k = (np.einsum("BTD,DNH->BNTH", x, kernel(name)) for name in ("query", "key"))
    e = np.exp(q @ k.swapaxes(-1, -2) / np.sqrt(np.float32(H))) * np.tri(T, dtype=np.float32)
    expected = e / e.sum(-1, keepdims=True)
    chex.assert_trees_all_close(maps["block_0/attend"], expected, rtol=1e-5)


def test_reads_queries_and_keys(setting):
    model, params, x = setting
    read = edit.read(model.apply, what="qk", where="block_0/*")
    found = jax.jit(lambda *args: read(*args)[1])(params, x)
    (path, (q, _)), kernel = *found.items(), params["params"]["block_0"]["query"]["heads"]["kernel"]
    assert path == "block_0/attend"
    chex.assert_trees_all_close(q, np.einsum("BTD,DNH->BTNH", x, kernel), rtol=1e-5, atol=1e-5)


def test_logits_and_weights_say_the_same(setting):
    """Hiding key 0 from head 1 of layer 1, by the score and by the weight."""
    model, params, x = setting
    hide = lambda score, b, n, t, s: jnp.where((s == 0) & (t > 0), -jnp.inf, score)

    def renormalised(w):
        w = w.at[:, :, 1:, 0].set(0)
        return w / w.sum(-1, keepdims=True)

    here = dict(where="block_1/*", heads=[1])
    by_logits = edit.rewrite(model.apply, logits=hide, **here)
    by_weights = edit.rewrite(model.apply, weights=renormalised, **here)
    a, b, y = jax.jit(lambda *args: [f(*args) for f in (by_logits, by_weights, model.apply)])(
        params, x
    )
    chex.assert_trees_all_close(a, b, rtol=1e-5, atol=1e-5)
    assert np.abs(jax.device_get(a) - y).max() > 1e-3


def test_only_chosen_layers_and_heads_change(setting):
    model, params, x = setting
    halved = lambda score, b, n, t, s: score / 2
    apply = edit.read(edit.rewrite(model.apply, logits=halved, where="block_1/*", heads=[0, 2]))
    both = jax.jit(lambda *args: (edit.read(model.apply)(*args), apply(*args)))
    (_, before), (_, after) = jax.device_get(both(params, x))
    change = {path: np.abs(after[path] - w).max((0, 2, 3)) for path, w in before.items()}
    assert not change["block_0/attend"].any() and change["block_2/attend"].all()
    assert list(change["block_1/attend"] > 1e-4) == [True, False, True, False]
    assert not change["block_1/attend"][[1, 3]].any()


def test_queries_and_keys_of_another_run_give_its_map(setting):
    """Values stay those of the run that is rewritten."""
    model, params, x = setting
    other = draw(*x.shape, seed=1)

    @jax.jit
    def run(params, x, other):
        _, found = edit.read(model.apply, what="qk")(params, other)
        _, maps = edit.read(model.apply)(params, other)
        replace = edit.read(edit.rewrite(model.apply, qk=lambda path, q, k: found[path]))
        return model.apply(params, other), maps, replace(params, x)

    y, maps, (injected, seen) = jax.device_get(run(params, x, other))
    chex.assert_trees_all_close(seen, maps, rtol=1e-6, atol=1e-7)
    assert np.abs(injected - y).max() > 1e-2


def test_rewrites_of_one_path_compose(setting):
    model, params, x = setting
    halved = lambda score, b, n, t, s: score / 2
    twice = edit.rewrite(edit.rewrite(model.apply, logits=halved), logits=halved)
    quarter = edit.rewrite(model.apply, logits=lambda score, b, n, t, s: score / 4)
    doubled = edit.rewrite(model.apply, weights=lambda w: 2 * w, where="block_2/*")
    each = twice, quarter, edit.read(model.apply), edit.read(doubled)
    run = jax.jit(lambda *args: [apply(*args) for apply in each])
    a, b, (_, before), (_, after) = jax.device_get(run(params, x))
    chex.assert_trees_all_close(a, b, rtol=1e-6, atol=1e-6)
    before["block_2/attend"] = 2 * before["block_2/attend"]
    chex.assert_trees_all_close(after, before, rtol=1e-6)


def test_gradients_reach_parameters_and_what_a_rewrite_captures(setting):
    model, params, x = setting

    def loss(params, bias, x):
        mod = lambda score, b, n, t, s: score + bias[n]
        apply = edit.rewrite(model.apply, logits=mod, weights=lambda w: w * bias[0])
        return (apply(params, x) ** 2).sum()

    one = np.ones(N, np.float32)
    grads, gain = jax.device_get(jax.jit(jax.grad(loss, (0, 1)))(params, one, x))
    assert all(grad.any() for grad in jax.tree.leaves(grads))
    assert abs(gain[0]) > 1e-2 and np.abs(gain[1:]).max() < 1e-3  # softmax ignores a constant


def test_a_grid_is_flattened_in_row_order():
    model, x = OverGrid(), draw(B, 2, 3, D)
    params = like(jax.eval_shape(model.init, KEY, x))
    cut = edit.rewrite(model.apply, weights=lambda w: w.at[:, :, :3].set(0))
    run = jax.jit(lambda *args: (edit.read(model.apply)(*args), cut(*args)))
    (y, maps), first_row = jax.device_get(run(params, x))
    w = maps["Attend_0"]
    assert w.shape == (B, N, 6, 6) and y.shape == (B, 2, 3, N, H)
    assert not first_row[:, 0].any()
    chex.assert_trees_all_close(first_row[:, 1], y[:, 1], rtol=1e-5, atol=1e-6)


def test_what_cannot_be_done_raises(setting):
    model, params, x = setting
    with pytest.raises(ValueError, match="no attention matches where='block_9.*there is block_0/a"):
        jax.eval_shape(edit.read(model.apply, where="block_9/*"), params, x)
    with pytest.raises(ValueError, match=r"heads=\[4\] must be among the 4 heads"):
        jax.eval_shape(edit.rewrite(model.apply, weights=lambda w: w, heads=[4]), params, x)
    with pytest.raises(ValueError, match="what='values' must be"):
        edit.read(model.apply, what="values")
    with pytest.raises(ValueError, match="jitted already"):
        edit.read(jax.jit(model.apply))(params, x)
    scanned = Scanned()
    with pytest.raises(NotImplementedError, match="scan over layers"):
        jax.eval_shape(lambda x: edit.read(scanned.apply)(scanned.init(KEY, x), x), x)
    grid, image = OverGrid(), draw(B, 2, 3, D)
    with pytest.raises(NotImplementedError, match="over_grid has no logits"):
        run = edit.rewrite(grid.apply, logits=lambda score, b, n, t, s: score)
        jax.eval_shape(lambda x: run(grid.init(KEY, x), x), image)
    with pytest.raises(NotImplementedError, match="does not attend by queries, keys and values"):
        jax.eval_shape(edit.read(layers.Attend(jnp.tanh).apply), {}, x)
