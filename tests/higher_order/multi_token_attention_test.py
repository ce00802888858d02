"""Multi-token attention: what it becomes, what may not leak, and places that two letters name."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import masks
from attnjax.higher_order import multi_token_attention as lib
from attnjax.ops import dot_product_attention as ops
from tests import training
from tests.cotangents import like
from tests.initial import initial

KEY = jax.random.key(0)
EXAMPLE = jax.device_get(initial(lambda key: lib.SPEC.example(key, 9), KEY))


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


CAUSAL = functools.partial(lib.multi_token_attention, mask=masks.Causal())
IDENTITY = jax.device_get(
    jax.jit(
        lambda: dict(kernel=lib._only_itself(KEY, (4, 3, 5)), mix=lib._identity(KEY, (2, 2, 2)))
    )()
)


def test_kernels_that_change_nothing_give_multi_head_attention():
    """Without a mask, and with those that tile keys, by one program."""

    @jax.jit
    def both(qkv, kernels):
        each = [None, masks.Causal(), masks.Window(2, 1)]
        actual = [lib.multi_token_attention(**qkv, **kernels, mask=mask) for mask in each]
        return actual, [ops.dot_product_attention(**qkv, mask=mask) for mask in each]

    qkv = {name: EXAMPLE[name] for name in "qkv"}
    chex.assert_trees_all_close(*both(qkv, IDENTITY), rtol=1e-5, atol=1e-5)


def test_module_begins_with_kernels_that_change_nothing():
    module = lib.MultiTokenAttention(num_heads=4, head_dim=6, queries=3, keys=5)
    init = lambda: module.init(KEY, jnp.ones((1, 4, 8)))["params"]
    tables = jax.jit(lambda: {name: init()[name]["table"] for name in IDENTITY})()
    chex.assert_trees_all_equal(tables, IDENTITY)


def influence(mask, *queries):
    """Which positions of each of q, k and v some outputs depend on, by any kernel.

    The conformance tests see the kernel that a module begins with.
    """
    run = functools.partial(lib.multi_token_attention, mask=mask)
    seen = lambda args: (run(**args)[:, np.array(queries)] ** 2).sum()
    grads = jax.device_get(jax.jit(jax.grad(seen))(EXAMPLE))
    return [grads[name].any((0, 2, 3)) for name in "qkv"]


def test_nothing_comes_from_the_future():
    for reached in influence(masks.Causal(), 4):
        assert reached[2:5].any() and not reached[5:].any()


def test_hidden_token_is_neither_key_nor_neighbour_of_a_query():
    valid = masks.Valid(jnp.asarray((np.arange(9) != 3)[None].repeat(2, 0)))
    for reached in influence(masks.Causal() & valid, 0, 1, 2, 4, 5, 6, 7, 8):
        assert reached[2] and not reached[3]


def test_what_a_query_may_not_see_does_not_reach_it_through_those_before_it():
    for reached in influence(masks.Window(2), 6):
        assert reached[4:7].any() and not reached[np.r_[:4, 7:9]].any()


def test_documents_packed_into_one_sequence_are_as_if_alone():
    ids = (np.arange(9) >= 4).astype(np.int32)[None].repeat(2, 0)

    @jax.jit
    def run(args, ids):
        cut = lambda part: args | {name: args[name][:, part] for name in "qkv"}
        packed = masks.Causal() & masks.Segments(ids)
        together = lib.multi_token_attention(**args, mask=packed)
        parts = [CAUSAL(**cut(part)) for part in (slice(4), slice(4, 9))]
        return together, jnp.concatenate(parts, 1)

    chex.assert_trees_all_close(*run(EXAMPLE, ids), rtol=1e-5, atol=1e-5)


def test_streams_with_any_kernel():
    module = lib.MultiTokenAttention(4, 6, queries=4, keys=3, rotary_base=100.0)
    x = normal(2, 8, 16)
    params = like(jax.eval_shape(module.init, KEY, x))["params"]
    small = {name: p if name in IDENTITY else jax.tree.map(lambda p: np.asarray(p) / 4, p)
             for name, p in params.items()}  # fmt: skip

    @jax.jit
    def both(params, x):
        state, ys = module.apply(params, 2, 11, method="init_state"), []
        for piece in jnp.split(x, (1, 3), 1):
            state, part = module.apply(params, state, piece, method="extend")
            ys.append(part)
        return module.apply(params, x, mask=masks.Causal()), jnp.concatenate(ys, 1)

    chex.assert_trees_all_close(*both({"params": small}, x), rtol=1e-4, atol=1e-5)


def test_heads_of_a_group_lend_each_other_their_weights():
    """mix[f, g] is what head g takes of head f, and never of another group."""
    args = EXAMPLE | IDENTITY | dict(mix=np.float32([[[0, 1], [0, 0]], [[1, 0], [0, 1]]]))

    @jax.jit
    def run(args):
        q, k, v = (args[name] for name in "qkv")
        of = functools.partial(ops.dot_product_attention, mask=masks.Causal())
        lent = of(q[:, :, :1], k[:, :, :1], v[:, :, 1:2])
        return CAUSAL(**args), jnp.concatenate([lent, of(q, k, v)[:, :, 2:]], 2)

    o, expected = jax.device_get(run(args))
    chex.assert_trees_all_close(o[:, :, 1:], expected, rtol=1e-5, atol=1e-5)
    assert not o[:, :, 0].any()


BLOCKS, LETTERS = 5, 9


def find_the_block(key):
    """One-hot letters (batch 3 BLOCKS + 2, LETTERS) and the number of the block in question.

    A block is two letters and a blank. The last two letters are both in one block. Each other block
    has one of them, once or twice, so that neither letter tells by itself.
    """
    where, which, twice, rest, turn, rename = jax.random.split(key, 6)
    target = jax.random.randint(where, (64,), 0, BLOCKS)
    own = jnp.arange(BLOCKS)[None] == target[:, None]
    one = jax.random.randint(which, own.shape, 0, 2)
    other = jax.random.randint(rest, own.shape, 2, LETTERS)
    other = jnp.where(jax.random.bernoulli(twice, shape=own.shape), one, other)
    other = jnp.where(own, 1 - one, other)
    swap = jax.random.bernoulli(turn, shape=own.shape)
    block = [jnp.where(swap, one, other), jnp.where(swap, other, one), jnp.full_like(one, LETTERS)]
    pair = jnp.tile(jnp.arange(2), (64, 1))
    letters = jnp.concatenate([jnp.stack(block, -1).reshape(64, -1), pair], 1)
    return jax.nn.one_hot(letters, LETTERS)[..., jax.random.permutation(rename, LETTERS)], target


def blocks_seen(kernel, letters):
    """Weight of each block (batch BLOCKS) for the last letter, by the kernel of one head."""
    P, x = kernel.shape[1], letters[:, :, None]
    number = jax.nn.one_hot(jnp.arange(x.shape[1]) // 3, BLOCKS)  # none for the last two letters
    v = number.at[2::3].set(0)[None, :, None].repeat(64, 0)
    end = dict(past=x[:, -P:-1], q_offset=x.shape[1] - 1)
    return lib.multi_token_attention(x[:, -1:], x, v, kernel, jnp.ones((1, 1, 1)), **end)[:, 0, 0]


def losses(kernels, key):
    """Of each kernel; kernels learn side by side, independently of each other."""
    letters, target = find_the_block(key)
    seen = [blocks_seen(kernel, letters) for kernel in kernels]
    right = [(weight.argmax(-1) == target).mean() for weight in seen]
    share = lambda weight: jnp.take_along_axis(
        weight / weight.sum(-1, keepdims=True), target[:, None], 1
    )
    return sum(-jnp.log(share(weight) + 1e-9).mean() for weight in seen), right


def test_learns_to_find_the_block_that_has_both_letters():
    """The headline, in small: what a single query and a single key can't tell."""
    kernels = [np.ones((1, *size), np.float32) for size in ((2, 3), (1, 3), (2, 1))]
    loss = lambda kernels, key: losses(kernels, key)[0]
    kernels = training.fit(loss, kernels, steps=150, learning_rate=0.2)
    both, keys, queries = jax.device_get(jax.jit(losses)(kernels, jax.random.key(1))[1])
    assert both > 0.95
    assert keys < 0.8 and queries < 0.8  # several keys, or several queries, but not both


def test_arguments_that_do_not_fit():
    def run(**changes):
        sizes = {name: jax.ShapeDtypeStruct(size, "float32") for name, size in changes.items()}
        jax.eval_shape(lambda args: CAUSAL(**args), EXAMPLE | sizes)

    with pytest.raises(ValueError, match="W=4 must be odd"):
        run(kernel=(4, 3, 4))
    with pytest.raises(ValueError, match="must be for N=4 heads"):
        run(mix=(1, 2, 2))
    with pytest.raises(ValueError, match="must hold 2 queries"):
        run(past=(2, 3, 4, 6))
    with pytest.raises(ValueError, match="num_heads=4 must be a multiple of group=3"):
        jax.eval_shape(lib.MultiTokenAttention(4, 8, group=3).init, KEY, normal(1, 2, 8))
