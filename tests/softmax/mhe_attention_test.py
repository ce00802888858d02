import functools

import chex
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from attnjax.core import masks, registry
from attnjax.softmax import mhe_attention as lib
from tests import training
from tests.cotangents import like
from tests.initial import initial

KEY = jax.random.key(0)
N, H, D = 4, 3, 12  # D = N H, as in the paper


def module(num_heads=N, **options):
    return lib.MheAttention(num_heads=num_heads, head_dim=H, **options)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


X = normal(2, 7, D)


def begin(module):
    params = like(jax.eval_shape(module.init, KEY, X))
    return jax.tree.map(lambda p: p / 3, jax.device_get(params))


def example():
    """As that of the record, by numpy."""
    q, k, v = normal(3, 2, 6, 1, 8)
    names = "query_embedding", "key_embedding", "value_embedding"
    return dict(q=q, k=k, v=v) | dict(zip(names, normal(3, 4, 8, seed=1) / 2, strict=True))


@pytest.mark.parametrize("form, embeddings", [("mul", 3 * N * H), ("add", 2 * N * H)])
def test_parameters_before_the_output(form, embeddings):
    params = jax.eval_shape(module(form=form).init, KEY, X)["params"]
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    sizes = {name: count(p) for name, p in params.items()}
    assert sizes.pop("out") == N * H * D
    assert sum(sizes.values()) == 3 * N * H**2 + embeddings  # multi-head attention: 3 N^2 H^2


def test_is_multi_head_attention_with_scaled_copies_of_one_projection():
    mha = registry.get("multi_head_attention").module(num_heads=N, head_dim=H)

    @jax.jit
    def both(params, x):
        p = params["params"]
        copies = {"out": p["out"]}
        for name in ("query", "key", "value"):
            scale = 1 + p[f"{name}_embedding"]["table"]
            copies[name] = {"heads": {"kernel": p[name]["heads"]["kernel"] * scale[None]}}
        y = mha.apply({"params": copies}, x, mask=masks.Causal())
        return module().apply(params, x, mask=masks.Causal()), y

    chex.assert_trees_all_close(*both(begin(module()), X), rtol=1e-5, atol=1e-6)


@functools.cache
def program(form):
    """Without a mask, and the shared head; with queries that see nothing; without key embedding."""

    @jax.jit
    def run(args):
        q, k, v = (args[name] for name in "qkv")
        mask = masks.Causal() & masks.Valid(jnp.arange(6)[None] >= 2)
        fn = functools.partial(lib.mhe_attention, form=form)
        keyless = fn(**(args | dict(key_embedding=None))) if form == "add" else None
        return (
            fn(**args),
            registry.get("multi_query_attention").fn(q, k, v),
            keyless,
            fn(**args, mask=mask),
        )

    return lambda args: jax.device_get(run(args))


@pytest.mark.parametrize("form", ["mul", "add"])
def test_without_embeddings_all_heads_are_the_shared_one(form):
    args = example()
    zero = {name: 0 * x for name, x in args.items() if name.endswith("embedding")}
    o, shared, *_ = program(form)(args | zero)
    chex.assert_trees_all_close(o, shared.repeat(4, 2), rtol=1e-5, atol=1e-6)


def test_a_key_embedding_that_is_added_does_nothing():
    """Judged by the oracle, which adds it."""
    args = example()

    @jax.jit
    def loss(e):
        arrays = {name: jnp.asarray(x) for name, x in args.items()} | dict(key_embedding=e)
        return (lib.SPEC.oracle(**arrays, form="add") ** 3).sum()

    value, grad = jax.device_get(jax.jit(jax.value_and_grad(loss))(args["key_embedding"]))
    assert np.abs(grad).max() < 1e-3 * np.abs(value)
    o, _, without, _ = program("add")(args)
    chex.assert_trees_all_equal(without, o)


def test_a_query_that_sees_nothing_has_no_embedding_either():
    *_, o = program("add")(example())
    assert not o[:, :2].any() and o[:, 2:].all()


def test_the_cache_holds_one_head():
    size = lambda state: state.k.size + state.v.size
    mha = registry.get("multi_head_attention").module(num_heads=N, head_dim=H)
    mine, theirs = (jax.eval_shape(lambda m=m: m.init_state(2, 9)) for m in (module(), mha))
    assert size(theirs) == N * size(mine)


def test_add_streams():
    mhe = module(form="add")

    @jax.jit
    def both(params, x):
        run = functools.partial(mhe.apply, params)
        state, first = run(run(2, 7, method="init_state"), x[:, :4], method="extend")
        _, rest = run(state, x[:, 4:], method="extend")
        return jnp.concatenate([first, rest], 1), run(x, mask=masks.Causal())

    chex.assert_trees_all_close(*both(begin(mhe), X), rtol=1e-5, atol=1e-6)


def test_heads_learn_what_one_shared_head_cannot():
    """The largest and the smallest of some numbers need two maps of attention."""

    def data(key):
        x = jax.random.normal(key, (64, 5, D)).at[..., 1:].set(1.0)  # a number and constants
        return x, jnp.stack([x[..., 0].max(1), x[..., 0].min(1)], -1)

    def losses(params, key):
        """Of models with four heads and with one, which learn independently of each other."""
        x, target = data(key)
        ys = [module(heads).apply(params[heads], x)[:, 0, :2] for heads in (4, 1)]
        return [jnp.mean((y - target) ** 2) for y in ys]

    params = {heads: initial(module(heads).init, KEY, X) for heads in (4, 1)}
    loss = lambda params, key: sum(losses(params, key))
    params = training.fit(loss, params, steps=300, learning_rate=3e-2)
    four, one = jax.device_get(jax.jit(losses)(params, jax.random.key(9)))
    assert four < 0.1 * one


def test_refuses_an_unknown_form(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as it is for users
    with pytest.raises(ValueError, match="form='both' must be one of"):
        jax.eval_shape(lambda args: lib.mhe_attention(**args, form="both"), example())
