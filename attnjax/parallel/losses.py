"""Losses that a function adds to every gradient: of each device its share, as all are summed.

Such a loss (`ops.auxiliary_loss`) is a mean over examples, heads and queries, and its weight is an
option of the function. A device takes the mean over its own, so its weight is less by as much as
they are fewer.
"""

from typing import Any

_WEIGHTS = ("distill",)  # options that weigh such a loss


def shared(options: dict[str, Any], share: float) -> dict[str, Any]:
    """Options of a function that is called on this share of examples, heads and queries."""
    return options | {name: share * options[name] for name in _WEIGHTS if name in options}
