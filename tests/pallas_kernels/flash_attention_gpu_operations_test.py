"""What stands for operations that Mosaic lacks on Hopper, and which it is said to lack."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import flash_attention as kernels
from pallas_kernels.flash_attention.mosaic_gpu import operations, score_mod

NEAR = np.linspace(-9, 9, 601, dtype=np.float32)
FAR = np.float32(1.7) * np.arange(-60_000, 60_000, 317, dtype=np.float32)
FUNCTIONS = {
    "tanh": (jnp.tanh, NEAR),
    "sin": (jnp.sin, FAR),
    "cos": (jnp.cos, FAR),
    "log1p": (jnp.log1p, abs(NEAR)),
    "floor": (jnp.floor, NEAR * 2.5),
    "ceil": (jnp.ceil, NEAR * 2.5),
    "pow": (lambda x: jnp.where(x > 0, x, 0.0) ** 0.3 + abs(x) ** 1.7, NEAR),
    "pow of negative numbers": (lambda x: jax.lax.pow(x, jnp.round(x)), NEAR),
    "pow by zero": (lambda x: jax.lax.pow(x, jnp.zeros_like(x)), NEAR),
    "pow without a value": (lambda x: jax.lax.pow(x, jnp.full_like(x, 0.5)), NEAR),
    "integer_pow": (lambda x: x**-3 + x**-1 + x**5, NEAR + 0.01),
    "not": (lambda x: jnp.where(~((x > 1) & ~(x > 5)), x, 0.0), NEAR),
    "convert": (lambda x: jnp.where(jnp.round(x).astype(bool), x, 7.0), NEAR),
    "numbers": (lambda x: jnp.where(x > 0, -jnp.inf, x + jnp.where(x < -3, 1.0, 2.0)), NEAR),
    "stop_gradient": (lambda x: jax.lax.stop_gradient(x) * x, NEAR),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_and_slopes_are_those_of_float32(name):
    fn, x = FUNCTIONS[name][0], jnp.asarray(FUNCTIONS[name][1])
    slope = lambda x: jax.jvp(fn, (x,), (jnp.ones_like(x),))[1]
    for exact in (fn, slope) if name != "pow of negative numbers" else (fn,):
        found, expected = operations.rewritten(exact)(x), exact(x)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6)


LOWERED = {
    "arithmetic": lambda x, t, s, f, n: -abs(x - f) / (1 + x * x) + jnp.sign(x) * n + jnp.sqrt(f),
    "of int32": lambda x, t, s, f, n: x + (t // n) % 3 * jnp.maximum(s, t) - abs(t - s) ** 2,
    "bits and truth": lambda x, t, s, f, n: jnp.where(~(t > s) ^ (((s & 3) | n) == 1), x, f),
    "exponential": lambda x, t, s, f, n: jnp.exp(x) + jnp.exp2(x) + jax.lax.logistic(f * x),
    "logarithmic": lambda x, t, s, f, n: jnp.log(abs(x)) - f * jnp.log1p(abs(t - s) * 1.0),
    "bounds": lambda x, t, s, f, n: f * jnp.tanh(x / f) + jnp.clip(x, -1, 1) + jnp.floor(x),
    "powers": lambda x, t, s, f, n: x**3 + x**-2 + jax.lax.rsqrt(f) - abs(t - s * 1.0) ** f,
    "waves": lambda x, t, s, f, n: x * jnp.cos(f * (t - s)) + jnp.sin(x),
    "of one number": lambda x, t, s, f, n: f,
    "numbers": lambda x, t, s, f, n: jnp.where(
        t > s, -jnp.inf, x * jnp.exp(jnp.where(f > n, 2.0, 3.0))
    ),
    "of none": lambda x, t, s, f, n: jnp.float32(0),
}


def check(function):
    mod = lambda x, t, s, factors, numbers: function(x, t, s, *factors, *numbers)
    mod = jax.vmap(jax.vmap(mod))
    one = jnp.ones((1, 1, 1, 1))
    score_mod.check(kernels.ScoreMod(mod, (one,), (one.astype(jnp.int32),)))


@pytest.mark.parametrize("name", LOWERED)
def test_it_has_what_score_mods_are_made_of(name):
    check(LOWERED[name])


@pytest.mark.parametrize(
    ("function", "named"),
    [
        (lambda x, t, s, f, n: jnp.fmod(x, f), "rem of float32"),
        (lambda x, t, s, f, n: jnp.expm1(x), "expm1 of float32"),
        (lambda x, t, s, f, n: jnp.exp(x.astype(jnp.bfloat16)) + f, "exp of bfloat16"),
    ],
)
def test_what_it_lacks_is_named(function, named):
    with pytest.raises(
        NotImplementedError, match=f"score_mod with {named}, but what Mosaic lowers"
    ):
        check(function)


def test_it_is_asked_wherever_it_is_traced():
    """Within other transforms and on the devices of a mesh."""
    run = functools.partial(check, LOWERED["bounds"])
    traced = lambda x: (run(), x)[1]
    operations._lowers.cache_clear()
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    over = jax.shard_map(traced, mesh=mesh, in_specs=jax.P("x"), out_specs=jax.P("x"))
    jax.eval_shape(jax.jit(jax.grad(lambda x: over(x).sum())), jnp.zeros(4))
    assert operations._lowers.cache_info().misses
