"""Only what is particular to MoH; the rest is tests/conformance_test.py."""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import masks, registry
from attnjax.ops import dot_product_attention as ops
from attnjax.ops import routing
from attnjax.routed import moh as lib
from tests import cost
from tests.cotangents import like

KEY = jax.random.key(0)
T, D, N, H = 9, 16, 4, 8
ROUTERS = {"router", "share", "balance"}


def draw(i, *shape):
    return np.random.default_rng(i).normal(size=shape).astype(np.float32)


x = draw(9, 2, T, D)


def logits(E=3, M=2):
    return draw(0, 2, T, E), draw(1, 2, T, M), draw(2, 2, T, 2)


def assert_is_multi_head_attention(module):
    """With the parameters of an attention with all heads, and routers that are left at zero."""
    attention = registry.get("multi_head_attention").module(num_heads=N, head_dim=H)
    params = like(jax.eval_shape(attention.init, KEY, x))["params"]
    params = jax.tree.map(lambda p: p / 4, jax.device_get(params))
    shapes = jax.eval_shape(module.init, KEY, x)["params"]
    zero = lambda shape: np.zeros(shape.shape, shape.dtype)
    routers = {name: jax.tree.map(zero, shapes[name]) for name in ROUTERS & set(shapes)}
    run = lambda module, params, x: module.apply({"params": params}, x, mask=masks.Causal())
    both = jax.jit(
        lambda *more: (run(module, params | routers, *more), run(attention, params, *more))
    )
    chex.assert_trees_all_close(*both(x), rtol=1e-5, atol=1e-5)
    return shapes


@pytest.mark.parametrize("num_shared", [1, 2])
def test_equal_weights_of_all_heads_are_multi_head_attention(num_shared):
    assert_is_multi_head_attention(lib.MoH(N, H, num_shared=num_shared, topk=N - num_shared))


def test_continue_tuning_begins_as_the_trained_model_and_adds_no_parameter():
    module = lib.MoH(N, H, num_shared=1, topk=3, logits="query_norm", weights="rounded")
    assert not ROUTERS & set(assert_is_multi_head_attention(module))


@functools.cache
def outputs(topk):
    """And the gradient of the router, by a program of function and gradient."""

    def run(q, k, v, routed, *others):
        fn = lambda routed: lib.moh(q, k, v, routed, *others, topk=topk)
        o, pull = jax.vjp(fn, routed)
        return o, pull(2 * o)[0]

    return jax.device_get(jax.jit(run)(*draw(3, 3, 2, T, 5, H), *logits()))


@pytest.mark.parametrize("topk", [1, 2])
def test_a_token_has_the_shared_heads_and_topk_others(topk):
    o, _ = outputs(topk)
    used = o.any(-1)
    assert used[:, :, :2].all() and (used[:, :, 2:].sum(-1) == topk).all()
    chosen = used[:, :, 2:]
    routed = logits()[0]
    least = np.where(chosen, routed, np.inf).min(-1)
    assert (least > np.where(chosen, -np.inf, routed).max(-1)).all()


def test_weights_add_up_to_the_number_of_heads():
    gates, heads = jax.device_get(jax.jit(functools.partial(lib.choose_heads, topk=2))(*logits()))
    e = np.exp(logits()[2])
    a = 2 * e / e.sum(-1, keepdims=True)
    assert heads.shape == (2, T, 4)
    chex.assert_trees_all_close(gates[..., :2].sum(-1), 2 * a[..., 0], rtol=1e-5)
    chex.assert_trees_all_close(gates[..., 2:].sum(-1), 2 * a[..., 1], rtol=1e-5)


def test_the_loss_of_the_paper_is_topk_times_the_balance():
    @jax.jit
    def run(routed):
        chosen = routing.choose(routed, topk=2)[1]
        me = jax.nn.softmax(routed).mean((0, 1))
        ce = jax.nn.one_hot(chosen, 4).sum(2).mean((0, 1))
        return 2 * routing.load_balance_loss(routed, chosen), 4**2 * jnp.mean(me * ce)

    chex.assert_trees_all_close(*run(logits(E=4)[0]), rtol=1e-5)


def test_the_router_learns_from_the_loss_alone_where_one_head_is_chosen():
    grads = {topk: np.abs(outputs(topk)[1]).max() for topk in (1, 2)}
    assert grads[1] < 1e-4 < grads[2]
    module = lib.MoH(N, H, topk=1)
    params = like(jax.eval_shape(module.init, KEY, x))
    is_router = lambda module, _: module.name == "router"

    def loss(params, x):
        _, seen = module.apply(params, x, capture_intermediates=is_router)
        (z,) = seen["intermediates"]["router"]["__call__"]
        return routing.load_balance_loss(z, routing.choose(z, topk=1)[1])

    grads = jax.jit(jax.grad(loss))(params, x)["params"]
    assert jax.device_get(grads["router"]["dense"]["kernel"]).any()


def test_norms_of_queries_choose_the_heads_that_ask_most():
    q = draw(3, 2, T, 3, H) * np.array([1.0, 9.0, 3.0], np.float32)[:, None]

    @jax.jit
    def run(q):
        norms, pull = jax.vjp(lib.query_norms, q)
        return norms, pull(jnp.ones_like(norms))[0]

    (norms, _), (larger, _), (_, grads) = (jax.device_get(run(s * q)) for s in (1, 5, 0))
    assert (norms.argmax(-1) == 1).mean() > 0.9
    chex.assert_trees_all_close(norms.std(-1, ddof=1), np.ones((2, T), np.float32), rtol=1e-5)
    chex.assert_trees_all_close(larger, norms, rtol=1e-5)
    assert np.isfinite(grads).all()


def test_heads_that_are_not_chosen_are_not_computed():
    """The product of 3 of 8 heads, and a little."""

    def count(fn, *more):
        arrays = [
            jax.ShapeDtypeStruct((1, 512, *shape), "float32") for shape in ((8, 32),) * 3 + more
        ]
        return cost.operations(lambda *x: fn(*x).sum(), *arrays)

    full = count(functools.partial(ops.dot_product_attention, implementation="dense"))
    assert count(functools.partial(lib.moh, topk=2), (7,), (1,), (2,)) < 0.5 * full


def test_wrong_options():
    qkv, four = draw(3, 3, 2, T, 5, H), logits(E=4)
    run = lambda *args, **options: jax.eval_shape(
        functools.partial(lib.moh, **options), *qkv, *args
    )
    init = lambda **options: jax.eval_shape(lib.MoH(N, H, **options).init, KEY, x)
    with pytest.raises(ValueError, match="topk=4 must be 1 to the 3 experts"):
        run(*logits(), topk=4)
    with pytest.raises(ValueError, match="5 heads must be as many as"):
        run(*four)
    with pytest.raises(ValueError, match="num_shared=4 must be 1 to num_heads - 1 = 3"):
        init(num_shared=4)
    with pytest.raises(ValueError, match="1 routed heads must be at least 2"):
        init(num_shared=3, topk=1, logits="query_norm")
    with pytest.raises(ValueError, match="weights='hard' must be one of"):
        # users run without the annotations' checks
        inspect.unwrap(lib.choose_heads)(*logits(), topk=2, weights="hard")
    with pytest.raises(NotImplementedError, match="moh can't honour Dense"):
        run(*logits(), mask=masks.Dense(jnp.asarray(np.ones((1, 1, T, T), bool))))
