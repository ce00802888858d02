"""Only what is particular to MoA; the rest is tests/conformance_test.py."""

import functools

import chex
import jax
import jax.numpy as jnp
import pytest

from attnjax.core import masks, registry
from attnjax.routed import moa_attention_heads as lib
from tests import cost

KEY = jax.random.key(0)
T, D, H, E = 7, 12, 8, 4


def test_all_heads_in_equal_shares_are_multi_query_attention():
    x = jax.random.normal(KEY, (2, T, D))
    many = registry.get("multi_query_attention").module(num_heads=E, head_dim=H)
    params = jax.jit(many.init)(KEY, x)["params"]
    table = lambda kernel: dict(table=kernel)
    mixed = dict(
        key=params["key"],
        value=params["value"],
        query=table(params["query"]["heads"]["kernel"].swapaxes(0, 1)),
        out=table(params["out"]["merge"]["kernel"] * E),
        router=dict(dense=dict(kernel=jnp.zeros((D, E)))),
    )
    run = lambda module, params: module.apply({"params": params}, x, mask=masks.Causal())
    actual, expected = jax.jit(
        lambda: (run(lib.MoaAttentionHeads(E, H, num_experts=E), mixed), run(many, params))
    )()
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_heads_that_nobody_chooses_have_no_gradient_and_could_be_anything():
    args = lib.SPEC.example(KEY, T)
    args["logits"] = args["logits"].at[..., 2:].set(-9.0)

    @jax.jit
    def run(query, out):
        return (lib.moa_attention_heads(**(args | dict(query=query, out=out))) ** 2).sum()

    value, grads = jax.value_and_grad(run, (0, 1))(args["query"], args["out"])
    assert all(grad[:2].any() and not grad[2:].any() for grad in grads)
    chex.assert_trees_all_equal(value, run(*(args[x].at[2:].set(9.0) for x in ("query", "out"))))


@pytest.mark.parametrize("topk", [1, 2])
def test_the_router_learns_which_head_helps(topk):
    """Even of a single head, whose weight is 1: what it is divided by is a constant."""
    args = lib.SPEC.example(KEY, T)
    best = 3  # the only head that says anything
    args["out"] = args["out"].at[:best].set(0)
    logits = jnp.zeros_like(args.pop("logits")).at[..., best].set(0.1)

    @jax.jit
    def run(logits):
        y, pull = jax.vjp(lambda z: lib.moa_attention_heads(**args, logits=z, topk=topk), logits)
        return pull(y)[0]

    grad = run(logits)  # of what raises the output
    assert (grad[..., best] > 0).all() and (grad[..., :best] < 0).all()


def test_more_heads_to_choose_from_cost_no_more():
    def count(E, topk):
        x, k, v = (jnp.zeros((1, 256, *shape)) for shape in ((64,), (1, 32), (1, 32)))
        heads = jnp.zeros((E, 64, 32)), jnp.zeros((E, 32, 64)), jnp.zeros((1, 256, E))
        fn = functools.partial(lib.moa_attention_heads, topk=topk, implementation="dense")
        return cost.operations(lambda *x: fn(*x).sum(), x, k, v, *heads)

    assert count(64, 2) < 1.1 * count(4, 2) < 0.6 * count(4, 4)


def test_the_cache_is_that_of_one_head():
    state = lib.MoaAttentionHeads(num_heads=4, head_dim=H, num_experts=64).init_state(2, 9)
    assert state.k.shape == state.v.shape == (2, 9, 1, H)


def test_a_token_needs_as_many_heads_to_choose_from():
    with pytest.raises(ValueError, match="topk=5 must be 1 to the 4 experts"):
        lib.moa_attention_heads(**lib.SPEC.example(KEY, T), topk=5)
