"""Only what is particular to the C-VSS block: what a kind of image changes."""

import chex
import jax
import jax.numpy as jnp
import numpy as np

from attnjax.ops import cross_scan
from attnjax.ssm import c_vss as lib
from tests import training
from tests.cotangents import like
from tests.initial import initial

KEY = jax.random.key(0)
ARGS = jax.device_get(initial(lambda key: lib.SPEC.example(key, 4), KEY))
SCAN = ("select", "widen", "bias", "log_rate", "skip")


def draw(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def test_at_rest_it_is_the_normalised_scan():
    zero, one = np.zeros(4, np.float32), np.ones(4, np.float32)
    args = ARGS | dict(modulation=np.zeros((2, 2), np.float32), gain=one, offset=zero)

    @jax.jit
    def run(args):
        y = cross_scan.ss2d(args["u"], **{name: args[name] for name in SCAN})
        return lib.c_vss(**args), jax.nn.standardize(y, epsilon=1e-6)

    chex.assert_trees_all_close(*run(args), rtol=1e-5, atol=1e-5)


def test_a_scale_of_the_scans_is_undone():
    """Why the fifth number of the paper is left out: all scans are linear in c and skip."""
    c = np.arange(7) >= 4
    select = np.where(c, np.float32(3), 1) * ARGS["select"]
    run = jax.jit(lambda args: lib.c_vss(**args))
    tripled = run(ARGS | dict(select=select, skip=3 * ARGS["skip"]))
    chex.assert_trees_all_close(tripled, run(ARGS), rtol=1e-5, atol=1e-5)


def test_kinds_are_of_each_image_by_itself():
    module = lib.CVss(kinds=3, prompt_dim=8, expand=1, state=2)
    x = np.broadcast_to(draw(3, 3, 8), (4, 3, 3, 8))
    params = initial(module.init, KEY, jnp.asarray(x))
    run = jax.jit(lambda *args: (module.apply(*args), module.apply(*args[:2])))
    y, first = jax.device_get(run(params, x, np.array([0, 1, 2, 1], np.int32)))
    chex.assert_trees_all_close(y[0], first[0], rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(y[1], y[3], rtol=1e-5, atol=1e-5)
    assert min(np.abs(y[i] - y[j]).max() for i, j in ((0, 1), (0, 2), (1, 2))) > 1e-2


def test_first_modulation_is_of_the_input():
    module = lib.CVss(kinds=1, prompt_dim=8, expand=1, state=2)
    x = draw(2, 3, 3, 8)
    params = like(jax.eval_shape(module.init, KEY, x))["params"]
    params = jax.tree.map(lambda p: p / 3, jax.device_get(params))
    kernel, run = np.zeros((8, 4), np.float32), jax.jit(module.apply)

    def of(x, *numbers):
        dense = dict(kernel=kernel, bias=np.array(numbers, np.float32))
        return run(dict(params=params | dict(prompt_out=dict(dense=dense))), x)

    actual, expected = of(x, 0.5, -1, 2, 3), of(np.float32(1.5) * x - 1, 0, 0, 2, 3)
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_one_model_learns_what_contradicts_itself_if_it_knows_the_kind():
    """Two kinds of image whose targets are opposite: without the kind the best answer is 0."""
    module = lib.CVss(kinds=2, prompt_dim=8, expand=1, state=1, rank=1)
    images, sign = draw(2, 2, 2, 4), np.float32([1, 1, -1, -1])
    x = jnp.asarray(np.concatenate([images, images]))
    target = sign[:, None, None, None] * np.asarray(x)
    kinds = np.stack([sign < 0, sign < -1]).astype(np.int32)  # told, and not told

    @jax.jit
    def losses(params):
        error = lambda params, kind: jnp.mean((module.apply(params, x, kind) - target) ** 2)
        return jax.vmap(error)(params, kinds)

    params = jax.device_get(initial(module.init, KEY, x))
    params = jax.tree.map(lambda p: np.stack([p, p]), params)
    learn = lambda params, _: losses(params).sum()
    params = training.fit(learn, params, steps=100, learning_rate=0.03)
    (told, untold), least = jax.device_get(losses(params)), np.mean(target**2)
    assert untold > 0.95 * least and told < 0.5 * least
