import chex
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from attnjax.core import masks, positions, registry
from attnjax.softmax import rcmha as lib

KEY = jax.random.key(0)
B, T, N, H, D = 2, 7, 3, 4, 12
X = jax.random.normal(KEY, (B, T, D))


def module(**options):
    return lib.Rcmha(num_heads=N, head_dim=H, **options)


def identity(params, **others):
    """With kernels that see the token itself alone."""
    kernels = jnp.zeros_like(params["params"]["kernels"]["table"]).at[:, 0].set(1.0)
    changes = dict(kernels=kernels, **others)
    return {"params": params["params"] | {name: {"table": x} for name, x in changes.items()}}


def shifted(x):
    """Transformer-XL's shift (appendix B): from x_tj = (q_t + b) . r_{T-1-j} to offsets t - s."""
    x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (1, 0)))
    return x.reshape(*x.shape[:2], T + 1, T)[:, :, 1:]


def test_scores_are_those_of_transformer_xl():
    args = lib.SPEC.example(KEY, T)
    q, k, a, b = args["q"], args["k"], args["content_bias"], args["position_bias"]
    waves = positions.sinusoidal(T, 6)[::-1]  # of the offsets T - 1 ... 0
    r = jnp.einsum("JF,NFH->JNH", waves, args["relative"])
    x = jnp.einsum("BTNH,BSNH->BNTS", q + a[None, None], k)
    x = x + shifted(jnp.einsum("BTNH,JNH->BNTJ", q + b[None, None], r))
    x = jnp.where(jnp.tri(T, dtype=bool)[None, None], x / q.shape[-1] ** 0.5, -1e30)
    expected = jnp.einsum("BNTS,BSNH->BTNH", jax.nn.softmax(x), args["v"])
    o = lib.rcmha(**args, mask=masks.Causal())
    chex.assert_trees_all_close(o, expected, rtol=1e-4, atol=1e-5)


def test_without_convolution_and_positions_is_multi_head_attention():
    params = module().init(KEY, X)
    params = identity(params, relative=jnp.zeros((N, H, H)))
    mha = registry.get("multi_head_attention").module(num_heads=N, head_dim=H)
    kernels = {name: params["params"][name] for name in ("query", "key", "value", "out")}
    expected = mha.apply({"params": kernels}, X, mask=masks.Causal())
    y = module().apply(params, X, mask=masks.Causal())
    chex.assert_trees_all_close(y, expected, rtol=1e-5, atol=1e-6)


def test_convolution_is_causal_and_of_each_channel():
    x, kernel = jax.random.normal(KEY, (B, T, N, H)), jax.random.normal(KEY, (3, H))
    y = lib.convolve(x, kernel)
    for b, n, h in np.ndindex(B, N, H):
        expected = jnp.convolve(x[b, :, n, h], kernel[:, h])[:T]
        chex.assert_trees_all_close(y[b, :, n, h], expected, rtol=1e-4, atol=1e-5)


def test_convolution_stops_at_documents_and_padding():
    x, kernel = jnp.arange(1.0, 8)[None, :, None, None], jnp.ones((3, 1))
    ids = jnp.array([[0, 0, 0, 1, 1, 1, 1]])
    valid = jnp.array([[True, True, True, True, True, False, True]])
    mask = masks.Causal() & masks.Segments(ids) & masks.Valid(valid)
    y = lib.convolve(x, kernel, mask=mask)[0, :, 0, 0]
    chex.assert_trees_all_equal(y[jnp.array([0, 1, 2, 3, 4, 6])], jnp.array([1.0, 3, 6, 4, 9, 12]))


def test_only_the_difference_of_positions_matters():
    """Tokens before the sequence that are hidden only move it."""
    params = module().init(KEY, X)
    run = jax.jit(lambda x, mask: module().apply(params, x, mask=mask))
    valid = masks.Valid((jnp.arange(T + 5) >= 5)[None].repeat(B, 0))
    moved = jnp.concatenate([jnp.ones((B, 5, D)), X], 1)
    y = run(moved, masks.Causal() & valid)[:, 5:]
    chex.assert_trees_all_close(y, run(X, masks.Causal()), rtol=1e-4, atol=1e-5)
    swapped = run(X[:, ::-1], None)[:, ::-1]
    assert jnp.abs(swapped - run(X, None)).max() > 1e-2


@pytest.mark.parametrize("kernel_size", [1, 5])
def test_streams_with_every_kernel(kernel_size):
    rc = module(kernel_size=kernel_size, num_features=6)
    params = rc.init(KEY, X)
    state, ys = rc.apply(params, B, T, method="init_state"), []
    for piece in (X[:, :2], X[:, 2:3], X[:, 3:]):
        state, y = rc.apply(params, state, piece, method="extend")
        ys.append(y)
    expected = rc.apply(params, X, mask=masks.Causal())
    chex.assert_trees_all_close(jnp.concatenate(ys, 1), expected, rtol=1e-4, atol=1e-5)


def test_memory_is_linear_because_both_implementations_can():
    args = lib.SPEC.example(KEY, 40)
    run = lambda name: lib.rcmha(**args, mask=masks.Causal(), implementation=name)
    chex.assert_trees_all_close(*jax.jit(lambda: (run("blocked"), run("dense")))(), atol=1e-5)


def test_refuses_what_it_cannot_do(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as it is for users
    with pytest.raises(NotImplementedError, match="rcmha can't honour Window"):
        module().init(KEY, X, mask=masks.Window(2))
    args = lib.SPEC.example(KEY, 3)
    with pytest.raises(ValueError, match="F=3 must be even"):
        lib.rcmha(**(args | dict(relative=args["relative"][:, :3])))
    ids = jnp.zeros((2, 3), int)
    with pytest.raises(NotImplementedError, match="Segments with ids of their own"):
        lib.convolve(args["q"], jnp.ones((2, 8)), mask=masks.Segments(ids, ids))
