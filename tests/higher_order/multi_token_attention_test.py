"""Multi-token attention: what it becomes, what may not leak, and places that two letters name."""

import functools

import chex
import jax
import jax.numpy as jnp
import pytest

from attnjax.core import masks
from attnjax.higher_order import multi_token_attention as lib
from attnjax.ops import dot_product_attention as ops
from tests import training

KEY = jax.random.key(0)
EXAMPLE = lib.SPEC.example(KEY, 9)
CAUSAL = functools.partial(lib.multi_token_attention, mask=masks.Causal())
IDENTITY = dict(kernel=lib._only_itself(KEY, (4, 3, 5)), mix=lib._identity(KEY, (2, 2, 2)))


@pytest.mark.parametrize("mask", [None, masks.Causal(), masks.Window(2, 1)])
def test_kernels_that_change_nothing_give_multi_head_attention(mask):
    args = {name: EXAMPLE[name] for name in "qkv"}
    actual = jax.jit(functools.partial(lib.multi_token_attention, mask=mask))(**args, **IDENTITY)
    expected = ops.dot_product_attention(**args, mask=mask)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_module_begins_with_kernels_that_change_nothing():
    module = lib.MultiTokenAttention(num_heads=4, head_dim=6, queries=3, keys=5)
    params = jax.jit(module.init)(KEY, jnp.ones((1, 4, 8)))["params"]
    for name, expected in IDENTITY.items():
        chex.assert_trees_all_equal(params[name]["table"], expected)


def test_nothing_comes_from_the_future():
    """By any kernel; the conformance tests see the one that a module begins with."""
    seen = lambda args: (CAUSAL(**args)[:, 4] ** 2).sum()
    grads = jax.jit(jax.grad(seen))(EXAMPLE)
    for name in "qkv":
        assert grads[name][:, 2:5].any() and not grads[name][:, 5:].any()


def test_hidden_token_is_neither_key_nor_neighbour_of_a_query():
    valid = masks.Valid(jnp.ones((2, 9), bool).at[:, 3].set(False))
    run = functools.partial(lib.multi_token_attention, mask=masks.Causal() & valid)
    kept = lambda args: (run(**args)[:, jnp.array([0, 1, 2, 4, 5, 6, 7, 8])] ** 2).sum()
    grads = jax.jit(jax.grad(kept))(EXAMPLE)
    for name in "qkv":
        assert grads[name][:, 2].any() and not grads[name][:, 3].any()


def test_what_a_query_may_not_see_does_not_reach_it_through_those_before_it():
    run = functools.partial(lib.multi_token_attention, mask=masks.Window(2))
    grads = jax.jit(jax.grad(lambda args: (run(**args)[:, 6] ** 2).sum()))(EXAMPLE)
    for name in "qkv":
        assert grads[name][:, 4:7].any() and not grads[name][:, jnp.r_[:4, 7:9]].any()


def test_documents_packed_into_one_sequence_are_as_if_alone():
    packed = masks.Segments((jnp.arange(9) >= 4).astype(int)[None].repeat(2, 0))
    cut = lambda part: EXAMPLE | {name: EXAMPLE[name][:, part] for name in "qkv"}

    @jax.jit
    def run():
        together = lib.multi_token_attention(**EXAMPLE, mask=masks.Causal() & packed)
        parts = [CAUSAL(**cut(part)) for part in (slice(4), slice(4, 9))]
        return together, jnp.concatenate(parts, 1)

    chex.assert_trees_all_close(*run(), rtol=1e-5, atol=1e-5)


def test_streams_with_any_kernel():
    module = lib.MultiTokenAttention(4, 6, queries=4, keys=3, rotary_base=100.0)
    x = jax.random.normal(KEY, (2, 8, 16))

    @jax.jit
    def both(x):
        params = module.init(KEY, x)
        noise = jax.random.normal(KEY, (4, 4, 3)), jax.random.normal(KEY, (2, 2, 2))
        for name, table in zip(("kernel", "mix"), noise, strict=True):
            params["params"][name]["table"] = table
        state, ys = module.apply(params, 2, 11, method="init_state"), []
        for piece in jnp.split(x, (1, 3, 7), 1):
            state, part = module.apply(params, state, piece, method="extend")
            ys.append(part)
        return module.apply(params, x, mask=masks.Causal()), jnp.concatenate(ys, 1)

    chex.assert_trees_all_close(*both(x), rtol=1e-4, atol=1e-5)


def test_heads_of_a_group_lend_each_other_their_weights():
    """mix[f, g] is what head g takes of head f, and never of another group."""
    args = EXAMPLE | IDENTITY | dict(mix=jnp.array([[[0.0, 1], [0, 0]], [[1, 0], [0, 1]]]))
    q, k, v = (args[name] for name in "qkv")
    o = jax.jit(CAUSAL)(**args)
    lent = ops.dot_product_attention(q[:, :, :1], k[:, :, :1], v[:, :, 1:2], mask=masks.Causal())
    own = ops.dot_product_attention(q, k, v, mask=masks.Causal())
    chex.assert_trees_all_close(o[:, :, 1:2], lent, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(o[:, :, 2:], own[:, :, 2:], rtol=1e-5, atol=1e-5)
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


def accuracy_after_training(P, W):
    def loss(kernel, key):
        letters, target = find_the_block(key)
        weight = blocks_seen(kernel, letters)
        weight = jnp.take_along_axis(weight / weight.sum(-1, keepdims=True), target[:, None], 1)
        return -jnp.log(weight + 1e-9).mean()

    kernel = training.fit(loss, jnp.ones((1, P, W)), steps=150, learning_rate=0.2)
    letters, target = find_the_block(jax.random.key(1))
    return (jax.jit(blocks_seen)(kernel, letters).argmax(-1) == target).mean()


def test_learns_to_find_the_block_that_has_both_letters():
    """The headline, in small: what a single query and a single key can't tell."""
    assert accuracy_after_training(2, 3) > 0.95
    for P, W in ((1, 3), (2, 1)):  # several keys, or several queries, but not both
        assert accuracy_after_training(P, W) < 0.8


def test_arguments_that_do_not_fit():
    with pytest.raises(ValueError, match="W=4 must be odd"):
        CAUSAL(**(EXAMPLE | dict(kernel=jnp.ones((4, 3, 4)))))
    with pytest.raises(ValueError, match="must be for N=4 heads"):
        CAUSAL(**(EXAMPLE | dict(mix=jnp.ones((1, 2, 2)))))
    with pytest.raises(ValueError, match="must hold 2 queries"):
        CAUSAL(**EXAMPLE, past=jnp.ones((2, 3, 4, 6)))
    with pytest.raises(ValueError, match="num_heads=4 must be a multiple of group=3"):
        lib.MultiTokenAttention(4, 8, group=3).init(KEY, jnp.ones((1, 2, 8)))
