"""What is particular to DuoAttention: decoding past the ring, and finding gates."""

import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.cache_policies import duoattention as duo
from attnjax.core import attention, masks, positions
from attnjax.ops import dot_product_attention as ops
from tests.cotangents import like

KEY = jax.random.key(0)
POLICY = duo.Policy((False, False, True), sinks=2, recent=3)
B, T, H = 2, 17, 8  # the ring wraps around more than four times


def seen_by_each_head():
    """(1 6 T T), two query heads for each key head."""
    t, s = np.arange(T)[:, None], np.arange(T)[None]
    near = (s < 2) | (t - s < 3)
    heads = [(s <= t) & (near | keep) for keep in POLICY.retrieval for _ in range(2)]
    return masks.Dense(jnp.asarray(np.stack(heads)[None]))


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@functools.cache
def arrays():
    """Queries, keys, values, and what they give under the mask."""
    q, k, v = draw(3, B, T, 6, H)
    k, v = k[:, :, :3], v[:, :, :3]
    mask = seen_by_each_head()
    attend = jax.jit(functools.partial(ops.dot_product_attention, mask=mask))
    return q, k, v, jax.device_get(attend(q, k, v))


EXTEND = jax.jit(functools.partial(POLICY.extend, ops.dot_product_attention))


def stream(q, k, v, policy, pieces):
    state, outputs = policy.empty(*k.shape, v.shape[-1], k.dtype), []
    for part in np.split(np.arange(k.shape[1]), np.cumsum(pieces)[:-1]):
        state, o = EXTEND(state, q[:, part], k[:, part], v[:, part])
        outputs.append(jax.device_get(o))
    return jax.device_get(state), np.concatenate(outputs, 1)


@pytest.mark.parametrize("pieces", [(1,) * 17, (9, 1, 1, 6), (17,)], ids=["steps", "chunks", "one"])
def test_decoding_equals_the_mask(pieces):
    q, k, v, expected = arrays()
    state, o = stream(q, k, v, POLICY, pieces)
    chex.assert_trees_all_close(o, expected, rtol=1e-5, atol=1e-6)
    at = np.array([0, 1, 14, 15, 16])  # 2 sinks, then slots of the ring: 14 is a multiple of 3 on
    chex.assert_trees_all_equal(state.short_k, k[:, at][:, :, :2])
    chex.assert_trees_all_equal(state.full_v, v[:, :, 2:])
    assert state.length == T


def test_only_retrieval_heads_grow_with_the_length():
    empty = lambda n: jax.eval_shape(lambda: POLICY.empty(1, n, 3, 128, 128, jnp.bfloat16))
    size = lambda state: sum(x.size for x in state[:4])
    assert size(empty(200)) == POLICY.entries(1, 200, 128, 128) == (200 + 2 * 5) * 2 * 128
    assert size(empty(200)) - size(empty(100)) == 100 * 2 * 128


def test_a_state_keeps_its_dtype():
    x = jax.ShapeDtypeStruct((1, 4, 3, H), "float32")
    empty = jax.eval_shape(lambda: POLICY.empty(1, 9, 3, H, H, jnp.bfloat16))
    state, _ = jax.eval_shape(
        functools.partial(POLICY.extend, ops.dot_product_attention), empty, x, x, x
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(state, empty)


class Streamed(attention.KeyValueAttention):
    """Attention with rotated positions whose state is that of a policy."""

    fn: Callable[..., jax.Array] = ops.dot_product_attention

    def init_state(self, batch, length):
        return POLICY.empty(batch, length, self.num_kv_heads, H, H, jnp.float32)

    def extend(self, state, x):
        q, k, v = self._project(x, state.length + jnp.arange(x.shape[1]))
        state, o = POLICY.extend(self.attend, state, q, k, v)
        return state, self.out(o, x.shape[-1])


def test_is_the_state_of_a_module():
    model, x = Streamed(6, H, num_kv_heads=3, rotary_base=100.0), draw(B, T, 12)
    params = like(jax.eval_shape(model.init, KEY, x))
    params = jax.tree.map(lambda p: p / 4, jax.device_get(params))
    mask = seen_by_each_head()

    @jax.jit
    def both(params, x):
        step = lambda state, x: model.apply(params, state, x[:, None], method="extend")
        start = model.apply(params, B, T, method="init_state")
        y = jax.lax.scan(step, start, x.swapaxes(0, 1))[1][:, :, 0].swapaxes(0, 1)
        return y, model.apply(params, x, mask=mask)

    chex.assert_trees_all_close(*both(params, x), rtol=1e-5, atol=1e-6)


def test_gates_at_their_ends():
    q, k, v, expected = arrays()
    run = jax.jit(functools.partial(duo.gated, sinks=2, recent=3))
    o = run(q, k, v, np.array([0.0, 0.0, 1.0], np.float32))
    chex.assert_trees_all_close(o, expected, rtol=1e-5, atol=1e-6)


def test_training_of_gates_finds_the_head_that_retrieves():
    """Head 2 looks 20 tokens back, to where a passkey stands; the others at what is near."""

    @jax.jit
    def train(v, merge):
        T, answers = 32, jnp.arange(32)[None] >= 28
        place = positions.sinusoidal(T, 16, base=30.0)
        looks_at = jnp.stack([jnp.roll(place, lag, 0) for lag in (0, 1, 20, 2)], 1)
        q, k = 8 * looks_at[None], jnp.broadcast_to(place[None, :, None], (1, T, 4, 16))
        hidden = lambda o: jnp.einsum("BTNH,NHD->BTD", o, merge)
        full = hidden(duo.gated(q, k, v, jnp.ones(4), sinks=1, recent=6))

        def loss(gates):
            mixed = hidden(duo.gated(q, k, v, gates[0], sinks=1, recent=6))
            return duo.gate_loss(mixed, full, answers, gates)

        step = lambda _, gates: jnp.clip(gates - 0.05 * jax.grad(loss)(gates), 0, 1)
        return jax.lax.fori_loop(0, 400, step, jnp.ones((1, 4)))

    gates = jax.device_get(train(draw(1, 32, 4, 8), draw(4, 8, 16, seed=1)))
    assert gates[0, 2] > 0.8 and np.delete(gates[0], 2).max() < 0.2
    kept = duo.binarise(jnp.asarray(gates), full=0.25)
    np.testing.assert_array_equal(kept, [[False, False, True, False]])


def test_binarise_keeps_the_share_whatever_the_layer():
    gates = jnp.asarray(np.float32([[0.9, 0.1, 0.5], [0.5, 0.8, 0.7]]))
    shares = (4 / 6, 1.0, 0.0)  # of the two gates of 0.5 the first
    kept, every, none = (duo.binarise(gates, full=share) for share in shares)
    np.testing.assert_array_equal(kept, [[True, False, True], [False, True, True]])
    assert every.all() and not none.any()


def test_wrong_options_raise():
    with pytest.raises(ValueError, match="recent=0.* must have .* recent of at least 1"):
        duo.Policy((True,), recent=0)
    with pytest.raises(ValueError, match="num_kv_heads=2 must be 3"):
        POLICY.empty(1, 8, 2, 4, 4, jnp.float32)
    with pytest.raises(ValueError, match="full=2.0 must be in"):
        duo.binarise(jnp.ones((1, 2)), full=2.0)
