"""Masks as data: what a query may see, said once and read in three ways.

    Causal()            Window(1, 0)        Prefix(2)           Segments([0 0 1 1])
    x . . .             x . . .             x x . .             x x . .
    x x . .             x x . .             x x . .             x x . .
    x x x .             . x x .             x x x .             . . x x
    x x x x             . . x x             x x x x             . . x x

`mask.visible(t, s)` gives the dense form for any positions, so one mask serves a whole sequence, a
decode step (t = [length]) and a shard of a ring (t, s = the positions that a device holds).
`mask.tiles(t, s)` says which tiles are EMPTY, PARTIAL or FULL without looking at single entries
where it can, so that a kernel skips the first and does no mask work on the last. A tile may be
called PARTIAL that is not; never EMPTY or FULL. `&` and `|` combine masks.

Positions given as numpy arrays to a mask without arrays in it give numpy arrays: such a mask is
known while tracing, so tiles are skipped statically. Every mask is a pytree.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

EMPTY, PARTIAL, FULL = 0, 1, 2

Positions = np.ndarray | jax.Array  # integers: [T] for single ones, [tiles, tile size] for tiles


def _register(*arrays: str):
    """A frozen dataclass whose fields named in `arrays` are traced and the others static."""

    def decorate(cls):
        cls = dataclasses.dataclass(frozen=True)(cls)
        static = [f.name for f in dataclasses.fields(cls) if f.name not in arrays]
        return jax.tree_util.register_dataclass(cls, data_fields=arrays, meta_fields=static)

    return decorate


class Mask:
    """What every mask can do. A subclass defines `visible` and, where it can, `tiles`."""

    def visible(self, t: Positions, s: Positions) -> Bool[Array | np.ndarray, "#B #N T S"]:
        """Whether a query at position t [T] may see a key at position s [S]."""
        raise NotImplementedError

    def tiles(self, t: Positions, s: Positions) -> Int[Array | np.ndarray, "#B #N tq tk"]:
        """EMPTY, PARTIAL or FULL for tiles of positions t [tq, block] and s [tk, block]."""
        rows = [_reduce(self.visible(row, s.reshape(-1)), s.shape) for row in t]
        return _module(*rows).stack(rows, axis=2)

    def __and__(self, other: "Mask") -> "Mask":
        return And((self, other))

    def __or__(self, other: "Mask") -> "Mask":
        return Or((self, other))


def dense(mask: Mask | None, T: int, S: int, *, q_offset=0) -> Bool[Array, "#B #N T S"]:
    """The dense form over T queries that start at position `q_offset` and S keys."""
    if mask is None:
        return jnp.ones((1, 1, T, S), bool)
    return jnp.asarray(mask.visible(q_offset + np.arange(T), np.arange(S)))


def tiles(mask: Mask | None, T: int, S: int, *, block_q: int, block_k: int, q_offset=0):
    """The summary (#B #N ceil(T/block_q) ceil(S/block_k)) by tiles of a flat sequence.

    A last tile that reaches over the end repeats the last position, which changes nothing.
    """
    t = q_offset + tile_positions(np.arange(T), block_q)
    s = tile_positions(np.arange(S), block_k)
    if mask is None:
        return np.full((1, 1, len(t), len(s)), FULL)
    return mask.tiles(t, s)


def tile_positions(positions: Positions, block: int | Sequence[int], shape=None) -> Positions:
    """Positions cut into tiles [tiles, block], the last filled up by repeating its last position.

    With a grid `shape`, `block` has one size for each axis and the tiles are boxes of the grid.
    """
    if shape is not None:
        axes = [tile_positions(np.arange(n), b) for n, b in zip(shape, block, strict=True)]
        boxes = itertools.product(*axes)  # one tile along each axis
        return np.stack([np.ravel_multi_index(np.ix_(*box), shape).reshape(-1) for box in boxes])
    count = -(-len(positions) // block)
    return positions[np.minimum(np.arange(count * block), len(positions) - 1)].reshape(count, block)


@_register()
class Causal(Mask):
    """A query sees the keys up to its own position."""

    def visible(self, t, s):
        return (s[None, :] <= t[:, None])[None, None]

    def tiles(self, t, s):
        return _by_lag(t, s, 0, None)


@_register()
class Window(Mask):
    """A query sees `left` keys before its own position and `right` after it; None is no limit."""

    left: int | None
    right: int | None = 0

    def __post_init__(self):
        for side in (self.left, self.right):
            if side is not None and side < 0:
                raise ValueError(f"{self} must not have a negative side")

    def visible(self, t, s):
        lag = t[:, None] - s[None, :]
        low = True if self.right is None else lag >= -self.right
        high = True if self.left is None else lag <= self.left
        return (low & high & (lag == lag))[None, None]

    def tiles(self, t, s):
        return _by_lag(t, s, None if self.right is None else -self.right, self.left)


@_register()
class Prefix(Mask):
    """Every query sees the first `length` keys. With `| Causal()`: a prefix language model."""

    length: int

    def visible(self, t, s):
        return ((s[None, :] < self.length) & (t[:, None] == t[:, None]))[None, None]

    def tiles(self, t, s):
        none, every = s.min(-1) >= self.length, s.max(-1) < self.length
        states = _states(~none, every)
        return (states[None, :] + 0 * t[:, :1])[None, None]


@_register("q", "kv")
class Segments(Mask):
    """A query sees the keys of its own segment: documents packed into one sequence.

    q is (B T) segment ids by position, kv (B S) those of the keys, the same as q where None.
    """

    q: Int[Array, "B T"]
    kv: Int[Array, "B S"] | None = None

    @property
    def keys(self) -> Int[Array, "B S"]:
        """Segment ids of the keys."""
        return self.q if self.kv is None else self.kv

    def visible(self, t, s):
        return (self.q[:, t][:, :, None] == self.keys[:, s][:, None, :])[:, None]

    def tiles(self, t, s):
        q, kv = self.q[:, t][:, :, None], self.keys[:, s][:, None]
        q_low, q_high, kv_low, kv_high = q.min(-1), q.max(-1), kv.min(-1), kv.max(-1)
        overlap = (q_low <= kv_high) & (kv_low <= q_high)
        same = (q_low == q_high) & (kv_low == kv_high) & (q_low == kv_low)
        return _states(overlap, same)[:, None]


@_register("keys")
class Valid(Mask):
    """A query sees the keys that are valid: padding is not. keys is (B S) by position."""

    keys: Bool[Array, "B S"]

    def visible(self, t, s):
        seen = self.keys[:, s][:, None, :]
        return (seen & (t == t)[None, :, None])[:, None]

    def tiles(self, t, s):
        keys = self.keys[:, s]
        states = _states(keys.any(-1), keys.all(-1))
        return (states[:, None, :] + 0 * t[None, :, :1])[:, None]


@_register("array")
class Dense(Mask):
    """Any mask given entry by entry, (B|1 N|1 T S)."""

    array: Bool[Array, "#B #N T S"]

    def visible(self, t, s):
        return self.array[:, :, t][:, :, :, s]


@_register("selected")
class Blocks(Mask):
    """A query block sees the key blocks selected for it: (B|1 N|1 query blocks, key blocks).

    Block i holds the positions i * block_q to (i + 1) * block_q - 1, and likewise for keys.
    """

    selected: Bool[Array | np.ndarray, "#B #N tq tk"]
    block_q: int
    block_k: int

    def visible(self, t, s):
        selected = _module(self.selected, t, s).asarray(self.selected)
        return selected[:, :, t // self.block_q][:, :, :, s // self.block_k]

    def tiles(self, t, s):
        """Exact where a tile lies within one block; elsewhere the base class looks."""
        rows, columns = t // self.block_q, s // self.block_k
        aligned = self.block_q % t.shape[1] == 0 and self.block_k % s.shape[1] == 0
        if not (aligned and isinstance(rows, np.ndarray) and isinstance(columns, np.ndarray)):
            return super().tiles(t, s)
        if (rows != rows[:, :1]).any() or (columns != columns[:, :1]).any():
            return super().tiles(t, s)
        seen = self.selected[:, :, rows[:, 0]][:, :, :, columns[:, 0]]
        return _states(seen, seen)


@_register()
class Neighborhood(Mask):
    """Generalized neighborhood attention over a grid of 1 to 3 axes, flattened in row order.

    Source: Hassani et al., "Generalized Neighborhood Attention". Per axis of length L, with
    window k, stride s <= k, dilation d: positions with the same remainder modulo d form a line of
    their own. On a line, the queries of a stride share the window of their leader

        leader = min(floor(q/s) s + floor(s/2), L - 1)
        centre = clamp(leader, floor(k/2), L - 1 - (floor(k/2) + k % 2 - 1))
        keys   = centre - floor(k/2) ... centre + floor(k/2) + k % 2 - 1

    and on a causal axis the leader is the last query of the stride, and the keys are those with
    key <= q and leader - key < k. The axes are combined by AND.
    """

    shape: tuple[int, ...]
    window: tuple[int, ...]
    stride: tuple[int, ...] | None = None
    dilation: tuple[int, ...] | None = None
    causal: tuple[bool, ...] | None = None

    def __post_init__(self):
        rank = len(self.shape)
        for name in ("window", "stride", "dilation", "causal"):
            value = getattr(self, name)
            if value is not None and len(value) != rank:
                raise ValueError(f"{name}={value} must have one value per axis of {self.shape}")
        for n, (length, k, s, d, _) in enumerate(self._axes()):
            if not (k >= 1 and k * d <= length and 1 <= s <= k and d >= 1):
                raise ValueError(
                    f"axis {n}: window={k}, stride={s}, dilation={d} must satisfy "
                    f"1 <= stride <= window and window * dilation <= {length}"
                )

    def _axes(self):
        ones, rank = (1,), len(self.shape)
        return list(
            zip(
                self.shape,
                self.window,
                self.stride or ones * rank,
                self.dilation or ones * rank,
                self.causal or (False,) * rank,
                strict=True,
            )
        )

    def along(self, axis: int) -> Bool[np.ndarray, "L L"]:
        """The mask of one axis alone."""
        return _neighborhood_axis(*self._axes()[axis])

    def visible(self, t, s):
        module = _module(t, s)
        shape = self.shape
        q, k = module.unravel_index(t, shape), module.unravel_index(s, shape)
        seen = True
        for axis in range(len(shape)):
            table = module.asarray(self.along(axis))
            seen = seen & table[q[axis]][:, k[axis]]
        return seen[None, None]


@functools.cache
def _neighborhood_axis(length, window, stride, dilation, causal) -> np.ndarray:
    position = np.arange(length)
    line, index = position % dilation, position // dilation
    count = (length - line + dilation - 1) // dilation  # positions on each one's line
    start = index // stride * stride
    if causal:
        leader = np.minimum(start + stride - 1, count - 1)
        low, high = leader - window + 1, index
    else:
        leader = np.minimum(start + stride // 2, count - 1)
        half, odd = window // 2, window % 2
        centre = np.clip(leader, half, count - 1 - (half + odd - 1))
        low, high = centre - half, centre + half + odd - 1
    key = index[None, :]
    return (low[:, None] <= key) & (key <= high[:, None]) & (line[:, None] == line[None, :])


@_register("parts")
class And(Mask):
    """Visible where every part says so."""

    parts: tuple[Mask, ...]

    def visible(self, t, s):
        return functools.reduce(lambda a, b: a & b, (p.visible(t, s) for p in self.parts))

    def tiles(self, t, s):
        states = [part.tiles(t, s) for part in self.parts]
        return functools.reduce(_module(*states).minimum, states)


@_register("parts")
class Or(Mask):
    """Visible where any part says so."""

    parts: tuple[Mask, ...]

    def visible(self, t, s):
        return functools.reduce(lambda a, b: a | b, (p.visible(t, s) for p in self.parts))

    def tiles(self, t, s):
        states = [part.tiles(t, s) for part in self.parts]
        return functools.reduce(_module(*states).maximum, states)


def parts(mask: Mask | None) -> tuple[Mask, ...]:
    """The masks that are combined by AND, flattened; () for None."""
    if mask is None:
        return ()
    return tuple(q for p in mask.parts for q in parts(p)) if isinstance(mask, And) else (mask,)


def select(mask: Mask | None, *kinds: type[Mask], by: str) -> tuple[tuple[Mask, ...], ...]:
    """The parts of each kind, for a mechanism that honours only `kinds`.

    Raises NotImplementedError, naming the mechanism `by` and what it honours, for any other part.
    """
    for part in parts(mask):
        if not isinstance(part, kinds):
            honours = " & ".join(kind.__name__ for kind in kinds) or "no mask"
            raise NotImplementedError(f"{by} can't honour {type(part).__name__}; it can {honours}")
    return tuple(tuple(p for p in parts(mask) if isinstance(p, kind)) for kind in kinds)


def _module(*arrays):
    return np if all(isinstance(a, np.ndarray) for a in arrays) else jnp


def _states(some, every):
    return _module(some, every).where(every, FULL, _module(some, every).where(some, PARTIAL, EMPTY))


def _reduce(seen, shape):
    """(#B #N block, S) -> states (#B #N, tk) of one row of tiles."""
    seen = seen.reshape(*seen.shape[:-1], *shape)
    return _states(seen.any((-3, -1)), seen.all((-3, -1)))


def _by_lag(t, s, low, high):
    """States where visible means low <= t - s <= high, from the extremes of each tile."""
    least = t.min(-1)[:, None] - s.max(-1)[None, :]
    most = t.max(-1)[:, None] - s.min(-1)[None, :]
    some = (most == most) if low is None else most >= low
    every = (most == most) if low is None else least >= low
    if high is not None:
        some, every = some & (least <= high), every & (most <= high)
    return _states(some, every)[None, None]
