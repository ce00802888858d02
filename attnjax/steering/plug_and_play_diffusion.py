r"""Plug-and-play diffusion features: keep the layout of one image while drawing another.

Paper: Tumanyan et al., "Plug-and-Play Diffusion Features for Text-Driven Image-to-Image
Translation", arXiv:2211.12572, section 4, algorithm 1; inversion and steps by Song et al.,
"Denoising Diffusion Implicit Models", arXiv:2010.02502, eq. 12 without noise.

    guidance image -> noise by inversion; then denoise guidance and target side by side from it:
    attention of the target in chosen layers, first steps:  softmax(Q_guide K_guide^T / sqrt(H)) V
    features of the target in a chosen layer, first steps:  those of the guidance
    x_next = sqrt(a_next) (x - sqrt(1 - a) e) / sqrt(a) + sqrt(1 - a_next) e

The map says where things are and the values what they are, so the target gets the guidance's
layout and its own look. Nothing is trained. The paper injects attention in half of the steps
(decoder layers 4 to 11) and features in 80 % of them (decoder layer 4).

Shapes: B batch, T queries, S keys, N heads, H head dim, V value dim.
Unlike the paper: steps are counted from the noise; the negative prompt is left to the caller, as
is classifier-free guidance: a target batch of several times the guidance's takes it for each part.
"""

import fnmatch
import functools
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from attnjax.core import edit, registry
from attnjax.ops import dot_product_attention as ops

QueriesKeys = Mapping[str, tuple[jax.Array, jax.Array]]  # by path, as edit.read(what="qk") gives


def plug_and_play_diffusion(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N V"],
    guide_q: Float[Array, "B T N H"],
    guide_k: Float[Array, "B S N H"],
    *,
    step: int | Int[Array, ""] = 0,
    until: int | Int[Array, ""] = 1,
) -> Float[Array, "B T N V"]:
    """Attention of the target, by the guidance's map in the steps before `until`."""
    q, k = (_choose(step < until, *pair) for pair in ((guide_q, q), (guide_k, k)))
    return ops.dot_product_attention(q, k, v)


def inject(
    apply: Callable, guidance: QueriesKeys, *, when: bool | Bool[Array, ""] = True
) -> Callable:
    """`apply` in which attention at the guidance's paths has its queries and keys, when so.

    Raises ValueError where `apply` has no attention at one of the paths.
    """
    for path, guide in guidance.items():
        swap = lambda _, *own, guide=guide: tuple(map(functools.partial(_choose, when), guide, own))
        apply = edit.rewrite(apply, qk=swap, where=path)
    return apply


def features(apply: Callable, *, where: str) -> Callable:
    """`apply` that returns (its output, {path: output of the module at a path that matches})."""

    def reading(*args, **kwargs):
        found = {}

        def keep(path, output):
            found[path] = output
            return output

        return _at_modules(apply, where, keep)(*args, **kwargs), found

    return reading


def inject_features(
    apply: Callable, guidance: Mapping[str, jax.Array], *, when: bool | Bool[Array, ""] = True
) -> Callable:
    """`apply` in which modules at the guidance's paths give its features instead, when so."""
    for path, guide in guidance.items():
        swap = lambda _, output, guide=guide: _choose(when, guide, output)
        apply = _at_modules(apply, path, swap)
    return apply


def ddim_step(
    x: Float[Array, "*B"], noise: Float[Array, "*B"], a: Float[Array, ""], a_next: Float[Array, ""]
) -> Float[Array, "*B"]:
    """From signal share a to a_next, up or down, along the predicted `noise`."""
    clean = (x - jnp.sqrt(1 - a) * noise) / jnp.sqrt(a)
    return jnp.sqrt(a_next) * clean + jnp.sqrt(1 - a_next) * noise


def invert(
    denoise: Callable[..., jax.Array], x: Float[Array, "*B"], signal: Float[Array, "shares"]
) -> Float[Array, "*B"]:
    """The noise from which `denoise` draws x.

    signal is the share (alpha bar) from noise to image, signal[-1] that of x; denoise(x, step)
    predicts the noise at signal[step].
    """

    def back(x, step):
        noise = denoise(x, step)
        return ddim_step(x, noise, signal[step + 1], signal[step]), None

    return jax.lax.scan(back, x, jnp.arange(len(signal) - 1)[::-1])[0]


def translate(
    guide: Callable[..., jax.Array],
    target: Callable[..., jax.Array],
    noise: Float[Array, "*B"],
    signal: Float[Array, "shares"],
    *,
    attention: str,
    attention_until: int | Int[Array, ""],
    feature: str,
    feature_until: int | Int[Array, ""],
) -> tuple[Float[Array, "*B"], Float[Array, "*B"]]:
    """(guidance, target) drawn from the same noise, with the injections of algorithm 1.

    guide and target are one model under two prompts: (x, step) -> noise. attention and feature
    are patterns of paths, injected in the steps before `..._until`. signal is as for `invert`.
    """
    read = features(edit.read(guide, what="qk", where=attention), where=feature)

    def forward(pair, step):
        (e, queries_keys), found = read(pair[0], step)
        steered = inject(target, queries_keys, when=step < attention_until)
        steered = inject_features(steered, found, when=step < feature_until)
        move = lambda x, noise: ddim_step(x, noise, signal[step], signal[step + 1])
        return (move(pair[0], e), move(pair[1], steered(pair[1], step))), None

    return jax.lax.scan(forward, (noise, noise), jnp.arange(len(signal) - 1))[0]


def _choose(when, guide, own):
    """guide instead of own, when so; repeated along the batch to the parts of own."""
    if own.shape[0] % guide.shape[0] or own.shape[1:] != guide.shape[1:]:
        raise ValueError(f"guidance of shape {guide.shape} doesn't fit {own.shape}")
    parts = own.shape[0] // guide.shape[0]
    return jnp.where(when, jnp.tile(guide, (parts,) + (1,) * (own.ndim - 1)), own)


def _at_modules(apply, where, change):
    """`apply` in which a module at a path that matches gives change(path, its output)."""

    def wrapped(*args, **kwargs):
        matched = []

        def interceptor(call, args, kwargs, context):
            path = "/".join(context.module.path)
            if context.method_name != "__call__" or not fnmatch.fnmatchcase(path, where):
                return call(*args, **kwargs)
            matched.append(path)
            return change(path, call(*args, **kwargs))

        with nn.intercept_methods(interceptor):
            output = apply(*args, **kwargs)
        if not matched:
            raise ValueError(f"no module matches {where=}")
        return output

    return wrapped


def _example(key: jax.Array, T: int) -> dict[str, jax.Array]:
    draws = jax.random.normal(key, (5, 2, T, 4, 8))
    return dict(zip(("q", "k", "v", "guide_q", "guide_k"), draws, strict=True))


def _oracle(q, k, v, guide_q, guide_k, *, step=0, until=1):
    softmax = lambda q, k: jax.nn.softmax(jnp.einsum("BTNH,BSNH->BNTS", q, k) / q.shape[-1] ** 0.5)
    w = softmax(guide_q, guide_k) if step < until else softmax(q, k)
    return jnp.einsum("BNTS,BSNV->BTNV", w, v)


SPEC = registry.Intervention(
    fn=plug_and_play_diffusion,
    papers=("plug-and-play-diffusion",),
    example=_example,
    oracle=_oracle,
    identity=dict(until=0),
    untouched=lambda q, k, v, guide_q, guide_k: ops.dot_product_attention(q, k, v),
    variants=({}, dict(step=5, until=5), dict(step=4, until=5)),
)
