import dataclasses

import chex
import jax
import jax.numpy as jnp
import pytest

from attnjax import parallel
from attnjax.core import masks, registry
from attnjax.ops import blocked_schedule, dropout
from attnjax.ops import dot_product_attention as ops
from attnjax.parallel import travel
from tests.parallel import helpers, traffic

# every option of the operation, as a mechanism would have them
ANY = dataclasses.replace(registry.get("multi_head_attention"), fn=ops.dot_product_attention)
CAUSAL = masks.Causal()
SEGMENTS = masks.Segments(jnp.array([[0] * 6 + [1] * 2 + [2] * 8, [0] * 12 + [4] * 4]))
VALID = masks.Valid(jnp.arange(16)[None] < jnp.array([[16], [9]]))


def qkv(T=16, S=16, N=4, K=2, H=8, V=6, dtype="float32"):
    return helpers.normal((2, T, N, H), (2, S, K, H), (2, S, K, V), dtype=dtype)


def test_equals_one_device_on_any_mesh():
    mask = SEGMENTS & (masks.Window(5) | masks.Prefix(3)) & CAUSAL
    helpers.assert_same("ring", ANY, qkv(), *helpers.MESHES, mask=mask)


@pytest.mark.parametrize(("N", "K"), [(4, 1), (3, 3)], ids=["one key head", "odd heads"])
def test_heads_that_do_not_divide(N, K):
    axes = dict(context=2, tensor=2)
    helpers.assert_same("ring", ANY, qkv(N=N, K=K), axes, mask=CAUSAL)


def test_fewer_key_heads_than_devices():
    axes = dict(context=1, tensor=4)
    helpers.assert_same("ring", ANY, qkv(N=8, K=2), axes, mask=CAUSAL)


def test_every_option_at_once():
    """On two axes, in a length that doesn't divide: the same dropout and bias as on one device."""
    shapes = (2, 13, 4, 8), (2, 13, 2, 8), (2, 13, 2, 6), (2, 4, 13, 13), (4,)
    drop = dropout.Dropout(0.3, helpers.KEY)
    options = dict(mask=CAUSAL & VALID & SEGMENTS, scale=0.7, softcap=2.0, dropout=drop)
    named = lambda fn: lambda q, k, v, bias, sinks: fn(q, k, v, bias=bias, sinks=sinks, **options)
    arrays = helpers.normal(*shapes)
    sharded = parallel.shard("ring(order='zigzag')", ANY, helpers.mesh(data=2, context=2))
    actual, expected = (helpers.with_gradients(named(f))(*arrays) for f in (sharded, ANY.fn))
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_a_score_mod_is_told_of_no_token_that_only_fills_up():
    """Beyond the last key its logarithm is not a number."""
    q, k, v = qkv(T=13, S=11)
    ring = parallel.shard("ring(order='zigzag')", ANY, helpers.mesh(context=4))

    def run(fn):
        mod = lambda w: lambda x, b, n, t, s: x - w * jnp.log(11.0 - s) * jnp.sqrt(12.0 - t)
        of = lambda q, k, v, w: fn(q, k, v, score_mod=mod(w))
        return helpers.with_gradients(of)(q, k, v, jnp.float32(0.5))

    chex.assert_trees_all_close(run(ring), run(ANY.fn), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("order", "spread"), [("contiguous", 1.5), ("zigzag", 0.05), ("striped", 0.05)]
)
def test_causal_work_of_each_device(order, spread):
    """In tiles that the blocked implementation computes; contiguous pieces are uneven."""
    size, length = 4, 4096

    def tiles(device, source):
        t, s = (jnp.asarray(travel.positions(order, i, size, length)) for i in (device, source))
        return int(blocked_schedule.schedule(CAUSAL, t, s, K=1, G=1).some.sum())

    work = [sum(tiles(device, source) for source in range(size)) for device in range(size)]
    mean = sum(work) / size
    most = max(abs(each - mean) for each in work) / mean
    assert most <= spread and (order != "contiguous" or most > 0.5)


