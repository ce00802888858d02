"""Settings of every test here: strict shapes; all else as users have it, optimizations included."""

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_rank_promotion", "raise")
