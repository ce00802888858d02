"""Masks, and the choice of steps; the scan itself is judged in tests/pallas_kernels."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import masks
from attnjax.ops import selective_scan as ops

B, T, N, H, M, R = 2, 11, 2, 3, 4, 2


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), "float32")


def inputs():
    return dict(
        x=normal(0, B, T, N, H),
        select=normal(1, N, H, R + 2 * M),
        widen=normal(2, N, R, H),
        bias=normal(3, N, H),
        log_rate=normal(4, N, H, M),
        skip=normal(5, N, H),
    )


def test_chooses_for_each_token_and_head_by_its_equation():
    args = inputs()

    def of_head(n):
        x, w = args["x"][:, :, n], {k: a[n] for k, a in args.items() if k != "x"}
        r, b, c = jnp.split(x @ w["select"], [R, R + M], -1)
        delta = jnp.log(1 + jnp.exp(r @ w["widen"] + w["bias"][None, None]))

        def step(h, now):
            x, delta, b, c = now
            h = h * jnp.exp(-delta[..., None] * jnp.exp(w["log_rate"])[None])
            h = h + (delta * x)[..., None] * b[:, None]
            return h, jnp.einsum("BHM,BM->BH", h, c) + w["skip"][None] * x

        h, y = jax.lax.scan(
            step, jnp.zeros((B, H, M)), [a.swapaxes(0, 1) for a in (x, delta, b, c)]
        )
        return y.swapaxes(0, 1), h

    run = jax.jit(lambda n: (ops.selected_scan(**args), of_head(n)))
    for n in range(N):
        (y, state), expected = jax.device_get(run(n))
        actual = y[:, :, n], state[:, n]
        chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_padding_changes_nothing():
    args = inputs()
    mask = masks.Valid(jnp.asarray(np.tile(np.arange(T) != 3, (B, 1)))) & masks.Causal()
    without = args | dict(x=jnp.asarray(np.delete(args["x"], 3, 1)))
    run = jax.jit(lambda: (ops.selected_scan(**args, mask=mask), ops.selected_scan(**without)))
    (y, state), (expected, expected_state) = jax.device_get(run())
    chex.assert_trees_all_close(np.delete(y, 3, 1), expected, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(state, expected_state, rtol=1e-5, atol=1e-5)


def test_segments_are_sequences_of_their_own():
    args, ids = inputs(), jnp.array([[0] * 4 + [1] * 7])
    state = normal(6, B, N, H, M)
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
    ids, valid = np.cumsum(np.isin(np.arange(T), changes)), np.ones((B, T), bool)
    valid[0, 3] = False
    segments = masks.Segments(jnp.asarray(np.stack([ids, 0 * ids]), jnp.int32))
    mask, initial = segments & masks.Valid(jnp.asarray(valid)), normal(6, B, N, H, M)

    @jax.jit
    def run():
        delta, b, c = ops.choose(*(args[name] for name in ("x", "select", "widen", "bias")))
        rate = -jnp.exp(args["log_rate"])
        nothing = 0 * args["x"]  # is written
        options = dict(mask=mask, initial_state=initial)
        _, final = ops.selective_scan(nothing, delta, rate, b, c, args["skip"], **options)
        return ops.carry(delta, rate, mask=mask) * initial, final

    actual, expected = jax.device_get(run())
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)
    assert bool(actual[0].any()) == (not changes) and actual[1].any()


def test_what_cannot_be_honoured_raises():
    with pytest.raises(NotImplementedError, match="selected_scan can't honour Window"):
        ops.selected_scan(**inputs(), mask=masks.Window(2))
    with pytest.raises(ValueError, match=r"must end in R=2 and twice the size of a state"):
        ops.selected_scan(**inputs() | dict(select=jnp.zeros((N, H, R + 3))))
