"""Gradients by parts of the keys add up to those by all of them."""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import masks
from attnjax.ops import dot_product_attention as ops
from attnjax.ops import dropout

T, S, CUT = 40, 70, 37


def normal(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


LEARNED = dict(
    q=normal(2, T, 4, 8),
    k=normal(2, S, 2, 8),
    v=normal(2, S, 2, 6),
    bias=normal(1, 4, T, S),
    slope=normal(4),
)
COTANGENTS = normal(2, T, 4, 6), normal(2, T, 4)
MASK = masks.Window(left=15) & masks.Prefix(60)  # the last queries see nothing at all


def call(attend, learned, keys, **options):
    """`attend` to some of the keys, with every option that a part has."""
    learned = dict(learned)
    slope = learned.pop("slope")
    return attend(
        **learned,
        mask=MASK,
        softcap=5.0,
        scale=0.5,
        dropout=dropout.Dropout(0.3, jax.random.key(1)),
        score_mod=lambda x, b, n, t, s: x - slope[n] * (t - s) / 50,
        positions=(2 * np.arange(T), keys),
        **options,
    )


def cut(tree, keys):
    axes = dict(k=1, v=1, bias=3)
    return {n: x.take(keys, axes[n]) if n in axes else x for n, x in tree.items()}


@pytest.mark.parametrize("implementation", ["dense", "blocked", "interpret"])
def test_gradients_of_parts_add_up(implementation):
    every = np.arange(S)
    attend = functools.partial(ops.dot_product_attention, return_lse=True, implementation="dense")
    whole, pull = jax.vjp(lambda x: call(attend, x, every), LEARNED)
    [expected] = pull(COTANGENTS)
    assert (whole[1] == -jnp.inf).any()
    attend = functools.partial(ops.part_of_attention, whole=whole, implementation=implementation)

    @functools.partial(jax.jit, static_argnums=1)
    def gradients(learned, keys):
        out, pull = jax.vjp(lambda x: call(attend, x, np.array(keys)), learned)
        return out, pull(COTANGENTS)[0]

    first, second = (gradients(cut(LEARNED, x), tuple(x)) for x in np.split(every, [CUT]))
    for out, _ in (first, second):
        chex.assert_trees_all_equal(out, whole)
    join = dict(k=1, v=1, bias=3)
    actual = {
        name: np.concatenate([x, y], join[name]) if name in join else x + y
        for (name, x), y in zip(first[1].items(), second[1].values(), strict=True)
    }
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_a_whole_of_another_shape_is_refused():
    whole = jnp.zeros((2, T, 4, 6)), jnp.zeros((2, 4, T))
    attend = inspect.unwrap(ops.part_of_attention)  # as users run it
    with pytest.raises(ValueError, match=r"whole of shapes .* must have shapes"):
        call(functools.partial(attend, whole=whole), LEARNED, np.arange(S))
