import jax
import jax.numpy as jnp
import numpy as np

from attnjax import models
from attnjax.tasks import source_text
from experiments.reproductions import softmax_limits


def test_windows_come_from_the_text():
    text = np.asarray(softmax_limits.corpus("test"))
    whole = source_text.SourceText("test", length=100)
    assert 0 <= len(text) - 100 * len(whole) < 100
    assert (text[300:400] == whole[3]["inputs"]).all()
    draw = jax.jit(lambda key, text: softmax_limits.draw(key, text, batch_size=4))
    tokens, targets = jax.device_get(draw(jax.random.key(0), jnp.asarray(text[:200])))
    assert tokens.shape == (4, 128) and (tokens[:, 1:] == targets[:, :-1]).all()
    window = np.append(tokens[0], targets[0, -1])
    assert any((text[i : i + 129] == window).all() for i in range(72))


def test_the_last_query_and_its_tokens_are_read():
    """By hand in a first layer, whose tokens are embeddings, brought to length 1."""
    options = dict(features=8, num_heads=2, mixers=("multi_head_attention",))
    model = models.create("lm", vocab_size=5, depth=2, **options)
    tokens = np.array([[1, 4, 2, 0, 3, 2]])

    @jax.jit
    def run():
        params = model.init(jax.random.key(0), jnp.asarray(tokens))
        return params, softmax_limits.look(model, params, jnp.asarray(tokens))

    params, (logits, x) = jax.device_get(run())
    assert logits.shape == (2, 1, 2, 6) and x.shape == (2, 1, 2, 6, 8)
    np.testing.assert_allclose(np.linalg.norm(x, axis=-1), 1, rtol=1e-5)
    rows = params["params"]["embed"]["embedding"][tokens[0]]
    unit = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
    np.testing.assert_allclose(x[0, 0, 1], unit, rtol=1e-4, atol=1e-5)
    mixer = params["params"]["block_0"]["mixer"]
    q, k = (mixer[name]["heads"]["kernel"] for name in ("query", "key"))
    scaled = unit * 8**0.5  # what RMSNorm makes of them
    by_hand = np.einsum("D,DNH,SE,ENH->NS", scaled[-1], q, scaled, k) / 2
    softmax = lambda x: np.exp(x) / np.exp(x).sum(-1, keepdims=True)
    np.testing.assert_allclose(softmax(logits[0, 0]), softmax(by_hand), rtol=1e-3, atol=1e-5)
