r"""GNA: each query of a grid attends to a window of near keys, which it may share with others.

Paper: Hassani et al., "Generalized Neighborhood Attention: Multi-dimensional Sparse Attention at
the Speed of Light", arXiv:2504.16922, section 3.

    o_t = softmax(q_t k_s^T / sqrt(H)) v_s      over the s of t's window along every axis

Per axis: window k, stride s <= k, dilation d, causal or not. Positions with the same remainder
modulo d form a line. On a line of L positions, the queries of a stride have a leader in common,

    leader = min(floor(t / s) s + floor(s / 2), L - 1),

and see the k positions around it, moved inward at the border. On a causal axis the leader is the
last query of the stride, and t sees the keys up to itself among the k that end with the leader.
s = 1 is a sliding window (neighborhood attention), s = k cuts the grid into blocks, and k = L is
attention to everything. `core.masks.Neighborhood` says the same as a mask.

Here a few strides of queries are taken with all keys that any of them sees, and what a query
doesn't see of those is masked. So the cost is linear in the tokens, and with s = k nothing is
computed in vain.

Shapes: B batch, T one to three axes of a grid, N heads, K kv-heads, H head dim, V value dim,
D model dim; in tables G groups, q and s the queries and keys of a group, L positions of an axis.
Unlike the paper: a window that is larger than a line is cut to it, so that a model for large grids
works on small ones; the projections have no biases.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from attnjax.core import layers, masks, registry
from attnjax.core.registry import Claim
from attnjax.ops import neighborhood_attention as ops
from pallas_kernels import neighborhood as kernels


def gna(
    q: Float[Array, "B *T N H"],
    k: Float[Array, "B *T K H"],
    v: Float[Array, "B *T K V"],
    *,
    window: int | tuple[int, ...] = 7,
    stride: int | tuple[int, ...] = 1,
    dilation: int | tuple[int, ...] = 1,
    causal: bool | tuple[bool, ...] = False,
    implementation: ops.Implementation | None = None,
) -> Float[Array, "B *T N V"]:
    """Neighborhood attention over a grid of any number of axes: sequences, images, videos.

    Each option but the last is one value for all axes or a tuple with one for each.

    Args:
      window: keys that a query sees along an axis; cut to the L // dilation of the shortest line.
      stride: neighbours that share a window, at most `window`.
      dilation: distance of the keys of a window.
      causal: whether a query sees nothing after its own position along the axis.
      implementation: as in `ops.neighborhood_attention`.

    Returns the output in v's dtype. Raises ValueError for options out of range, and for queries,
    keys and values of different grids.
    """
    shape = q.shape[1:-2]
    if not shape == k.shape[1:-2] == v.shape[1:-2]:
        raise ValueError(f"q {q.shape}, k {k.shape} and v {v.shape} must be of the same grid")
    options = dict(window=window, stride=stride, dilation=dilation, causal=causal)
    split = {name: _per_axis(name, value, len(shape)) for name, value in options.items()}
    axes = [_axis(*sizes) for sizes in zip(shape, *split.values(), strict=True)]
    queries, keys = [axis.queries for axis in axes], [axis.keys for axis in axes]
    q, k, v = _take(q, queries), _take(k, keys), _take(v, keys)
    options = dict(near=_near(axes), implementation=implementation)
    return _join(ops.neighborhood_attention(q, k, v, **options), axes)


def _per_axis(name, value, rank):
    values = value if isinstance(value, tuple) else (value,) * rank
    if len(values) != rank:
        raise ValueError(f"{name}={value} must have one value for each of {rank} axes")
    return values


class Axis(NamedTuple):
    """One axis cut into groups of queries that are taken together with the keys they need."""

    queries: Int[np.ndarray, "G q"]  # positions; a group is filled up by repeating its last one
    keys: Int[np.ndarray, "G s"]
    low: Int[np.ndarray, "G q"]  # the first of its group's keys that a query sees
    high: Int[np.ndarray, "G q"]  # the last
    slots: Int[np.ndarray, "L"]  # where in the flattened `queries` each position is


@functools.cache
def _axis(length: int, window: int, stride: int, dilation: int, causal: bool) -> Axis:
    if not (1 <= stride <= window and dilation >= 1):
        raise ValueError(f"{stride=} must be 1 to {window=}, and {dilation=} at least 1")
    dilation = min(dilation, length)  # any more leaves every position alone, too
    window = min(window, length // dilation)
    stride = min(stride, window)
    block = -(-window // stride) * stride
    blocks = -(-length // (dilation * block))
    line = np.arange(dilation)[:, None, None]
    count = (length - line + dilation - 1) // dilation
    index = np.arange(blocks * block).reshape(1, blocks, block)
    index = np.minimum(index, count - 1)
    low, high = _window(index, count, window, stride, causal)
    first = np.maximum(low.min(-1, keepdims=True), 0)
    key = first + np.arange((high - first).max() + 1)
    groups = lambda x: x.reshape(-1, *x.shape[2:])
    at = lambda index: groups(line + dilation * np.minimum(index, count - 1))
    position = np.arange(length)
    slots = position % dilation * blocks * block + position // dilation
    return Axis(at(index), at(key), groups(low - first), groups(high - first), slots)


def _window(index, count, window, stride, causal):
    """The first and the last index on a line of `count` positions that `index` sees."""
    start = index // stride * stride
    if causal:
        return np.minimum(start + stride, count) - window, index
    first = np.minimum(start + stride // 2, count - 1) - window // 2
    first = np.clip(first, 0, count - window)
    return first, first + window - 1


def _near(axes):
    """What queries see of their groups, along every axis; keys count from the group's first."""
    low, high = (_product([getattr(axis, end) for axis in axes]) for end in ("low", "high"))
    at = _product([np.arange(axis.keys.shape[1])[None] for axis in axes])
    return kernels.Near(at, low, high)


