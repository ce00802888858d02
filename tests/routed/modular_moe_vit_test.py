"""Only what is particular to the modular vision model; the rest is tests/conformance_test.py."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import registry
from attnjax.routed import modular_moe_vit as lib
from tests import training
from tests.cotangents import like
from tests.initial import initial

KEY = jax.random.key(0)
T, D, H = 5, 12, 8


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


x = jnp.asarray(normal(2, T, D))


def block(num_experts=4, **options):
    return lib.ModularBlock(
        num_heads=options.pop("num_heads", 2), head_dim=H, mlp_dim=10,
        num_experts=num_experts, **options,
    )  # fmt: skip


def begin(module):
    """Parameters, random by numpy and small."""
    params = like(jax.eval_shape(module.init, KEY, x))
    return jax.tree.map(lambda p: p / 3, jax.device_get(params))


def test_with_one_expert_it_is_the_block_of_a_vision_transformer():
    """Attention with one head, and one feed-forward layer, whatever the routers say."""
    module = block(num_experts=1, num_heads=1, topk=1)
    dense = registry.get("multi_head_attention").module(num_heads=1, head_dim=H)

    @jax.jit
    def both(params, x):
        inner = params["params"]
        attention = {name: inner["attention"][name] for name in ("key", "value")}
        kernel = inner["attention"]["query"]["table"].swapaxes(0, 1)
        attention["query"] = dict(heads=dict(kernel=kernel))
        attention["out"] = dict(merge=dict(kernel=inner["attention"]["out"]["table"]))
        norm = lambda name, x: nn.LayerNorm().apply({"params": inner[name]}, x)
        y = x + dense.apply({"params": attention}, norm("attention_norm", x))
        up, down = (inner["mlp"][name]["table"][0] for name in ("up", "down"))
        return module.apply(params, x), y + jax.nn.gelu(norm("mlp_norm", y) @ up) @ down

    chex.assert_trees_all_close(*both(begin(module), x), rtol=1e-5, atol=1e-5)


def test_a_task_may_be_known_only_at_run_time_and_teaches_its_own_routers_alone():
    module = block(num_tasks=3)
    params = begin(module)

    def run(params, task):
        y = module.apply(params, x, task=task)
        return (y**2).sum(), y

    of = jax.jit(jax.grad(run, has_aux=True))
    grads, ys = zip(*(jax.device_get(of(params, task)) for task in range(3)), strict=True)
    known = jax.jit(lambda params: [module.apply(params, x, task=task) for task in range(3)])
    chex.assert_trees_all_close(list(ys), known(params), rtol=1e-5, atol=1e-6)
    assert np.abs(ys[0] - ys[1]).max() > 1e-3
    for part in ("attention", "mlp"):
        learned = grads[1]["params"][part]["router"]["heads"]["kernel"].any((0, 2))
        assert learned.tolist() == [False, True, False]
    with pytest.raises(ValueError, match="task=3 must be 0 to 2"):
        jax.eval_shape(lambda params: module.apply(params, x, task=3), params)


def test_experts_that_a_task_never_chooses_can_be_dropped():
    module, small = block(num_tasks=2), block(num_experts=2, num_tasks=2)
    params = begin(module)["params"]
    for part, chosen in (("attention", [1, 3]), ("mlp", [0, 2])):
        # a constant feature of the norm, by which the task always chooses these two
        params[f"{part}_norm"]["bias"][:] = np.eye(1, D)[0] * 9
        params[f"{part}_norm"]["scale"][0] = 0
        kernel = params[part]["router"]["heads"]["kernel"]
        kernel[0, 0] = [-9.0 * (e not in chosen) for e in range(4)]

    @jax.jit
    def run(params):
        attention = lib.drop_experts(params["attention"], [3, 1])
        smaller = params | dict(attention=attention, mlp=lib.drop_experts(params["mlp"], [0, 2]))
        assert attention["query"]["table"].shape == (2, D, H)
        for wrong, message in (
            ([1, 1], "twice"),
            ([0, 2], r"kept=\[0, 2\] must be among the 2 ex"),
        ):
            with pytest.raises(ValueError, match=message):
                lib.drop_experts(smaller, wrong)
        pairs = ((small, smaller), (module, params))
        return [[m.apply({"params": p}, x, task=task) for m, p in pairs] for task in (0, 1)]

    same, other = jax.device_get(run(params))
    chex.assert_trees_all_close(*same, rtol=1e-5, atol=1e-6)
    assert np.abs(other[0] - other[1]).max() > 1e-3


# ---- the loss ----


def test_information_is_nothing_for_alike_tasks_and_all_for_different_ones():
    information = jax.jit(lib.mutual_information)
    p = np.exp(np.arange(6, dtype=np.float32))
    chex.assert_trees_all_close(information(np.tile(p / p.sum(), (3, 1))), 0.0, atol=1e-6)
    apart = np.eye(3, dtype=np.float32).repeat(2, 1) / 2  # two experts for each of three tasks
    chex.assert_trees_all_close(information(apart), np.log(3.0), rtol=1e-5)


def test_running_means_turn_into_those_of_all_tasks():
    step = jax.jit(functools.partial(lib.mutual_information_loss, momentum=0.8))
    running, logits = np.full((2, 3), 1 / 3, np.float32), normal(2, 4, 3)
    for i in range(60):
        loss, running = step(logits[i % 2], running, task=i % 2)
    p = np.exp(logits)
    means = (p / p.sum(-1, keepdims=True)).mean(1)
    left = 0.8**30  # of the start, after the 30 steps of each task
    chex.assert_trees_all_close(running, left / 3 + (1 - left) * means, rtol=1e-5)
    information = jax.jit(lib.mutual_information)(running)
    chex.assert_trees_all_close(loss, -information, rtol=1e-5)


def test_gradient_of_the_loss_is_that_of_the_information_of_this_batch():
    @jax.jit
    def gradients(z, running):
        by = lambda z, momentum: lib.mutual_information_loss(z, running, task=1, momentum=momentum)[
            0
        ]
        exact = lambda z: -lib.mutual_information(running.at[1].set(jax.nn.softmax(z).mean(0)))
        return jax.grad(by)(z, 0.0), jax.grad(exact)(z), jax.grad(by)(0 * z, 0.999)

    running = np.array([[0.2, 0.5, 0.3], [0.6, 0.2, 0.2]], np.float32)
    actual, expected, away = jax.device_get(gradients(normal(5, 3), running))
    chex.assert_trees_all_close(actual, expected, rtol=1e-5)
    assert (away[:, 1] > 0).all() and (away[:, 0] < 0).all()  # from the other task's experts


# ---- the claim: tasks that conflict part ----

module = lib.ModularMlp(mlp_dim=8, num_experts=4, num_tasks=2)


def tokens(key):
    """With a feature that is always the same, by which a router can prefer experts for a task."""
    return jax.random.normal(key, (8, 4, D)).at[..., 0].set(2.0)


def apply(params, x, task):
    """The output, and the logits of the router."""
    is_router = lambda module, _: module.name == "router"
    y, seen = module.apply(params, x, task=task, capture_intermediates=is_router)
    return y, seen["intermediates"]["router"]["__call__"][0][:, :, task]


def conflict(params, key, weight):
    """One task wants the tokens themselves and the other wants them negated."""
    x, wrong, p = tokens(key), 0.0, []
    for task, sign in enumerate((1.0, -1.0)):
        y, logits = apply(params, x, task)
        wrong += ((y - sign * x) ** 2).mean()
        p.append(jax.nn.softmax(logits).mean((0, 1)))
    return wrong - weight * lib.mutual_information(jnp.stack(p))


def test_tasks_with_conflicting_targets_part_and_leave_each_others_experts_out():
    params = initial(module.init, KEY, jnp.zeros((8, 4, D)))
    loss = functools.partial(conflict, weight=1.0)
    params = jax.device_get(training.fit(loss, params, steps=300, learning_rate=1e-2))
    x = jax.jit(tokens)(jax.random.key(5))
    of = jax.jit(lambda params: [apply(params, x, task) for task in (0, 1)])
    (y, own), (_, others) = jax.device_get(of(params))
    chosen = [np.argsort(-logits, -1)[..., :2].ravel() for logits in (own, others)]
    shares = np.stack([np.bincount(c, minlength=4) / c.size for c in chosen])
    expected = shares * np.log(np.where(shares > 0, shares, 1) / shares.mean(0))
    assert expected.sum() / 2 > 0.3
    used = sorted(set(chosen[0].tolist()))
    assert len(used) < 4
    smaller = {"params": lib.drop_experts(params["params"], used)}
    less = lib.ModularMlp(mlp_dim=8, num_experts=len(used), num_tasks=2)
    chex.assert_trees_all_close(jax.jit(less.apply)(smaller, x), y, rtol=1e-5, atol=1e-6)
