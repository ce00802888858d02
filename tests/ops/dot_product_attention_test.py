"""Both implementations against a float64 oracle of loops: outputs, gradients, every option."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import masks
from attnjax.ops import blocked_schedule, dropout
from attnjax.ops import dot_product_attention as ops

IMPLEMENTATIONS = ["dense", "blocked"]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles, and a part of one, at tiny lengths."""
    monkeypatch.setattr(blocked_schedule, "_TILE", 16)


def oracle(arrays, t, s, *, mask=None, scale=None, softcap=None, dropout=None, score_mod=None):
    """(o, lse) in float64, one query at a time."""
    q, k, v = arrays["q"], arrays["k"], arrays["v"]
    B, T, N, H = q.shape
    bias = np.broadcast_to(arrays.get("bias", 0.0), (B, N, T, len(s)))
    visible = np.ones((B, N, T, len(s)), bool)
    if mask is not None:
        visible = np.broadcast_to(np.asarray(mask.visible(t, s)), visible.shape)
    kept = np.ones(visible.shape)
    if dropout is not None:
        kept = dropout.keep(*jnp.ix_(jnp.arange(B), jnp.arange(N), jnp.asarray(t), jnp.asarray(s)))
        kept = np.asarray(kept) / (1 - dropout.rate)
    o, lse = np.zeros((B, T, N, v.shape[-1])), np.full((B, T, N), -np.inf)
    for b, i, n in np.ndindex(B, T, N):
        head = n // (N // k.shape[2])
        x = k[b, :, head] @ q[b, i, n] * (H**-0.5 if scale is None else scale)
        if softcap is not None:
            x = softcap * np.tanh(x / softcap)
        x = x + bias[b, n, i]
        if score_mod is not None:
            x = score_mod(*arrays["captured"])(x, b, n, t[i], s)
        seen = visible[b, n, i]
        logits = [*x[seen], *([arrays["sinks"][n]] if "sinks" in arrays else [])]
        if not logits:
            continue
        peak = max(logits)
        lse[b, i, n] = peak + np.log(np.sum(np.exp(np.array(logits) - peak)))
        o[b, i, n] = (np.exp(x[seen] - lse[b, i, n]) * kept[b, n, i][seen]) @ v[b, seen, head]
    return o, lse


def ours(arrays, t, s, implementation, *, score_mod=None, dtype=None, **options):
    """(o, lse) of an implementation, from the oracle's arguments."""
    arrays = dict(arrays)
    captured = arrays.pop("captured", None)
    q, k, v = (arrays.pop(name) for name in "qkv")
    if score_mod is not None:
        options["score_mod"] = score_mod(*captured)
    return ops.dot_product_attention(
        q,
        k,
        v,
        positions=(t, s),
        return_lse=True,
        implementation=implementation,
        **arrays,
        **options,
    )


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def inputs(B=2, T=35, S=35, N=4, K=2, H=8, V=8, **more):
    q, k, v = normal(0, B, T, N, H), normal(1, B, S, K, H), normal(2, B, S, K, V)
    return {"q": q, "k": k, "v": v, **more}


def relative(slopes, table):
    """A score_mod: slopes by head, and a table by distance that an integer array looks up."""
    buckets = jnp.arange(100) // 7 if isinstance(table, jax.Array) else np.arange(100) // 7

    def score_mod(x, b, n, t, s):
        return x * (1 + 0.1 * b) - slopes[n] * abs(t - s) + table[buckets[abs(t - s)]]

    return score_mod


SEGMENTS = masks.Segments(jnp.asarray(np.repeat([[0, 1, 2], [0, 3, 3]], [9, 20, 6], axis=1)))
VALID = masks.Valid(jnp.arange(35)[None, :] < jnp.array([[35], [17]]))
PER_HEAD = masks.Dense(jnp.asarray(normal(7, 1, 4, 35, 35) > 1))
SELECTED = masks.Blocks(jnp.asarray(normal(8, 2, 4, 3, 3) > 0), 16, 16)
DROPOUT = dropout.Dropout(0.3, jax.random.key(3))
SLOPES = {"captured": [normal(11, 4), normal(12, 15)]}

