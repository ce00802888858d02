"""Only what is particular to SegMAN: who sees whom by which path, and its limits."""

import functools

import chex
import jax
import jax.numpy as jnp

from attnjax.core import registry
from attnjax.ssm import segman as lib
from tests.initial import initial

KEY = jax.random.key(0)
ARGS = initial(lambda key: lib.SPEC.example(key, 9), KEY)  # a grid of 9 x 3
OFF = ARGS | dict(gain=jnp.zeros(4))


@functools.partial(jax.jit, static_argnames="window")
def reach(args, window):
    """Which rows of values a cell in the middle of the long axis depends on."""
    run = lambda v: jnp.abs(lib.segman(**args | dict(v=v), window=window)[0, 4, 1]).sum()
    return jnp.abs(jax.grad(run)(args["v"]))[0].sum((1, 2, 3)) > 0


def test_without_the_scan_a_cell_sees_its_neighborhood_and_with_it_everything():
    bare = OFF | dict(lepe=jnp.zeros((5, 5, 4)))
    assert reach(bare, 3).tolist() == [3 <= x <= 5 for x in range(9)]
    assert reach(OFF, 3).tolist() == [2 <= x <= 6 for x in range(9)]  # the convolution of values
    assert reach(ARGS, 3).all()


def test_a_window_as_large_as_the_image_is_attention_to_everything():
    bare = OFF | dict(lepe=jnp.zeros((5, 5, 4)))

    @jax.jit
    def run():
        flat = [ARGS[name].reshape(2, 27, 2, 2) for name in "qkv"]
        o = registry.get("softmax.multi_head_attention").fn(*flat)
        return lib.segman(**bare, window=9), o.reshape(2, 9, 3, 4)

    chex.assert_trees_all_close(*run(), rtol=1e-5, atol=1e-5)


def test_what_is_scanned_is_the_output_of_the_attention():
    """Values of zero attention weight for every query leave no trace in the scan."""
    lonely = ARGS["k"].at[:, 4].set(-1e4)  # no query looks at row 4
    args = ARGS | dict(k=lonely, q=jnp.ones_like(ARGS["q"]), lepe=jnp.zeros((5, 5, 4)))
    other = args | dict(v=args["v"].at[:, 4].add(1.0))
    run = jax.jit(lambda: (lib.segman(**args), lib.segman(**other)))
    chex.assert_trees_all_equal(*run())


def test_positions_are_relative_in_the_attention():
    """A pattern that moves with its window gives rotated scores that are the same."""
    x = jax.random.normal(KEY, (2, 1, 1, 1, 1, 8))
    q, k = jnp.broadcast_to(x, (2, 1, 6, 6, 1, 8))
    q, k = lib._rotated(q), lib._rotated(k)
    at = lambda x, y: (q[0, x, y, 0] * k[0, x + 1, y - 2, 0]).sum()
    chex.assert_trees_all_close(at(0, 2), at(4, 5), rtol=1e-5)
    assert jnp.abs(at(0, 2) - (q[0, 0, 2, 0] * k[0, 2, 1, 0]).sum()) > 1e-3


def test_the_module_hands_on_its_options():
    seen = {}

    def spy(q, *arrays, **options):
        seen.update(options)
        return q.reshape(*q.shape[:3], -1)

    module = lib.Segman(2, 4, window=5, fn=spy)
    jax.eval_shape(module.init, KEY, jnp.zeros((1, 2, 2, 8)))
    assert seen == dict(window=5)