@pytest.mark.parametrize(
    ("mask", "messages"),
    [
        (CAUSAL, 3),
        (masks.Window(3), 1),
        (masks.Window(3, 2), 2),  # from the device before, and then from the one after
        (masks.Window(5) & SEGMENTS, 2),
        (masks.Prefix(4), 3),
        (masks.Window(0), 0),
    ],
    ids=str,
)
def test_keys_travel_no_further_than_they_are_seen(mask, messages):
    q, k, v = qkv(K=2)
    ring = parallel.shard("ring", ANY, helpers.mesh(context=4))
    run = lambda q, k, v: ring(q, k, v, mask=mask)
    assert traffic.sent(run, dict(q=q, k=k, v=v)) == messages * (k.size + v.size)


def test_gradients_travel_behind_their_keys():
    """In the backward pass keys make one rotation less than a round, gradients a round."""
    q, k, v = qkv(K=2)
    ring = parallel.shard("ring", ANY, helpers.mesh(context=4))
    run = lambda q, k, v: jax.vjp(ring, q, k, v)[1](q[..., :6])
    assert traffic.sent(run, dict(q=q, k=k, v=v)) == (3 + 3 + 4) * (k.size + v.size)


def test_query_that_sees_nothing_is_zero():
    valid = jnp.ones((2, 16), bool).at[1].set(False)
    ring = parallel.shard("ring", ANY, helpers.mesh(context=4))
    out, grads = helpers.with_gradients(ring, mask=masks.Valid(valid))(*qkv())
    chex.assert_tree_all_finite((out, grads))
    assert not any(x[1].any() for x in (out, *grads)) and out[0].any()


def test_bfloat16():
    rounded = qkv(dtype="bfloat16")
    one = helpers.with_gradients(ANY.fn, mask=CAUSAL)
    run = lambda f, *arrays: jax.device_get(jax.tree.leaves(f(*arrays)))
    naive, truth = run(one, *rounded), run(one, *(x.astype(jnp.float32) for x in rounded))
    for strategy in ("ring", "ring(gradients='bfloat16')"):
        ring = parallel.shard(strategy, ANY, helpers.mesh(context=4))
        outputs = run(helpers.with_gradients(ring, mask=CAUSAL), *rounded)
        for actual, known, x in zip(outputs, naive, truth, strict=True):
            assert actual.dtype == jnp.bfloat16
            assert helpers.rms(actual - x) <= 2 * helpers.rms(known - x) + 2**-9 * helpers.rms(x)


def compiled(size, T=2**17):
    """A gradient over `size` devices, of so many tokens that a tile of scores is small beside.

    Without a mask, with which there would be a second loop over the tiles that need it.
    """
    mesh = helpers.mesh(context=size)
    ring = parallel.shard("ring", registry.get("gqa"), mesh)
    loss = lambda q, k, v: (ring(q, k, v).astype(jnp.float32) ** 2).sum()
    split = jax.NamedSharding(mesh, jax.P(None, "context"))
    array = lambda heads: jax.ShapeDtypeStruct((1, T, heads, 16), jnp.bfloat16, sharding=split)
    run = jax.jit(jax.grad(loss, (0, 1, 2)), out_shardings=split)
    return run.lower(array(4), array(2), array(2)).compile()


def test_keys_are_never_gathered():
    """How memory falls with devices: eight_devices.py."""
    text = compiled(4).as_text()
    assert "collective-permute" in text and "all-gather" not in text


@pytest.mark.parametrize(("name", "value"), [("q_offset", 3), ("return_lse", True)])
def test_refuses(name, value):
    ring = parallel.shard("ring", ANY, helpers.mesh(context=4))
    with pytest.raises(NotImplementedError, match=f"ring can't honour {name}, no strategy can"):
        ring(*qkv(), **{name: value})
