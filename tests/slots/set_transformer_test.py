import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from attnjax.core import layers, masks
from attnjax.ops import dot_product_attention as ops
from attnjax.slots import set_transformer as sets
from tests import cost, training

KEY = jax.random.key(0)
BLOCKS = dict(
    sab=sets.SAB(2, 8),
    isab=sets.ISAB(2, 8, num_inducing=3),
    pooled=sets.SetTransformer(2, 8, num_seeds=2, num_inducing=None, decoder_blocks=1),
)


def draw(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def init(module, *args):
    return jax.jit(module.init)(KEY, *args)


def test_scale_is_by_the_width_of_all_heads():
    q, k, v = draw(3, 2, 7, 4, 8)
    narrow = ops.dot_product_attention(q / 4**0.5, k, v)
    chex.assert_trees_all_close(sets.set_transformer(q, k, v), narrow, rtol=1e-5, atol=1e-6)


def test_refuses_masks_by_position():
    with pytest.raises(NotImplementedError, match="set_transformer can't honour Causal"):
        sets.set_transformer(*draw(3, 2, 7, 4, 8), mask=masks.Causal())


def test_block_is_the_equation():
    x, y, module = draw(2, 5, 12), draw(2, 9, 10, seed=1), sets.MAB(2, 8)
    params = init(module, x, y)
    params = jax.tree.map(lambda p: p + 0.1 * draw(*p.shape), params)  # norms and biases too
    p = params["params"]
    norm = lambda name, x: nn.LayerNorm().apply(dict(params=p[name]), x)
    heads = lambda name, x: jnp.einsum("BSD,DNH->BSNH", x, p[name]["heads"]["kernel"])

    def equation():
        o = sets.SPEC.oracle(heads("query", x), heads("key", y), heads("value", y))
        a = norm("attended_norm", x + jnp.einsum("BTNH,NHD->BTD", o, p["out"]["merge"]["kernel"]))
        rff = p["feedforward"]["dense"]
        return norm("norm", a + nn.relu(a @ rff["kernel"] + rff["bias"][None, None]))

    found, expected = jax.jit(lambda: (module.apply(params, x, y), equation()))()
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["sab", "isab"])
def test_encoders_are_permutation_equivariant(name):
    x, order = draw(2, 9, 12), jax.random.permutation(KEY, 9)
    params = init(BLOCKS[name], x)
    y, permuted = jax.jit(lambda: [BLOCKS[name].apply(params, a) for a in (x, x[:, order])])()
    chex.assert_trees_all_close(permuted, y[:, order], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["isab", "pooled"])
def test_padding_changes_nothing(name):
    module, x, mask = BLOCKS[name], draw(2, 9, 12), masks.Valid(jnp.arange(9)[None] < 6)
    params = init(module, x)
    padded, short = jax.jit(
        lambda: (module.apply(params, x, mask=mask), module.apply(params, x[:, :6]))
    )()
    chex.assert_trees_all_close(padded[:, : short.shape[1]], short, rtol=1e-4, atol=1e-5)


def test_whole_is_its_blocks_in_turn():
    x, module = draw(2, 9, 12), BLOCKS["pooled"]
    params = init(module, x)

    def in_turn(x):
        pool = sets.PMA(2, 8, num_seeds=2)
        steps = dict(encoder_0=sets.SAB(2, 8), encoder_1=sets.SAB(2, 8), pool=pool)
        for name, block in (steps | dict(decoder_0=sets.SAB(2, 8))).items():
            x = block.apply(dict(params=params["params"][name]), x)
        return x

    found, expected = jax.jit(lambda: (module.apply(params, x), in_turn(x)))()
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_decoder_needs_more_than_one_seed():
    with pytest.raises(ValueError, match="decoder_blocks=1 must be 0 with num_seeds=1"):
        init(sets.SetTransformer(2, 8, decoder_blocks=1), draw(2, 9, 12))


def test_inducing_points_make_the_cost_linear():
    def growth(block):
        params = jax.eval_shape(block.init, KEY, jnp.zeros((1, 8, 12)))
        count = lambda S: cost.operations(block.apply, params, jnp.zeros((1, S, 12)))
        return count(256) / count(128)

    assert growth(BLOCKS["isab"]) <= 2 < 3 < growth(BLOCKS["sab"])


def test_seeds_that_ask_nothing_pool_by_the_mean():
    """Without logits PMA is what it generalises: a mean of features, then a network."""
    x, module = draw(2, 9, 12), sets.PMA(2, 8, num_seeds=3)
    params = init(module, x)
    params["params"]["mab"]["query"]["heads"]["kernel"] *= 0
    features = nn.relu(layers.Dense(12).apply(dict(params=params["params"]["feedforward"]), x))
    one = features.mean(1, keepdims=True)
    seeds = jnp.tile(params["params"]["seeds"]["table"][None], (2, 1, 1))
    mab = jax.jit(sets.MAB(2, 8).apply)
    expected = mab(dict(params=params["params"]["mab"]), seeds, one)
    pooled = jax.jit(module.apply)(params, x)
    chex.assert_trees_all_close(pooled, expected, rtol=1e-4, atol=1e-5)


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
    errors = {}
    for pooling in ("attention", "mean"):
        net = Largest(pooling)
        params = init(net, *sets_of_numbers(KEY, 2)[:2])
        loss = lambda params, key, net=net: error(net, params, key, 32)
        params = training.fit(loss, params, steps=400, learning_rate=5e-3)
        errors[pooling] = float(error(net, params, jax.random.key(5), 512))
    assert errors["attention"] < 0.05 and errors["attention"] < 0.6 * errors["mean"], errors
