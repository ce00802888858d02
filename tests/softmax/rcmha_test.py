import chex
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from attnjax.core import masks, positions, registry
from attnjax.softmax import rcmha as lib
from tests.cotangents import like

KEY = jax.random.key(0)
B, T, N, H, D = 2, 7, 3, 4, 12


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


X = normal(B, T, D)


def example(T):
    """As that of the record, by numpy."""
    q, k, v = normal(3, 2, T, 4, 8)
    biases = dict(zip(("content_bias", "position_bias"), normal(2, 4, 8, seed=1), strict=True))
    return dict(q=q, k=k, v=v, relative=normal(4, 6, 8, seed=2) / 3, **biases)


def module(**options):
    return lib.Rcmha(num_heads=N, head_dim=H, **options)


def begin(module):
    params = like(jax.eval_shape(module.init, KEY, X))
    return jax.tree.map(lambda p: p / 3, jax.device_get(params))


def identity(params, **others):
    """With kernels that see the token itself alone."""
    kernels = 0 * params["params"]["kernels"]["table"]
    kernels[:, 0] = 1.0
    changes = dict(kernels=kernels, **others)
    return {"params": params["params"] | {name: {"table": x} for name, x in changes.items()}}


def shifted(x):
    """Transformer-XL's shift (appendix B): from x_tj = (q_t + b) . r_{T-1-j} to offsets t - s."""
    x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (1, 0)))
    return x.reshape(*x.shape[:2], T + 1, T)[:, :, 1:]


def test_scores_are_those_of_transformer_xl():
    @jax.jit
    def both(args):
        q, k, a, b = args["q"], args["k"], args["content_bias"], args["position_bias"]
        waves = positions.sinusoidal(T, 6)[::-1]  # of the offsets T - 1 ... 0
        r = jnp.einsum("JF,NFH->JNH", waves, args["relative"])
        x = jnp.einsum("BTNH,BSNH->BNTS", q + a[None, None], k)
        x = x + shifted(jnp.einsum("BTNH,JNH->BNTJ", q + b[None, None], r))
        x = jnp.where(jnp.tri(T, dtype=bool)[None, None], x / q.shape[-1] ** 0.5, -1e30)
        expected = jnp.einsum("BNTS,BSNH->BTNH", jax.nn.softmax(x), args["v"])
        return lib.rcmha(**args, mask=masks.Causal()), expected

    chex.assert_trees_all_close(*both(example(T)), rtol=1e-4, atol=1e-5)


def test_without_convolution_and_positions_is_multi_head_attention():
    zero = np.zeros((N, H), np.float32)
    none = dict(relative=np.zeros((N, H, H), np.float32), content_bias=zero, position_bias=zero)
    params = identity(begin(module()), **none)
    mha = registry.get("multi_head_attention").module(num_heads=N, head_dim=H)

    @jax.jit
    def both(params, x):
        kernels = {name: params["params"][name] for name in ("query", "key", "value", "out")}
        expected = mha.apply({"params": kernels}, x, mask=masks.Causal())
        return module().apply(params, x, mask=masks.Causal()), expected

    chex.assert_trees_all_close(*both(params, X), rtol=1e-5, atol=1e-6)


def test_convolution_is_causal_and_of_each_channel():
    x, kernel = normal(B, T, N, H), normal(3, H, seed=1)
    y = jax.device_get(jax.jit(lib.convolve)(x, kernel))
    for b, n, h in np.ndindex(B, N, H):
        expected = np.convolve(x[b, :, n, h], kernel[:, h])[:T]
        chex.assert_trees_all_close(y[b, :, n, h], expected, rtol=1e-4, atol=1e-5)


def test_convolution_stops_at_documents_and_padding():
    x, ids = np.arange(1.0, 8, dtype=np.float32), np.array([[0, 0, 0, 1, 1, 1, 1]], np.int32)
    valid = np.array([[True, True, True, True, True, False, True]])

    @jax.jit
    def run(x, ids, valid):
        mask = masks.Causal() & masks.Segments(ids) & masks.Valid(valid)
        return lib.convolve(x, jnp.ones((3, 1)), mask=mask)[0, :, 0, 0]

    y = jax.device_get(run(x[None, :, None, None], ids, valid))
    expected = np.array([1.0, 3, 6, 4, 9, 12], np.float32)
    chex.assert_trees_all_equal(y[[0, 1, 2, 3, 4, 6]], expected)


def test_only_the_difference_of_positions_matters():
    """Tokens before the sequence that are hidden only move it."""

    @jax.jit
    def run(params, x, moved, valid):
        apply = lambda x, mask: module().apply(params, x, mask=mask)
        later = apply(moved, masks.Causal() & masks.Valid(valid))[:, 5:]
        return later, apply(x, masks.Causal()), apply(x[:, ::-1], None)[:, ::-1], apply(x, None)

    valid = np.broadcast_to(np.arange(T + 5) >= 5, (B, T + 5))
    moved = np.concatenate([np.ones((B, 5, D), np.float32), X], 1)
    later, first, swapped, whole = jax.device_get(run(begin(module()), X, moved, valid))
    chex.assert_trees_all_close(later, first, rtol=1e-4, atol=1e-5)
    assert np.abs(swapped - whole).max() > 1e-2


@pytest.mark.parametrize("kernel_size", [1, 5])
def test_streams_with_every_kernel(kernel_size):
    """The conformance tests stream with one of 3 taps."""
    rc = module(kernel_size=kernel_size, num_features=6)

    @jax.jit
    def both(params, x):
        state, ys = rc.apply(params, B, T, method="init_state"), []
        for piece in (x[:, :2], x[:, 2:]):
            state, y = rc.apply(params, state, piece, method="extend")
            ys.append(y)
        return jnp.concatenate(ys, 1), rc.apply(params, x, mask=masks.Causal())

    chex.assert_trees_all_close(*both(begin(rc), X), rtol=1e-4, atol=1e-5)


def test_memory_is_linear_because_both_implementations_can():
    run = lambda args, name: lib.rcmha(**args, mask=masks.Causal(), implementation=name)
    both = jax.jit(lambda args: (run(args, "blocked"), run(args, "dense")))
    chex.assert_trees_all_close(*both(example(40)), atol=1e-5)


def test_refuses_what_it_cannot_do(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as it is for users
    with pytest.raises(NotImplementedError, match="rcmha can't honour Window"):
        jax.eval_shape(lambda x: module().init(KEY, x, mask=masks.Window(2)), X)
    args = example(3)
    with pytest.raises(ValueError, match="F=3 must be even"):
        jax.eval_shape(
            lambda args: lib.rcmha(**args), args | dict(relative=args["relative"][:, :3])
        )
    ids = jnp.asarray(np.zeros((2, 3), np.int32))
    with pytest.raises(NotImplementedError, match="Segments with ids of their own"):
        lib.convolve(args["q"], np.ones((2, 8)), mask=masks.Segments(ids, ids))
