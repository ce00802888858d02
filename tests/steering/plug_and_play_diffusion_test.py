"""What is particular to plug-and-play: whose map, whose values, and for how many steps."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import edit
from attnjax.softmax import multi_head_attention as mha
from attnjax.steering import plug_and_play_diffusion as pnp
from tests.initial import initial

B, T, D, STEPS = 16, 16, 8, 6
KEY = jax.random.key(0)
SIGNAL = jnp.asarray(np.linspace(0.1, 0.98, STEPS + 1, dtype=np.float32))
PATHS = dict(attention="attention_*/attend", feature="block")


class Denoiser(nn.Module):
    """A residual block and two attention layers, told what to draw by a vector."""

    gain: float = 1.0

    @nn.compact
    def __call__(self, x, step, prompt):
        x = self.gain * x / 2 + prompt[None, None] + 0.1 * step
        x = x + nn.Dense(D, name="block")(jnp.tanh(x))
        for i in range(2):
            x = x + mha.MultiHeadAttention(2, 8, name=f"attention_{i}")(self.gain * x)
        return nn.tanh(nn.Dense(D, name="out")(x))


@functools.cache
def setting_of(gain):
    """The model under two prompts, and the noise of an image."""
    model, draw = Denoiser(gain), np.random.default_rng(0).normal
    params = initial(lambda key: model.init(key, jnp.zeros((B, T, D)), 0, jnp.zeros(D)), KEY)
    prompts = jnp.asarray(draw(size=(2, D)), jnp.float32)
    guide, target = (lambda x, step, p=p: model.apply(params, x, step, p) for p in prompts)
    return guide, target, jnp.asarray(draw(size=(B, T, D)), jnp.float32)


@pytest.fixture
def setting():
    return setting_of(1.0)


def draw(denoise, x):
    for i in range(STEPS):
        x = pnp.ddim_step(x, denoise(x, i), SIGNAL[i], SIGNAL[i + 1])
    return x


@functools.partial(jax.jit, static_argnums=(0, 1))
def translate(guide, target, noise, attention_until, feature_until):
    until = dict(attention_until=attention_until, feature_until=feature_until)
    return pnp.translate(guide, target, noise, SIGNAL, **PATHS, **until)


def test_without_injection_both_are_plain_samples(setting):
    guide, target, noise = setting
    expected = jax.jit(lambda: (draw(guide, noise), draw(target, noise)))()
    chex.assert_trees_all_close(translate(*setting, 0, 0), expected, rtol=1e-5, atol=1e-5)


def test_each_injection_ends_at_its_own_step(setting):
    """Step by step: both kinds, then features alone, then none."""
    guide, target, noise = setting
    attention, feature = PATHS["attention"], PATHS["feature"]

    def by_hand(guided, own):
        for i in range(STEPS):
            denoise = target
            if i < 2:
                found = edit.read(guide, what="qk", where=attention)(guided, i)[1]
                denoise = pnp.inject(denoise, found)
            if i < 5:
                found = pnp.features(guide, where=feature)(guided, i)[1]
                denoise = pnp.inject_features(denoise, found)
            own = pnp.ddim_step(own, denoise(own, i), SIGNAL[i], SIGNAL[i + 1])
            guided = pnp.ddim_step(guided, guide(guided, i), SIGNAL[i], SIGNAL[i + 1])
        return guided, own

    expected = jax.jit(by_hand)(noise, noise)
    chex.assert_trees_all_close(translate(*setting, 2, 5), expected, rtol=1e-5, atol=1e-5)


def test_injecting_a_run_into_itself_changes_no_bit(setting):
    guide, _, noise = setting

    @jax.jit
    def run(noise):
        y, found = edit.read(guide, what="qk")(noise, 0)
        return y, found, pnp.features(guide, where="block")(noise, 0)[1]

    y, found, block = run(noise)
    steered = lambda noise, found, block: pnp.inject_features(pnp.inject(guide, found), block)(
        noise, 0
    )
    chex.assert_trees_all_equal(jax.jit(steered)(noise, found, block), y)


def test_map_is_the_guidances_and_values_are_the_targets(setting):
    guide, target, noise = setting

    @jax.jit
    def run(noise):
        y, queries_keys = edit.read(guide, what="qk")(noise, 0)
        _, maps = edit.read(guide)(noise, 0)
        steered = edit.read(pnp.inject(target, queries_keys))(noise, 0)
        unsteered = pnp.inject(target, queries_keys, when=False)(noise, 0)
        return y, maps, steered, target(noise, 0), unsteered

    of_guide, maps, (y, seen), plain, unsteered = jax.device_get(run(noise))
    chex.assert_trees_all_close(seen, maps, rtol=1e-6)
    assert np.abs(y - plain).max() > 1e-2 and np.abs(y - of_guide).max() > 1e-2
    chex.assert_trees_all_equal(unsteered, plain)


def test_features_of_the_guidance_take_the_place_of_the_targets(setting):
    guide, target, noise = setting

    @jax.jit
    def run(noise):
        _, found = pnp.features(guide, where="block")(noise, 0)
        steered = pnp.inject_features(target, found)
        y, seen = pnp.features(steered, where="block")(noise, 0)
        return seen, found, y, target(noise, 0)

    seen, found, y, plain = jax.device_get(run(noise))
    chex.assert_trees_all_equal(seen, found)
    assert np.abs(y - plain).max() > 1e-2


def test_both_halves_of_a_guided_batch_are_injected(setting):
    """Two prompts in one batch of the target, as classifier-free guidance has them."""
    guide, target, noise = setting

    @jax.jit
    def run(noise):
        _, found = edit.read(guide, what="qk")(noise, 0)
        inject = pnp.inject(target, found)
        one = [inject(x, 0) for x in (noise, 2 * noise)]
        return inject(jnp.concatenate([noise, 2 * noise]), 0), jnp.concatenate(one)

    chex.assert_trees_all_close(*run(noise), rtol=1e-5, atol=1e-6)


def test_layout_is_kept_the_more_the_longer_it_is_injected():
    """Layout: which tokens of an image are alike, by the correlation of their similarities."""

    def layout(x):
        x = x - x.mean(1, keepdims=True)
        x = x / np.linalg.norm(x, axis=-1, keepdims=True)
        similar = (x @ x.swapaxes(1, 2)).reshape(B, -1)
        return similar - similar.mean(1, keepdims=True)

    def change(until):
        a, b = map(layout, jax.device_get(translate(*setting_of(2.0), until, until)))
        return float(1 - ((a * b).sum(1) / np.sqrt((a**2).sum(1) * (b**2).sum(1))).mean())

    changes = [change(until) for until in (0, 2, 4, 6)]
    assert changes == sorted(changes, reverse=True) and changes[-1] < changes[0] / 2


def test_inversion_finds_the_noise_of_an_image(setting):
    """The more exactly the finer its steps are: each takes the noise of the step before."""
    guide, _, noise = setting
    smooth = lambda x, step: guide(x / 4, 0)

    def error(steps):
        signal = jnp.linspace(0.3, 0.98, steps + 1)
        none = dict(attention_until=0, feature_until=0)
        image, _ = pnp.translate(smooth, smooth, noise, signal, **PATHS, **none)
        return jnp.abs(pnp.invert(smooth, image, signal) - noise).max()

    coarse, fine = jax.jit(lambda: (error(8), error(64)))()
    assert fine < 0.05 and fine < coarse / 4


def test_a_step_undoes_itself():
    x, noise = np.random.default_rng(0).normal(size=(2, 5)).astype(np.float32)

    @jax.jit
    def back(x, noise):
        there = pnp.ddim_step(x, noise, SIGNAL[1], SIGNAL[4])
        return pnp.ddim_step(there, noise, SIGNAL[4], SIGNAL[1])

    chex.assert_trees_all_close(back(x, noise), x, rtol=1e-5)


def test_what_does_not_fit_raises(setting):
    guide, target, noise = setting
    _, found = jax.eval_shape(lambda x: edit.read(guide, what="qk")(x, 0), noise)
    found = jax.tree.map(lambda x: jnp.asarray(np.zeros(x.shape, x.dtype)), found)
    run = lambda fn, x=noise: jax.eval_shape(lambda x: fn(x, 0), x)
    with pytest.raises(ValueError, match="guidance of shape .* doesn't fit"):
        run(pnp.inject(target, found), np.zeros((B, 5, D), np.float32))
    with pytest.raises(ValueError, match="no module matches where='block_7'"):
        run(pnp.features(guide, where="block_7"))
    with pytest.raises(ValueError, match="no attention matches"):
        run(pnp.inject(target, {"decoder/attend": next(iter(found.values()))}))