CASES = {
    "plain": (inputs(), {}),
    "one query": (inputs(T=1, S=67), {}),
    "one key": (inputs(T=35, S=1, V=12), {}),
    "one key head": (inputs(K=1, V=5), {"mask": masks.Causal()}),
    "lengths differ": (inputs(T=67, S=33), {}),
    "causal": (inputs(K=4), {"mask": masks.Causal(), "scale": 0.7}),
    "causal by tiles": (inputs(T=48, S=48), {"mask": masks.Causal()}),
    "window": (inputs(), {"mask": masks.Window(9, 2)}),
    "prefix": (inputs(), {"mask": masks.Prefix(5) | masks.Causal()}),
    "segments": (inputs(), {"mask": SEGMENTS & masks.Causal()}),
    "valid": (inputs(), {"mask": VALID}),
    "mask by head": (inputs(), {"mask": PER_HEAD}),
    "blocks": (inputs(), {"mask": SELECTED & masks.Causal()}),
    "neighborhood": (inputs(), {"mask": masks.Neighborhood((5, 7), (3, 3))}),
    "softcap": (inputs(), {"softcap": 1.5}),
    "bias": (inputs(bias=normal(5, 2, 4, 35, 35)), {"mask": masks.Causal()}),
    "bias by key": (inputs(bias=normal(5, 2, 1, 1, 35)), {"mask": SEGMENTS}),
    "bias by query": (inputs(bias=normal(5, 1, 1, 35, 1)), {"softcap": 2.0}),
    "sinks": (inputs(sinks=normal(6, 4)), {}),
    "sinks, nothing seen": (inputs(sinks=normal(6, 4)), {"mask": masks.Window(0, 0) & VALID}),
    "dropout": (inputs(), {"dropout": DROPOUT, "mask": masks.Causal()}),
    "score_mod": (inputs(**SLOPES), {"score_mod": relative, "mask": masks.Causal()}),
    "all": (
        inputs(V=5, bias=normal(5, 1, 4, 35, 1), sinks=normal(6, 4), **SLOPES),
        {
            "mask": SEGMENTS & masks.Window(12, 3),
            "softcap": 3.0,
            "dropout": DROPOUT,
            "score_mod": relative,
            "scale": 0.4,
        },
    ),
}


def positions(arrays):
    """Queries are the last positions of the keys."""
    T, S = arrays["q"].shape[1], arrays["k"].shape[1]
    return np.arange(T) + max(S - T, 0), np.arange(S)


def loss(o, lse):
    """A scalar in which every output counts, and every lse that is finite."""
    weights_o, weights_lse = normal(20, *o.shape), normal(21, *lse.shape)
    module = jnp if isinstance(o, jax.Array) else np
    finite = module.where(lse > -np.inf, lse, 0.0)
    return (o * weights_o).sum() + (finite * weights_lse).sum()


def run(implementation, arrays, options, dtype=jnp.float32):
    """((o, lse), gradients of every array)."""

    def f(arrays):
        out = ours(arrays, *positions(arrays), implementation, **options)
        return loss(*out), out

    arrays = jax.tree.map(lambda x: np.asarray(x, dtype), arrays)
    (_, out), grads = jax.jit(jax.value_and_grad(f, has_aux=True))(arrays)
    return out, grads


@functools.cache
def run_case(implementation, case):
    return run(implementation, *CASES[case])


