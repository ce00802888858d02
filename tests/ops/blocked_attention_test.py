"""What is particular to the blocked form: memory, skipped tiles, and jax's transformations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from attnjax.core import masks
from attnjax.ops import blocked_exp2, blocked_schedule, dropout
from attnjax.ops import dot_product_attention as ops

blocked = functools.partial(ops.dot_product_attention, implementation="blocked")


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(blocked_schedule, "_TILE", 16)


def normal(*shapes):
    random = np.random.default_rng(0)
    return [random.standard_normal(shape, np.float32) for shape in shapes]


def qkv(B=1, T=64, N=4, K=2, H=8):
    return normal((B, T, N, H), (B, T, K, H), (B, T, K, H))


def with_gradients(f, argnums=(0, 1, 2)):
    """A function to ((loss, output), gradients), compiled."""

    def loss(*args):
        o = f(*args)
        return (o**2).sum(), o

    return jax.jit(jax.value_and_grad(loss, argnums, has_aux=True))


def assert_close(a, b):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), a, b)


@jax.tree_util.register_static
class Claim(masks.Mask):
    """Its tiles and its entries contradict each other, which shows what is looked at."""

    def __init__(self, state, entries):
        self.state, self.entries = state, entries

    def visible(self, t, s):
        return jnp.full((1, 1, len(t), len(s)), self.entries)

    def tiles(self, t, s):
        return np.full((1, 1, len(t), len(s)), self.state)


def test_full_tiles_have_no_mask_and_empty_ones_no_work(small_tiles):
    claims = (masks.FULL, False), (masks.PARTIAL, True), (masks.EMPTY, True)
    fns = [functools.partial(blocked, mask=Claim(*claim)) for claim in claims]
    fns.append(functools.partial(ops.dot_product_attention, implementation="dense"))
    run = jax.jit(lambda *qkv: [with_gradients(fn)(*qkv) for fn in fns])
    full, partial, empty, everything = run(*qkv())
    assert_close(full, everything)
    assert_close(partial, everything)
    assert not any(np.any(x) for x in jax.tree.leaves(empty))


POISONED = {  # keys 32 to 47 are NaN, and these queries (by head) must not see them
    "causal": (masks.Causal(), np.s_[:, :32]),
    "segments": (masks.Segments(jnp.repeat(jnp.arange(4), 16)[None]), np.r_[0:32, 48:64]),
    "blocks": (
        masks.Blocks(jnp.ones((1, 4, 4, 4), bool).at[0, 2:, :, 2].set(False), 16, 16),
        np.s_[:, :, 2:],
    ),
}


@pytest.mark.parametrize("name", POISONED)
def test_nan_in_an_empty_tile_is_never_read(small_tiles, name):
    mask, clean = POISONED[name]
    clean = (slice(None), clean) if isinstance(clean, np.ndarray) else clean
    q, k, v = qkv()
    k[:, 32:48] = v[:, 32:48] = np.nan
    k, v = jnp.asarray(k), jnp.asarray(v)
    wanted = np.zeros(q.shape, bool)
    wanted[clean] = True

    def loss(q):
        o = blocked(q, k, v, mask=mask)
        return jnp.where(wanted, o, 0.0).sum(), o

    (_, o), dq = jax.jit(jax.value_and_grad(loss, has_aux=True))(q)
    assert np.isfinite(o[clean]).all() and not np.isfinite(o).all()
    assert np.isfinite(dq[clean]).all()


def peak(T, backward, **options):
    """Bytes of temporaries, by what XLA says."""
    shapes = [jax.ShapeDtypeStruct((1, T, heads, 8), jnp.float32) for heads in (4, 2, 2)]
    f = functools.partial(blocked, **options)
    f = with_gradients(f) if backward else jax.jit(f)
    return f.lower(*shapes).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("backward", [False, True])
def test_memory_grows_as_the_length_does(backward):
    """With tiles of both kinds, those that need a mask and those that don't."""
    options = {"mask": masks.Causal(), "softcap": 5.0}
    sizes = [peak(T, backward, **options) for T in (4096, 8192, 16384)]
    steps = np.diff(sizes)
    inputs = 8192 * 8 * 8 * 4  # bytes by which q, k and v grow in the last step
    assert steps[1] <= 2.5 * steps[0] + 4096 and steps[1] < 5 * inputs


