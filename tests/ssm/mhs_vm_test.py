"""Only what is particular to MHS-VM: what scan route attention does, and what heads cost."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import selection
from attnjax.ssm import mhs_vm as lib
from tests.initial import initial

KEY = jax.random.key(0)


ARGS = jax.device_get(initial(lambda key: lib.SPEC.example(key, 3), KEY))


@functools.cache
def program(threshold):
    options = dict(threshold=threshold) if threshold else {}
    run = jax.jit(functools.partial(lib.scan_route_attention, **options))
    return lambda y: jax.device_get(run(y))


def weight(y, threshold=0.0):
    return program(threshold)(y) / y.sum(-2)


@pytest.mark.parametrize(
    ("routes", "expected"),
    [([0, 1, 1, 1], 2 / 3), ([0, 0, 0, 1], 2), ([0, 0, 1, 1], 2 / 3**0.5), ([1, 1, 1, 1], 0)],
)
def test_weight_of_routes(routes, expected):
    y = 10 * np.array(routes, np.float32)[:, None] + 3
    np.testing.assert_allclose(weight(y), [expected], rtol=1e-5)


def test_weight_is_between_its_bounds_and_blind_to_scale_and_offset():
    y = 100 * np.random.default_rng(0).normal(size=(1000, 4, 1)).astype(np.float32)
    a = weight(y)
    assert (a > 0.666).all() and (a < 2.001).all() and a.min() < 0.7 and a.max() > 1.7
    chex.assert_trees_all_close(weight(7 * y + 9), a, rtol=1e-3)
    chex.assert_trees_all_close(weight(y, threshold=0.5), a - 0.5, rtol=1e-3)
    assert not program(2.0)(y).any()


def test_where_routes_agree_output_and_gradient_are_zero():
    """An image of a single cell with weights in common: all routes are the same."""
    shared = lambda w: np.broadcast_to(w[:1], w.shape)
    args = {name: w[:, :1, :1] if name == "x" else shared(w) for name, w in ARGS.items()}
    y, grads = jax.jit(jax.value_and_grad(lambda args: lib.mhs_vm(**args).sum()))(args)
    assert y == 0
    for grad in jax.tree.leaves(jax.device_get(grads)):
        assert np.isfinite(grad).all()


def test_heads_do_not_meet_before_the_projection():
    run = lambda x, args: lib.mhs_vm(**args | dict(x=x))[..., 1, :].sum()
    grad = jax.device_get(jax.jit(jax.grad(run))(ARGS["x"], ARGS))
    reached = np.abs(grad).sum((0, 1, 2, 4)) > 0
    assert reached.tolist() == [False, True, False]


def test_each_pattern_is_its_head_s():
    """Heads of one pattern in another order are the same heads in that order."""
    order = [2, 0, 1]
    patterns = tuple(lib.PATTERNS[n] for n in order)
    of_head = lambda w: w.reshape(3, 4, *w.shape[1:])[order].reshape(w.shape)
    moved = {n: w[..., order, :] if n == "x" else of_head(w) for n, w in ARGS.items()}
    both = lambda a, b: (lib.mhs_vm(**a, patterns=patterns), lib.mhs_vm(**b))
    actual, expected = jax.device_get(jax.jit(both)(moved, ARGS))
    chex.assert_trees_all_close(actual, expected[..., order, :], rtol=1e-5, atol=1e-5)


def test_heads_widen_their_steps_with_fewer_weights():
    """A third of those that a scan of all channels has, as each head chooses for its own third."""
    x = jnp.zeros((1, 2, 2, 96))
    heads = jax.eval_shape(lib.MhsVm().init, KEY, x)["params"]["selection"]
    whole = jax.eval_shape(selection.Selection(4, 96).init, KEY)["params"]
    size = lambda params: sum(x.size for x in jax.tree.leaves(params))
    assert 3 * size(heads["widen"]) == size(whole["widen"]) and size(heads) < size(whole)


def test_options_are_checked():
    with pytest.raises(ValueError, match="D=2 must be at least the 3 heads of patterns="):
        jax.eval_shape(lib.MhsVm().init, KEY, jnp.zeros((1, 2, 2, 2)))


def test_the_module_hands_on_its_options():
    seen = {}

    def spy(x, *arrays, **options):
        seen.update(options)
        return x

    module = lib.MhsVm(("raster", "spiral"), 3, threshold=0.7, fn=spy)
    jax.eval_shape(module.init, KEY, jnp.zeros((1, 2, 2, 8)))
    assert seen == dict(patterns=("raster", "spiral"), threshold=0.7)
