import functools

import chex
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from attnjax.core import masks, registry
from attnjax.softmax import super_attention as lib
from tests.cotangents import like

KEY = jax.random.key(0)
N, H, D, T, L = 2, 4, 8, 6, 7
LENGTHS = dict(optimised=None, efficient=None, super=L)
SLICES = {"heads": {"kernel": np.eye(D, dtype=np.float32).reshape(D, N, H)}}  # projects to X_n


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


X = normal(2, T, D)


def module(form, num_heads=N, **options):
    return lib.SuperAttention(num_heads, D // num_heads, form, LENGTHS[form], **options)


def random_params(form, num_heads=N):
    """With an alignment that is not the identity."""
    return like(jax.eval_shape(module(form, num_heads).init, KEY, X))


def mha(num_heads, kernels, x):
    attention = registry.get("multi_head_attention").module(num_heads, D // num_heads)
    return attention.apply({"params": kernels}, x, mask=masks.Causal())


def run(form, params, x, num_heads=N):
    return module(form, num_heads).apply(params, x, mask=masks.Causal())


def test_parameters_are_four_to_three_to_two():
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    size = lambda m: count(jax.eval_shape(m.init, KEY, X))
    assert size(registry.get("multi_head_attention").module(N, H)) == 4 * D**2
    sizes = {form: size(module(form)) for form in LENGTHS}
    assert sizes == dict(optimised=3 * D**2, efficient=2 * D**2, super=2 * D**2 + L**2)


def test_for_one_head_the_projections_left_out_lose_nothing():
    kernels = normal(4, D, D) / D**0.5
    q, k, v, o = kernels
    standard = dict(zip(("query", "key", "value"), kernels[:3, :, None], strict=True))
    standard = {name: {"heads": {"kernel": x}} for name, x in standard.items()}
    standard["out"] = {"merge": {"kernel": o[None]}}
    merged = {
        "query": {"heads": {"kernel": (q @ k.T)[:, None]}},
        "out": {"merge": {"kernel": (v @ o)[None]}},
    }

    @jax.jit
    def both(merged, standard, x):
        return run("efficient", {"params": merged}, x, num_heads=1), mha(1, standard, x)

    chex.assert_trees_all_close(*both(merged, standard, X), rtol=1e-4, atol=1e-4)


@functools.cache
def program(form):
    """In three pieces, and as a whole; as attention to slices; with an alignment that is one."""

    @jax.jit
    def outputs(params, x):
        call = lambda name, *args: module(form).apply(params, *args, method=name)
        state, ys = call("init_state", 2, T), []
        for piece in (x[:, :1], x[:, 1:4], x[:, 4:]):
            state, y = call("extend", state, piece)
            ys.append(y)
        y = jnp.concatenate(ys, 1)
        if form == "super":
            rest = {name: p for name, p in params["params"].items() if name != "alignment"}
            return y, run(form, params, x), run("efficient", {"params": rest}, x)
        slices = {"key": SLICES, "value": SLICES} | params["params"]
        return y, run(form, params, x), mha(N, slices, x)

    return lambda params: jax.device_get(outputs(params, X))


@pytest.mark.parametrize("form", ["optimised", "efficient"])
def test_is_multi_head_attention_whose_heads_have_slices_of_the_tokens(form):
    params = jax.tree.map(lambda p: p / 3, jax.device_get(random_params(form)))
    _, actual, expected = program(form)(params)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_super_begins_as_efficient_attention():
    table = jax.jit(lambda: module("super").init(KEY, jnp.asarray(X))["params"]["alignment"])()
    params = jax.tree.map(lambda p: p / 3, jax.device_get(random_params("super"))["params"])
    _, actual, expected = program("super")({"params": params | {"alignment": table}})
    chex.assert_trees_all_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_the_alignment_knows_positions():
    """Looking at itself, each token finds the one before it, which no attention by content does."""
    keys, values = np.eye(T, dtype=np.float32)[None, :, None], normal(1, T, 1, 3)
    fn = jax.jit(functools.partial(lib.super_attention, mask=masks.Causal()))
    o = fn(1000 * keys, keys, values, np.eye(T, k=-1, dtype=np.float32))
    expected = np.pad(values[:, :-1], ((0, 0), (1, 0), (0, 0), (0, 0)))
    chex.assert_trees_all_close(o, expected, atol=1e-6)


def test_documents_and_padding_do_not_mix():
    args = dict(zip("qkv", normal(3, 2, 6, 4, 8), strict=True))
    args["alignment"] = normal(8, 8, seed=1) / 8**0.5
    valid, ids = np.arange(6)[None] != 2, np.array([[0, 0, 0, 1, 1, 1]], np.int32)

    @jax.jit
    def influence(args, ids, valid, of):
        mask = masks.Segments(ids) & masks.Valid(valid)
        seen = lambda v: (lib.super_attention(**(args | dict(v=v)), mask=mask) ** 2)[:, of].sum()
        return jax.grad(seen)(args["v"])

    reached = lambda t: jax.device_get(influence(args, ids, valid, t)).any((0, 2, 3))
    np.testing.assert_array_equal(reached(1), np.arange(6) < 2)
    np.testing.assert_array_equal(reached(4), np.arange(6) >= 3)


@pytest.mark.parametrize("form", LENGTHS)
def test_streams_in_every_form(form):
    streamed, whole, _ = program(form)(random_params(form))
    chex.assert_trees_all_close(streamed, whole, rtol=1e-4, atol=1e-4)


def test_masks_that_an_alignment_would_leak_through():
    args, ids = jax.eval_shape(lambda: lib.SPEC.example(KEY, T)), jnp.asarray(np.zeros((2, T), int))
    for mask, message in (
        (masks.Window(1, 0), "can't honour Window"),
        (masks.Segments(ids, ids), "Segments with ids"),
    ):
        with pytest.raises(NotImplementedError, match=message):
            jax.eval_shape(lambda args, mask=mask: lib.super_attention(**args, mask=mask), args)


def test_refuses_what_does_not_fit(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as it is for users
    args = jax.eval_shape(lambda: lib.SPEC.example(KEY, T))
    short = args | dict(alignment=jax.ShapeDtypeStruct((5, 5), "float32"))
    with pytest.raises(ValueError, match="S=6 must be at most L=5"):
        jax.eval_shape(lambda args: lib.super_attention(**args), short)
    for options, match in (
        (dict(), "length=None must be given just where form is 'super'"),
        (dict(form="efficient", length=4), "length=4 must be given just where"),
        (dict(form="best"), "form='best' must be one of"),
        (dict(num_heads=3, length=L), "num_heads=3 times head_dim=4 must be D=8"),
    ):
        with pytest.raises(ValueError, match=match):
            module = lib.SuperAttention(**(dict(num_heads=N, head_dim=H) | options))
            jax.eval_shape(module.init, KEY, X)
