"""Symmetries of the four routes, their reach, limits of the scan, and the residual."""

import chex
import jax
import numpy as np
import pytest

from attnjax.ssm import res_vmamba as lib
from tests.cotangents import like
from tests.initial import initial

KEY = jax.random.key(0)
ARGS = jax.device_get(initial(lambda key: lib.SPEC.example(key, 4), KEY))  # a grid of 4 x 3
WEIGHTS = {name: w for name, w in ARGS.items() if name != "u"}
SHARED = {name: np.broadcast_to(w[:1], w.shape) for name, w in WEIGHTS.items()}
run = jax.jit(lib.res_vmamba)


@pytest.mark.parametrize(
    ("turn", "symmetric"),
    [
        (lambda u: u.swapaxes(1, 2), True),
        (lambda u: u[:, ::-1, ::-1], True),
        (lambda u: u[:, ::-1], False),
        (lambda u: np.rot90(u, axes=(1, 2)), False),
    ],
    ids=["transposed", "half turn", "mirrored", "quarter turn"],
)
def test_with_weights_in_common_it_knows_two_turns_of_an_image(turn, symmetric):
    """Both exchange the routes among each other; a mirror makes routes that are none of them."""
    u = ARGS["u"][:, :3]  # a square
    turned, y = jax.device_get([run(x, **SHARED) for x in (turn(u), u)])
    difference = np.abs(turned - turn(y)).max()
    assert difference < 1e-5 if symmetric else difference > 1e-2


def test_each_cell_reaches_every_cell_but_not_by_one_route():
    @jax.jit
    def jacobian(weights, u):
        return jax.jacrev(lambda u: lib.res_vmamba(u, **weights)[0].sum(-1))(u)[:, :, 0]

    # X Y, X Y
    reach = lambda weights: np.abs(jax.device_get(jacobian(weights, ARGS["u"]))).sum(-1) > 0
    one = {name: np.arange(len(w)) == 0 for name, w in WEIGHTS.items()}
    off = {name: w * one[name].reshape(-1, *[1] * (w.ndim - 1)) for name, w in WEIGHTS.items()}
    assert reach(WEIGHTS).all()
    np.testing.assert_array_equal(reach(off).reshape(12, 12), np.tri(12, dtype=bool))


def test_without_memory_each_cell_is_alone():
    """Rates beyond measure leave h_t = delta_t u_t b_t."""
    instant = WEIGHTS | dict(log_rate=np.full_like(WEIGHTS["log_rate"], 60.0))
    u, expected = ARGS["u"], 0
    names = "select", "widen", "bias", "skip"
    for select, widen, bias, skip in zip(*map(WEIGHTS.get, names), strict=True):
        r, b, c = np.split(u @ select, [1, 4], -1)
        delta = np.log1p(np.exp(r @ widen + bias))
        expected = expected + (delta * (b * c).sum(-1, keepdims=True) + skip) * u
    chex.assert_trees_all_close(run(u, **instant), expected, rtol=1e-5, atol=1e-5)


def test_the_residual_is_added_to_the_layer_of_vmamba():
    module, x = lib.ResVmamba(state=3), ARGS["u"][:1, :3].repeat(2, -1)
    params = like(jax.eval_shape(module.init, KEY, x))["params"]
    params = jax.tree.map(lambda p: p / 3, jax.device_get(params))
    apply = jax.jit(module.apply)
    of = lambda **changes: jax.device_get(apply(dict(params=params | changes), x))
    none = lambda name: {name: jax.tree.map(np.zeros_like, params[name])}
    whole, residual, layer = of(), of(**none("down")), of(**none("residual"))
    expected = x @ params["residual"]["dense"]["kernel"]
    chex.assert_trees_all_close(residual, expected, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(whole, residual + layer, rtol=1e-5, atol=1e-5)
    assert np.abs(layer).max() > 1e-2
