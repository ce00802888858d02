"""Only what is particular to AKI; the rest is tests/conformance_test.py."""

import chex
import jax
import jax.numpy as jnp
import numpy as np

from attnjax.core import edit, masks
from attnjax.ops import dot_product_attention as ops
from attnjax.softmax import aki as lib
from tests.initial import initial

KEY = jax.random.key(0)
T = 9
#                   text, image,   question, answer
KINDS = jnp.array([[0, 1, 1, 1, 2, 2, 0, 0, 0], [1, 1, 2, 2, 2, 2, 0, 0, 0]])
ARGS = lib.SPEC.example(KEY, T) | dict(kinds=KINDS)
MODULE = lib.Aki(num_heads=2, head_dim=4, rotary_base=100.0)
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, T, 8)), jnp.float32)
PARAMS = initial(MODULE.init, KEY, X)


def test_the_mask_opens_from_images_to_questions_alone():
    expected = np.tril(np.ones((2, T, T), bool))
    expected[0, 1:4, 4:6] = True
    expected[1, :2, 2:6] = True
    np.testing.assert_array_equal(masks.dense(lib.mutual(KINDS), T, T)[:, 0], expected)
    w = edit.matrix(lib.aki, *ARGS.values())
    np.testing.assert_array_equal(w > 0, np.broadcast_to(expected[:, None], w.shape))


def test_is_causal_without_a_question():
    no_question = jnp.where(KINDS == lib.QUESTION, 0, KINDS)
    expected = ops.dot_product_attention(*(ARGS[name] for name in "qkv"), mask=masks.Causal())
    chex.assert_trees_all_equal(lib.aki(**(ARGS | dict(kinds=no_question))), expected)
    assert jnp.abs(lib.aki(**ARGS) - expected).max() > 0.1


def test_answers_leak_into_nothing_before_them_through_two_layers():
    twice = lambda x: MODULE.apply(PARAMS, MODULE.apply(PARAMS, x, kinds=KINDS), kinds=KINDS)
    other = X.at[:, 6:].set(3.0)
    chex.assert_trees_all_equal(*jax.jit(lambda: (twice(X)[:, :6], twice(other)[:, :6]))())


def test_a_question_knows_its_end_from_the_second_layer_on():
    def influence(layers):
        def first_of_the_question(x):
            for _ in range(layers):
                x = MODULE.apply(PARAMS, x, kinds=KINDS)
            return x[0, 4].sum()

        return jax.jit(jax.grad(first_of_the_question))(X)[0, 5]

    assert not influence(1).any() and influence(2).any()


def test_decodes_an_answer_from_the_cache_of_its_prompt():
    @jax.jit
    def stream():
        state = MODULE.apply(PARAMS, 2, T, method="init_state")
        extend = lambda state, x, **kinds: MODULE.apply(PARAMS, state, x, method="extend", **kinds)
        state, first = extend(state, X[:, :6], kinds=KINDS[:, :6])
        ys = [first]
        for t in range(6, T):
            state, y = extend(state, X[:, t : t + 1])
            ys.append(y)
        return jnp.concatenate(ys, 1)

    expected = jax.jit(lambda: MODULE.apply(PARAMS, X, kinds=KINDS))()
    chex.assert_trees_all_close(stream(), expected, rtol=1e-4, atol=1e-5)


def test_a_second_prompt_sees_its_own_question():
    """In a later piece, where positions no longer begin at 0."""
    kinds = jnp.concatenate([jnp.zeros((2, 3), int), KINDS[:, :6]], 1)

    @jax.jit
    def stream():
        state = MODULE.apply(PARAMS, 2, T, method="init_state")
        state, first = MODULE.apply(PARAMS, state, X[:, :3], method="extend")
        _, rest = MODULE.apply(PARAMS, state, X[:, 3:], kinds=kinds[:, 3:], method="extend")
        return jnp.concatenate([first, rest], 1)

    expected = jax.jit(lambda: MODULE.apply(PARAMS, X, kinds=kinds))()
    chex.assert_trees_all_close(stream(), expected, rtol=1e-4, atol=1e-5)
