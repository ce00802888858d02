"""Only what is particular to LaMamba-Diff: what its gates let through, and how far."""

import chex
import jax
import jax.numpy as jnp
import pytest

from attnjax.core import registry
from attnjax.ssm import lamamba_diff as lib

KEY = jax.random.key(0)
ARGS = lib.SPEC.example(KEY, 9)  # a grid of 9 x 3
M = ARGS["modulation"]
first_off, second_off = M.at[:, 2].set(0), M.at[:, 5].set(0)


def test_with_both_gates_shut_it_is_the_identity():
    shut = first_off.at[:, 5].set(0)
    y = jax.jit(lambda: lib.lamamba_diff(**ARGS | dict(modulation=shut)))()
    chex.assert_trees_all_equal(y, ARGS["x"])


@pytest.mark.parametrize(
    ("modulation", "shift", "seen"),
    [(first_off, 0, range(3, 6)), (first_off, 1, range(4, 7)), (second_off, 0, range(9))],
    ids=["windows", "shifted windows", "scans"],
)
def test_reach_of_each_step(modulation, shift, seen):
    """By rows: what a cell in row 4 sees in windows of 3, and what it does by the scans."""
    args = ARGS | dict(modulation=modulation, offsets=ARGS["offsets"][:, :, :9, :9])
    run = lambda x: lib.lamamba_diff(**args | dict(x=x), window=3, shift=shift)[0, 4].sum()
    grad = jax.jit(jax.grad(run))(ARGS["x"])[0]
    assert jnp.flatnonzero(jnp.abs(grad).sum((1, 2)) > 0).tolist() == list(seen)


def test_windows_see_what_the_scans_made_and_not_the_other_way():
    """Attention comes second: the whole is it, upon the output of the scans alone."""

    @jax.jit
    def run():
        scanned = lib.lamamba_diff(**ARGS | dict(modulation=second_off))
        both = lib.lamamba_diff(**ARGS | dict(modulation=first_off, x=scanned))
        swapped = lib.lamamba_diff(**ARGS | dict(modulation=first_off))
        swapped = lib.lamamba_diff(**ARGS | dict(modulation=second_off, x=swapped))
        return lib.lamamba_diff(**ARGS), both, swapped

    actual, expected, swapped = run()
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert jnp.abs(actual - swapped).max() > 1e-2


def test_attention_is_that_of_swin():
    """With shift and scale at rest and a gate of 1."""
    rest = jnp.zeros((2, 6, 4)).at[:, 5].set(1)

    @jax.jit
    def run():
        x = jax.nn.standardize(ARGS["x"], epsilon=1e-6)
        q, k, v = jnp.einsum("BXYD,PDNH->PBXYNH", x, ARGS["qkv"])
        o = registry.get("swin").fn(q, k, v, ARGS["offsets"], window=8, shift=4)
        o = ARGS["x"] + jnp.einsum("BXYNH,NHD->BXYD", o, ARGS["merge"])
        return lib.lamamba_diff(**ARGS | dict(modulation=rest), shift=4), o

    chex.assert_trees_all_close(*run(), rtol=1e-5, atol=1e-5)


def test_the_condition_is_of_each_image_and_may_be_withheld():
    module = lib.LamambaDiff(num_heads=2, head_dim=4, window=3, state=2)
    x = jnp.broadcast_to(jax.random.normal(KEY, (4, 4, 8)), (3, 4, 4, 8))
    params = jax.jit(module.init)(KEY, x)
    none = params["params"]["no_condition"]["table"]
    condition = jnp.stack([none, 0 * none + 1, none])
    y, without = jax.jit(lambda: (module.apply(params, x, condition), module.apply(params, x)))()
    chex.assert_trees_all_close(y[jnp.array([0, 2])], without[:2], rtol=1e-5, atol=1e-5)
    assert jnp.abs(y[1] - without[1]).max() > 1e-2


def test_the_module_hands_on_its_options():
    seen = {}

    def spy(x, *arrays, **options):
        seen.update(options)
        return x

    module = lib.LamambaDiff(2, 4, window=3, shift=1, pattern="raster", fn=spy)
    jax.eval_shape(module.init, KEY, jnp.zeros((1, 2, 2, 8)))
    assert seen == dict(window=3, shift=1, pattern="raster")
