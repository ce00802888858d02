"""Masks, and the choice of steps; the scan itself is judged in tests/pallas_kernels."""

import chex
import jax
import jax.numpy as jnp
import pytest

from attnjax.core import masks
from attnjax.ops import selective_scan as ops

KEY = jax.random.key(0)
B, T, N, H, M, R = 2, 11, 2, 3, 4, 2


def inputs():
    keys = jax.random.split(KEY, 6)
    return dict(
        x=jax.random.normal(keys[0], (B, T, N, H)),
        select=jax.random.normal(keys[1], (N, H, R + 2 * M)),
        widen=jax.random.normal(keys[2], (N, R, H)),
        bias=jax.random.normal(keys[3], (N, H)),
        log_rate=jax.random.normal(keys[4], (N, H, M)),
        skip=jax.random.normal(keys[5], (N, H)),
    )


def test_chooses_for_each_token_and_head_by_its_equation():
    args = inputs()
    y, state = jax.jit(lambda: ops.selected_scan(**args))()

    @jax.jit
    def expected(n):
        x, w = args["x"][:, :, n], {k: a[n] for k, a in args.items() if k != "x"}
        r, b, c = jnp.split(x @ w["select"], [R, R + M], -1)
        delta = jnp.log(1 + jnp.exp(r @ w["widen"] + w["bias"][None, None]))
        h, ys = jnp.zeros((B, H, M)), []
        for t in range(T):
            h = h * jnp.exp(-delta[:, t, :, None] * jnp.exp(w["log_rate"])[None])
            h = h + (delta * x)[:, t, :, None] * b[:, t, None]
            ys.append(jnp.einsum("BHM,BM->BH", h, c[:, t]) + w["skip"][None] * x[:, t])
        return jnp.stack(ys, 1), h

    for n in range(N):
        actual = y[:, :, n], state[:, n]
        chex.assert_trees_all_close(actual, expected(n), rtol=1e-5, atol=1e-5)


def test_padding_changes_nothing():
    args = inputs()
    mask = masks.Valid(jnp.ones((B, T), bool).at[:, 3].set(False)) & masks.Causal()
    without = args | dict(x=jnp.delete(args["x"], 3, 1))
    run = jax.jit(lambda: (ops.selected_scan(**args, mask=mask), ops.selected_scan(**without)))
    (y, state), (expected, expected_state) = run()
    chex.assert_trees_all_close(jnp.delete(y, 3, 1), expected, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(state, expected_state, rtol=1e-5, atol=1e-5)


def test_segments_are_sequences_of_their_own():
    args, ids = inputs(), jnp.array([[0] * 4 + [1] * 7])
    state = jax.random.normal(KEY, (B, N, H, M))
    part = lambda *ends: args | dict(x=args["x"][:, slice(*ends)])

    @jax.jit
    def run():
        mask = masks.Segments(jnp.repeat(ids, B, 0))
        first, _ = ops.selected_scan(**part(0, 4), initial_state=state)
        second, last = ops.selected_scan(**part(4, T))
        packed = ops.selected_scan(**args, mask=mask, initial_state=state)
        return packed, (jnp.concatenate([first, second], 1), last)

    chex.assert_trees_all_close(*run(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("changes", [[], [5]], ids=["one document", "two"])
def test_carry_is_what_is_left_of_an_initial_state(changes):
    args = inputs()
    delta, b, c = ops.choose(*(args[name] for name in ("x", "select", "widen", "bias")))
    rate = -jnp.exp(args["log_rate"])
    ids = jnp.cumsum(jnp.isin(jnp.arange(T), jnp.array(changes, int)))
    valid = jnp.ones((B, T), bool).at[0, 3].set(False)
    mask = masks.Segments(jnp.stack([ids, 0 * ids])) & masks.Valid(valid)
    initial = jax.random.normal(KEY, (B, N, H, M))

    @jax.jit
    def run():
        nothing = 0 * args["x"]  # is written
        options = dict(mask=mask, initial_state=initial)
        _, final = ops.selective_scan(nothing, delta, rate, b, c, args["skip"], **options)
        return ops.carry(delta, rate, mask=mask) * initial, final

    actual, expected = run()
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)
    assert bool(actual[0].any()) == (not changes) and actual[1].any()


def test_what_cannot_be_honoured_raises():
    with pytest.raises(NotImplementedError, match="selected_scan can't honour Window"):
        ops.selected_scan(**inputs(), mask=masks.Window(2))
    with pytest.raises(ValueError, match=r"must end in R=2 and twice the size of a state"):
        ops.selected_scan(**inputs() | dict(select=jnp.zeros((N, H, R + 3))))
