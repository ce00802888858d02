"""Only what is particular to MoH; the rest is tests/conformance_test.py."""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import pytest

from attnjax.core import masks, registry
from attnjax.ops import dot_product_attention as ops
from attnjax.ops import routing
from attnjax.routed import moh as lib
from tests import cost

KEY = jax.random.key(0)
T, D, N, H = 9, 16, 4, 8
ROUTERS = {"router", "share", "balance"}
x = jax.random.normal(KEY, (2, T, D))


def draw(i, *shape):
    return jax.random.normal(jax.random.fold_in(KEY, i), shape)


def logits(E=3, M=2):
    return draw(0, 2, T, E), draw(1, 2, T, M), draw(2, 2, T, 2)


def from_multi_head_attention(module):
    """Parameters of a MoH with those of an attention with all heads, and that attention's output.

    Routers are left at zero.
    """
    attention = registry.get("multi_head_attention").module(num_heads=N, head_dim=H)
    params = jax.jit(attention.init)(KEY, x)["params"]
    shapes = jax.eval_shape(module.init, KEY, x)["params"]
    zero = lambda shape: jnp.zeros(shape.shape, shape.dtype)
    routers = {name: jax.tree.map(zero, shapes[name]) for name in ROUTERS & set(shapes)}
    return {"params": params | routers}, run(attention, {"params": params})


def run(module, params):
    return jax.jit(functools.partial(module.apply, mask=masks.Causal()))(params, x)


@pytest.mark.parametrize("num_shared", [1, 2])
def test_equal_weights_of_all_heads_are_multi_head_attention(num_shared):
    module = lib.MoH(N, H, num_shared=num_shared, topk=N - num_shared)
    params, expected = from_multi_head_attention(module)
    chex.assert_trees_all_close(run(module, params), expected, rtol=1e-5, atol=1e-5)


def test_continue_tuning_begins_as_the_trained_model_and_adds_no_parameter():
    module = lib.MoH(N, H, num_shared=1, topk=3, logits="query_norm", weights="rounded")
    params, expected = from_multi_head_attention(module)
    assert not ROUTERS & set(params["params"])
    chex.assert_trees_all_close(run(module, params), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("topk", [1, 2])
def test_a_token_has_the_shared_heads_and_topk_others(topk):
    q, k, v = draw(3, 3, 2, T, 5, H)
    o = jax.jit(functools.partial(lib.moh, topk=topk))(q, k, v, *logits())
    used = o.any(-1)
    assert used[:, :, :2].all() and (used[:, :, 2:].sum(-1) == topk).all()
    chosen = used[:, :, 2:]
    routed = logits()[0]
    assert (
        jnp.where(chosen, routed, jnp.inf).min(-1) > jnp.where(chosen, -jnp.inf, routed).max(-1)
    ).all()


def test_weights_add_up_to_the_number_of_heads():
    gates, heads = lib.choose_heads(*logits(), topk=2)
    a = 2 * jax.nn.softmax(logits()[2])
    assert heads.shape == (2, T, 4)
    chex.assert_trees_all_close(gates[..., :2].sum(-1), 2 * a[..., 0], rtol=1e-5)
    chex.assert_trees_all_close(gates[..., 2:].sum(-1), 2 * a[..., 1], rtol=1e-5)


def test_the_loss_of_the_paper_is_topk_times_the_balance():
    routed, _, _ = logits(E=4)
    chosen = routing.choose(routed, topk=2)[1]
    me = jax.nn.softmax(routed).mean((0, 1))
    ce = jax.nn.one_hot(chosen, 4).sum(2).mean((0, 1))
    loss = 2 * routing.load_balance_loss(routed, chosen)
    chex.assert_trees_all_close(loss, 4**2 * jnp.mean(me * ce), rtol=1e-5)


def test_the_router_learns_from_the_loss_alone_where_one_head_is_chosen():
    q, k, v = draw(3, 3, 2, T, 5, H)
    routed, *others = logits()
    out = lambda routed, topk: (lib.moh(q, k, v, routed, *others, topk=topk) ** 2).sum()
    grads = {topk: jax.jit(jax.grad(out), static_argnums=1)(routed, topk) for topk in (1, 2)}
    assert jnp.abs(grads[1]).max() < 1e-4 < jnp.abs(grads[2]).max()
    module = lib.MoH(N, H, topk=1)
    params = jax.jit(module.init)(KEY, x)
    is_router = lambda module, _: module.name == "router"

    def loss(params):
        _, seen = module.apply(params, x, capture_intermediates=is_router)
        (z,) = seen["intermediates"]["router"]["__call__"]
        return routing.load_balance_loss(z, routing.choose(z, topk=1)[1])

    assert jax.jit(jax.grad(loss))(params)["params"]["router"]["dense"]["kernel"].any()


def test_norms_of_queries_choose_the_heads_that_ask_most():
    q = draw(3, 2, T, 3, H) * jnp.array([1.0, 9.0, 3.0])[None, None, :, None]
    norms = lib.query_norms(q)
    assert (norms.argmax(-1) == 1).mean() > 0.9
    chex.assert_trees_all_close(norms.std(-1, ddof=1), jnp.ones((2, T)), rtol=1e-5)
    chex.assert_trees_all_close(lib.query_norms(5 * q), norms, rtol=1e-5)
    assert jnp.isfinite(jax.grad(lambda q: lib.query_norms(q).sum())(0 * q)).all()


def test_heads_that_are_not_chosen_are_not_computed():
    """The product of 3 of 8 heads, and a little."""

    def count(fn, *more):
        arrays = [jnp.zeros((1, 512, *shape)) for shape in ((8, 32),) * 3 + more]
        return cost.operations(lambda *x: fn(*x).sum(), *arrays)

    full = count(functools.partial(ops.dot_product_attention, implementation="dense"))
    assert count(functools.partial(lib.moh, topk=2), (7,), (1,), (2,)) < 0.5 * full


def test_wrong_options():
    q, k, v = draw(3, 3, 2, T, 5, H)
    with pytest.raises(ValueError, match="topk=4 must be 1 to the 3 experts"):
        lib.moh(q, k, v, *logits(), topk=4)
    with pytest.raises(ValueError, match="5 heads must be as many as"):
        lib.moh(q, k, v, *logits(E=4))
    with pytest.raises(ValueError, match="num_shared=4 must be 1 to num_heads - 1 = 3"):
        lib.MoH(N, H, num_shared=4).init(KEY, x)
    with pytest.raises(ValueError, match="1 routed heads must be at least 2"):
        lib.MoH(N, H, num_shared=3, topk=1, logits="query_norm").init(KEY, x)
    with pytest.raises(ValueError, match="weights='hard' must be one of"):
        # users run without the annotations' checks
        inspect.unwrap(lib.choose_heads)(*logits(), topk=2, weights="hard")
    with pytest.raises(NotImplementedError, match="moh can't honour Dense"):
        lib.moh(q, k, v, *logits(), mask=masks.Dense(jnp.ones((1, 1, T, T), bool)))
