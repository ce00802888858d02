"""What a training step computes: model, loss, optimiser, and one update as a pure function.

A state is a dict of arrays: params, opt_state, step and key. `update` is the same for jit over a
mesh and for pmap over devices; `axis` alone tells it whose sums to add up.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from attnjax import models
from attnjax.core import registry

State = dict[str, Any]
Batch = dict[str, jax.Array]


def model_description(config, source) -> dict[str, Any]:
    """{"kind", "options"} for `attnjax.models.create`: those of the config and of the task."""
    kind, options = registry.parse_call(config.model)
    example = source[0]
    if hasattr(source, "vocab_size"):
        given = dict(vocab_size=source.vocab_size)
        fitting = "lm"
    elif "label" in example:
        *size, channels = example["image"].shape
        given = dict(image_size=list(size), channels=channels, num_classes=source.num_classes)
        fitting = "vit"
    else:
        raise ValueError(f"task {config.task} has neither tokens nor labels: no model fits it yet")
    if kind != fitting and kind in ("lm", "vit"):
        raise ValueError(f"task {config.task} fits model {fitting}, not {kind}")
    given |= dict(mixers=list(config.mixers), dtype=config.dtype)
    as_data = lambda value: list(value) if isinstance(value, tuple) else value
    return {"kind": kind, "options": given | {k: as_data(v) for k, v in options.items()}}


def make_model(description, *, parallel: Callable | None = None):
    """The module of a description; `parallel` gives mechanisms their sharded function."""
    extra = {} if parallel is None else {"parallel": parallel}
    return models.create(description["kind"], **description["options"], **extra)


def loss_sums(model, params, batch: Batch, key, *, label_smoothing: float = 0.0):
    """Sums over a batch: (loss, {"loss", "correct", "weight"}), by weight of each target.

    Cross-entropy in nats, of tokens (inputs, targets, weights) or of images (image, label, and
    weights that are 0 for padding).
    """
    if "label" in batch:
        logits = model.apply({"params": params}, batch["image"], rngs={"noise": key})
        targets = batch["label"]
    else:
        logits = model.apply({"params": params}, batch["inputs"], rngs={"noise": key})
        targets = batch["targets"]
    weights = batch.get("weights", jnp.ones(targets.shape))
    # by index, as targets over a large vocabulary would be the largest array of all
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    if label_smoothing:
        evenly = jax.nn.logsumexp(logits, -1) - logits.mean(-1)
        losses = (1 - label_smoothing) * losses + label_smoothing * evenly
    loss = (weights * losses).sum()
    correct = (weights * (logits.argmax(-1) == targets)).sum()
    return loss, {"loss": loss, "correct": correct, "weight": weights.sum()}


def optimizer(config) -> optax.GradientTransformation:
    """AdamW after clipping, with a linear warm-up and a cosine decay to a hundredth.

    The same object for the same numbers: what is compiled with it is found again.
    """
    warmup = min(config.warmup_steps, config.steps // 2)
    return _adamw(config.learning_rate, warmup, config.steps, config.weight_decay, config.clip_norm)


@functools.lru_cache
def _adamw(peak, warmup, steps, weight_decay, clip_norm):
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=peak,
        warmup_steps=warmup,
        decay_steps=steps,
        end_value=peak / 100,
    )
    decayed = functools.partial(jax.tree.map, lambda x: x.ndim > 1)
    adamw = optax.adamw(schedule, b2=0.99, weight_decay=weight_decay, mask=decayed)
    return optax.chain(optax.clip_by_global_norm(clip_norm), adamw)


def init_state(model, optimiser, example: Batch, seed: int | Int[Array, ""]) -> State:
    """The state before the first step."""
    key = jax.random.key(seed)
    x = jnp.asarray(example["image"] if "label" in example else example["inputs"])
    params = model.init({"params": key, "noise": key}, x)["params"]
    return dict(
        params=params,
        opt_state=optimiser.init(params),
        step=jnp.zeros((), jnp.int32),
        key=jax.random.fold_in(key, 1),
    )


def update(
    model, optimiser, state: State, batch: Batch, *, accumulate=1, label_smoothing=0.0, axis=None
) -> tuple[State, dict[str, Float[Array, ""]]]:
    """One step: (new state, metrics). A step that isn't finite leaves params and opt_state alone.

    The gradient is that of the mean loss over the whole batch, by weight: pieces of an
    accumulation and devices along `axis` add up sums and divide once.
    """
    key = jax.random.fold_in(state["key"], state["step"])
    loss = functools.partial(loss_sums, model, label_smoothing=label_smoothing)
    gradient = jax.grad(lambda p, b: loss(p, b, key), has_aux=True)
    sums = _accumulated(functools.partial(gradient, state["params"]), batch, accumulate)
    grads, totals = sums if axis is None else jax.lax.psum(sums, axis)
    grads = jax.tree.map(lambda g: g / jnp.maximum(totals["weight"], 1), grads)
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(norm) & jnp.isfinite(totals["loss"])
    updates, opt_state = optimiser.update(grads, state["opt_state"], state["params"])
    new = optax.apply_updates(state["params"], updates), opt_state
    old = state["params"], state["opt_state"]
    params, opt_state = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
    metrics = means(totals) | {"gradient_norm": norm, "finite": finite}
    return state | dict(params=params, opt_state=opt_state, step=state["step"] + 1), metrics


def means(totals: dict[str, Array]) -> dict[str, Array]:
    """Loss and accuracy per target from their sums."""
    weight = jnp.maximum(totals["weight"], 1)
    return {"loss": totals["loss"] / weight, "accuracy": totals["correct"] / weight}


def _accumulated(gradient, batch, pieces):
    """Sums of `gradient` over `pieces` of a batch."""
    if pieces == 1:
        return gradient(batch)
    # every piece takes examples from everywhere in the batch, so it is spread over all devices
    cut = jax.tree.map(lambda x: x.reshape(-1, pieces, *x.shape[1:]).swapaxes(0, 1), batch)
    shapes = jax.eval_shape(gradient, jax.tree.map(lambda x: x[0], cut))
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    add = lambda total, piece: (jax.tree.map(jnp.add, total, gradient(piece)), None)
    return jax.lax.scan(add, zero, cut)[0]
