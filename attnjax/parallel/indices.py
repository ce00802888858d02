"""Dropout and score_mod on a device: told the batch and head index of the whole, not of a piece."""

import dataclasses
import functools
from typing import Any

import jax
from jaxtyping import Array, Int

from attnjax.ops import dropout


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["key", "batch", "head"], meta_fields=["rate"]
)
@dataclasses.dataclass(frozen=True)
class Shifted(dropout.Dropout):
    """Dropout where batch entry and head 0 are the whole's number `batch` and `head`."""

    batch: int | Int[Array, ""] = 0
    head: int | Int[Array, ""] = 0

    def keep(self, b, n, t, s):
        """As of `Dropout`."""
        return super().keep(b + self.batch, n + self.head, t, s)


def shifted(options: dict[str, Any], *, batch=0, head=0) -> dict[str, Any]:
    """Options of a function in which `dropout` and `score_mod` count on from batch and head."""
    drop, mod = options.get("dropout"), options.get("score_mod")
    if drop is not None:
        b0, n0 = batch + getattr(drop, "batch", 0), head + getattr(drop, "head", 0)
        options = options | dict(dropout=Shifted(drop.rate, drop.key, b0, n0))
    if mod is not None:
        counted = lambda x, b, n, t, s: mod(x, b + batch, n + head, t, s)
        options = options | dict(score_mod=counted)
    return options