def test_gradient_of_bias_takes_the_memory_of_bias(small_tiles):
    def bytes_of(T):
        shapes = [jax.ShapeDtypeStruct((2, T, 4, 8), jnp.float32)] * 3
        bias = jax.ShapeDtypeStruct((1, 1, T, T), jnp.float32)
        f = with_gradients(lambda q, k, v, bias: blocked(q, k, v, bias=bias), argnums=3)
        return f.lower(*shapes, bias).compile().memory_analysis().temp_size_in_bytes

    one = 4 * (512**2 - 256**2)  # bytes by which a (T T) array grows; the scores grow by 8
    assert bytes_of(512) - bytes_of(256) < 2.5 * one


def test_vmap_with_a_mask_of_its_own(small_tiles):
    q, k, v = normal(*[(3, 1, 40, 2, 8)] * 3)
    ids = jnp.asarray(np.repeat([[0, 1], [2, 2], [0, 3]], 20, axis=1).reshape(3, 1, 40))
    f = lambda q, k, v, ids: blocked(q, k, v, mask=masks.Segments(ids) & masks.Causal())
    together = jax.vmap(with_gradients(f))(q, k, v, ids)
    one = with_gradients(f)
    one_by_one = [one(*x) for x in zip(q, k, v, ids, strict=True)]
    assert_close(together, jax.tree.map(lambda *x: jnp.stack(x), *one_by_one))


def test_shard_map_over_batch_of_what_is_computed_again(small_tiles):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    q, k, v, bias, slope = normal(*[(4, 40, 2, 8)] * 3, (1, 2, 40, 40), (2,))
    ids = jnp.arange(4)[:, None] * jnp.arange(40)[None, :] // 30

    def f(q, k, v, bias, slope, ids):
        score_mod = lambda x, b, n, t, s: x * slope[n]
        mask = masks.Segments(ids) & masks.Causal()
        return blocked(q, k, v, mask=mask, bias=bias, score_mod=score_mod)

    data, none = PartitionSpec("data"), PartitionSpec()
    sharded = jax.shard_map(
        jax.checkpoint(f), mesh=mesh, in_specs=(data, data, data, none, none, data), out_specs=data
    )
    args = q, k, v, bias, slope, ids
    learned = (0, 1, 2, 3, 4)
    assert_close(with_gradients(sharded, learned)(*args), with_gradients(f, learned)(*args))


def test_exp2():
    x = np.concatenate([np.linspace(-125.9, 1.0, 9999), [-127.0, -1e30, -np.inf, np.nan]])
    x = x.astype(np.float32)
    y = np.asarray(jax.jit(blocked_exp2.exp2)(x))
    np.testing.assert_allclose(y[:-4], np.exp2(x[:-4].astype(np.float64)), rtol=4e-7)
    assert (y[-4:-1] == 0).all() and np.isnan(y[-1])


@pytest.mark.parametrize("mask, size", [
    (masks.Causal(), 512),
    (masks.Window(250, 0), 256),
    (masks.Blocks(jnp.ones((1, 1, 64, 64), bool), 64, 64) & masks.Causal(), 64),
])  # fmt: skip
def test_tiles_fit_the_mask(mask, size):
    plan = blocked_schedule.schedule(mask, np.arange(4096), np.arange(4096), K=8, G=1)
    assert (plan.block_q, plan.block_k) == (size, size)


def test_strips_of_partial_tiles():
    causal = blocked_schedule.schedule(masks.Causal(), np.arange(1024), np.arange(1024), K=2, G=1)
    upper, lower = (slice(0, 256), slice(0, 256)), (slice(256, 512), slice(0, 512))
    assert causal.strips == (upper, lower)
    both = masks.Window(1024, 0)  # the tiles at its left end need what those at the right don't
    both = blocked_schedule.schedule(both, np.arange(4096), np.arange(4096), K=2, G=1)
    assert both.strips == ((slice(0, both.block_q), slice(0, both.block_k)),)


@pytest.mark.parametrize("mask", [masks.Causal(), masks.Causal() & masks.Prefix(90)])
def test_strips_equal_the_dense_form(monkeypatch, mask):
    monkeypatch.setattr(blocked_schedule, "_TILE", 64)
    q, k, v, bias = *qkv(T=200), *normal((1, 4, 200, 200))
    drop = dropout.Dropout(0.3, jax.random.key(2))

    def attend(q, k, v, bias, implementation):
        options = dict(mask=mask, bias=bias, dropout=drop, implementation=implementation)
        return ops.dot_product_attention(q, k, v, **options)

    run = lambda x: with_gradients(functools.partial(attend, implementation=x), (0, 1, 2, 3))
    assert len(blocked_schedule.schedule(mask, *[np.arange(200)] * 2, K=2, G=2).strips) > 1
    assert_close(run("blocked")(q, k, v, bias), run("dense")(q, k, v, bias))
