import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import edit, masks
from attnjax.core.registry import Claim
from attnjax.models import lm
from tests.models import helpers

HYBRID = ["multi_head_attention", "multi_head_attention(rotary_base=100.0)"]
CAUSAL = helpers.named("sequence", claim=Claim.CAUSAL)
STREAMABLE = helpers.named("sequence", claim=Claim.STREAMABLE)
SMALL = helpers.lm(depth=2)


@pytest.mark.parametrize("name", CAUSAL)
def test_every_causal_mechanism_by_name(name):
    model, tokens = helpers.lm(mixers=[helpers.text(name)]), helpers.tokens()
    other = tokens.at[:, -1].add(1) % 11

    @jax.jit
    def run(x):
        return helpers.run(model, helpers.init(model, x), x)

    y, changed = jnp.split(run(jnp.concatenate([tokens, other])), 2)
    assert y.shape == (2, 8, 11) and y.dtype == jnp.float32
    chex.assert_trees_all_close(y[:, :-1], changed[:, :-1], rtol=1e-5, atol=1e-6)
    assert not jnp.allclose(y[:, -1], changed[:, -1])


@pytest.mark.parametrize("name", STREAMABLE)
def test_every_streamable_mechanism_decodes(name):
    assert_decodes(helpers.lm(mixers=[helpers.text(name)]))


@pytest.mark.parametrize("options", [dict(max_length=9), dict(tie_embeddings=True)], ids=str)
def test_decoding_with(options):
    assert_decodes(helpers.lm(**options))


@pytest.mark.parametrize("scan", [False, True])
def test_a_hybrid_decodes(scan):
    assert_decodes(helpers.lm(mixers=HYBRID, depth=4, scan=scan))


def assert_decodes(model):
    """A prompt and then single tokens give what all at once gives."""

    @jax.jit
    def both(tokens):
        variables = {"params": helpers.init(model, tokens)}
        state, ys = model.apply(variables, 2, 9, method="init_state"), []
        for piece in jnp.split(tokens, (6, 7), axis=1):
            state, y = model.apply(variables, state, piece, method="extend")
            ys.append(y)
        return state.length, jnp.concatenate(ys, 1), model.apply(variables, tokens)

    length, y, expected = both(helpers.tokens())
    assert length == 8
    chex.assert_trees_all_close(y, expected, rtol=1e-4, atol=1e-5)


def test_generates_what_the_model_prefers():
    params, _ = helpers.params_of(SMALL)
    prompt, padded = helpers.tokens(5), jnp.zeros((2, 8), jnp.int32)
    run = jax.jit(lambda tokens: helpers.run(SMALL, params, tokens))
    tokens = padded.at[:, :5].set(prompt)
    for t in range(5, 8):
        tokens = tokens.at[:, t].set(run(tokens)[:, t - 1].argmax(-1))
    actual = lm.generate(SMALL, params, prompt, steps=3)
    np.testing.assert_array_equal(actual, tokens[:, 5:])
    assert actual.dtype == prompt.dtype


def test_generates_by_chance():
    params, prompt = helpers.params_of(SMALL)[0], jnp.zeros((600, 1), jnp.int32)
    draw = lambda key: lm.generate(SMALL, params, prompt, steps=2, temperature=2.0, key=key)
    first = draw(helpers.KEY)
    np.testing.assert_array_equal(first, draw(helpers.KEY))
    logits = jax.jit(lambda x: helpers.run(SMALL, params, x))(prompt[:1])
    actual = jnp.bincount(first[:, 0], length=11) / 600
    # 4 standard deviations of a frequency are 0.08 at most
    chex.assert_trees_all_close(actual, jax.nn.softmax(logits[0, 0] / 2), atol=0.08)
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
    y, changed = run(tokens), run(tokens.at[:, 0].add(1) % 11)
    chex.assert_trees_all_equal(y[:, 3:], changed[:, 3:])
    assert (y[:, 0] != changed[:, 0]).any()


def test_attention_can_be_read_layer_by_layer():
    params, tokens = helpers.params_of(SMALL)
    _, maps = jax.eval_shape(lambda: edit.read(SMALL.apply)({"params": params}, tokens))
    assert set(maps) == {"block_0/mixer/attend", "block_1/mixer/attend"}


def test_bfloat16():
    model = SMALL.clone(dtype="bfloat16")
    params, tokens = helpers.params_of(model)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    y, exact = jax.jit(lambda: [helpers.run(m, params, tokens) for m in (model, SMALL)])()
    assert y.dtype == jnp.float32
    error = jnp.sqrt(jnp.mean((y - exact) ** 2) / jnp.mean(exact**2))
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
    params = helpers.init(model, tokens)
    apply = lambda params, **options: helpers.run(model, params, tokens, **options)
    run = jax.jit(lambda params: (apply(params), apply(params, at=at)))
    every, some = run(params)
    chex.assert_trees_all_close(some, jnp.take_along_axis(every, at[..., None], 1), rtol=1e-6)
