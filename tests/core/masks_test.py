import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import masks
from attnjax.core.masks import EMPTY, FULL, PARTIAL

T = 24
RANDOM = np.random.default_rng(0)
IDS = np.sort(RANDOM.integers(0, 4, (2, T)), axis=1)
KEYS = RANDOM.random((2, T)) > 0.3
ENTRIES = RANDOM.random((2, 3, T, T)) > 0.8
SELECTED = RANDOM.random((2, 3, 4, 3)) > 0.5

STATIC = {
    "causal": masks.Causal(),
    "window": masks.Window(5, 2),
    "no left": masks.Window(0, 0),
    "all": masks.Window(None, None),
    "left only": masks.Window(3, None),
    "prefix": masks.Prefix(10),
    "prefix lm": masks.Prefix(10) | masks.Causal(),
    "line": masks.Neighborhood((T,), (5,), stride=(2,), dilation=(2,)),
    "plane": masks.Neighborhood((4, 6), (3, 4), causal=(True, False)),
    "known blocks": masks.Blocks(np.asarray(SELECTED), 6, 8),
}
DYNAMIC = {
    "segments": masks.Segments(jnp.asarray(IDS)),
    "cross segments": masks.Segments(jnp.asarray(IDS), jnp.asarray(IDS[::-1])),
    "shuffled segments": masks.Segments(jnp.asarray(RANDOM.permuted(IDS, axis=1))),
    "valid": masks.Valid(jnp.asarray(KEYS)),
    "dense": masks.Dense(jnp.asarray(ENTRIES)),
    "blocks": masks.Blocks(jnp.asarray(SELECTED), 6, 8),
    "packed": masks.Segments(jnp.asarray(IDS)) & masks.Causal() & masks.Valid(jnp.asarray(KEYS)),
    "either": masks.Blocks(jnp.asarray(SELECTED), 6, 8) | masks.Window(4, 0),
}
BLOCKS = [(1, 1), (4, 4), (6, 8), (3, 4), (24, 24), (5, 7)]


def entries(mask, t, s):
    """By numpy for a mask that is known."""
    known = not any(isinstance(x, jax.Array) for x in jax.tree.leaves(mask))
    return np.asarray((mask.visible if known else jax.jit(mask.visible))(t, s))


@functools.cache
def whole(name):
    return entries((STATIC | DYNAMIC)[name], np.arange(T), np.arange(T))


@functools.cache
def states_of(name):
    """Of tiles of all sizes: in numpy for a mask that is known, else in one compilation."""
    tiles = functools.partial(masks.tiles, T=T, S=T)
    each = lambda mask: [tiles(mask, block_q=q, block_k=k) for q, k in BLOCKS]
    return each(STATIC[name]) if name in STATIC else jax.jit(each)(DYNAMIC[name])


def truth(visible, t, s):
    """EMPTY, PARTIAL or FULL by looking at every entry."""
    states = np.empty((*visible.shape[:2], len(t), len(s)), int)
    for i, j in np.ndindex(len(t), len(s)):
        tile = visible[:, :, t[i]][:, :, :, s[j]]
        states[:, :, i, j] = np.where(
            tile.all((2, 3)), FULL, np.where(tile.any((2, 3)), PARTIAL, EMPTY)
        )
    return states


@pytest.mark.parametrize("name", STATIC | DYNAMIC)
def test_tiles_are_never_wrong(name):
    visible = whole(name)
    for (block_q, block_k), states in zip(BLOCKS, states_of(name), strict=True):
        assert isinstance(states, np.ndarray) == (name in STATIC)
        states = np.asarray(states)
        t, s = (masks.tile_positions(np.arange(T), block) for block in (block_q, block_k))
        true = truth(visible, t, s)
        assert np.broadcast_shapes(states.shape, true.shape) == true.shape
        wrong = (states != PARTIAL) & (states != true)
        assert not wrong.any(), (block_q, block_k)