def rms(*arrays):
    return np.sqrt(np.mean(np.concatenate([np.ravel(x).astype(np.float64) for x in arrays]) ** 2))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_oracle(case, implementation):
    arrays, options = CASES[case]
    (o, lse), grads = run_case(implementation, case)
    expected_o, expected_lse = oracle(arrays, *positions(arrays), **options)
    np.testing.assert_allclose(o, expected_o, rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(lse, expected_lse, rtol=2e-6, atol=2e-6)
    leaves, tree = jax.tree.flatten(arrays)
    for index, grad in enumerate(jax.tree.leaves(grads)):
        step = 1e-5 * normal(30, *grad.shape)  # a random direction for each learned array
        values = []
        for sign in (1, -1):
            moved = [x + sign * step if i == index else x for i, x in enumerate(leaves)]
            values.append(loss(*oracle(tree.unflatten(moved), *positions(arrays), **options)))
        slope = (values[0] - values[1]) / 2
        assert abs(np.vdot(grad, step) - slope) < 1e-5 * rms(grad) * np.linalg.norm(step) + 1e-9


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_both_agree_entry_by_entry(case):
    dense, blocked = (run_case(name, case)[1] for name in IMPLEMENTATIONS)
    for a, b in zip(jax.tree.leaves(dense), jax.tree.leaves(blocked), strict=True):
        np.testing.assert_allclose(b, a, rtol=2e-5, atol=2e-5 * rms(a) + 1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_query_that_sees_nothing(implementation):
    arrays = inputs(bias=normal(5, 1, 4, 35, 35))
    nothing = {
        "mask": masks.Window(3, 0) & masks.Valid(jnp.arange(35)[None, :] < jnp.array([[0], [9]]))
    }
    (o, lse), grads = run(implementation, arrays, nothing)
    assert (o[0] == 0).all() and (o[1, 12:] == 0).all() and (o[1, :12] != 0).all()
    assert (lse[0] == -np.inf).all() and (lse[1, 12:] == -np.inf).all()
    assert (grads["q"][0] == 0).all() and (grads["q"][1, 12:] == 0).all()
    assert (grads["k"][0] == 0).all() and (grads["v"][0] == 0).all()
    assert all(np.isfinite(g).all() for g in grads.values())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_large_scores(implementation):
    arrays = inputs()
    arrays["q"] = 1e4 * arrays["q"]
    options = {"mask": masks.Causal()}
    (o, lse), grads = run(implementation, arrays, options)
    expected_o, expected_lse = oracle(arrays, *positions(arrays), **options)
    # scores of 1e4 have errors of about 1e-3 in float32, and so has what is made of them
    np.testing.assert_allclose(o, expected_o, atol=2e-2)
    # a score is a sum of H products that may cancel, so its error is to be judged by their size
    q, k = (np.abs(arrays[name]).transpose(0, 2, 1, 3) for name in "qk")
    H, heads_of_a_key = q.shape[-1], q.shape[1] // k.shape[1]
    size = (q @ k.repeat(heads_of_a_key, 1).mT).max(-1).swapaxes(1, 2) / np.sqrt(H)
    unit = np.finfo(np.float32).eps / 2
    assert (abs(lse - expected_lse) <= (H + 3) * unit * size).all()
    assert all(np.isfinite(g).all() for g in grads.values())


def naive(arrays):
    """Everything in the dtype of the inputs."""
    q, k, v = (arrays[name] for name in "qkv")
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], 2) for x in (k, v))
    x = jnp.einsum("btnh,bsnh->bnts", q, k) * q.shape[-1] ** -0.5
    return jnp.einsum("bnts,bsnv->btnv", jax.nn.softmax(x), v), jax.nn.logsumexp(x, -1).swapaxes(
        1, 2
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_is_no_worse_than_naive(implementation):
    narrow = jax.tree.map(lambda x: np.asarray(x, jnp.bfloat16), inputs(T=67, S=67, H=16))
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), narrow)
    (o, lse), grads = run(implementation, narrow, {}, jnp.bfloat16)
    assert o.dtype == jnp.bfloat16 and lse.dtype == jnp.float32
    exact_o, exact_lse = oracle(wide, np.arange(67), np.arange(67))
    exact_grads = run("dense", wide, {})[1]  # float32: far finer than what is judged
    naive_o, naive_lse = jax.jit(naive)(narrow)
    naive_loss = lambda arrays: loss(*naive(arrays)).astype(jnp.float32)
    naive_grads = jax.jit(jax.grad(naive_loss))(narrow)
    error = lambda x, exact: rms(np.asarray(x, np.float64) - np.asarray(exact, np.float64))
    assert error(o, exact_o) <= error(naive_o, exact_o)
    assert error(lse, exact_lse) <= 0.1 * error(naive_lse, exact_lse)
    for name in "qkv":
        assert error(grads[name], exact_grads[name]) <= error(naive_grads[name], exact_grads[name])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_pieces_of_a_sequence_give_the_whole(implementation):
    q, k, v = (jnp.float32(x) for x in inputs(T=32, S=32).values())
    options = {"mask": masks.Causal(), "dropout": DROPOUT, "implementation": implementation}
    attend = jax.jit(functools.partial(ops.dot_product_attention, return_lse=True, **options))
    whole, _ = attend(q, k, v)
    offset, _ = attend(q[:, 20:], k, v, q_offset=jnp.array(20))
    np.testing.assert_allclose(offset, whole[:, 20:], atol=1e-6)
    even, odd = jnp.arange(0, 32, 2), jnp.arange(1, 32, 2)  # as devices of a striped ring hold them
    pieces = [attend(q[:, odd], k[:, s], v[:, s], positions=(odd, s)) for s in (even, odd)]
    lse = jnp.logaddexp(*(lse for _, lse in pieces))
    merged = sum(o * jnp.exp(part - lse)[..., None] for o, part in pieces)
    np.testing.assert_allclose(merged, whole[:, odd], atol=1e-6)


@pytest.mark.parametrize("T, S, chosen", [(256, 256, "dense"), (256, 257, "blocked")])
def test_default_is_chosen_by_size(T, S, chosen, monkeypatch):
    used = []
    for name in IMPLEMENTATIONS:
        use = lambda q, k, v, *rest, name=name, **options: (used.append(name) or q, None)
        monkeypatch.setattr(ops, f"{name}_attention", use)
    q, k = jnp.zeros((1, T, 1, 1)), jnp.zeros((1, S, 1, 1))
    ops.dot_product_attention(q, k, k)
    assert used == [chosen]


def test_wrong_arguments():
    q, k = jnp.zeros((1, 4, 3, 8)), jnp.zeros((1, 4, 2, 8))
    with pytest.raises(ValueError, match="3 query heads must be a multiple of 2"):
        ops.dot_product_attention(q, k, k)
    with pytest.raises(ValueError, match="q_offset and positions"):
        where = (jnp.arange(4), jnp.arange(4))
        ops.dot_product_attention(k, k, k, q_offset=1, positions=where)
    with pytest.raises(ValueError, match="rate=1.5"):
        dropout.Dropout(1.5, jax.random.key(0))
