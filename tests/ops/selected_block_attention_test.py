import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import masks, sharding
from attnjax.ops import dot_product_attention as ops
from attnjax.ops.selected_block_attention import selected_block_attention
from pallas_kernels import placing
from pallas_kernels.block_sparse import plan, walk
from tests import cost

B, N, K, H, V = 2, 4, 2, 8, 6


def example(T, S, A, block, *, same=False, query_block=1):
    """Arguments with random blocks for each run of queries, or the same block for all."""
    draw, I = np.random.default_rng(0), -(-T // query_block)
    score = draw.random((B, 1 if same else I, 1 if same else N, -(-S // block)))
    selected = np.broadcast_to(np.argsort(-score)[..., :A], (B, I, N, A))
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, V)
    q, k, v = (jnp.asarray(draw.standard_normal(shape, np.float32)) for shape in shapes)
    return q, k, v, jnp.asarray(selected)


def dense(q, k, v, selected, *, block, query_block=1, mask=None, q_offset=0):
    """Full attention under the selection written out as a mask."""
    T, S = q.shape[1], k.shape[1]
    selected = selected[:, jnp.arange(T) // query_block]
    of_key = jnp.arange(S)[None, None, None, :, None] // block
    seen = (selected[:, :, :, None, :] == of_key).any(-1).swapaxes(1, 2)
    seen = seen & masks.dense(mask, T, S, q_offset=q_offset)
    return ops.dot_product_attention(q, k, v, mask=masks.Dense(seen), implementation="dense")


def with_gradients(fn, args, **options):
    out, pull = jax.vjp(lambda *x: fn(*x, args[3], **options), *args[:3])
    return out, pull(jnp.cos(out))


def program(*fns, **options):
    """[(output, gradients) of each function], compiled."""
    run = functools.partial(with_gradients, **options)
    return jax.jit(lambda *args: [run(fn, args) for fn in fns])


def by(implementation):
    return functools.partial(selected_block_attention, implementation=implementation)


def assert_same(args, run=None, **options):
    """By each implementation as by the dense form; returns (output, gradients)."""
    run = run or program(by("xla"), by("interpret"), dense, **options)
    *actual, expected = run(*args)
    for each in actual:
        chex.assert_trees_all_close(each, expected, rtol=1e-5, atol=1e-5)
    return jax.device_get(expected)


@functools.cache
def plain():
    """Of blocks of 4, no mask; each of its tests takes arguments of one of two sizes."""
    return program(by("xla"), by("interpret"), dense, block=4)


@pytest.fixture
def small_tiles(monkeypatch):
    """Of the kernel: several tiles at tiny lengths, and a call for each example and key head."""
    monkeypatch.setattr(plan, "_LEAST", 2)
    monkeypatch.setattr(plan, "_most", lambda q, v: 4)
    monkeypatch.setattr(walk, "MOST_PAIRS", 64)


@pytest.mark.parametrize("same", [False, True], ids=["own blocks", "one selection for all"])
def test_equals_dense_attention_under_the_selection(same):
    assert_same(example(13, 23, 3, 4, same=same), plain())


def test_one_query():
    assert_same(example(1, 40, 3, 4), plain())


def packed(T, S):
    """What hides keys by position, by key and by document, and from a query all of them."""
    s = np.arange(S)[None]
    valid, ids = s % 5 != np.array([[2], [3]]), s // np.array([[6], [20]])
    segments = masks.Segments(*map(jnp.asarray, (np.where(s == S - 2, 99, ids), ids)))
    return masks.Causal() & masks.Valid(jnp.asarray(valid)) & segments


def test_honours_masks_from_an_offset(small_tiles):
    """With blocks of two tiles of keys, and a query that sees nothing."""
    T, S = 7, 17
    o, (dq, _, _) = assert_same(example(T, S, 3, 6), block=6, mask=packed(T, S), q_offset=S - T)
    assert not o[:, T - 2].any() and not dq[:, T - 2].any() and o[:, T - 1].any()


def test_runs_of_queries_share_a_selection(small_tiles):
    """Each of two tiles of queries, the last one of a part of one."""
    args = example(20, 20, 2, 5, query_block=6)
    assert_same(args, block=5, query_block=6, mask=packed(20, 20))


def test_large_logits_do_not_overflow():
    """They are about 1000, which float32 rounds by as much as 6e-5."""
    q, *rest = example(13, 23, 3, 4)
    *both, (expected, _) = plain()(300 * q, *rest)
    for actual, grads in both:
        chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-4)
        assert all(np.isfinite(x).all() for x in grads)


def test_bfloat16_errs_as_dense_attention_does():
    args = example(33, 33, 2, 8)
    rounded = [x.astype(jnp.bfloat16) for x in args[:3]] + [args[3]]
    raised = [x.astype(jnp.float32) for x in rounded[:3]] + [args[3]]

    @jax.jit
    def every(rounded, raised):
        pairs = (dense, raised), (dense, rounded), (by("interpret"), rounded)
        return [jax.tree.leaves(with_gradients(fn, args, block=8)) for fn, args in pairs]

    rms = lambda x: np.sqrt(np.mean(np.float32(x) ** 2))
    for exact, naive, fast in zip(*jax.device_get(every(rounded, raised)), strict=True):
        assert fast.dtype == jnp.bfloat16
        error = lambda x, exact=exact: rms(np.float32(x) - np.float32(exact))
        assert error(fast) <= 2 * error(naive) + 2**-9 * rms(exact)


@pytest.mark.parametrize(("T", "query_block"), [(256, 1), (256, 128)])
def test_default_is_the_kernel_on_tpu(monkeypatch, T, query_block):
    monkeypatch.setattr(placing, "whole", lambda: True)
    args = jax.eval_shape(lambda: example(T, T, 2, 64, query_block=query_block))
    options = dict(block=64, query_block=query_block, mask=masks.Causal())
    run = jax.jit(lambda *x: with_gradients(selected_block_attention, x, **options))
    export = lambda platform: jax.export.export(run, platforms=[platform])(*args).mlir_module()
    assert export("tpu").count("tpu_custom_call") == 3
    if query_block == 1:
        assert "custom_call" not in export("cpu")


def test_heads_over_devices_lower_for_tpu():
    """They can't be run here: the interpreter mixes arrays that vary over a mesh with others."""
    mesh, P = sharding.make_mesh(fsdp=2, tensor=2), jax.P
    args, heads = example(16, 16, 2, 4), P("fsdp", None, "tensor")
    mask = masks.Causal() & masks.Segments(jnp.arange(16)[None] // 6)
    options = dict(block=4, mask=mask, implementation="pallas")
    fn = lambda *x: selected_block_attention(*x, **options)
    split = jax.shard_map(fn, mesh=mesh, in_specs=(heads,) * 4, out_specs=heads)
    run = jax.jit(lambda *x: with_gradients(split, x))
    lowered = run.trace(*args).lower(lowering_platforms=("tpu",)).as_text()
    for kernel in ("block_sparse", "block_sparse_dq", "block_sparse_dkv"):
        assert f'kernel_name = "{kernel}"' in lowered


def test_refuses_masks_by_head():
    with pytest.raises(NotImplementedError, match="can't honour Dense"):
        selected_block_attention(
            *example(4, 4, 1, 2), block=2, mask=masks.Dense(jnp.ones((1, N, 4, 4), bool))
        )


def test_a_block_that_nobody_selects_is_not_read():
    q, k, v, _ = example(1, 40, 3, 4)  # with which `plain` is compiled already
    selected = jnp.asarray(np.broadcast_to(np.array([7, 2, 4]), (B, 1, N, 3)))
    others = ~np.isin(np.arange(40) // 4, [7, 2, 4])[None, :, None, None]
    k, v = (np.where(others, np.nan, x) for x in (k, v))
    *both, _ = plain()(q, k, v, selected)
    for leaf in jax.tree.leaves(both):
        assert np.isfinite(leaf).all()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(implementation="triton"), "implementation='triton' must be one of"),
        (dict(query_block=0), "query_block=0 must be at least 1"),
        (dict(query_block=2), r"selected \(2, 4, 4, 1\) must be of 2 runs of query_block=2"),
    ],
)
def test_wrong_arguments_raise(wrong, message):
    unchecked = inspect.unwrap(selected_block_attention)  # by the annotations, as outside of tests
    with pytest.raises(ValueError, match=message):
        unchecked(*example(4, 4, 1, 2), block=2, **wrong)


def test_work_is_that_of_one_block_more_than_selected():
    def count(T, A, block, gradient):
        args = jax.eval_shape(lambda: example(T, T, A, block))
        fn = functools.partial(selected_block_attention, block=block)
        loss = jax.grad(lambda *x: fn(*x).sum(), (0, 1, 2))
        return cost.operations(loss if gradient else fn, *args)

    pairs = 4096 * 3 * 64  # of queries and keys, were A + 1 blocks seen by every query
    assert count(4096, 2, 64, False) < 1.6 * B * N * pairs * 2 * (H + V)
    for gradient in (False, True):
        assert count(4096, 2, 64, gradient) < 2.1 * count(2048, 2, 64, gradient)
