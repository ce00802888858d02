"""Only what is particular to AnchorAttention; the rest is tests/conformance_test.py."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import masks
from attnjax.sparse import anchorattention as lib
from tests.sparse import helpers

T, C, STEP = 64, 4, 2
SIZES = dict(block=C, step=STEP)
s = np.arange(T)
# by group, what is read whatever it scores
ALWAYS = (s < C) | (s >= C * STEP * np.arange(T // (C * STEP))[:, None])
LOUD = (13, 22, 30, 41)


def striped(stripes=LOUD):
    """Every query scores a few single keys and the first one high, all others near 0."""
    q, k = np.float32(0.3) * helpers.normal(2, 1, T, 1, 16)
    q[..., 0], k[..., 0] = 40.0, np.isin(s, [0, *stripes])[None, :, None]
    return q, k


def run(*args, **options):
    return helpers.program(lib.anchorattention, **(SIZES | options))(*args)


def select(q, k, **options):
    return helpers.program(lib.select, **(SIZES | options))(q, k)


def by_query(read, size=C * STEP):
    """(B N g T) -> (B N T T), what each query sees."""
    T = read.shape[-1]  # the last group is filled up
    return np.repeat(read, size, 2)[:, :, :T] & np.tri(T, dtype=bool)


def recall(q, k, seen):
    return float(np.where(seen, helpers.weights(q, k), 0).sum(-1).mean())


@pytest.mark.parametrize("theta", [np.inf, -np.inf])
def test_its_ends(theta):
    """Full attention, and that to the first block and to one's own group."""
    q, k, v = helpers.example(61)
    group = np.arange(61) // (C * STEP)
    near = (np.arange(61) < C) | (group[:, None] == group)
    seen = np.tri(61, dtype=bool) & (near if theta < 0 else True)
    assert_attends(run(q, k, v, theta=theta), q, k, v, seen)


def assert_attends(o, q, k, v, seen):
    w = np.where(seen, helpers.weights(q, k), 0)
    w = w / w.sum(-1, keepdims=True)
    expected = np.einsum("BNTS,BSNV->BTNV", w, np.repeat(v, 2, 2))
    chex.assert_trees_all_close(o, expected, rtol=1e-5, atol=1e-6)


def test_is_attention_to_the_keys_that_it_selects():
    q, k, v = helpers.example(61)
    both = helpers.program(chosen_and_attended)
    read, o = both(q, k, v)
    seen = by_query(read)
    assert_attends(o, q, k, v, seen)
    assert 0.3 < seen.sum() / (2 * 4 * 61 * 31) < 0.9


def chosen_and_attended(q, k, v):
    options = dict(theta=0.5, **SIZES)
    return lib.select(q, k, **options), lib.anchorattention(q, k, v, **options)


def test_finds_single_columns():
    read = select(*striped(), theta=3.0)[0, 0]
    assert (read == ALWAYS | np.isin(s, LOUD)).all()


def test_recalls_more_than_blocks_and_than_a_random_choice_of_as_many_keys():
    q, k = striped()
    read = select(q, k, theta=3.0)
    count = (read & ~ALWAYS).sum(-1, keepdims=True)
    means = [x.reshape(1, -1, size, 16).mean(2) for x, size in ((q, C * STEP), (k, C))]
    pooled = np.einsum("BQH,BLH->BQL", *means)[:, None]
    pooled = np.where(ALWAYS[:, ::C], -np.inf, pooled)
    rank = np.argsort(np.argsort(-pooled))
    in_blocks = np.repeat(rank < (count + C - 1) // C, C, -1)
    noise = np.where(ALWAYS, -1.0, np.random.default_rng(0).uniform(size=ALWAYS.shape))
    at_random = np.argsort(np.argsort(-noise)) < count
    found = recall(q, k, by_query(read))
    assert found > recall(q, k, by_query(ALWAYS | in_blocks)) + 0.05
    assert found > recall(q, k, by_query(ALWAYS | at_random)) + 0.2 and found > 0.95


def test_a_larger_theta_reads_more():
    q, k, _ = helpers.example(T)
    reads = helpers.program(lambda q, k: [lib.select(q, k, theta=t, **SIZES) for t in thetas])
    thetas = (-0.3, 0.2, 0.7)
    few, some, many = reads(q, k)
    assert (few <= some).all() and (some <= many).all()
    assert few.sum() < some.sum() < many.sum()
    found = [recall(q, k, by_query(read)) for read in (few, some, many)]
    assert found == sorted(found) and found[2] > found[0] + 0.1


def test_one_block_that_comes_near_is_enough():
    q, k = striped(stripes=(13,))
    k[..., 1] = s[None, :, None] == 0
    elsewhere = np.zeros_like(q)
    elsewhere[..., 1] = 40.0  # at the first key alone
    second = (s // C % STEP == 1)[None, :, None, None]  # block of each group
    assert select(np.where(second, elsewhere, q), k, theta=3.0)[0, 0, 2:, 13].all()
    assert not select(elsewhere, k, theta=3.0)[0, 0, 2:, 13].any()


def test_keys_that_are_not_read_are_not_computed():
    """A whole tile of unread values is not touched by the last group."""
    q, k, v = helpers.normal(3, 1, 2048, 1, 8)
    v[:, 1000:1600] = np.nan
    o = run(q, k, v, theta=-np.inf, block=64, step=4)
    assert np.isfinite(o[:, 1792:]).all() and np.isnan(o[:, 1000:1600]).any()


def test_going_on_is_full_attention():
    options = dict(num_heads=2, head_dim=8, block=2, step=2, theta=-np.inf)
    helpers.assert_goes_on_in_full(lib.AnchorAttention(**options))


def test_refuses_what_it_cannot_do():
    q, k, v = (jnp.asarray(x) for x in helpers.example(6))
    with pytest.raises(NotImplementedError, match="anchorattention can't honour Window"):
        lib.anchorattention(q, k, v, mask=masks.Window(2))
    for options in (dict(block=0), dict(step=0)):
        with pytest.raises(ValueError, match="must be at least 1"):
            lib.anchorattention(q, k, v, **options)
    with pytest.raises(ValueError, match="must be of the tokens of"):
        lib.anchorattention(q[:, :3], k, v)
