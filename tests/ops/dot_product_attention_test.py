"""Both implementations against a float64 oracle of loops: outputs, gradients, every option."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import masks
from attnjax.ops import blocked_schedule, dropout, softmax_choice
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


CAUSAL = masks.Causal()
SEGMENTS = masks.Segments(jnp.asarray(np.repeat([[0, 1, 2], [0, 3, 3]], [9, 20, 6], axis=1)))
VALID = masks.Valid(jnp.arange(35)[None, :] < jnp.array([[35], [17]]))
PER_HEAD = masks.Dense(jnp.asarray(normal(7, 1, 4, 35, 35) > 1))
SELECTED = masks.Blocks(jnp.asarray(normal(8, 2, 4, 3, 3) > 0), 16, 16)
DROPOUT = dropout.Dropout(0.3, jax.random.key(3))
SLOPES = {"captured": [normal(11, 4), normal(12, 15)]}

GRID = masks.Neighborhood((5, 7), (3, 3))
UNSEEN = masks.Window(3, 0) & masks.Valid(jnp.arange(35)[None, :] < jnp.array([[0], [9]]))

# Each mask, each form of a bias and each option with another beside it, and all at once: the oracle
# honours them, and what each alone would give is far from that.
CASES = {
    "plain": (inputs(), {}),
    "one query": (inputs(T=1, S=67), {}),
    "one key": (inputs(T=35, S=1, V=12), {}),
    "one key head, fewer keys than queries": (inputs(T=67, S=33, K=1, V=5), {"mask": CAUSAL}),
    "causal by tiles, a head of keys each": (inputs(T=48, S=48, K=4), {"mask": CAUSAL}),
    "window, sinks": (inputs(sinks=normal(6, 4)), {"mask": masks.Window(9, 2)}),
    "prefix, bias by query, softcap": (
        inputs(bias=normal(5, 1, 1, 35, 1)),
        {"mask": masks.Prefix(5) | CAUSAL, "softcap": 2.0},
    ),
    "segments, bias by key": (inputs(bias=normal(5, 2, 1, 1, 35)), {"mask": SEGMENTS & CAUSAL}),
    "mask by head, dropout": (inputs(), {"mask": PER_HEAD, "dropout": DROPOUT}),
    "blocks, scale": (inputs(), {"mask": SELECTED & CAUSAL, "scale": 0.7}),
    "score_mod, neighborhood": (inputs(**SLOPES), {"score_mod": relative, "mask": GRID}),
    "bias, nothing seen": (inputs(bias=normal(5, 2, 4, 35, 35)), {"mask": UNSEEN}),
    "sinks, nothing seen": (inputs(sinks=normal(6, 4)), {"mask": masks.Window(0, 0) & VALID}),
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


def both(options):
    """A program of ((o, lse), gradients of every array) for each implementation."""

    def f(arrays, implementation):
        out = ours(arrays, *positions(arrays), implementation, **options)
        return loss(*out), out

    @jax.jit
    def run(arrays):
        run_one = jax.value_and_grad(f, has_aux=True)
        found = {name: run_one(arrays, name) for name in IMPLEMENTATIONS}
        return {name: (out, grads) for name, ((_, out), grads) in found.items()}

    return run


@functools.cache
def of_case(case):
    """(its program, what that gives)"""
    arrays, options = CASES[case]
    run = both(options)
    return run, jax.device_get(run(as_dtype(arrays, jnp.float32)))


def as_dtype(arrays, dtype):
    return jax.tree.map(lambda x: np.asarray(x, dtype), arrays)


def rms(*arrays):
    return np.sqrt(np.mean(np.concatenate([np.ravel(x).astype(np.float64) for x in arrays]) ** 2))


def along(arrays, options, index, step):
    """How much the loss of the oracle grows along `step` of one of its arrays."""
    leaves, tree = jax.tree.flatten(arrays)
    values = []
    for sign in (1, -1):
        moved = [x + sign * step if i == index else x for i, x in enumerate(leaves)]
        values.append(loss(*oracle(tree.unflatten(moved), *positions(arrays), **options)))
    return (values[0] - values[1]) / 2


@pytest.mark.parametrize("case", CASES)
def test_equals_the_oracle(case):
    arrays, options = CASES[case]
    _, found = of_case(case)
    expected_o, expected_lse = oracle(arrays, *positions(arrays), **options)
    for (o, lse), _ in found.values():
        np.testing.assert_allclose(o, expected_o, rtol=2e-5, atol=2e-6)
        np.testing.assert_allclose(lse, expected_lse, rtol=2e-6, atol=2e-6)
    for index, leaf in enumerate(jax.tree.leaves(arrays)):
        step = 1e-5 * normal(30, *leaf.shape)  # a random direction for each learned array
        slope = along(arrays, options, index, step)
        for _, grads in found.values():
            grad = jax.tree.leaves(grads)[index]
            assert abs(np.vdot(grad, step) - slope) < 1e-5 * rms(grad) * np.linalg.norm(step) + 1e-9


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_both_agree_entry_by_entry(case):
    dense, blocked = (of_case(case)[1][name][1] for name in IMPLEMENTATIONS)
    for a, b in zip(jax.tree.leaves(dense), jax.tree.leaves(blocked), strict=True):
        np.testing.assert_allclose(b, a, rtol=2e-5, atol=2e-5 * rms(a) + 1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_query_that_sees_nothing(implementation):
    (o, lse), grads = of_case("bias, nothing seen")[1][implementation]
    assert (o[0] == 0).all() and (o[1, 12:] == 0).all() and (o[1, :12] != 0).all()
    assert (lse[0] == -np.inf).all() and (lse[1, 12:] == -np.inf).all()
    assert (grads["q"][0] == 0).all() and (grads["q"][1, 12:] == 0).all()
    assert (grads["k"][0] == 0).all() and (grads["v"][0] == 0).all()
    assert all(np.isfinite(g).all() for g in grads.values())


def test_large_scores():
    case = "causal by tiles, a head of keys each"
    arrays, options = CASES[case]
    arrays = arrays | {"q": 1e4 * arrays["q"]}
    expected_o, expected_lse = oracle(arrays, *positions(arrays), **options)
    # a score is a sum of H products that may cancel, so its error is to be judged by their size
    q, k = (np.abs(arrays[name]).transpose(0, 2, 1, 3) for name in "qk")
    size = (q @ k.mT).max(-1).swapaxes(1, 2) / np.sqrt(8)
    unit = np.finfo(np.float32).eps / 2
    for (o, lse), grads in of_case(case)[0](as_dtype(arrays, jnp.float32)).values():
        # scores of 1e4 have errors of about 1e-3 in float32, and so has what is made of them
        np.testing.assert_allclose(o, expected_o, atol=2e-2)
        assert (abs(lse - expected_lse) <= (8 + 3) * unit * size).all()
        assert all(np.isfinite(g).all() for g in grads.values())


def naive(arrays):
    """Everything in the dtype of the inputs."""
    q, k, v = (arrays[name] for name in "qkv")
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], 2) for x in (k, v))
    x = jnp.einsum("btnh,bsnh->bnts", q, k) * q.shape[-1] ** -0.5
    return jnp.einsum("bnts,bsnv->btnv", jax.nn.softmax(x), v), jax.nn.logsumexp(x, -1).swapaxes(
        1, 2
    )


@jax.jit
def naive_with_gradients(arrays):
    def f(arrays):
        out = naive(arrays)
        return loss(*out).astype(jnp.float32), out

    (_, out), grads = jax.value_and_grad(f, has_aux=True)(arrays)
    return out, grads


def test_bfloat16_is_no_worse_than_naive():
    narrow = as_dtype(inputs(T=67, S=67, H=16), jnp.bfloat16)
    wide = as_dtype(narrow, np.float64)
    exact_o, exact_lse = oracle(wide, np.arange(67), np.arange(67))
    exact_grads = naive_with_gradients(as_dtype(wide, np.float32))[1]  # finer than what is judged
    (naive_o, naive_lse), naive_grads = naive_with_gradients(narrow)
    error = lambda x, exact: rms(np.asarray(x, np.float64) - np.asarray(exact, np.float64))
    for (o, lse), grads in both({})(narrow).values():
        assert o.dtype == jnp.bfloat16 and lse.dtype == jnp.float32
        assert error(o, exact_o) <= error(naive_o, exact_o)
        assert error(lse, exact_lse) <= 0.1 * error(naive_lse, exact_lse)
        for name in "qkv":
            bar = error(naive_grads[name], exact_grads[name])
            assert error(grads[name], exact_grads[name]) <= bar


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_pieces_of_a_sequence_give_the_whole(implementation):
    arrays = [np.asarray(x, np.float32) for x in inputs(T=32, S=32).values()]
    options = {"mask": CAUSAL, "dropout": DROPOUT, "implementation": implementation}
    attend = functools.partial(ops.dot_product_attention, return_lse=True, **options)

    @jax.jit
    def run(q, k, v, first, even, odd):
        offset, _ = attend(q[:, 20:], k, v, q_offset=first)
        # as devices of a striped ring hold them
        pieces = [attend(q[:, odd], k[:, s], v[:, s], positions=(odd, s)) for s in (even, odd)]
        lse = jnp.logaddexp(*(lse for _, lse in pieces))
        merged = sum(o * jnp.exp(part - lse)[..., None] for o, part in pieces)
        return attend(q, k, v)[0], offset, merged

    whole, offset, merged = run(*arrays, 20, np.arange(0, 32, 2), np.arange(1, 32, 2))
    np.testing.assert_allclose(offset, whole[:, 20:], atol=1e-6)
    np.testing.assert_allclose(merged, whole[:, 1::2], atol=1e-6)


@pytest.mark.parametrize("T, S, chosen", [(256, 256, "dense"), (256, 257, "blocked")])
def test_default_is_chosen_by_size(T, S, chosen, monkeypatch):
    used = []
    for name in IMPLEMENTATIONS:
        use = lambda q, k, v, *rest, name=name, **options: (used.append(name) or q, None)
        monkeypatch.setattr(softmax_choice, f"{name}_attention", use)
    q, k = jnp.zeros((1, T, 1, 1)), jnp.zeros((1, S, 1, 1))
    ops.dot_product_attention(q, k, k)
    assert used == [chosen]


def test_wrong_arguments():
    q, k = jnp.zeros((1, 4, 3, 8)), jnp.zeros((1, 4, 2, 8))
    with pytest.raises(ValueError, match="3 query heads must be a multiple of 2"):
        ops.dot_product_attention(q, k, k)
    with pytest.raises(ValueError, match=r"bias of shape \(1, 2, 1, 3\) must have .*4, 4\)"):
        unchecked = inspect.unwrap(ops.dot_product_attention)  # as users run it
        unchecked(k, k, k, bias=jnp.zeros((1, 2, 1, 3)))
    with pytest.raises(ValueError, match="q_offset and positions"):
        where = (jnp.arange(4), jnp.arange(4))
        ops.dot_product_attention(k, k, k, q_offset=1, positions=where)
    with pytest.raises(ValueError, match="rate=1.5"):
        dropout.Dropout(1.5, jax.random.key(0))
