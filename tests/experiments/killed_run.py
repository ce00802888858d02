"""Runs that save at every step, to be killed; the tests start this file as a process.

For each line of standard input, a directory, it forks a run there and prints "run <process id>".
The run resumes, saves with `keep=2`, so that it deletes at every step too, and prints
"durable <step>" for each step that must survive a kill. Forking spares an import of jax for each.
"""

import os
import sys

import jax
import jax.numpy as jnp

from experiments import checkpointing

STEPS = 10_000


def state_at(step: int) -> dict[str, jax.Array]:
    key = jax.random.fold_in(jax.random.key(7), step)
    return {"key": key, "w": jax.random.bits(key, (200_000,), jnp.uint32)}


def train(directory: str) -> None:
    with checkpointing.Checkpointer(directory, fingerprint={}, keep=2) as checkpointer:
        restored = checkpointer.restore_latest_valid(state_at(0))
        first = restored.step + 1 if restored else 1
        for step in range(first, STEPS):
            checkpointer.save(step, state_at(step), {"next": step})
            if step > first:
                print(f"durable {step - 1}", flush=True)


def main() -> None:
    for line in sys.stdin:
        process = os.fork()
        if process == 0:
            train(line.strip())
            os._exit(0)
        print(f"run {process}", flush=True)
        os.waitpid(process, 0)
        print("over", flush=True)


if __name__ == "__main__":
    main()