EXACT = ["causal", "window", "no left", "left only", "prefix", "line", "plane", "valid", "dense"]


@pytest.mark.parametrize("name", EXACT)
def test_tiles_are_exact_where_they_can_be(name):
    visible = whole(name)
    for (block_q, block_k), states in zip(BLOCKS, states_of(name), strict=True):
        t, s = (masks.tile_positions(np.arange(T), block) for block in (block_q, block_k))
        np.testing.assert_array_equal(states, truth(visible, t, s))


@pytest.mark.parametrize("name", ["causal", "window", "prefix lm", "plane"])
def test_traced_positions_give_the_same(name):
    mask = STATIC[name]
    t, s = (masks.tile_positions(np.arange(T), block) for block in (5, 4))
    states = jax.jit(mask.tiles)(t, s)
    assert isinstance(states, jax.Array)
    np.testing.assert_array_equal(states, mask.tiles(t, s))
    some, others = np.arange(7, 12), np.arange(3, 23)
    np.testing.assert_array_equal(jax.jit(mask.visible)(some, others), mask.visible(some, others))


def test_a_shard_sees_its_part_of_the_whole():
    t, s = RANDOM.permutation(T)[:9], RANDOM.permutation(T)[:11]
    shards = {name: mask.visible(t, s) for name, mask in STATIC.items()}
    every = lambda given: {name: mask.visible(t, s) for name, mask in given.items()}
    shards |= jax.device_get(jax.jit(every)(DYNAMIC))  # in one compilation
    for name, shard in shards.items():
        np.testing.assert_array_equal(shard, whole(name)[:, :, t][:, :, :, s])


def test_dense_continues_at_an_offset():
    square = np.asarray(masks.dense(masks.Window(3, 1), T, T))
    part = masks.dense(masks.Window(3, 1), 2, T, q_offset=9)
    np.testing.assert_array_equal(part, square[:, :, 9:11])
    assert masks.dense(None, 2, 3).shape == (1, 1, 2, 3)


def entry(f):
    """A mask of one batch entry and head, from a rule about one query and one key."""
    return np.array([[f(t, s) for s in range(T)] for t in range(T)])


RULES = {
    masks.Causal(): lambda t, s: s <= t,
    masks.Window(3, 1): lambda t, s: t - 3 <= s <= t + 1,
    masks.Window(None, 0): lambda t, s: s <= t,
    masks.Prefix(4): lambda t, s: s < 4,
    masks.Prefix(4) | masks.Causal(): lambda t, s: s < 4 or s <= t,
    masks.Prefix(4) & masks.Causal(): lambda t, s: s < 4 and s <= t,
}


@pytest.mark.parametrize("mask", RULES, ids=str)
def test_visible_by_rule(mask):
    np.testing.assert_array_equal(np.asarray(masks.dense(mask, T, T))[0, 0], entry(RULES[mask]))


