"""Fit a few parameters to data drawn anew for every step, all on the device."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
import rich.progress

_CHUNK = 100  # steps between looks at the progress bar


def initial(module, draw: Callable[[jax.Array], tuple], *, seed: int, inputs: int = 1):
    """Parameters of a module for the first `inputs` of what is drawn, by one program."""
    shapes = jax.eval_shape(draw, jax.random.key(0))[:inputs]
    blank = lambda: [jnp.zeros(x.shape, x.dtype) for x in shapes]
    return jax.jit(lambda key: module.init(key, *blank()))(jax.random.key(seed))


def fit(
    loss: Callable[..., jax.Array],
    params,
    draw: Callable[[jax.Array], tuple],
    *,
    steps: int,
    learning_rate: float,
    seed: int = 0,
    label: str = "fit",
):
    """Parameters after `steps` updates of Adam by loss(params, *draw(key)).

    The rate falls to 0 along a cosine. The bar shows `label` and the loss of the last step. Raises
    FloatingPointError where the loss is not finite.
    """
    adam = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))

    def step(carry, key):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params, *draw(key))
        updates, state = adam.update(grads, state)
        return (optax.apply_updates(params, updates), state), value

    several = jax.jit(lambda carry, keys: jax.lax.scan(step, carry, keys))
    carry, keys = (params, adam.init(params)), jax.random.split(jax.random.key(seed), steps)
    columns = ("{task.description}", rich.progress.BarColumn(), rich.progress.TimeRemainingColumn())
    with rich.progress.Progress(*columns, transient=True) as bar:
        task = bar.add_task(label, total=steps)
        for start in range(0, steps, _CHUNK):
            carry, values = several(carry, keys[start : start + _CHUNK])
            value = float(values[-1])
            if not value < float("inf"):
                raise FloatingPointError(f"{label}: loss {value} by step {start + len(values)}")
            bar.update(task, advance=len(values), description=f"{label}: loss {value:.4g}")
    return carry[0]


def mean_loss(loss, params, draw, *, batches: int, seed: int) -> float:
    """Mean of loss(params, *draw(key)) over batches of their own."""
    one = lambda key: loss(params, *draw(key))
    return float(jax.jit(lambda keys: jax.lax.map(one, keys))(
        jax.random.split(jax.random.key(seed), batches)).mean())  # fmt: skip
