"""Symmetries of the four routes, their reach, limits of the scan, and the residual."""

import chex
import jax
import jax.numpy as jnp
import pytest

from attnjax.ssm import res_vmamba as lib

KEY = jax.random.key(0)
ARGS = lib.SPEC.example(KEY, 4)  # a grid of 4 x 3
WEIGHTS = {name: w for name, w in ARGS.items() if name != "u"}
SHARED = {name: jnp.broadcast_to(w[:1], w.shape) for name, w in WEIGHTS.items()}


@pytest.mark.parametrize(
    ("turn", "symmetric"),
    [
        (lambda u: u.swapaxes(1, 2), True),
        (lambda u: u[:, ::-1, ::-1], True),
        (lambda u: u[:, ::-1], False),
        (lambda u: jnp.rot90(u, axes=(1, 2)), False),
    ],
    ids=["transposed", "half turn", "mirrored", "quarter turn"],
)
def test_with_weights_in_common_it_knows_two_turns_of_an_image(turn, symmetric):
    """Both exchange the routes among each other; a mirror makes routes that are none of them."""
    run = jax.jit(lambda u: lib.res_vmamba(u, **SHARED))
    difference = jnp.abs(run(turn(ARGS["u"])) - turn(run(ARGS["u"]))).max()
    assert difference < 1e-5 if symmetric else difference > 1e-2


def test_each_cell_reaches_every_cell_but_not_by_one_route():
    def reach(weights):
        grad = jax.jacrev(lambda u: lib.res_vmamba(u, **weights)[0].sum(-1))(ARGS["u"])
        return jnp.abs(grad[:, :, 0]).sum(-1) > 0  # X Y, X Y

    off = WEIGHTS | {name: w.at[1:].set(0) for name, w in WEIGHTS.items()}
    every, rows = jax.jit(lambda: (reach(WEIGHTS), reach(off)))()
    assert every.all()
    chex.assert_trees_all_equal(rows.reshape(12, 12), jnp.tril(jnp.ones((12, 12), bool)))


def test_without_memory_each_cell_is_alone():
    """Rates beyond measure leave h_t = delta_t u_t b_t."""
    instant = WEIGHTS | dict(log_rate=jnp.full_like(WEIGHTS["log_rate"], 60.0))

    @jax.jit
    def expected(u):
        total = 0
        for select, widen, bias, _, skip in zip(*WEIGHTS.values(), strict=True):
            r, b, c = jnp.split(u @ select, [1, 4], -1)
            delta = jax.nn.softplus(r @ widen + bias[None, None, None])
            total += (delta * (b * c).sum(-1, keepdims=True) + skip[None, None, None]) * u
        return total

    actual = jax.jit(lambda: lib.res_vmamba(ARGS["u"], **instant))()
    chex.assert_trees_all_close(actual, expected(ARGS["u"]), rtol=1e-5, atol=1e-5)


def test_the_residual_is_added_to_the_layer_of_vmamba():
    module, x = lib.ResVmamba(state=3), jax.random.normal(KEY, (1, 3, 4, 8))
    params = jax.jit(module.init)(KEY, x)["params"]
    without = lambda name: params | {name: jax.tree.map(jnp.zeros_like, params[name])}

    @jax.jit
    def run(x):
        whole, residual, layer = (
            module.apply(dict(params=p), x) for p in (params, without("down"), without("residual"))
        )
        return whole, residual, layer, x @ params["residual"]["dense"]["kernel"]

    whole, residual, layer, expected = run(x)
    chex.assert_trees_all_close(residual, expected, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(whole, residual + layer, rtol=1e-5, atol=1e-5)
    assert jnp.abs(layer).max() > 1e-2
