"""Small trainings inside tests."""

import jax
import optax


def fit(loss, params, *, steps: int, learning_rate: float, seed: int = 0):
    """`params` after `steps` of Adam on loss(params, key), each with a key of its own."""
    optimizer = optax.adam(learning_rate)

    def step(carry, key):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params, key), state)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(jax.random.key(seed), steps)
    run = jax.jit(lambda carry: jax.lax.scan(step, carry, keys)[0])
    return run((params, optimizer.init(params)))[0]
