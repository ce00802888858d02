"""Small models by the name of a mechanism, for every test of this folder."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from attnjax import models
from attnjax.core import registry
from attnjax.models import backbone
from tests.initial import initial

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
    return np.random.default_rng(0).integers(0, 11, (2, T), np.int32)


def images():
    return np.random.default_rng(0).normal(size=(2, 32, 32, 1)).astype(np.float32)


def inputs(model):
    return images() if hasattr(model, "image_size") else tokens()


def init(model, x):
    return model.init(RNGS, jnp.asarray(x))["params"]


@functools.cache
def shapes_of(model):
    """(output, parameters) of a model, traced alone."""
    trace = lambda x: model.init_with_output(RNGS, x)
    y, variables = jax.eval_shape(trace, inputs(model))
    return y, variables["params"]


@functools.cache
def params_of(model):
    """Parameters of a model, and what it takes: initialised once for all tests.

    Those of a scan over layers are those of the loop, so that the two may be compared.
    """
    if model.remat != "none":
        return params_of(model.clone(remat="none"))
    if model.scan:
        params, x = params_of(model.clone(scan=False))
        stack = jax.jit(functools.partial(backbone.stacked, period=len(model.mixers)))
        return stack(params), x
    return initial(functools.partial(init, model), inputs(model)), inputs(model)


def run(model, params, x, **options):
    return model.apply({"params": params}, jnp.asarray(x), rngs=dict(noise=KEY), **options)


@functools.cache
def value_and_grad(model):
    """A scalar that every logit matters to, and its gradients, at the model's own parameters."""
    run = jax.jit(jax.value_and_grad(functools.partial(loss, model)))
    return jax.device_get(run(*params_of(model)))


def loss(model, params, x):
    return jnp.mean(jnp.sin(run(model, params, x)))
