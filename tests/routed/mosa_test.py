"""Only what is particular to MoSA; the rest is tests/conformance_test.py."""

import functools

import chex
import jax
import jax.numpy as jnp
import pytest

from attnjax.core import masks, registry
from attnjax.ops import dot_product_attention as ops
from attnjax.routed import mosa as lib
from tests import cost

KEY = jax.random.key(0)
T, D, N, H = 12, 16, 3, 8
CAUSAL = dict(mask=masks.Causal())


def example(T=T):
    args = lib.SPEC.example(KEY, T)
    return args | dict(qkv=args["qkv"][1:], out=args["out"][1:])  # sparse heads alone


def test_heads_that_choose_all_are_dense_heads_with_a_gate():
    args = example()
    q, k, v = jnp.split(jnp.einsum("BTD,NDF->BTNF", args["x"], args["qkv"]), 3, -1)
    o = jax.nn.sigmoid(args["logits"])[..., None] * ops.dot_product_attention(q, k, v, **CAUSAL)
    expected = jnp.einsum("BTNH,NHD->BTD", o, args["out"])
    actual = lib.mosa(**args, sparsity=1, **CAUSAL)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_dense_heads_are_multi_head_attention():
    x = jax.random.normal(KEY, (2, T, D))
    dense = registry.get("multi_head_attention").module(num_heads=2, head_dim=H, rotary_base=50.0)
    params = jax.jit(dense.init)(KEY, x)["params"]
    kernel = lambda name: params[name]["heads"]["kernel"].swapaxes(0, 1)
    nothing = lambda *shape: jnp.zeros((1, *shape))  # one sparse head that says nothing
    qkv = jnp.concatenate([kernel(name) for name in ("query", "key", "value")], -1)
    mixed = dict(
        router=dict(dense=dict(kernel=jnp.zeros((D, 1)))),
        qkv=dict(table=jnp.concatenate([qkv, nothing(D, 3 * H)])),
        out=dict(table=jnp.concatenate([params["out"]["merge"]["kernel"], nothing(H, D)])),
    )
    module = lib.Mosa(num_heads=1, head_dim=H, num_dense=2, rotary_base=50.0)
    actual = module.apply({"params": mixed}, x, **CAUSAL)
    expected = dense.apply({"params": params}, x, **CAUSAL)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_a_head_reads_and_writes_its_tokens_alone():
    args = example()
    y = lib.mosa(**args, sparsity=6)
    seen = jnp.ones((2, T), bool)
    chosen = lib.choose_tokens(args["logits"], seen, sparsity=6, keep_first=False)
    assert chosen.shape == (2, N, 2)
    used = (chosen[..., None] == jnp.arange(T)[None, None, None]).any((1, 2))
    assert y[used].any(-1).all() and not y[~used].any() and not used.all()
    other = jnp.where(used[..., None], args["x"], jnp.nan)
    chex.assert_trees_all_equal(lib.mosa(**(args | dict(x=other)), sparsity=6), y)


def test_tokens_of_a_choice_do_not_see_later_ones_but_the_choice_does():
    """So it is no claim of this mechanism that it is causal."""
    args = example()
    run = jax.jit(lambda x, logits: lib.mosa(**(args | dict(x=x, logits=logits)), **CAUSAL)[:, :6])
    y = run(args["x"], args["logits"])
    late = args["x"].at[:, 6:].add(1.0)
    chex.assert_trees_all_equal(run(late, args["logits"]), y)
    assert (run(args["x"], args["logits"].at[:, 9:].add(9.0)) != y).any()


def test_the_first_token_can_be_given_to_every_head():
    args, seen = example(), jnp.ones((2, T), bool).at[1, 0].set(False)
    logits = args["logits"].at[:, 0].set(-9.0)
    choose = functools.partial(lib.choose_tokens, logits, seen, sparsity=4)
    assert not (choose(keep_first=False) == 0).any()
    chosen = choose(keep_first=True)
    assert (chosen[0, :, 0] == 0).all() and not (chosen[1] == 0).any()  # where it is hidden: not
    assert (jnp.diff(chosen, axis=-1) > 0).all()


def test_hidden_tokens_that_fill_up_a_head_are_not_read():
    """Each head takes four tokens, of which only two are seen."""
    args, at = example(), jnp.array([5, 9])
    seen = jnp.zeros((1, T), bool).at[:, at].set(True)
    y = lib.mosa(**args, sparsity=3, mask=masks.Valid(seen))
    alone = {name: args[name][:, at] for name in ("x", "logits")}
    expected = lib.mosa(**(args | alone), sparsity=1)
    chex.assert_trees_all_close(y[:, at], expected, rtol=1e-5, atol=1e-5)


def test_at_least_two_tokens_if_there_are_two():
    seen = lambda T: jnp.ones((1, T), bool)
    count = lambda T, sparsity: lib.choose_tokens(
        jnp.zeros((1, T, 1)), seen(T), sparsity=sparsity, keep_first=False
    ).shape[-1]
    assert [count(1, 8), count(9, 8), count(16, 8), count(31, 8)] == [1, 2, 2, 3]
    with pytest.raises(ValueError, match="sparsity=0 must be at least 1"):
        count(9, 0)


def test_rotation_is_by_the_place_in_the_sequence():
    """What counts is the distance of the chosen tokens in the whole sequence."""
    args = example()
    logits = jnp.full((2, T, N), -5.0)

    def at(*places):
        places = jnp.array(places)
        x = jnp.zeros_like(args["x"]).at[:, places].set(args["x"][:, :2])
        chosen = args | dict(x=x, logits=logits.at[:, places].set(5.0))
        return lib.mosa(**chosen, sparsity=6, rotary_base=3.0)[:, places]

    chex.assert_trees_all_close(at(1, 4), at(6, 9), rtol=1e-4, atol=1e-5)
    assert jnp.abs(at(1, 4) - at(1, 5)).max() > 1e-3


def test_cost_is_linear_in_tokens_for_so_many_chosen():
    def count(T, sparsity):
        arrays = (1, T, 32), (1, T, 8), (8, 32, 96), (8, 32, 32)
        loss = lambda *x: lib.mosa(*x, sparsity=sparsity).sum()
        return cost.operations(jax.grad(loss, (0, 1, 2, 3)), *map(jnp.zeros, arrays))

    assert count(2048, 32) < 2.1 * count(1024, 16)
    assert count(1024, 4) > 6 * count(1024, 16)


def test_wrong_arguments():
    args = lib.SPEC.example(KEY, T)
    with pytest.raises(ValueError, match="2 heads must be at least the 3 that have scores"):
        lib.mosa(**(args | dict(qkv=args["qkv"][:2], out=args["out"][:2])))
    with pytest.raises(NotImplementedError, match="mosa can't honour Window"):
        lib.mosa(**args, mask=masks.Window(2))
