"""How far the mean over a few seeds may be from the mean over all."""

import statistics
from collections.abc import Iterable, Mapping, Sequence

import scipy.special  # jax needs it too


def t_interval(values: Sequence[float], *, level: float = 0.95) -> tuple[float, float | None]:
    """(mean, half the width of Student's interval around it); None in its place for one value.

    Raises ValueError without values.
    """
    if not values:
        raise ValueError("an interval needs one value at least")
    mean, n = statistics.fmean(values), len(values)
    if n == 1:
        return mean, None
    quantile = scipy.special.stdtrit(n - 1, (1 + level) / 2)
    return mean, float(quantile * statistics.stdev(values) / n**0.5)


def of(rows: Iterable[Mapping], name: str) -> tuple[float, float | None] | None:
    """The interval of the values called `name` that are not None; None without any."""
    values = [row[name] for row in rows if row[name] is not None]
    return t_interval(values) if values else None
