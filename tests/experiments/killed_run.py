"""A run that saves at every step, to be killed; the tests call it in processes of their own.

It resumes, saves with `keep=2`, so that it deletes at every step too, and prints "durable <step>"
for each step that must survive a kill.
"""

import pathlib

import jax
import numpy as np

from experiments import checkpointing

STEPS = 10_000
SIZE = 200_000


def state_at(step: int) -> dict:
    """Drawn by numpy: JAX would compile what draws."""
    key = jax.random.wrap_key_data(np.array([7, step], np.uint32))
    w = np.random.default_rng(step).integers(2**32, size=SIZE, dtype=np.uint32)
    return {"key": key, "w": jax.numpy.asarray(w)}


def train(directory: pathlib.Path) -> None:
    with checkpointing.Checkpointer(directory, fingerprint={}, keep=2) as checkpointer:
        restored = checkpointer.restore_latest_valid(state_at(0))
        first = restored.step + 1 if restored else 1
        for step in range(first, STEPS):
            checkpointer.save(step, state_at(step), {"next": step})
            if step > first:
                print(f"durable {step - 1}", flush=True)
