r"""MMInference: in video, heads look at keys a fixed stride apart, which a permutation makes dense.

Paper: Li et al., "MMInference: Accelerating Pre-filling for Long-Context VLMs via Modality-Aware
Permutation Sparse Attention", arXiv:2504.16083, section 3.

    a_shape   s < sinks  or  t - s < window
    grid      these  or  (t - s) mod stride = phase
    full      every s <= t

A stride is what a frame or one of its rows takes, so that lines of a grid join the same place of
all frames. Each head that was found to be a grid gets the stride and phase that hold most of the
attention of the last queries, above what an even spread over phases would hold. Then keys are
shifted by the phase and tokens are permuted by position mod stride: the lines become `stride` dense
causal maps of T / stride tokens, computed as such, and merged with the a_shape by lse.

Where tokens of text stand between those of a video, text queries are taken apart and see all before
them, and text keys are seen by all after them (a pattern for each pair of modalities). It needs no
training: set it as `fn` of a MultiHeadAttention by functools.partial. patterns="full" is attention.

Shapes: B batch, T tokens, N heads, K kv-heads, H head dim, V value dim, L tokens of a line.
Unlike the paper: lines are by the difference of positions, and go on through text; the search that
gives each head its pattern is left out, and so are vertical-slash heads, which MInference had. The
choice depends on the last queries; tokens that follow a cache get full attention.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from attnjax.core import masks, registry
from attnjax.ops import dot_product_attention as ops

PATTERNS = "a_shape", "full", "grid"


def mminference(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    *,
    mask: masks.Mask | None = None,
    patterns: str | tuple[str, ...] = "grid",
    strides: tuple[int, ...] = (16, 32, 64, 128, 256),
    sinks: int = 64,
    window: int = 256,
    text: tuple[tuple[int, int], ...] = (),
    last: int = 64,
    q_offset: int | Int[Array, ""] = 0,
) -> Float[Array, "B T N V"]:
    """Attention of a prompt to itself, each query seeing no later keys; in v's dtype.

    Args:
      mask: honours Causal, which holds anyway; NotImplementedError for others.
      patterns: of PATTERNS, one for all heads or one for each.
      strides: among which a grid chooses.
      text: spans (first, end) of text, as far as there are tokens.
      last: queries by which a grid chooses.
      q_offset: other than the int 0, the queries follow a cache and attention is full.

    Raises ValueError for options that don't fit, and for a prompt with other keys than its own.
    """
    masks.select(mask, masks.Causal, by="mminference")
    T, N = q.shape[1:3]
    patterns = (patterns,) * N if isinstance(patterns, str) else tuple(patterns)
    _check(patterns, N, strides, sinks, window, last)
    if set(patterns) == {"full"} or not (isinstance(q_offset, int) and q_offset == 0):
        return ops.dot_product_attention(q, k, v, mask=masks.Causal(), q_offset=q_offset)
    if k.shape[1] != T:
        raise ValueError(f"q {q.shape} must be of the tokens of k {k.shape}")
    near, text = dict(sinks=sinks, window=window), _positions(text, T)
    found, phase = find_grid(q, k, strides, last=last, **near)
    kind = np.array([[PATTERNS.index(p) for p in patterns]])
    choice = jnp.where(kind == 2, found + 2, kind)
    phase = jnp.where(kind == 2, phase, 0)
    options = 0, 1, *strides  # of an a_shape, which has no lines, of full and of a grid
    o = _merge(
        _on_lines(q, k, v, options, choice, phase),
        _beside_lines(q, k, v, options, choice, phase, text=text, **near),
    )
    return _whole(o.astype(v.dtype), q, k, v, text)


def find_grid(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    strides: tuple[int, ...],
    *,
    sinks: int = 64,
    window: int = 256,
    last: int = 64,
) -> tuple[Int[Array, "B N"], Int[Array, "B N"]]:
    """The number of the stride and the phase that fit the last queries best, without gradient."""
    q, k = (x.astype(jnp.float32) for x in lax.stop_gradient((q[:, -last:], k)))
    (B, C, N, H), (T, K) = q.shape, k.shape[1:3]
    x = jnp.einsum("BCKGH,BSKH->BKGCS", q.reshape(B, C, K, -1, H), k).reshape(B, N, C, T)
    s = jnp.arange(T)[None]
    lag = jnp.arange(T - C, T)[:, None] - s
    a = jax.nn.softmax(jnp.where((lag >= 0)[None, None], x * H**-0.5, -jnp.inf))
    a = jnp.where(((lag >= window) & (s >= sinks))[None, None], a, 0)
    excess, phases = [], []
    for stride in strides:
        mass = jnp.zeros((B, N, stride)).at[..., lag % stride].add(a)
        excess.append(mass.max(-1) - mass.mean(-1))
        phases.append(mass.argmax(-1))
    best = jnp.argmax(jnp.stack(excess), 0)
    return best, jnp.take_along_axis(jnp.stack(phases), best[None], 0)[0]


def on_lines(
    q: Float[Array, "T H"],
    k: Float[Array, "T H"],
    v: Float[Array, "T V"],
    phase: int | Int[Array, ""],
    *,
    stride: int,
) -> tuple[Float[Array, "T V"], Float[Array, "T"]]:
    """Attention to the keys with t - s >= 0 and (t - s) mod stride = phase, and its lse."""
    T = len(q)

    def permute(x):  # (T ...) -> (stride L 1 ...)
        x = jnp.pad(x, [(0, -T % stride), *[(0, 0)] * (x.ndim - 1)])
        return x.reshape(-1, stride, 1, *x.shape[1:]).swapaxes(0, 1)

    back = lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[3:])[:T]
    k, v = (jnp.roll(x, phase, 0) for x in (k, v))
    exists = permute(jnp.arange(T) >= phase)[..., 0]  # others came around the end
    mask = masks.Causal() & masks.Valid(exists)
    o, lse = ops.dot_product_attention(*map(permute, (q, k, v)), mask=mask, return_lse=True)
    return back(o), back(lse)


def _on_lines(q, k, v, options, choice, phase):
    """(o, lse) of all heads, each with the stride that it chose among the options."""
    (B, T, N, _), K = q.shape, k.shape[2]

    def none(q, k, v, phase):
        return jnp.zeros((T, v.shape[-1])), jnp.full(T, -jnp.inf)

    strides = [functools.partial(on_lines, stride=stride) for stride in options[1:]]

    @jax.checkpoint
    def head(unit):
        b, n = unit
        rows, keys, values = q[b, :, n], k[b, :, n // (N // K)], v[b, :, n // (N // K)]
        arrays = rows, keys, values.astype(jnp.float32), phase[b, n]
        return lax.switch(choice[b, n], [none, *strides], *arrays)

    o, lse = lax.map(head, [x.reshape(-1) for x in jnp.indices((B, N))])
    return o.reshape(B, N, T, -1).swapaxes(1, 2), lse.reshape(B, N, T).swapaxes(1, 2)


def _beside_lines(q, k, v, options, choice, phase, *, sinks, window, text):
    """(o, lse) of all heads, from what is first, near or text and not on a line."""
    T = q.shape[1]
    stride = jnp.array([T + 1, *options[1:]])[choice]  # T + 1 with phase T is no line
    phase = jnp.where(choice == 0, T, phase)
    near = masks.Prefix(sinks) | masks.Window(window - 1)
    if len(text):
        near = near | masks.Valid(jnp.zeros((1, T), bool).at[:, text].set(True))

    def leave_out(x, b, n, t, s):
        return jnp.where((t - s) % stride[b, n] == phase[b, n], -1e30, x)

    options = dict(mask=masks.Causal() & near, score_mod=leave_out, return_lse=True)
    return ops.dot_product_attention(q, k, v.astype(jnp.float32), **options)


def _merge(*parts):
    """Attention to all that the parts, pairs of (o, lse), attend to."""
    o, lse = (jnp.stack(x) for x in zip(*parts, strict=True))
    share = jax.nn.softmax(jnp.maximum(lse, -1e30), 0)
    return (share[..., None] * o).sum(0)


def _whole(o, q, k, v, text):
    """o, where the queries of text attend to all before them."""
    if not len(text):
        return o
    at = text, np.arange(q.shape[1])
    full = ops.dot_product_attention(q[:, text], k, v, mask=masks.Causal(), positions=at)
    return o.at[:, text].set(full)


def _positions(spans, T):
    """The positions below T in spans (first, end)."""
    at = np.concatenate([np.zeros(0, int), *(np.arange(*span) for span in spans)])
    return at[at < T]


def _check(patterns, N, strides, sinks, window, last):
    if len(patterns) != N or not set(patterns) <= set(PATTERNS):
        raise ValueError(f"{patterns=} must be {N} of {PATTERNS}")
    if not (strides and min(strides) >= 1 and sinks >= 0 and min(window, last) >= 1):
        raise ValueError(f"{strides=}, {window=}, {last=} must be at least 1 and {sinks=} 0")


def _example(key: jax.Array, T: int) -> dict[str, jax.Array]:
    q, k, v = jax.random.normal(key, (3, 2, T, 4, 8))
    return dict(q=q, k=k[:, :, :2], v=v[:, :, :2])


def _oracle(q, k, v, *, patterns="grid", strides=(16,), sinks=64, window=256, text=(), last=64):
    """A dense mask for each head, whose grid is found pair by pair."""
    T, N = q.shape[1:3]
    k, v = (jnp.repeat(x, N // k.shape[2], 2) for x in (k, v))
    x = jnp.einsum("BTNH,BSNH->BNTS", q, k) / jnp.sqrt(q.shape[-1])
    t, s = np.arange(T)[:, None], np.arange(T)[None]
    words = np.zeros(T, bool)
    for first, end in text:
        words[first:end] = True
    near = (s < sinks) | (t - s < window) | words[None] | words[:, None]
    far = (t >= T - last) & (t - s >= window) & (s >= sinks)
    causal = (s <= t)[None, None]
    a = jnp.where(far[None, None], jax.nn.softmax(jnp.where(causal, x, -1e30)), 0)
    lines = [((t - s) % c == p, c) for c in strides for p in range(c)]
    excess = [jnp.where(on[None, None], a, 0).sum((2, 3)) - a.sum((2, 3)) / c for on, c in lines]
    grid = jnp.stack([on for on, _ in lines])[jnp.argmax(jnp.stack(excess), 0)]
    names = np.array([patterns] * N if isinstance(patterns, str) else patterns)
    names = names[None, :, None, None]
    seen = near[None, None] | (names == "full") | ((names == "grid") & grid)
    w = jax.nn.softmax(jnp.where(seen & causal, x, -1e30))
    return jnp.einsum("BNTS,BSNV->BTNV", w, v)


SPEC = registry.Intervention(
    fn=mminference,
    papers=("mminference",),
    example=_example,
    oracle=_oracle,
    identity=dict(patterns="full"),
    untouched=lambda q, k, v: ops.dot_product_attention(q, k, v, mask=masks.Causal()),
    variants=(
        dict(strides=(3, 7), sinks=2, window=3, last=8, text=((0, 3), (40, 44))),
        dict(patterns=("grid", "a_shape", "full", "grid"), strides=(5,), sinks=1, window=2, last=5),
    ),
)
