"""What tests of a record run: its function, oracle and module, each compiled once for all tests.

Each second spent here on one mechanism is spent on all, and compiling takes nearly all of it. So
shapes are tiny, bodies are jitted whole, and the tests of one mechanism run in a row and share its
programs, which are kept by `recent`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.core import masks, registry
from attnjax.core.registry import Claim
from tests import cotangents
from tests.initial import initial
from tests.records import has

KEY = jax.random.key(0)
RNGS = dict(params=KEY, noise=KEY)
D = 48
recent = functools.lru_cache(maxsize=16)  # enough for one mechanism; programs take memory


def on_host(run):
    """`run` that gives numpy arrays: JAX would compile each operation of an assertion as well."""
    return lambda *args: jax.device_get(run(*args))


# ---- a function and its oracle ----


@recent
def example(name, T):
    return initial(lambda key: registry.get(name).example(key, T), KEY)


def floats(tree):
    return {k: x for k, x in tree.items() if jnp.issubdtype(x.dtype, jnp.floating)}


def with_gradients(fn, args):
    """Output of fn and the gradient of each array of floating point, by random cotangents."""
    learned = floats(args)
    out, vjp = jax.vjp(lambda learned: fn(**(args | learned)), learned)
    if any(jnp.issubdtype(x.dtype, jnp.inexact) for x in jax.tree.leaves(out)):
        return out, vjp(cotangents.like(out))[0]
    return out, {}


def keys_in(args, T):
    """How many tokens a mask is about."""
    return args["k"].shape[1] if "k" in args else T


@recent
def single_token(name):
    """The floats of an example of one token -> what `fn` gives, and the oracle for each variant.

    `fn` gives the output and gradients of the first variant and the outputs of all others. If it
    claims to honour masks, the token is masked for the first where it is not real.
    """
    args, record = example(name, 1), registry.get(name)
    options, *others = record.variants

    def run(learned, real):
        mask = masks.Valid(jnp.full((2, keys_in(args, 1)), real))
        mask = mask & options["mask"] if "mask" in options else mask
        given = options | dict(mask=mask) if has(name, Claim.MASKABLE) else options
        first = with_gradients(functools.partial(record.fn, **given), args | learned)
        of = lambda f, options: f(**(args | learned), **options)
        by_fn = first, [of(record.fn, x) for x in others]
        return by_fn, [of(record.oracle, known(x)) for x in record.variants]

    compiled = on_host(jax.jit(run))
    return lambda learned, real=True: compiled(learned, np.bool_(real))


@recent
def program(name, T, by="fn", **options):
    """The floats of an example -> output and gradients, by the record's `fn` or its `oracle`."""
    fn, args = getattr(registry.get(name), by), example(name, T)
    run = functools.partial(with_gradients, functools.partial(fn, **options))
    return on_host(jax.jit(lambda learned: run(args | learned)))


@recent
def every_variant(name, T):
    """The floats of an example -> outputs and gradients of all variants by `fn`, and by the oracle.

    Variants have so much in common that XLA takes a third less time for all in one program.
    """
    args, record = example(name, T), registry.get(name)

    def run(learned):
        of = lambda f, options: with_gradients(functools.partial(f, **options), args | learned)
        by_fn = [of(record.fn, x) for x in record.variants]
        return by_fn, [of(record.oracle, known(x)) for x in record.variants]

    return on_host(jax.jit(run))


def variant(name, T, by="fn", **options):
    """As `program`, but a part of `every_variant` where it is one."""
    of_fn = registry.get(name).variants
    there = of_fn if by == "fn" else [known(x) for x in of_fn]
    if options not in there:
        return program(name, T, by, **options)
    run, place = every_variant(name, T), there.index(options)
    return lambda learned: run(learned)[by == "oracle"][place]


def known(options):
    """Those that an oracle knows of."""
    return {k: v for k, v in options.items() if k != "implementation"}


# ---- a module ----


def build(name, **options):
    record = registry.get(name)
    return record.module(**(dict(record.small) | options))


def inputs(name, dtype="float32", T=8):
    """What the module of a mechanism takes, by its layout."""
    shape = dict(sequence=[(T,)], grid=[(T, T)], set=[(T,)], cross=[(T,), (T + 3,)])
    shapes = [(2, *axes, D) for axes in shape[registry.get(name).layout]]
    draw = np.random.default_rng(1).normal
    return [draw(size=shape).astype(jnp.dtype(dtype)) for shape in shapes]


@recent
def params_of(name):
    return initial(build(name).init, RNGS, *inputs(name))


def apply(name, *args, **options):
    return build(name).apply(*args, rngs=dict(noise=KEY), **options)


def module_with_gradients(name, **fields):
    """(params, inputs, valid tokens, weight) -> (output, gradients of params and inputs).

    Causal if that is claimed, and masked if that is, so that one program serves all tests. The
    gradients are those of a random projection of the output, in which each entry has its weight.
    """

    def loss(params, xs, valid, weight):
        options = plain(name)
        if has(name, Claim.MASKABLE):
            given = masks.Valid(valid)
            options = dict(mask=given & options["mask"] if options else given)
        y = build(name, **fields).apply(params, *xs, rngs=dict(noise=KEY), **options)
        y32 = y.astype(jnp.float32)
        return (y32 * cotangents.like(y32) * weight).sum(), y

    def run(params, xs, valid, weight):
        grads, y = jax.grad(loss, (0, 1), has_aux=True)(params, xs, valid, weight)
        return y, grads

    return run


def plain(name):
    """Options of a module that is causal if it can be."""
    return dict(mask=masks.Causal()) if has(name, Claim.CAUSAL) else {}


def all_of(name, xs, weight=1.0):
    """Valid tokens, which are all, and the weight of each entry of the output of a sequence."""
    shape = (2, 8, 1) if registry.get(name).layout == "sequence" else ()
    return np.ones(xs[-1].shape[:2], bool), np.broadcast_to(np.float32(weight), shape)


@recent
def module(name):
    """The same as one program, in which all is valid and weighs the same by default."""
    run = on_host(jax.jit(module_with_gradients(name)))

    def of(params, xs, valid=None, weight=1.0):
        every, weight = all_of(name, xs, weight)
        return run(params, xs, every if valid is None else valid, weight)

    return of
