import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import pytest

from attnjax import parallel
from attnjax.core import masks, registry
from tests.parallel import helpers

LIGHTNING = registry.get("lightning_attention_2")
LOG_DECAY = jnp.array([-0.05, -0.2, -0.5, -2.0])
CAUSAL = masks.Causal()
# documents that begin where a device does, one within, one over three devices
SEGMENTS = masks.Segments(jnp.array([[0] * 4 + [1] * 3 + [2] * 9, [0] * 4 + [1] * 12]))
VALID = masks.Valid(jnp.arange(16)[None] < jnp.array([[16], [9]]))


def lightning(q, k, v, **options):
    return LIGHTNING.fn(q, k, v, LOG_DECAY, **options)


def sharded(axes, **options):
    fn = parallel.shard("pass_state", LIGHTNING, helpers.mesh(**axes))
    return lambda q, k, v, **more: fn(q, k, v, LOG_DECAY, **options, **more)


def qkv(T=16, dtype="float32"):
    return helpers.normal((2, T, 4, 8), (2, T, 4, 8), (2, T, 4, 6), dtype=dtype)


def test_equals_one_device_on_any_mesh():
    """In the gradient of the decays too, an array of the heads."""
    arrays, mask = (*qkv(), LOG_DECAY), CAUSAL & SEGMENTS & VALID
    helpers.assert_same("pass_state", LIGHTNING, arrays, *helpers.MESHES, mask=mask)


def test_fewer_tokens_than_devices():
    arrays = *qkv(1), LOG_DECAY
    helpers.assert_same("pass_state", LIGHTNING, arrays, dict(context=4), mask=CAUSAL)


def test_state_goes_in_and_comes_out_with_documents():
    (initial,) = helpers.normal((2, 4, 8, 6))
    options = dict(mask=CAUSAL & SEGMENTS, return_state=True)
    given = lambda fn: lambda q, k, v, state: fn(q, k, v, initial_state=state, **options)
    run = lambda fn: helpers.with_gradients(given(fn))(*qkv(), initial)
    (o, state), grads = jax.device_get(run(lightning))
    assert o.any() and state.any()
    actual = run(sharded(dict(context=4)))
    chex.assert_trees_all_close(actual, ((o, state), grads), rtol=1e-5, atol=1e-5)


def test_bfloat16():
    rounded = qkv(dtype="bfloat16")
    exact = [x.astype(jnp.float32) for x in rounded]
    run = lambda fn, arrays: jax.device_get(jax.jit(functools.partial(fn, mask=CAUSAL))(*arrays))
    truth, naive = run(lightning, exact), run(lightning, rounded)
    actual = run(sharded(dict(context=4)), rounded)
    assert actual.dtype == jnp.bfloat16
    bound = 2 * helpers.rms(naive - truth) + 2**-9 * helpers.rms(truth)
    assert helpers.rms(actual - truth) <= bound


def compiled(size, T=2**16):
    mesh = helpers.mesh(context=size)
    fn = parallel.shard("pass_state", LIGHTNING, mesh)
    loss = lambda q, k, v: (fn(q, k, v, LOG_DECAY, mask=CAUSAL) ** 2).sum()
    split = jax.NamedSharding(mesh, jax.P(None, "context"))
    array = jax.ShapeDtypeStruct((1, T, 4, 16), jnp.float32, sharding=split)
    run = jax.jit(jax.grad(loss, (0, 1, 2)), out_shardings=split)
    return run.lower(array, array, array).compile()


def test_memory_falls_with_devices_and_only_states_are_gathered():
    used = {size: compiled(size) for size in (2, 4)}
    sizes = {n: program.memory_analysis().temp_size_in_bytes for n, program in used.items()}
    assert sizes[4] < 0.6 * sizes[2]
    gathers = [line for line in used[4].as_text().splitlines() if " all-gather(" in line]
    assert gathers and not any(str(2**14) in line for line in gathers)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (None, "pass_state goes forward in time: it needs mask=Causal"),
        (CAUSAL & masks.Window(3), "pass_state can't honour Window; it can Causal & Valid"),
    ],
)
def test_refuses(mask, message):
    with pytest.raises(NotImplementedError, match=message):
        sharded(dict(context=4))(*qkv(), mask=mask)


def test_refuses_the_state_of_a_length_that_does_not_divide():
    with pytest.raises(NotImplementedError, match="return_state needs T=13 to be a multiple of 4"):
        sharded(dict(context=4))(*qkv(13), mask=CAUSAL, return_state=True)


def test_without_a_carry_the_state_is_multiplied_by_a_matrix():
    record = dataclasses.replace(LIGHTNING, carry=None)
    arrays = (*qkv(), LOG_DECAY)
    mask = CAUSAL & SEGMENTS
    run = lambda fn: jax.jit(functools.partial(fn, mask=mask))(*arrays)
    fn = parallel.shard("pass_state", record, helpers.mesh(context=4))
    chex.assert_trees_all_close(run(fn), run(LIGHTNING.fn), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gqa", "pass_state needs initial_state and return_state of gqa"),
        ("mamba", r"pass_state needs carry, or a state \(B N H V\), of mamba"),
    ],
)
def test_refuses_a_record_without_states_or_carry(name, message):
    record = dataclasses.replace(registry.get(name), context=("pass_state",), carry=None)
    fn = parallel.shard("pass_state", record, helpers.mesh(context=4))
    with pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(fn, **helpers.example(name, 8))
