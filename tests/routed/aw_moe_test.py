"""Only what is particular to AW-MoE; the rest is tests/conformance_test.py."""

import chex
import jax
import jax.numpy as jnp
import pytest

from attnjax.core import masks
from attnjax.routed import aw_moe as lib
from tests import training

KEY = jax.random.key(0)


def example(S=8):
    args = lib.SPEC.example(KEY, 5)
    return args | dict(history=args["history"][:, :S])


def units(args):
    return {name: x for name, x in args.items() if name != "experts"}


def test_one_item_of_weight_one_is_a_plain_mixture_of_experts():
    """By the vote of that item."""
    args = example(S=1)
    x, h = args["x"], args["history"]
    args["activation_in"] = jnp.zeros_like(args["activation_in"]).at[0].set(1 / h[0, 0, 0])
    args["activation_out"] = jnp.zeros_like(args["activation_out"]).at[0].set(1.0)
    h = jnp.broadcast_to(h[:1], h.shape)  # one item, for both users: its activation is 1
    z = jnp.concatenate([jnp.broadcast_to(h, x.shape), x, h * x], -1)
    vote = jax.nn.relu(z @ args["gate_in"]) @ args["gate_out"]
    actual = lib.aw_moe(**(args | dict(history=h)))
    chex.assert_trees_all_close(actual, vote[..., None] * args["experts"], rtol=1e-5, atol=1e-6)


def test_items_add_up_their_votes():
    args = units(example())
    every = [lib.gates(**(args | dict(history=args["history"][:, s : s + 1]))) for s in range(8)]
    chex.assert_trees_all_close(lib.gates(**args), sum(every), rtol=1e-4, atol=1e-4)


def test_padding_changes_no_gate():
    args, valid = units(example()), jnp.arange(8)[None] < jnp.array([3, 8])[:, None]
    full = lib.gates(**args, mask=masks.Valid(valid))
    short = lib.gates(**(args | dict(history=args["history"][:, :3])))
    chex.assert_trees_all_close(full[0], short[0], rtol=1e-5, atol=1e-5)
    assert not lib.aw_moe(**example(), mask=masks.Valid(valid & False)).any()


def test_loss_is_low_where_each_user_is_like_itself_alone():
    g = jax.nn.one_hot(jnp.arange(6), 6)
    same = lib.contrastive_loss(g, 3 * g)
    assert 0 <= same < 1e-3 and lib.contrastive_loss(g, jnp.roll(g, 1, 0)) > 9
    equal = lib.contrastive_loss(jnp.ones((6, 4)), jnp.ones((6, 4)))
    chex.assert_trees_all_close(equal, jnp.log(6.0), rtol=1e-5)
    assert jnp.isfinite(jax.grad(lib.contrastive_loss)(0 * g, g)).all()


def test_hides_items_at_a_rate_and_padding_always():
    valid = jnp.arange(400)[None] < jnp.array([400, 100])[:, None]
    hidden = lib.hide_items(KEY, valid, rate=0.25)
    assert not (hidden & ~valid).any() and abs(hidden[0].mean() - 0.75) < 0.07
    assert (lib.hide_items(KEY, valid, rate=0.0) == valid).all()
    with pytest.raises(ValueError, match="rate=1.5 must be in"):
        lib.hide_items(KEY, valid, rate=1.5)


def test_refuses_a_mask_for_each_head():
    with pytest.raises(ValueError, match="mask for 2 heads must be for 1"):
        lib.aw_moe(**example(), mask=masks.Dense(jnp.ones((1, 2, 5, 8), bool)))


# ---- the claim: a user with a short history gets the gates of a long one ----

TYPES, S, D = 4, 8, 6
UNITS = ("gate_in", "gate_out", "activation_in", "activation_out")
module = lib.AwMoe(num_experts=TYPES, expert_dim=8, unit_dim=16)
likes = jax.random.normal(jax.random.key(7), (TYPES, D))  # of users of each type


def users(key, count):
    """A thing to rank for each, whether the user takes it, and a noisy history."""
    kind, thing, noise = jax.random.split(key, 3)
    kind = jax.random.randint(kind, (count,), 0, TYPES)
    x = jax.random.normal(thing, (count, 1, D))
    history = likes[kind][:, None] + jax.random.normal(noise, (count, S, D))
    return x, jnp.einsum("BTD,BD->B", x, likes[kind]) > 0, history


def gates_of(params, x, history, valid):
    arrays = [params["params"][name]["table"] for name in UNITS]
    return lib.gates(x, history, *arrays, mask=masks.Valid(valid))[:, 0]


def loss(params, key, weight):
    every, (x, taken, history) = jnp.ones((64, S), bool), users(key, 64)
    score = module.apply(params, x, history)[:, 0, 0]
    pair = [gates_of(params, x, history, every)]
    pair += [gates_of(params, x, history, lib.hide_items(key, every, rate=0.7))]
    wrong = jax.nn.softplus(jnp.where(taken, -score, score)).mean()
    return wrong + weight * lib.contrastive_loss(*pair)


def test_contrastive_loss_draws_gates_of_a_short_history_to_those_of_the_long_one():
    """On users not seen in training: likeness to the own gates, and how many others are more so."""
    x, _, history = users(jax.random.key(9), 256)
    valid = jnp.ones((256, S), bool)
    short = valid.at[:, 2:].set(False)
    start = jax.jit(module.init)(KEY, x, history)

    @jax.jit
    def measure(params):
        long, part = (gates_of(params, x, history, seen) for seen in (valid, short))
        norm = lambda g: g / jnp.linalg.norm(g, axis=-1, keepdims=True)
        likeness = norm(part) @ norm(long).T
        own = jnp.diagonal(likeness)
        return own.mean(), (likeness > own[:, None]).mean()

    fit = lambda weight: training.fit(
        lambda params, key: loss(params, key, weight), start, steps=200, learning_rate=3e-3
    )
    (plain_own, plain_more), (own, more) = measure(fit(0.0)), measure(fit(1.0))
    assert own > plain_own + 0.05 and more < plain_more / 2