@pytest.mark.parametrize("b", range(2))
def test_visible_by_arrays(b):
    seen = lambda name: whole(name)[b]
    np.testing.assert_array_equal(seen("segments")[0], entry(lambda t, s: IDS[b, t] == IDS[b, s]))
    np.testing.assert_array_equal(seen("valid")[0], entry(lambda t, s: KEYS[b, s]))
    np.testing.assert_array_equal(seen("dense"), ENTRIES[b])
    chosen = [entry(lambda t, s, n=n: SELECTED[b, n, t // 6, s // 8]) for n in range(3)]
    np.testing.assert_array_equal(seen("blocks"), chosen)


def neighbours(length, window, stride, dilation, causal, q):
    """Keys that a query at q sees along one axis, from the paper's words.

    Positions with the same remainder modulo the dilation form a line. A query's leader is the
    middle (or, causally, the last) query of its stride. The window is centred on the leader and
    shifted inwards at the ends; a causal one ends at the leader and shows nothing after q.
    """
    line = [x for x in range(length) if x % dilation == q % dilation]
    place = line.index(q)
    group = line[place // stride * stride :][:stride]
    if causal:
        last = place // stride * stride + stride - 1
        last = min(last, len(line) - 1)
        return {line[x] for x in range(len(line)) if last - window < x <= place}
    leader = min(place // stride * stride + stride // 2, len(line) - 1)
    assert line[leader] in group
    first = leader - window // 2
    while first < 0:
        first += 1
    while first + window > len(line):
        first -= 1
    return {line[x] for x in range(first, first + window)}


def random_neighborhood(seed):
    random = np.random.default_rng(seed)
    shape, window, stride, dilation, causal = [], [], [], [], []
    for _ in range(seed % 3 + 1):
        shape.append(int(random.integers(3, 8)))
        dilation.append(int(random.integers(1, 3)))
        window.append(int(random.integers(1, shape[-1] // dilation[-1] + 1)))
        stride.append(int(random.integers(1, window[-1] + 1)))
        causal.append(bool(random.integers(2)))
    return tuple(map(tuple, (shape, window, stride, dilation, causal)))


@pytest.mark.parametrize("seed", range(30))
def test_neighborhood_is_the_product_of_its_axes(seed):
    arguments = random_neighborhood(seed)
    shape, size = arguments[0], int(np.prod(arguments[0]))
    visible = entries(masks.Neighborhood(*arguments), np.arange(size), np.arange(size))[0, 0]
    for row, q in enumerate(itertools.product(*map(range, shape))):
        seen = [neighbours(*axis, x) for *axis, x in zip(*arguments, q, strict=True)]
        expected = [all(x in keys for x, keys in zip(k, seen, strict=True))
                    for k in itertools.product(*map(range, shape))]  # fmt: skip
        np.testing.assert_array_equal(visible[row], expected)


def test_boxes_of_a_grid_hold_each_position_once():
    t = masks.tile_positions(np.arange(24), (2, 3), shape=(4, 6))
    assert t.shape == (4, 6) and t[1].tolist() == [3, 4, 5, 9, 10, 11]
    np.testing.assert_array_equal(np.sort(t.ravel()), np.arange(24))
    uneven = masks.tile_positions(np.arange(15), (2, 2), shape=(3, 5))  # 2 by 3 boxes
    assert uneven.shape == (6, 4) and set(uneven.ravel()) == set(range(15))


def test_tiles_of_boxes():
    mask = masks.Neighborhood((6, 8), (3, 3))
    t = masks.tile_positions(np.arange(48), (2, 4), shape=(6, 8))
    states = mask.tiles(t, t)
    visible = entries(mask, np.arange(48), np.arange(48))
    np.testing.assert_array_equal(states, truth(visible, t, t))
    in_rows = masks.tiles(mask, 48, 48, block_q=8, block_k=8)
    assert (states == EMPTY).sum() > 0 and (in_rows == EMPTY).sum() > 0


def test_select_names_what_a_mechanism_cannot_honour():
    mask = masks.Causal() & (masks.Window(2, 0) & masks.Valid(jnp.asarray(KEYS)))
    assert len(masks.parts(mask)) == 3 and masks.parts(None) == ()
    select = functools.partial(masks.select, mask, masks.Causal, masks.Window, by="retention")
    with pytest.raises(NotImplementedError, match="retention can't honour Valid; it can Causal"):
        select()
    causal, rest = masks.select(mask, masks.Causal, masks.Mask, by="any")
    assert causal == (masks.Causal(),) and len(rest) == 3


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: masks.Window(-1, 0),
        lambda: masks.Neighborhood((8,), (9,)),
        lambda: masks.Neighborhood((8,), (3,), stride=(4,)),
        lambda: masks.Neighborhood((8,), (3,), dilation=(3,)),
        lambda: masks.Neighborhood((8, 8), (3,)),
    ],
)
def test_wrong_arguments(wrong):
    with pytest.raises(ValueError, match="must"):
        wrong()
