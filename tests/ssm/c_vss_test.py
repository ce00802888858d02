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
    tripled = dict(select=jnp.where(c[None, None], 3, 1) * ARGS["select"], skip=3 * ARGS["skip"])
    run = jax.jit(lambda: (lib.c_vss(**ARGS), lib.c_vss(**ARGS | tripled)))
    chex.assert_trees_all_close(*run(), rtol=1e-5, atol=1e-5)


def test_kinds_are_of_each_image_by_itself():
    module = lib.CVss(kinds=3, prompt_dim=8, expand=1, state=2)
    x = jnp.broadcast_to(jax.random.normal(KEY, (3, 3, 8)), (4, 3, 3, 8))
    params = jax.jit(module.init)(KEY, x)
    run = jax.jit(lambda kind: module.apply(params, x, kind))
    y, first = run(jnp.array([0, 1, 2, 1])), jax.jit(lambda: module.apply(params, x))()
    chex.assert_trees_all_close(y[0], first[0], rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(y[1], y[3], rtol=1e-5, atol=1e-5)
    assert min(jnp.abs(y[i] - y[j]).max() for i, j in ((0, 1), (0, 2), (1, 2))) > 1e-2


def test_first_modulation_is_of_the_input():
    module = lib.CVss(kinds=1, prompt_dim=8, expand=1, state=2)
    x = jax.random.normal(KEY, (2, 3, 3, 8))
    params = jax.jit(module.init)(KEY, x)["params"]

    def run(x, *numbers):
        dense = dict(kernel=jnp.zeros((8, 4)), bias=jnp.array(numbers, float))
        return module.apply(dict(params=params | dict(prompt_out=dict(dense=dense))), x)

    actual, expected = jax.jit(lambda: (run(x, 0.5, -1, 2, 3), run(1.5 * x - 1, 0, 0, 2, 3)))()
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_one_model_learns_what_contradicts_itself_if_it_knows_the_kind():
    """Two kinds of image whose targets are opposite: without the kind the best answer is 0."""
    module = lib.CVss(kinds=2, prompt_dim=8, expand=1, state=1, rank=1)
    images = jax.random.normal(KEY, (2, 2, 2, 4))
    x, sign = jnp.concatenate([images, images]), jnp.repeat(jnp.array([1.0, -1.0]), 2)
    target = sign[:, None, None, None] * x
    kinds = jnp.stack([sign < 0, sign < -1]).astype(int)  # told, and not told

    @jax.jit
    def losses(params):
        error = lambda params, kind: jnp.mean((module.apply(params, x, kind) - target) ** 2)
        return jax.vmap(error)(params, kinds)

    params = jax.jit(jax.vmap(lambda _: module.init(KEY, x)))(jnp.arange(2))
    learn = lambda params, _: losses(params).sum()
    told, untold = losses(training.fit(learn, params, steps=100, learning_rate=0.03))
    least = jnp.mean(target**2)
    assert untold > 0.95 * least and told < 0.5 * least
