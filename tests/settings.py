"""Settings of every process of tests: on the CPU, exact products, quick compilation."""

import gc

import jax


def settle() -> None:
    """Before anything is computed."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_default_matmul_precision", "highest")
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_include_full_tracebacks_in_locations", False)  # a fifth less to compile


def collect_less_garbage() -> None:
    """After imports: what is there by now stays, so the collector need not go through it again.

    Tracing makes many small objects and few cycles: by default it would look for those too often.
    """
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)
