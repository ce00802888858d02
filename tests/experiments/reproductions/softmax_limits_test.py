import chex
import jax
import jax.numpy as jnp

from attnjax import models
from attnjax.tasks import source_text
from experiments.reproductions import softmax_limits


def test_windows_come_from_the_text():
    text = softmax_limits.corpus("test")
    whole = source_text.SourceText("test", length=100)
    assert 0 <= len(text) - 100 * len(whole) < 100
    assert (text[300:400] == jnp.asarray(whole[3]["inputs"])).all()
    tokens, targets = softmax_limits.draw(jax.random.key(0), text[:200], batch_size=4)
    assert tokens.shape == (4, 128) and (tokens[:, 1:] == targets[:, :-1]).all()
    places = [(text[i : i + 129] == jnp.append(tokens[0], targets[0, -1])).all() for i in range(72)]
    assert any(places)


def test_the_last_query_and_its_tokens_are_read():
    """By hand in a first layer, whose tokens are embeddings, brought to length 1."""
    options = dict(features=8, num_heads=2, mixers=("multi_head_attention",))
    model = models.create("lm", vocab_size=5, depth=2, **options)
    tokens = jnp.array([[1, 4, 2, 0, 3, 2]])
    params = model.init(jax.random.key(0), tokens)
    logits, x = softmax_limits.look(model, params, tokens)
    assert logits.shape == (2, 1, 2, 6) and x.shape == (2, 1, 2, 6, 8)
    chex.assert_trees_all_close(jnp.linalg.norm(x, axis=-1), jnp.ones((2, 1, 2, 6)), rtol=1e-5)
    rows = params["params"]["embed"]["embedding"][tokens[0]]
    unit = rows / jnp.linalg.norm(rows, axis=-1, keepdims=True)
    chex.assert_trees_all_close(x[0, 0, 1], unit, rtol=1e-4, atol=1e-5)
    mixer = params["params"]["block_0"]["mixer"]
    q, k = (mixer[name]["heads"]["kernel"] for name in ("query", "key"))
    scaled = unit * 8**0.5  # what RMSNorm makes of them
    by_hand = jnp.einsum("D,DNH,SE,ENH->NS", scaled[-1], q, scaled, k) / 2
    chex.assert_trees_all_close(
        jax.nn.softmax(logits[0, 0]), jax.nn.softmax(by_hand), rtol=1e-3, atol=1e-5
    )
