"""What the benchmarks of operations time: sizes, a mask, a direction, and random arrays of them.

Shapes of accelerators are those that other libraries publish numbers of, for one H100.
"""

import dataclasses
from typing import Literal

import jax

from experiments.measuring.turns import Way


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One thing to time."""

    batch: int = 1
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    mask: Literal["full", "causal", "window", "documents", "padding"] = "full"
    """A padded sequence has three quarters of its keys at least."""
    bias: bool = False
    """Of each score; it gets no gradient."""
    way: Way
    dtype: str

    def __str__(self):
        either = lambda a, b: f"{a}" if a == b else f"{a}/{b}"
        heads, size = either(self.heads, self.kv_heads), either(self.head_dim, self.value_dim)
        mask = f"{self.mask}, bias" if self.bias else self.mask
        batch = f"B {self.batch}, " if self.batch > 1 else ""
        return f"{batch}T {self.length}, N {heads}, H {size}, {mask}, {self.way}"


def shape(
    length: int,
    heads: int,
    head_dim: int,
    *,
    batch: int = 1,
    kv_heads: int | None = None,
    value_dim: int | None = None,
    mask: str = "full",
    bias: bool = False,
) -> dict:
    """Fields of a Case; kv_heads and value_dim are heads and head_dim where None."""
    kv_heads, value_dim = kv_heads or heads, value_dim or head_dim
    return dict(
        batch=batch, length=length, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
        value_dim=value_dim, mask=mask, bias=bias,
    )  # fmt: skip


PLAIN = (
    shape(16384, 16, 128),
    shape(16384, 16, 128, mask="causal"),
    shape(16384, 8, 256),
    shape(16384, 32, 64),
    shape(4096, 16, 128, batch=4, mask="causal"),
    shape(1024, 16, 128, batch=16, mask="causal"),
    shape(4096, 32, 128, batch=32, kv_heads=8, mask="causal"),  # Mixtral
    shape(1024, 16, 192, batch=512, value_dim=128, mask="causal"),  # DeepSeek-V2
)
MASKED = (
    shape(16384, 16, 128, mask="documents"),
    shape(16384, 16, 128, mask="window"),
    shape(16384, 16, 128, bias=True),
)
FOLDING = (shape(4864, 4, 32, batch=128, mask="padding", bias=True),)  # AlphaFold


def draw(number: int, shape: tuple[int, ...], dtype: str) -> jax.Array:
    """Normal numbers."""
    return jax.random.normal(jax.random.key(number), shape, dtype)


def tokens_of(case: Case) -> tuple[jax.Array, ...]:
    """q, k, v."""
    sizes = (
        (case.heads, case.head_dim),
        (case.kv_heads, case.head_dim),
        (case.kv_heads, case.value_dim),
    )
    return tuple(draw(i, (case.batch, case.length, *x), case.dtype) for i, x in enumerate(sizes))


def bias_of(case: Case) -> jax.Array | None:
    """The bias, or None."""
    size = 1, case.heads, case.length, case.length
    return draw(3, size, case.dtype) if case.bias else None


def operations(case: Case, share: float) -> float:
    """Of the matrix products, over a share of all scores; a backward makes the scores again."""
    H, V = case.head_dim, case.value_dim
    features = {"forward": H + V, "backward": 3 * H + 2 * V, "forward+backward": 4 * H + 3 * V}
    return 2.0 * case.batch * case.heads * case.length**2 * features[case.way] * share
