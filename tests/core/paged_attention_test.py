"""Mechanisms that stream through pages do as in parallel, each sequence at its own length."""

import functools
import pathlib
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import edit, masks, paging, registry
from tests.cotangents import like

KEY = jax.random.key(0)
PAGE = pathlib.Path(__file__).parents[2] / "docs" / "decoding.md"
KINDS = ["multi_head_attention", "gqa", "multi_query_attention", "multi_head_latent_attention"]


@functools.cache
def module(kind, **options):
    of_heads = dict(num_kv_heads=2) if kind == "gqa" else {}
    rotation = dict(rotary_base=100.0)
    return registry.get(kind).module(4, 8, page_size=4, **of_heads, **rotation, **options)


@pytest.mark.parametrize("kind", ["gqa", "multi_head_latent_attention"])
def test_sequences_of_their_own_lengths_equal_the_parallel_form(kind):
    """A prompt for all that is cut to what each has, and two tokens more."""
    model, counts = module(kind), [5, 2]
    x = np.random.default_rng(0).normal(size=(2, 7, 16)).astype(np.float32)
    params = like(jax.eval_shape(model.init, KEY, x))
    params = jax.tree.map(lambda p: p / 4, jax.device_get(params))

    @jax.jit
    def run(params, x):
        extend = functools.partial(model.apply, params, method="extend")
        state, prompt = extend(model.init_state(2, 9), x[:, :5])
        state = paging.rewind(state, jnp.array(counts))
        state, y = extend(state, jnp.stack([x[b, n : n + 2] for b, n in enumerate(counts)]))
        return state.lengths, prompt, y, model.apply(params, x, mask=masks.Causal())

    lengths, prompt, y, expected = jax.device_get(run(params, x))
    np.testing.assert_array_equal(lengths, [7, 4])
    for b, n in enumerate(counts):
        actual = np.concatenate([prompt[b, :n], y[b]])
        chex.assert_trees_all_close(actual, expected[b, : n + 2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_is_in_one_piece_or_in_pages(kind):
    state = jax.eval_shape(lambda: registry.get(kind).module(4, 8).init_state(2, 9))
    assert not isinstance(state, paging.PagedCache)
    pages, x = module(kind).init_state(2, 9), jnp.zeros((2, 3, 16))
    assert pages.table.shape == (2, 3) and (np.asarray(pages.room) == 12).all()
    assert (pages.v is None) == (kind == "multi_head_latent_attention")
    extend = lambda: module(kind).apply(module(kind).init(KEY, x), pages, x, method="extend")
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(extend), (pages, x))


def test_a_bfloat16_cache():
    model, x = module("gqa", dtype=jnp.bfloat16), jnp.zeros((2, 3, 16))
    extend = lambda: model.apply(
        model.init(KEY, x), model.init_state(2, 9), x.astype(jnp.bfloat16), method="extend"
    )
    state, y = jax.eval_shape(extend)
    assert state.k.dtype == state.v.dtype == y.dtype == jnp.bfloat16


def test_pages_have_no_matrix_to_read():
    model, x = module("gqa"), jnp.zeros((2, 3, 16))
    run = functools.partial(edit.read(model.apply), method="extend")
    with pytest.raises(NotImplementedError, match="attend_pages does not attend by queries, keys"):
        jax.eval_shape(lambda: run(model.init(KEY, x), model.init_state(2, 9), x))


def test_the_lines_of_the_page():
    """Each sequence generates what it would alone; the page itself asserts the rest."""
    prompts, pool = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    exec(prompts, names := {})
    generated, lengths = np.stack(names["generated"], 1), names["lengths"]
    tokens = np.zeros((3, 26), int)
    for b, n in enumerate(lengths):
        tokens[b, : n + 9] = np.concatenate([names["prompts"][b, :n], generated[b]])
    logits = jax.jit(names["model"].apply)(names["variables"], jnp.asarray(tokens))
    logits = jax.device_get(logits)
    for b, n in enumerate(lengths):  # what is behind a sequence has no influence on it
        np.testing.assert_array_equal(generated[b], logits[b, n - 1 : n + 8].argmax(-1))
    exec(pool, names)
    o = np.asarray(names["o"])
    assert o.shape == (3, 8, 64) and not o[2].any() and o[:2].any()