def _product(tables):
    """Tables (G n), one for each axis a of a grid -> (a, all groups, all of their cells)."""
    rank = len(tables)
    sizes = [table.shape[i] for i in (0, 1) for table in tables]
    spread = []
    for axis, table in enumerate(tables):
        shape = np.ones(2 * rank, int)
        shape[[axis, rank + axis]] = table.shape
        spread.append(jnp.broadcast_to(jnp.asarray(table).reshape(shape), sizes))
    return jnp.stack(spread).reshape(rank, np.prod(sizes[:rank]), -1)


def _take(x, tables):
    """(B *T N H) -> (B, groups, cells of a group, N, H), by a table (G cells) for each axis."""
    rank = len(tables)
    for axis, table in enumerate(tables):
        x = jnp.take(x, table, 1 + 2 * axis)
    groups, cells = range(1, 2 * rank, 2), range(2, 2 * rank + 1, 2)
    B, N, H = x.shape[0], *x.shape[-2:]
    x = x.transpose(0, *groups, *cells, -2, -1)
    return x.reshape(B, np.prod([len(table) for table in tables]), -1, N, H)


def _join(o, axes):
    """(B, groups, queries of a group, N, V) -> (B *T N V): each position from its slot."""
    rank, (B, _, _, N, V) = len(axes), o.shape
    groups, cells = zip(*(axis.queries.shape for axis in axes), strict=True)
    pairs = [n for axis in range(rank) for n in (1 + axis, 1 + rank + axis)]
    o = o.reshape(B, *groups, *cells, N, V).transpose(0, *pairs, -2, -1)
    o = o.reshape(B, *(axis.queries.size for axis in axes), N, V)
    for n, axis in enumerate(axes):
        o = jnp.take(o, axis.slots, 1 + n)
    return o


class Gna(nn.Module):
    """Neighborhood attention over a grid of any number of axes; options as in `gna`."""

    num_heads: int
    head_dim: int
    window: int | tuple[int, ...] = 7
    stride: int | tuple[int, ...] = 1
    dilation: int | tuple[int, ...] = 1
    causal: bool | tuple[bool, ...] = False
    dtype: DTypeLike | None = None
    fn: Callable[..., jax.Array] = gna

    @nn.compact
    def __call__(self, x: Float[Array, "B *T D"]) -> Float[Array, "B *T D"]:
        """Attention of each token to its neighborhood; (B X Y D) for an image."""
        heads = functools.partial(layers.HeadProjection, self.num_heads, self.head_dim, self.dtype)
        q, k, v = (heads(name=name)(x) for name in ("query", "key", "value"))
        options = dict(window=self.window, stride=self.stride)
        options |= dict(dilation=self.dilation, causal=self.causal)
        o = layers.Attend(self.fn, name="attend")(q, k, v, **options)
        return layers.OutputProjection(self.dtype, name="out")(o, x.shape[-1])


def _example(key: jax.Array, T: int) -> dict[str, jax.Array]:
    q, k, v = jax.random.normal(key, (3, 2, T, 5, 2, 4))
    return dict(q=q, k=k, v=v)


def _oracle(q, k, v, *, window=7, stride=1, dilation=1, causal=False):
    shape = q.shape[1:-2]
    split = lambda x: np.broadcast_to(x, len(shape)).tolist()
    dilation = np.minimum(dilation, shape)
    window = np.minimum(window, shape // dilation)
    stride = np.minimum(stride, window)
    near = masks.Neighborhood(shape, *(tuple(split(x)) for x in (window, stride, dilation, causal)))
    flat = lambda x: x.reshape(x.shape[0], -1, *x.shape[-2:])
    x = jnp.einsum("BTNH,BSNH->BNTS", flat(q), flat(k)) / jnp.sqrt(q.shape[-1])
    x = jnp.where(masks.dense(near, *x.shape[-2:]), x, -jnp.inf)
    return jnp.einsum("BNTS,BSNV->BTNV", jax.nn.softmax(x), flat(v)).reshape(v.shape)


SPEC = registry.Mechanism(
    fn=gna,
    module=Gna,
    layout="grid",
    small=dict(num_heads=4, head_dim=8, window=3),
    papers=("gna",),
    example=_example,
    oracle=_oracle,
    variants=(
        {},
        dict(window=(6, 2), stride=(4, 2)),
        dict(window=3, dilation=(4, 1), stride=2, causal=(True, False)),
    ),
    claims=frozenset(
        {
            Claim.LINEAR_MEMORY,
            Claim.LINEAR_COMPUTE,
            Claim.FUSED,
            Claim.DENSE_TWIN,
            Claim.CONTEXT_PARALLEL,
        }
    ),
    context=("halo",),
)
