import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import edit, masks, registry
from attnjax.core.registry import Claim
from attnjax.models import lm
from tests.models import helpers

HYBRID = ["multi_head_attention", "multi_head_attention(rotary_base=100.0)"]
CAUSAL = helpers.named("sequence", claim=Claim.CAUSAL)
STREAMABLE = helpers.named("sequence", claim=Claim.STREAMABLE)
STATE = lambda name: str(inspect.signature(helpers.MECHANISMS[name].module.init_state))
STATES = {STATE(name): name for name in reversed(STREAMABLE)}  # the first with each kind of state
SMALL = helpers.lm(depth=2)
BUILD = dict(num_heads=2, head_dim=24, dtype=None)  # what a layer gives a mechanism


@pytest.mark.parametrize("name", CAUSAL)
def test_every_causal_mechanism_by_name(name):
    """The layer around it has the module that conformance_test judges, with its options.

    So what is left to see is that the model takes it, and that a state goes around a loop.
    """
    record, model = helpers.MECHANISMS[name], helpers.lm(mixers=[helpers.text(name)])
    mixer = registry.build(*model.mixers, **BUILD)
    assert mixer == record.module(**record.small)
    y, params = helpers.shapes_of(model)
    assert y.shape == (2, 8, 11) and y.dtype == jnp.float32
    if name in STREAMABLE:
        generate = lambda params: lm.generate(model, params, helpers.tokens(), steps=3)
        assert jax.eval_shape(generate, params).shape == (2, 3)


@pytest.mark.parametrize("name", [name for name in CAUSAL if name not in STREAMABLE])
def test_no_logits_are_of_later_tokens(name):
    """Those that stream show below that they are causal: they decode what all at once gives."""
    model, tokens = helpers.lm(mixers=[helpers.text(name)]), helpers.tokens()
    other = np.concatenate([tokens[:, :-1], (tokens[:, -1:] + 1) % 11], 1)
    run = jax.jit(functools.partial(helpers.run, model))
    params, _ = helpers.params_of(model)
    y, changed = np.split(np.asarray(run(params, np.concatenate([tokens, other]))), 2)
    chex.assert_trees_all_close(y[:, :-1], changed[:, :-1], rtol=1e-5, atol=1e-6)
    assert not np.allclose(y[:, -1], changed[:, -1])


@pytest.mark.parametrize("name", STATES.values())
def test_decodes_with_a_state_of_each_kind(name):
    assert_decodes(helpers.lm(mixers=[helpers.text(name)]))


def test_decodes_with_positions_and_one_table_of_tokens():
    assert_decodes(helpers.lm(max_length=9, tie_embeddings=True))


@pytest.mark.parametrize("scan", [False, True])
def test_a_hybrid_decodes(scan):
    assert_decodes(helpers.lm(mixers=HYBRID, depth=4 if scan else 2, scan=scan))


def assert_decodes(model):
    """A prompt and then single tokens give what all at once gives."""

    @jax.jit
    def both(params, tokens):
        variables = {"params": params}
        extend = lambda *args: model.apply(variables, *args, method="extend")
        state = model.apply(variables, 2, 9, method="init_state")
        state, first = extend(state, tokens[:, :6])
        state, rest = jax.lax.scan(extend, state, tokens[:, 6:].T[..., None])
        y = jnp.concatenate([first, rest[:, :, 0].swapaxes(0, 1)], 1)
        return state.length, y, model.apply(variables, tokens)

    length, y, expected = jax.device_get(both(*helpers.params_of(model)))
    assert length == 8
    chex.assert_trees_all_close(y, expected, rtol=1e-4, atol=1e-5)


def test_generates_what_the_model_prefers():
    params, _ = helpers.params_of(SMALL)
    prompt, tokens = helpers.tokens(5), np.zeros((2, 8), np.int32)
    run = jax.jit(lambda tokens: helpers.run(SMALL, params, tokens))
    tokens[:, :5] = prompt
    for t in range(5, 8):
        tokens[:, t] = np.asarray(run(tokens))[:, t - 1].argmax(-1)
    actual = lm.generate(SMALL, params, prompt, steps=3)
    np.testing.assert_array_equal(actual, tokens[:, 5:])
    assert actual.dtype == prompt.dtype


