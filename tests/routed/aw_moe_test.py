"""Only what is particular to AW-MoE; the rest is tests/conformance_test.py."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import masks
from attnjax.routed import aw_moe as lib
from tests import training
from tests.initial import initial

KEY = jax.random.key(0)


gates = jax.jit(lambda args, valid: lib.gates(**args, mask=masks.Valid(valid)))


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def example(S=8):
    """As that of the record, by numpy."""
    units = dict(gate_in=normal(18, 5), gate_out=normal(5, 4, seed=1))
    units |= dict(activation_in=normal(18, 5, seed=2), activation_out=normal(5, 1, seed=3))
    things = dict(experts=normal(2, 5, 4, 3, seed=4), x=normal(2, 5, 6, seed=5))
    return things | units | dict(history=normal(2, S, 6, seed=6))


def units(args):
    return {name: x for name, x in args.items() if name != "experts"}


def test_one_item_of_weight_one_is_a_plain_mixture_of_experts():
    """By the vote of that item."""
    args = example(S=1)
    h, first = args["history"][:1].repeat(2, 0), np.float32([[1]] + [[0]] * 4)
    args["activation_in"] = np.zeros_like(args["activation_in"])
    args["activation_in"][0] = 1 / h[0, 0, 0]
    args |= dict(activation_out=first, history=h)  # one item, for both users: its activation is 1
    h = np.broadcast_to(h, args["x"].shape)
    z = np.concatenate([h, args["x"], h * args["x"]], -1)
    vote = np.maximum(z @ args["gate_in"], 0) @ args["gate_out"]
    actual = jax.jit(lib.aw_moe)(**args)
    chex.assert_trees_all_close(actual, vote[..., None] * args["experts"], rtol=1e-5, atol=1e-6)


def test_items_add_up_their_votes_and_padding_changes_no_gate():
    args, full = units(example()), np.ones((2, 8), bool)
    every = [jax.device_get(gates(args, full & (np.arange(8) == s))) for s in range(8)]
    whole = jax.device_get(gates(args, full))
    chex.assert_trees_all_close(whole, sum(every), rtol=1e-4, atol=1e-4)
    seen = np.arange(8)[None] < np.array([3, 8])[:, None]
    part = jax.device_get(gates(args, seen))
    short = gates(args | dict(history=args["history"][:, :3]), full[:, :3])
    chex.assert_trees_all_close(part[0], short[0], rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(part[1], whole[1], rtol=1e-5, atol=1e-5)
    run = jax.jit(lambda args, valid: lib.aw_moe(**args, mask=masks.Valid(valid)))
    assert not jax.device_get(run(example(), ~full)).any()


def test_loss_is_low_where_each_user_is_like_itself_alone():
    loss = jax.jit(jax.value_and_grad(lib.contrastive_loss))
    of = lambda *pair: jax.device_get(loss(*pair))
    g, equal = np.eye(6, dtype=np.float32), np.ones((6, 6), np.float32)
    same, apart = of(g, 3 * g)[0], of(g, np.roll(g, 1, 0))[0]
    assert 0 <= same < 1e-3 and apart > 9
    chex.assert_trees_all_close(of(equal, equal)[0], np.log(np.float32(6)), rtol=1e-5)
    assert np.isfinite(of(0 * g, g)[1]).all()


def test_hides_items_at_a_rate_and_padding_always():
    valid = np.arange(400)[None] < np.array([400, 100])[:, None]
    hide = jax.jit(lambda valid: [lib.hide_items(KEY, valid, rate=r) for r in (0.25, 0.0)])
    hidden, none = jax.device_get(hide(valid))
    assert not (hidden & ~valid).any() and abs(hidden[0].mean() - 0.75) < 0.07
    assert (none == valid).all()
    with pytest.raises(ValueError, match="rate=1.5 must be in"):
        jax.eval_shape(lambda valid: lib.hide_items(KEY, valid, rate=1.5), valid)


def test_refuses_a_mask_for_each_head():
    mask = masks.Dense(jnp.asarray(np.ones((1, 2, 5, 8), bool)))
    with pytest.raises(ValueError, match="mask for 2 heads must be for 1"):
        jax.eval_shape(lambda args: lib.aw_moe(**args, mask=mask), example())


# ---- the claim: a user with a short history gets the gates of a long one ----

TYPES, S, D = 4, 8, 6
UNITS = ("gate_in", "gate_out", "activation_in", "activation_out")
module = lib.AwMoe(num_experts=TYPES, expert_dim=8, unit_dim=16)
likes = jnp.asarray(normal(TYPES, D, seed=7))  # of users of each type


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
    start = initial(module.init, KEY, jnp.zeros((1, 1, D)), jnp.zeros((1, S, D)))
    start = jax.tree.map(lambda x: np.stack([x] * 2), jax.device_get(start))
    weights = np.array([0.0, 1.0], np.float32)  # two models that learn side by side
    every = jax.vmap(loss, (0, None, 0))
    fit = functools.partial(training.fit, steps=200, learning_rate=3e-3)
    params = fit(lambda params, key: every(params, key, weights).sum(), start)

    @jax.jit
    @jax.vmap
    def measure(params):
        x, _, history = users(jax.random.key(9), 256)
        valid = jnp.ones((256, S), bool)
        short = valid.at[:, 2:].set(False)
        long, part = (gates_of(params, x, history, seen) for seen in (valid, short))
        norm = lambda g: g / jnp.linalg.norm(g, axis=-1, keepdims=True)
        likeness = norm(part) @ norm(long).T
        own = jnp.diagonal(likeness)
        return own.mean(), (likeness > own[:, None]).mean()

    (plain_own, own), (plain_more, more) = jax.device_get(measure(params))
    assert own > plain_own + 0.05 and more < plain_more / 2
