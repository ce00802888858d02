"""Only what is particular to LaMamba-Diff: what its gates let through, and how far."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np

from attnjax.core import registry
from attnjax.ssm import lamamba_diff as lib
from tests.cotangents import like
from tests.initial import initial

KEY = jax.random.key(0)
ARGS = jax.device_get(initial(lambda key: lib.SPEC.example(key, 9), KEY))  # a grid of 9 x 3
M = ARGS["modulation"]


def draw(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def off(*gates):
    """The modulation with some of its gates shut."""
    m = M.copy()
    m[:, list(gates)] = 0
    return m


def test_with_both_gates_shut_it_is_the_identity():
    y = jax.jit(lambda args: lib.lamamba_diff(**args))(ARGS | dict(modulation=off(2, 5)))
    chex.assert_trees_all_equal(y, ARGS["x"])


def test_reach_of_each_step():
    """By rows: what a cell in row 4 sees in windows of 3, also shifted, and what by the scans."""
    args = ARGS | dict(offsets=ARGS["offsets"][:, :, :9, :9])

    @functools.partial(jax.jit, static_argnames="shift")
    def gradient(args, shift):
        run = lambda x: lib.lamamba_diff(**args | dict(x=x), window=3, shift=shift)[0, 4].sum()
        return jax.grad(run)(args["x"])[0]

    for gate, shift, seen in ((2, 0, range(3, 6)), (2, 1, range(4, 7)), (5, 0, range(9))):
        grad = jax.device_get(gradient(args | dict(modulation=off(gate)), shift))
        assert np.flatnonzero(np.abs(grad).sum((1, 2))).tolist() == list(seen)


def test_windows_see_what_the_scans_made_and_not_the_other_way():
    """Attention comes second: the whole is it, upon the output of the scans alone."""
    run = jax.jit(lambda args: lib.lamamba_diff(**args))
    of = lambda **changes: jax.device_get(run(ARGS | changes))
    actual, first, second = of(), off(2), off(5)
    expected = of(modulation=first, x=of(modulation=second))
    swapped = of(modulation=second, x=of(modulation=first))
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert np.abs(actual - swapped).max() > 1e-2


def test_attention_is_that_of_swin():
    """With shift and scale at rest and a gate of 1."""
    rest = np.zeros((2, 6, 4), np.float32)
    rest[:, 5] = 1

    @jax.jit
    def run(args):
        x = jax.nn.standardize(args["x"], epsilon=1e-6)
        q, k, v = jnp.einsum("BXYD,PDNH->PBXYNH", x, args["qkv"])
        o = registry.get("swin").fn(q, k, v, args["offsets"], window=8, shift=4)
        o = args["x"] + jnp.einsum("BXYNH,NHD->BXYD", o, args["merge"])
        return lib.lamamba_diff(**args, shift=4), o

    chex.assert_trees_all_close(*run(ARGS | dict(modulation=rest)), rtol=1e-5, atol=1e-5)


def test_the_condition_is_of_each_image_and_may_be_withheld():
    module = lib.LamambaDiff(num_heads=2, head_dim=4, window=3, state=2)
    x = np.broadcast_to(draw(4, 4, 8), (3, 4, 4, 8))
    params = like(jax.eval_shape(module.init, KEY, x))
    params = jax.tree.map(lambda p: p / 3, jax.device_get(params))
    none = params["params"]["no_condition"]["table"]
    condition = np.stack([none, 0 * none + 1, none])
    both = jax.jit(lambda params, *xs: (module.apply(params, *xs), module.apply(params, xs[0])))
    y, without = jax.device_get(both(params, x, condition))
    chex.assert_trees_all_close(y[[0, 2]], without[:2], rtol=1e-5, atol=1e-5)
    assert np.abs(y[1] - without[1]).max() > 1e-2


def test_the_module_hands_on_its_options():
    seen = {}

    def spy(x, *arrays, **options):
        seen.update(options)
        return x

    module = lib.LamambaDiff(2, 4, window=3, shift=1, pattern="raster", fn=spy)
    jax.eval_shape(module.init, KEY, draw(1, 2, 2, 8))
    assert seen == dict(window=3, shift=1, pattern="raster")
