import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import layers, masks
from attnjax.ops import dot_product_attention as ops
from attnjax.slots import set_transformer as sets
from tests import cost, training
from tests.cotangents import like
from tests.initial import initial

KEY = jax.random.key(0)
BLOCKS = dict(
    sab=sets.SAB(2, 8),
    isab=sets.ISAB(2, 8, num_inducing=3),
    pooled=sets.SetTransformer(2, 8, num_seeds=2, num_inducing=None, decoder_blocks=1),
)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def begin(module, *args):
    """Random parameters, norms and biases too."""
    params = like(jax.eval_shape(module.init, KEY, *args))
    return jax.tree.map(lambda p: p / 3, jax.device_get(params))


def test_scale_is_by_the_width_of_all_heads():
    @jax.jit
    def both(q, k, v):
        return sets.set_transformer(q, k, v), ops.dot_product_attention(q / 4**0.5, k, v)

    chex.assert_trees_all_close(*both(*draw(3, 2, 7, 4, 8)), rtol=1e-5, atol=1e-6)


def test_refuses_masks_by_position():
    run = functools.partial(sets.set_transformer, mask=masks.Causal())
    with pytest.raises(NotImplementedError, match="set_transformer can't honour Causal"):
        jax.eval_shape(run, *draw(3, 2, 7, 4, 8))


def test_block_is_the_equation():
    x, y, module = draw(2, 5, 12), draw(2, 9, 10, seed=1), sets.MAB(2, 8)

    @jax.jit
    def both(params, x, y):
        p = params["params"]
        norm = lambda name, x: nn.LayerNorm().apply(dict(params=p[name]), x)
        heads = lambda name, x: jnp.einsum("BSD,DNH->BSNH", x, p[name]["heads"]["kernel"])
        o = sets.SPEC.oracle(heads("query", x), heads("key", y), heads("value", y))
        a = norm("attended_norm", x + jnp.einsum("BTNH,NHD->BTD", o, p["out"]["merge"]["kernel"]))
        rff = p["feedforward"]["dense"]
        expected = norm("norm", a + nn.relu(a @ rff["kernel"] + rff["bias"][None, None]))
        return module.apply(params, x, y), expected

    chex.assert_trees_all_close(*both(begin(module, x, y), x, y), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["sab", "isab"])
def test_encoders_are_permutation_equivariant_and_know_no_padding(name):
    x, order = draw(2, 9, 12), [3, 0, 2, 4, 1, 5]
    params = begin(BLOCKS[name], x)

    @jax.jit
    def apply(params, x, length):
        return BLOCKS[name].apply(params, x, mask=masks.Valid(jnp.arange(9)[None] < length))

    run = lambda x: jax.device_get(apply(params, x, 6))[:, :6]
    y = run(x)
    permuted, other = x.copy(), x.copy()
    permuted[:, :6], other[:, 6:] = x[:, order], 9.0
    chex.assert_trees_all_close(run(permuted), y[:, order], rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(run(other), y, rtol=1e-4, atol=1e-5)


@jax.jit
def pooled(params, x):
    """A padded set, the same without padding, and that block by block."""
    module, short = BLOCKS["pooled"], x[:, :6]
    mask = masks.Valid(jnp.arange(9)[None] < 6)
    pool, z = sets.PMA(2, 8, num_seeds=2), short
    steps = dict(encoder_0=sets.SAB(2, 8), encoder_1=sets.SAB(2, 8), pool=pool)
    for name, block in (steps | dict(decoder_0=sets.SAB(2, 8))).items():
        z = block.apply(dict(params=params["params"][name]), z)
    return module.apply(params, x, mask=mask), module.apply(params, short), z


def test_whole_is_its_blocks_in_turn_and_padding_changes_nothing():
    x = draw(2, 9, 12)
    padded, short, in_turn = pooled(begin(BLOCKS["pooled"], x), x)
    chex.assert_trees_all_close(padded, short, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(short, in_turn, rtol=1e-4, atol=1e-5)


def test_a_decoder_needs_more_than_one_seed():
    with pytest.raises(ValueError, match="decoder_blocks=1 must be 0 with num_seeds=1"):
        begin(sets.SetTransformer(2, 8, decoder_blocks=1), draw(2, 9, 12))


def test_inducing_points_make_the_cost_linear():
    shape = lambda S: jax.ShapeDtypeStruct((1, S, 12), "float32")

    def growth(block):
        params = jax.eval_shape(block.init, KEY, shape(8))
        count = lambda S: cost.operations(block.apply, params, shape(S))
        return count(256) / count(128)

    assert growth(BLOCKS["isab"]) <= 2 < 3 < growth(BLOCKS["sab"])


def test_seeds_that_ask_nothing_pool_by_the_mean():
    """Without logits PMA is what it generalises: a mean of features, then a network."""
    x, module = draw(2, 9, 12), sets.PMA(2, 8, num_seeds=3)

    @jax.jit
    def both(params, x):
        p = params["params"]
        features = nn.relu(layers.Dense(12).apply(dict(params=p["feedforward"]), x))
        one = features.mean(1, keepdims=True)
        seeds = jnp.tile(p["seeds"]["table"][None], (2, 1, 1))
        expected = sets.MAB(2, 8).apply(dict(params=p["mab"]), seeds, one)
        return module.apply(params, x), expected

    params = begin(module, x)
    params["params"]["mab"]["query"]["heads"]["kernel"] *= 0
    chex.assert_trees_all_close(*both(params, x), rtol=1e-4, atol=1e-5)


# ---- the claim: pooling by attention learns the largest of a set, where a mean has to guess ----


class Largest(nn.Module):
    """A number for a set of numbers."""

    pooling: str

    @nn.compact
    def __call__(self, x, valid):
        x = nn.relu(layers.Dense(16)(x[..., None]))
        if self.pooling == "attention":
            x = sets.PMA(2, 8)(x, mask=masks.Valid(valid))[:, 0]
        else:  # Zaheer et al., "Deep Sets": as many layers before and after the mean
            x = nn.relu(layers.Dense(16)(nn.relu(layers.Dense(16)(x))))
            x = nn.relu(layers.Dense(16)(jnp.mean(x, 1, where=valid[..., None])))
        return layers.Dense(1)(x)[:, 0]


def sets_of_numbers(key, batch):
    values, sizes = jax.random.split(key)
    x = jax.random.uniform(values, (batch, 10))
    valid = jnp.arange(10)[None] < jax.random.randint(sizes, (batch, 1), 1, 11)
    return x, valid, jnp.max(x, 1, where=valid, initial=0)


def error(net, params, key, batch):
    x, valid, largest = sets_of_numbers(key, batch)
    return abs(net.apply(params, x, valid) - largest).mean()


def test_learns_the_largest_better_than_deep_sets():
    """Two models that learn side by side, independently of each other."""
    nets = {pooling: Largest(pooling) for pooling in ("attention", "mean")}

    def errors(params, key, batch=32):
        return {name: error(net, params[name], key, batch) for name, net in nets.items()}

    examples = jax.jit(sets_of_numbers, static_argnums=1)(KEY, 2)[:2]
    params = {name: initial(net.init, KEY, *examples) for name, net in nets.items()}
    loss = lambda *args: sum(errors(*args).values())
    params = training.fit(loss, params, steps=400, learning_rate=5e-3)
    final = jax.device_get(jax.jit(errors, static_argnums=2)(params, jax.random.key(5), 512))
    assert final["attention"] < 0.05 and final["attention"] < 0.6 * final["mean"], final
