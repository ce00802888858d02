"""The form for Hopper against the dense one; what its lists name; what it refuses."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from attnjax.core import masks
from attnjax.ops import selected_block_attention as ops
from pallas_kernels import block_sparse as kernels
from pallas_kernels.block_sparse import mosaic_gpu, rows
from pallas_kernels.block_sparse.mosaic_gpu import walk
from pallas_kernels.block_sparse.tile import Options
from tests.pallas_kernels import gpu_forms

DRAW = np.random.default_rng(0)


def normal(*shape, dtype="float32"):
    return jnp.asarray(DRAW.standard_normal(shape, np.float32), dtype)


def select(B, I, N, A, L):
    """Blocks of each run and head, of which the first runs choose the last blocks."""
    score = DRAW.random((B, I, N, L))
    score[:, 0] = -np.arange(L)
    return jnp.asarray(np.argsort(score, -1)[..., :A], jnp.int32)


def dense(q, k, v, selected, t, *, mask, block, query_block=1):
    """Softmax under the selection written out, in the dtype of the inputs."""
    (T, N), (S, K) = q.shape[1:3], k.shape[1:3]
    k, v = (jnp.repeat(x, N // K, 2) for x in (k, v))
    of_key = (jnp.arange(S) // block)[None, None, None, :, None]
    seen = (selected[:, np.arange(T) // query_block][:, :, :, None] == of_key).any(-1)
    seen = seen.swapaxes(1, 2) & masks.dense(mask, T, S, q_offset=t[0])
    x = jnp.einsum("btnh,bsnh->bnts", q, k) * q.dtype.type(q.shape[-1] ** -0.5)
    x = jnp.where(seen, x, -jnp.inf)
    lse = jax.nn.logsumexp(x, -1, keepdims=True)
    p = jnp.exp(x - jnp.where(lse == -jnp.inf, 0, lse))
    return jnp.einsum("bnts,bsnv->btnv", p, v)


def test_lined_up_queries_are_no_worse_than_naive():
    """Blocks that are no tiles, two query heads of a key head; some queries see nothing."""
    T, S, N, A, block = 70, 140, 2, 2, 48
    shapes = dict(q=(1, T, N, 64), k=(1, S, 1, 64), v=(1, S, 1, 40))
    arrays = {name: normal(*shape, dtype="bfloat16") for name, shape in shapes.items()}
    valid = masks.Valid(jnp.asarray(np.arange(S)[None] % 5 != 3))
    selected, t = select(1, T, N, A, -(-S // block)), 30 + jnp.arange(T)
    options = dict(selected=selected, t=t, block=block, mask=masks.Causal() & valid)
    simulated = plgpu.InterpretGPUParams()
    kernel = functools.partial(ops._by_gpu, query_block=1, interpret=simulated, **options)
    naive = functools.partial(dense, **options)
    found = gpu_forms.assert_no_worse_than_naive(kernel, naive, arrays, gradients="qkv")
    assert (found["o"][0, 0] == 0).all() and (found["q"][0, 0] == 0).all()


def test_a_list_names_what_there_is_a_pair_for_and_nothing_else():
    R, S, block, L, tile, step = 700, 300, 48, 7, 128, 64
    selected = select(2, R, 1, 2, L)[:, :, 0]
    lay = jax.jit(jax.vmap(functools.partial(rows.lay, L=L, X=tile)))
    pairs = rows.Gathered(lay(selected)).pairs
    options = Options(1.0, None, S, block, 1)
    runs = functools.partial(walk.runs, options, masked=False, tile=tile, step=step)
    tables = jax.jit(lambda pairs: [runs(pairs, over=x).tables for x in ("row", "column")])(pairs)
    blocks, count = np.asarray(pairs.blocks)[..., 0], np.asarray(pairs.count)
    meets = lambda m, begin, size: np.any(np.arange(begin, min(begin + size, S)) // block == m)
    for unit in range(2):
        by_row, by_column = ([np.asarray(x)[unit, 0] for x in ends] for ends in tables)
        for m, (first, length) in enumerate(zip(*by_row, strict=True)):
            steps = [i for i in range(-(-S // step)) if meets(blocks[unit, m], i * step, step)]
            assert list(range(first, first + length)) == (steps if m < count[unit] else [])
        for j, (first, length) in enumerate(zip(*by_column, strict=True)):
            found = [m for m in range(count[unit]) if meets(blocks[unit, m], j * tile, tile)]
            assert list(range(first, first + length)) == [
                2 * m + i for m in found for i in range(2)
            ]


def test_more_pairs_than_one_number_tells_apart_are_sorted_alike(monkeypatch):
    selected = select(1, 300, 1, 2, 4)[0, :, 0]
    lay = lambda: jax.jit(functools.partial(rows.lay, L=4, X=16))(selected)
    alone = lay()
    monkeypatch.setattr(rows, "MOST_KEYS", 0)
    chex.assert_trees_all_equal(lay(), alone)


def test_runs_that_are_whole_tiles_are_states_of_softmax_attention(monkeypatch):
    """From an offset, with a last tile of each side that is not full, and a query of no block."""
    T, S, N, A, sizes = 500, 700, 2, 2, dict(block=128, query_block=256)
    arrays = normal(2, T, N, 8), normal(2, S, 1, 8), normal(2, S, 1, 8)
    options = dict(mask=masks.Causal(), **sizes)
    monkeypatch.setattr(ops.mosaic_gpu, "flash_attention", gpu_forms.by_states)
    t, forms = 100 + jnp.arange(T), (ops._by_gpu, dense)
    both = jax.jit(lambda *args: [attend(*args, t, **options) for attend in forms])
    found, expected = both(*arrays, select(2, 2, N, A, 6))
    assert (expected == 0).all(-1).any()
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-5)


def test_what_it_refuses():
    def attend(q):
        selected, t = jnp.zeros((*q.shape[:3], 1), int), jnp.arange(q.shape[1])
        return mosaic_gpu.block_sparse_attention(q, q, q, selected, t, kernels.Mask(), block=2)

    shape = lambda B=1, H=8, dtype="bfloat16": jax.ShapeDtypeStruct((B, 4, 1, H), dtype)
    for wrong, named in (
        (shape(B=2**16), "takes 65535 examples times key heads, not 65536"),
        (shape(H=264), "heads of 256 in bfloat16, not 264"),
        (shape(dtype="float32"), "float32 as TF32, not with precision='highest'"),
    ):
        with pytest.raises(NotImplementedError, match=named):
            jax.eval_shape(attend, wrong)


def test_a_gpu_has_xla_unless_the_kernel_is_asked_for():
    def fn(q, selected, implementation=None):
        options = dict(block=2, implementation=implementation)
        return ops.selected_block_attention(q, q, q, selected, **options)

    args = normal(1, 8, 1, 8), select(1, 8, 1, 2, 4)  # float32, which tests multiply as it is
    lower = lambda fn: jax.jit(fn).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" not in lower(fn)
    with pytest.raises(NotImplementedError, match="as TF32.*; implementation='xla' needs none"):
        lower(functools.partial(fn, implementation="pallas"))
