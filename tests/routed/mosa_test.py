"""Only what is particular to MoSA; the rest is tests/conformance_test.py."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import masks, registry
from attnjax.ops import dot_product_attention as ops
from attnjax.routed import mosa as lib
from tests import cost
from tests.cotangents import like

KEY = jax.random.key(0)
T, D, N, H = 12, 16, 3, 8
CAUSAL = dict(mask=masks.Causal())


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def example():
    """As that of the record, of sparse heads alone, by numpy."""
    heads = dict(qkv=normal(N, 12, 24) / 3, out=normal(N, 8, 12, seed=1) / 3)
    return dict(x=normal(2, T, 12, seed=2), logits=normal(2, T, N, seed=3)) | heads


@functools.cache
def program(**options):
    run = jax.jit(functools.partial(lib.mosa, **options))
    return lambda **args: jax.device_get(run(**args))


@functools.cache
def choice(**options):
    """Tokens of the heads by logits and what is seen."""
    choose = jax.jit(functools.partial(lib.choose_tokens, **options))
    return lambda logits, seen: jax.device_get(choose(logits, seen))


def test_heads_that_choose_all_are_dense_heads_with_a_gate():
    @jax.jit
    def both(x, logits, qkv, out):
        q, k, v = jnp.split(jnp.einsum("BTD,NDF->BTNF", x, qkv), 3, -1)
        o = jax.nn.sigmoid(logits)[..., None] * ops.dot_product_attention(q, k, v, **CAUSAL)
        expected = jnp.einsum("BTNH,NHD->BTD", o, out)
        return lib.mosa(x, logits, qkv, out, sparsity=1, **CAUSAL), expected

    chex.assert_trees_all_close(*both(**example()), rtol=1e-5, atol=1e-5)


def test_dense_heads_are_multi_head_attention():
    x = normal(2, T, D)
    dense = registry.get("multi_head_attention").module(num_heads=2, head_dim=H, rotary_base=50.0)
    module = lib.Mosa(num_heads=1, head_dim=H, num_dense=2, rotary_base=50.0)
    nothing = lambda *shape: jnp.zeros((1, *shape))  # one sparse head that says nothing

    @jax.jit
    def both(params, x):
        kernel = lambda name: params[name]["heads"]["kernel"].swapaxes(0, 1)
        qkv = jnp.concatenate([kernel(name) for name in ("query", "key", "value")], -1)
        out = params["out"]["merge"]["kernel"]
        mixed = dict(
            router=dict(dense=dict(kernel=jnp.zeros((D, 1)))),
            qkv=dict(table=jnp.concatenate([qkv, nothing(D, 3 * H)])),
            out=dict(table=jnp.concatenate([out, nothing(H, D)])),
        )
        run = lambda module, params: module.apply({"params": params}, x, **CAUSAL)
        return run(module, mixed), run(dense, params)

    params = like(jax.eval_shape(dense.init, KEY, x))["params"]
    params = jax.tree.map(lambda p: p / 4, jax.device_get(params))
    chex.assert_trees_all_close(*both(params, x), rtol=1e-5, atol=1e-5)


def test_a_head_reads_and_writes_its_tokens_alone():
    args, run = example(), program(sparsity=6)
    y = run(**args)
    chosen = choice(sparsity=6, keep_first=False)(args["logits"], np.ones((2, T), bool))
    assert chosen.shape == (2, N, 2)
    used = (chosen[..., None] == np.arange(T)).any((1, 2))
    assert y[used].any(-1).all() and not y[~used].any() and not used.all()
    other = np.where(used[..., None], args["x"], np.float32(np.nan))
    chex.assert_trees_all_equal(run(**(args | dict(x=other))), y)


def test_tokens_of_a_choice_do_not_see_later_ones_but_the_choice_does():
    """So it is no claim of this mechanism that it is causal."""
    args, late, other = example(), example(), example()
    run = lambda args: program(**CAUSAL)(**args)[:, :6]
    late["x"][:, 6:] += 1.0
    other["logits"][:, 9:] += 9.0
    chex.assert_trees_all_equal(run(late), run(args))
    assert (run(other) != run(args)).any()


def test_the_first_token_can_be_given_to_every_head():
    logits, seen = example()["logits"], np.ones((2, T), bool)
    seen[1, 0], logits[:, 0] = False, -9.0
    assert not (choice(sparsity=4, keep_first=False)(logits, seen) == 0).any()
    chosen = choice(sparsity=4, keep_first=True)(logits, seen)
    assert (chosen[0, :, 0] == 0).all() and not (chosen[1] == 0).any()  # where it is hidden: not
    assert (np.diff(chosen, axis=-1) > 0).all()


def test_hidden_tokens_that_fill_up_a_head_are_not_read():
    """Each head takes four tokens, of which only two are seen."""
    args, at = example(), [5, 9]
    seen = np.zeros((1, T), bool)
    seen[:, at] = True

    @jax.jit
    def both(args, alone, seen):
        y = lib.mosa(**args, sparsity=3, mask=masks.Valid(seen))
        return y[:, np.array(at)], lib.mosa(**(args | alone), sparsity=1)

    alone = {name: args[name][:, at] for name in ("x", "logits")}
    chex.assert_trees_all_close(*both(args, alone, seen), rtol=1e-5, atol=1e-5)


def test_at_least_two_tokens_if_there_are_two():
    def count(T, sparsity):
        choose = functools.partial(lib.choose_tokens, sparsity=sparsity, keep_first=False)
        return jax.eval_shape(choose, np.zeros((1, T, 1)), np.ones((1, T), bool)).shape[-1]

    assert [count(1, 8), count(9, 8), count(16, 8), count(31, 8)] == [1, 2, 2, 3]
    with pytest.raises(ValueError, match="sparsity=0 must be at least 1"):
        count(9, 0)


def test_rotation_is_by_the_place_in_the_sequence():
    """What counts is the distance of the chosen tokens in the whole sequence."""
    args, run = example(), program(sparsity=6, rotary_base=3.0)

    def at(*places):
        x, logits = np.zeros_like(args["x"]), np.full((2, T, N), -5.0, np.float32)
        x[:, places], logits[:, places] = args["x"][:, :2], 5.0
        return run(**(args | dict(x=x, logits=logits)))[:, places]

    chex.assert_trees_all_close(at(1, 4), at(6, 9), rtol=1e-4, atol=1e-5)
    assert np.abs(at(1, 4) - at(1, 5)).max() > 1e-3


def test_cost_is_linear_in_tokens_for_so_many_chosen():
    def count(T, sparsity):
        arrays = (1, T, 32), (1, T, 8), (8, 32, 96), (8, 32, 32)
        spec = lambda shape: jax.ShapeDtypeStruct(shape, "float32")
        loss = lambda *x: lib.mosa(*x, sparsity=sparsity).sum()
        return cost.operations(jax.grad(loss, (0, 1, 2, 3)), *map(spec, arrays))

    assert count(2048, 32) < 2.1 * count(1024, 16)
    assert count(1024, 4) > 6 * count(1024, 16)


def test_wrong_arguments():
    args = jax.eval_shape(lambda: lib.SPEC.example(KEY, T))
    few = lambda args: args | dict(qkv=args["qkv"][:2], out=args["out"][:2])
    with pytest.raises(ValueError, match="2 heads must be at least the 3 that have scores"):
        jax.eval_shape(lambda args: lib.mosa(**few(args)), args)
    with pytest.raises(NotImplementedError, match="mosa can't honour Window"):
        jax.eval_shape(lambda args: lib.mosa(**args, mask=masks.Window(2)), args)
