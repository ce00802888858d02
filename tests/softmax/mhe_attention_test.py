import chex
import jax
import jax.numpy as jnp
import jaxtyping
import pytest

from attnjax.core import masks, registry
from attnjax.softmax import mhe_attention as lib
from tests import training

KEY = jax.random.key(0)
N, H, D = 4, 3, 12  # D = N H, as in the paper


def module(num_heads=N, **options):
    return lib.MheAttention(num_heads=num_heads, head_dim=H, **options)


def init(**options):
    x = jax.random.normal(KEY, (2, 7, D))
    return module(**options), module(**options).init(KEY, x), x


@pytest.mark.parametrize("form, embeddings", [("mul", 3 * N * H), ("add", 2 * N * H)])
def test_parameters_before_the_output(form, embeddings):
    _, params, _ = init(form=form)
    sizes = {name: sum(map(jnp.size, jax.tree.leaves(p))) for name, p in params["params"].items()}
    assert sizes.pop("out") == N * H * D
    assert sum(sizes.values()) == 3 * N * H**2 + embeddings  # multi-head attention: 3 N^2 H^2


def test_is_multi_head_attention_with_scaled_copies_of_one_projection():
    mhe, params, x = init()
    p = params["params"]
    copies = {"out": p["out"]}
    for name in ("query", "key", "value"):
        scale = 1 + p[f"{name}_embedding"]["table"]
        copies[name] = {"heads": {"kernel": p[name]["heads"]["kernel"] * scale[None]}}
    mha = registry.get("multi_head_attention").module(num_heads=N, head_dim=H)
    y = mha.apply({"params": copies}, x, mask=masks.Causal())
    chex.assert_trees_all_close(mhe.apply(params, x, mask=masks.Causal()), y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", ["mul", "add"])
def test_without_embeddings_all_heads_are_the_shared_one(form):
    args = lib.SPEC.example(KEY, 6)
    zero = {name: 0 * x for name, x in args.items() if name.endswith("embedding")}
    o = lib.mhe_attention(**(args | zero), form=form)
    q, k, v = (args[name] for name in "qkv")
    shared = registry.get("multi_query_attention").fn(q, k, v)
    chex.assert_trees_all_close(o, shared.repeat(4, 2), rtol=1e-5, atol=1e-6)


def test_a_key_embedding_that_is_added_does_nothing():
    """Judged by the oracle, which adds it."""
    args = lib.SPEC.example(KEY, 6)
    loss = lambda e, fn: (fn(**(args | dict(key_embedding=e)), form="add") ** 3).sum()
    grad = jax.jit(jax.grad(loss), static_argnums=1)(args["key_embedding"], lib.SPEC.oracle)
    assert jnp.abs(grad).max() < 1e-3 * loss(args["key_embedding"], lib.SPEC.oracle)
    without = lib.mhe_attention(**(args | dict(key_embedding=None)), form="add")
    chex.assert_trees_all_equal(without, lib.mhe_attention(**args, form="add"))


def test_a_query_that_sees_nothing_has_no_embedding_either():
    args = lib.SPEC.example(KEY, 6)
    mask = masks.Causal() & masks.Valid(jnp.arange(6)[None] >= 2)
    o = lib.mhe_attention(**args, form="add", mask=mask)
    assert not o[:, :2].any() and o[:, 2:].all()


def test_the_cache_holds_one_head():
    size = lambda state: state.k.size + state.v.size
    mha = registry.get("multi_head_attention").module(num_heads=N, head_dim=H)
    assert size(mha.init_state(2, 9)) == N * size(module().init_state(2, 9))


def test_add_streams():
    mhe, params, x = init(form="add")
    state, first = mhe.apply(
        params, mhe.apply(params, 2, 7, method="init_state"), x[:, :4], method="extend"
    )
    _, rest = mhe.apply(params, state, x[:, 4:], method="extend")
    y = mhe.apply(params, x, mask=masks.Causal())
    chex.assert_trees_all_close(jnp.concatenate([first, rest], 1), y, rtol=1e-5, atol=1e-6)


def test_heads_learn_what_one_shared_head_cannot():
    """The largest and the smallest of some numbers need two maps of attention."""

    def data(key):
        x = jax.random.normal(key, (64, 5, D)).at[..., 1:].set(1.0)  # a number and constants
        return x, jnp.stack([x[..., 0].max(1), x[..., 0].min(1)], -1)

    def final(num_heads):
        mhe = module(num_heads)
        params = mhe.init(KEY, data(KEY)[0])

        def loss(params, key):
            x, target = data(key)
            return jnp.mean((mhe.apply(params, x)[:, 0, :2] - target) ** 2)

        params = training.fit(loss, params, steps=300, learning_rate=3e-2)
        return float(jax.jit(loss)(params, jax.random.key(9)))

    assert final(4) < 0.1 * final(1)


def test_refuses_an_unknown_form(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as it is for users
    with pytest.raises(ValueError, match="form='both' must be one of"):
        lib.mhe_attention(**lib.SPEC.example(KEY, 2), form="both")
