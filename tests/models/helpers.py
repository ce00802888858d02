"""Small models by the name of a mechanism, for every test of this folder."""

import functools

import jax
import jax.numpy as jnp

from attnjax import models
from attnjax.core import registry

KEY = jax.random.key(0)
RNGS = dict(params=KEY, noise=KEY)
MECHANISMS = registry.of_kind(registry.Mechanism)
SIZES = dict(features=48, depth=1, num_heads=2, mlp_ratio=1)  # features as in conformance_test


def text(name):
    """The mechanism as a text that stands in a config, small."""
    options = ", ".join(f"{key}={value!r}" for key, value in MECHANISMS[name].small.items())
    return f"{name}({options})"


def named(*layouts, claim=None):
    """Names of the mechanisms of these layouts that make a claim."""
    fits = lambda record: record.layout in layouts and (claim is None or claim in record.claims)
    return [name for name, record in MECHANISMS.items() if fits(record)]


def lm(**options):
    return models.create("lm", **(dict(vocab_size=11) | SIZES | options))


def vit(**options):
    image = dict(image_size=[32, 32], channels=1, num_classes=5)
    return models.create("vit", **(image | SIZES | options))


def model_of(name):
    """(kind, options) of a small model around a mechanism of any layout but cross."""
    record = MECHANISMS[name]
    if record.layout == "sequence" and registry.Claim.CAUSAL in record.claims:
        return "lm", dict(vocab_size=11, mixers=[text(name)]) | SIZES
    image = dict(image_size=[32, 32], channels=1, num_classes=5) | SIZES
    mixed = dict(pool=text(name)) if record.layout == "set" else dict(mixers=[text(name)])
    return "vit", image | mixed


def tokens(T=8):
    return jax.random.randint(KEY, (2, T), 0, 11)


def images():
    return jax.random.normal(KEY, (2, 32, 32, 1))


def init(model, x):
    return model.init(RNGS, x)["params"]


@functools.cache
def params_of(model):
    """Parameters of a model, and what it takes: initialised once for all tests."""
    x = images() if hasattr(model, "image_size") else tokens()
    return jax.jit(functools.partial(init, model))(x), x


def run(model, params, x, **options):
    return model.apply({"params": params}, x, rngs=dict(noise=KEY), **options)


@functools.cache
def value_and_grad(model):
    """A scalar that every logit matters to, and its gradients, at the model's own parameters."""
    params, x = params_of(model)
    return jax.jit(jax.value_and_grad(functools.partial(loss, model)))(params, x)


def loss(model, params, x):
    return jnp.mean(jnp.sin(run(model, params, x)))
