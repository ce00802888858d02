"""Only what is particular to the C-VSS block: what a kind of image changes."""

import chex
import jax
import jax.numpy as jnp

from attnjax.ops import cross_scan
from attnjax.ssm import c_vss as lib
from tests import training

KEY = jax.random.key(0)
ARGS = lib.SPEC.example(KEY, 4)
SCAN = {name: ARGS[name] for name in ("select", "widen", "bias", "log_rate", "skip")}


def test_at_rest_it_is_the_normalised_scan():
    args = ARGS | dict(modulation=jnp.zeros((2, 2)), gain=jnp.ones(4), offset=jnp.zeros(4))

    @jax.jit
    def run():
        y = cross_scan.ss2d(ARGS["u"], **SCAN)
        return lib.c_vss(**args), jax.nn.standardize(y, epsilon=1e-6)

    chex.assert_trees_all_close(*run(), rtol=1e-5, atol=1e-5)


def test_a_scale_of_the_scans_is_undone():
    """Why the fifth number of the paper is left out: all scans are linear in c and skip."""
    c = jnp.arange(7) >= 4
    doubled = dict(select=jnp.where(c[None, None], 3, 1) * ARGS["select"], skip=3 * ARGS["skip"])
    run = jax.jit(lambda: (lib.c_vss(**ARGS), lib.c_vss(**ARGS | doubled)))
    chex.assert_trees_all_close(*run(), rtol=1e-3, atol=1e-3)


def test_kinds_are_of_each_image_by_itself():
    module = lib.CVss(kinds=3, prompt_dim=8, expand=1, state=2)
    x = jnp.broadcast_to(jax.random.normal(KEY, (3, 3, 8)), (4, 3, 3, 8))
    params = jax.jit(module.init)(KEY, x)
    run = jax.jit(lambda kind: module.apply(params, x, kind))
    y, first = run(jnp.array([0, 1, 2, 1])), jax.jit(lambda: module.apply(params, x))()
    chex.assert_trees_all_close(y[0], first[0], rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(y[1], y[3], rtol=1e-5, atol=1e-5)
    assert min(jnp.abs(y[i] - y[j]).max() for i, j in ((0, 1), (0, 2), (1, 2))) > 1e-2


def test_one_model_learns_what_contradicts_itself_if_it_knows_the_kind():
    """Two kinds of image whose targets are opposite: without the kind the best answer is 0."""
    module = lib.CVss(kinds=2, prompt_dim=8, expand=1, state=2)
    images = jax.random.normal(KEY, (4, 3, 3, 4))
    x, sign = jnp.concatenate([images, images]), jnp.repeat(jnp.array([1.0, -1.0]), 4)
    target = sign[:, None, None, None] * x

    def loss(params, kind):
        return jnp.mean((module.apply(params, x, kind) - target) ** 2)

    def fitted(kind):
        params = module.init(KEY, x)
        learn = lambda params, _: loss(params, kind)
        return loss(training.fit(learn, params, steps=150, learning_rate=0.02), kind)

    known, unknown = fitted(jnp.repeat(jnp.array([0, 1]), 4)), fitted(jnp.zeros(8, int))
    least = jnp.mean(target**2)
    assert unknown > 0.95 * least and known < 0.5 * least