def test_generates_by_chance():
    params, prompt = helpers.params_of(SMALL)[0], np.zeros((600, 1), np.int32)
    generate = functools.partial(lm.generate, SMALL, params, prompt, steps=2, temperature=2.0)
    draw = lambda key: np.asarray(generate(key=key))
    first = draw(helpers.KEY)
    np.testing.assert_array_equal(first, draw(helpers.KEY))
    logits = np.asarray(jax.jit(lambda x: helpers.run(SMALL, params, x))(prompt[:1]), np.float64)
    actual, likely = np.bincount(first[:, 0], minlength=11) / 600, np.exp(logits[0, 0] / 2)
    # 4 standard deviations of a frequency are 0.08 at most
    chex.assert_trees_all_close(actual, likely / likely.sum(), atol=0.08)
    assert (first != draw(jax.random.key(1))).any()
    assert (first[:, 0] == first[:, 1]).mean() < 0.3  # each step has a key of its own


@pytest.mark.parametrize("options", [dict(steps=0), dict(steps=1, temperature=1.0)], ids=str)
def test_generate_refuses(options):
    with pytest.raises(ValueError, match="must be >= 1"):
        lm.generate(SMALL, {}, helpers.tokens(), **options)


@pytest.mark.parametrize("scan", [False, True])
def test_masks_are_honoured(scan):
    model = SMALL.clone(scan=scan)
    params, tokens = helpers.params_of(model)
    mask = masks.Segments(jnp.array([[0] * 3 + [1] * 5] * 2))
    run = jax.jit(lambda x: helpers.run(model, params, x, mask=mask))
    other = np.concatenate([(tokens[:, :1] + 1) % 11, tokens[:, 1:]], 1)
    y, changed = np.asarray(run(tokens)), np.asarray(run(other))
    chex.assert_trees_all_equal(y[:, 3:], changed[:, 3:])
    assert (y[:, 0] != changed[:, 0]).any()


def test_attention_can_be_read_layer_by_layer():
    params, tokens = helpers.params_of(SMALL)
    _, maps = jax.eval_shape(edit.read(SMALL.apply), {"params": params}, tokens)
    assert set(maps) == {"block_0/mixer/attend", "block_1/mixer/attend"}


def test_bfloat16():
    model = SMALL.clone(dtype="bfloat16")
    params, tokens = helpers.params_of(model)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    both = jax.jit(lambda params: [helpers.run(m, params, tokens) for m in (model, SMALL)])
    y, exact = jax.device_get(both(params))
    assert y.dtype == jnp.float32
    error = np.sqrt(np.mean((y - exact) ** 2) / np.mean(exact**2))
    assert 1e-4 < error < 0.02


def test_refuses_what_is_not_causal():
    for name in set(helpers.MECHANISMS) - set(CAUSAL):
        model = helpers.lm(mixers=[helpers.text(name)])
        with pytest.raises(ValueError, match=f"{name} is not a causal mechanism.*; such are ."):
            helpers.init(model, helpers.tokens())


def test_refuses_to_stream_what_does_not():
    for name in set(CAUSAL) - set(STREAMABLE):
        model = helpers.lm(mixers=[helpers.text(name)])
        with pytest.raises(ValueError, match=f"{name} is not a mechanism that streams; such are"):
            model.apply({}, 2, 8, method="init_state")


def test_refuses_more_than_max_length():
    model = helpers.lm(max_length=4)
    for call in (
        lambda: helpers.init(model, helpers.tokens()),
        lambda: model.apply({}, 2, 8, method="init_state"),
    ):
        with pytest.raises(ValueError, match="8 tokens must be at most max_length=4"):
            call()


def test_logits_of_chosen_positions_are_those_of_all():
    model, tokens, at = helpers.lm(), helpers.tokens(), jnp.array([[7, 0, 3], [1, 1, 6]])
    params, _ = helpers.params_of(model)
    apply = lambda params, **options: helpers.run(model, params, tokens, **options)
    run = jax.jit(lambda params: (apply(params), apply(params, at=at)))
    every, some = jax.device_get(run(params))
    chex.assert_trees_all_close(some, np.take_along_axis(every, at[..., None], 1), rtol=1e-6)
