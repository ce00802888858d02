"""Only what is particular to the modular vision model; the rest is tests/conformance_test.py."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from attnjax.core import registry
from attnjax.routed import modular_moe_vit as lib
from tests import training

KEY = jax.random.key(0)
T, D, H = 5, 12, 8
x = jax.random.normal(KEY, (2, T, D))


def block(num_experts=4, **options):
    return lib.ModularBlock(
        num_heads=options.pop("num_heads", 2), head_dim=H, mlp_dim=10,
        num_experts=num_experts, **options,
    )  # fmt: skip


def test_with_one_expert_it_is_the_block_of_a_vision_transformer():
    """Attention with one head, and one feed-forward layer, whatever the routers say."""
    module = block(num_experts=1, num_heads=1, topk=1)
    params = jax.jit(module.init)(KEY, x)
    inner = params["params"]
    dense = registry.get("multi_head_attention").module(num_heads=1, head_dim=H)
    attention = {name: inner["attention"][name] for name in ("key", "value")}
    attention["query"] = dict(
        heads=dict(kernel=inner["attention"]["query"]["table"].swapaxes(0, 1))
    )
    attention["out"] = dict(merge=dict(kernel=inner["attention"]["out"]["table"]))
    norm = lambda name, x: nn.LayerNorm().apply({"params": inner[name]}, x)

    @jax.jit
    def expected():
        y = x + dense.apply({"params": attention}, norm("attention_norm", x))
        up, down = (inner["mlp"][name]["table"][0] for name in ("up", "down"))
        return y + jax.nn.gelu(norm("mlp_norm", y) @ up) @ down

    chex.assert_trees_all_close(module.apply(params, x), expected(), rtol=1e-5, atol=1e-5)


def test_a_task_may_be_known_only_at_run_time():
    module = block(num_tasks=3)
    params = jax.jit(module.init)(KEY, x)
    run = jax.jit(lambda task: module.apply(params, x, task=task))
    for task in range(3):
        expected = module.apply(params, x, task=task)
        chex.assert_trees_all_close(run(task), expected, rtol=1e-5, atol=1e-6)
    assert jnp.abs(run(0) - run(1)).max() > 1e-3
    with pytest.raises(ValueError, match="task=3 must be 0 to 2"):
        module.apply(params, x, task=3)


def test_a_task_teaches_its_own_routers_alone():
    module = block(num_tasks=3)
    params = jax.jit(module.init)(KEY, x)
    loss = lambda params: (module.apply(params, x, task=1) ** 2).sum()
    grads = jax.jit(jax.grad(loss))(params)["params"]
    for part in ("attention", "mlp"):
        learned = grads[part]["router"]["heads"]["kernel"].any((0, 2))
        assert learned.tolist() == [False, True, False]


def test_experts_that_a_task_never_chooses_can_be_dropped():
    module = block(num_tasks=2)
    params = jax.jit(module.init)(KEY, x)
    for part, chosen in (("attention", [1, 3]), ("mlp", [0, 2])):
        # a constant feature of the norm, by which the task always chooses these two
        kernel = params["params"][part]["router"]["heads"]["kernel"]
        others = jnp.array([e not in chosen for e in range(4)])
        params["params"][f"{part}_norm"]["bias"] = jnp.zeros(D).at[0].set(9.0)
        params["params"][part]["router"]["heads"]["kernel"] = kernel.at[0, 0].set(-9.0 * others)
    smaller = params["params"] | dict(
        attention=lib.drop_experts(params["params"]["attention"], [3, 1]),
        mlp=lib.drop_experts(params["params"]["mlp"], [0, 2]),
    )
    assert smaller["attention"]["query"]["table"].shape == (2, D, H)
    run = lambda module, params, task: module.apply(params, x, task=task)
    small = functools.partial(run, block(num_experts=2, num_tasks=2), {"params": smaller})
    large = functools.partial(run, module, params)
    chex.assert_trees_all_close(small(0), large(0), rtol=1e-5, atol=1e-6)
    assert jnp.abs(small(1) - large(1)).max() > 1e-3
    with pytest.raises(ValueError, match="must not name an expert twice"):
        lib.drop_experts(smaller, [1, 1])
    with pytest.raises(ValueError, match=r"kept=\[0, 2\] must be among the 2 experts"):
        lib.drop_experts(smaller, [0, 2])


# ---- the loss ----


def test_information_is_nothing_for_alike_tasks_and_all_for_different_ones():
    alike = jnp.tile(jax.nn.softmax(jnp.arange(4.0))[None], (3, 1))
    chex.assert_trees_all_close(lib.mutual_information(alike), 0.0, atol=1e-6)
    apart = jnp.repeat(jnp.eye(3), 2, 1) / 2  # two experts for each of three tasks
    chex.assert_trees_all_close(lib.mutual_information(apart), jnp.log(3.0), rtol=1e-5)


def test_running_means_turn_into_those_of_all_tasks():
    running, logits = jnp.full((2, 3), 1 / 3), jax.random.normal(KEY, (2, 4, 3))
    step = jax.jit(functools.partial(lib.mutual_information_loss, momentum=0.8))
    for i in range(60):
        loss, running = step(logits[i % 2], running, task=i % 2)
    means = jax.nn.softmax(logits).mean(1)
    left = 0.8**30  # of the start, after the 30 steps of each task
    chex.assert_trees_all_close(running, left / 3 + (1 - left) * means, rtol=1e-5)
    chex.assert_trees_all_close(loss, -lib.mutual_information(running), rtol=1e-5)


def test_gradient_of_the_loss_is_that_of_the_information_of_this_batch():
    logits, running = jax.random.normal(KEY, (5, 3)), jnp.array([[0.2, 0.5, 0.3], [0.6, 0.2, 0.2]])
    loss = lambda logits: lib.mutual_information_loss(logits, running, task=1, momentum=0.0)[0]
    exact = lambda z: -lib.mutual_information(running.at[1].set(jax.nn.softmax(z).mean(0)))
    chex.assert_trees_all_close(jax.grad(loss)(logits), jax.grad(exact)(logits), rtol=1e-5)
    late = lambda z: lib.mutual_information_loss(z, running, task=1, momentum=0.999)[0]
    away = jax.grad(late)(jnp.zeros((5, 3)))  # from experts of the other task, to the own
    assert (away[:, 1] > 0).all() and (away[:, 0] < 0).all()


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
    params = jax.jit(module.init)(KEY, tokens(KEY))
    loss = functools.partial(conflict, weight=1.0)
    params = training.fit(loss, params, steps=300, learning_rate=1e-2)
    x = tokens(jax.random.key(5))
    chosen = [jax.lax.top_k(apply(params, x, task)[1], 2)[1].reshape(-1) for task in (0, 1)]
    shares = jnp.stack([jnp.bincount(c, length=4) / c.size for c in chosen])
    assert lib.mutual_information(shares) > 0.3
    used = sorted(set(chosen[0].tolist()))
    assert len(used) < 4
    smaller = {"params": lib.drop_experts(params["params"], used)}
    less = lib.ModularMlp(mlp_dim=8, num_experts=len(used), num_tasks=2)
    chex.assert_trees_all_close(
        less.apply(smaller, x), apply(params, x, 0)[0], rtol=1e-5, atol=1e-6
    )
