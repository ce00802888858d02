"""Equal budgets: models of different mechanisms with the same number of parameters.

What a mechanism has more or less than another is given to the MLPs: their width changes, and
features, heads and so the sizes of decode states stay those of the config. Only where the MLPs
would have less than half of the config's width is the whole model made narrower.
"""

import dataclasses
import functools

import jax

from attnjax.core import registry
from experiments import config as configs
from experiments import dry_run, learning, placement


def parameters(config) -> int:
    """Numbers that a config trains; shapes only. ValueError where its parts don't fit."""
    placed, _ = placement.prepare(config)
    return sum(leaf.size for leaf in jax.tree.leaves(placed.target["params"]))


def fit(config, wanted: int, *, tolerance: float):
    """`config` with MLPs, and if need be features, such that it has `wanted` parameters.

    Raises ValueError where no width comes within `tolerance`, a share of `wanted`.
    """
    model = _model(config)
    least = max(1, round(model.mlp_ratio * model.features / 2))
    # Head dims go down by fours, as rotations want pairs and some mechanisms rotate a half.
    for features in range(model.features, 0, -4 * model.num_heads):
        hidden = _mlp_width(config, features, wanted)
        if hidden >= least:
            fitted = _wide(config, features, hidden)
            if abs(parameters(fitted) - wanted) <= tolerance * wanted:
                return fitted
    raise ValueError(
        f"no width has {wanted:,} parameters within {tolerance:.1%}: "
        "choose other parameters or tolerance"
    )


def _wide(config, features, hidden):
    """The config with so many features, and `hidden` in its MLPs."""
    model = configs.changed(config.model, features=features, mlp_ratio=hidden / features)
    return dataclasses.replace(config, model=model)


def _mlp_width(config, features, wanted) -> int:
    """What brings a model closest to `wanted` parameters: each unit adds as many as another."""
    one, two = (parameters(_wide(config, features, hidden)) for hidden in (1, 2))
    return 1 + round((wanted - one) / (two - one))


def _model(config):
    _, source = configs.make_task(config.task, "train")
    return learning.make_model(learning.model_description(config, source))


def state_bytes(config) -> int | None:
    """Bytes of the decode state of one sequence as long as the task's; None without streaming."""
    records = [registry.get(registry.parse(text)[0]) for text in config.mixers]
    if not all(registry.Claim.STREAMABLE in record.claims for record in records):
        return None
    _, source = configs.make_task(config.task, "train")
    start = functools.partial(_model(config).init_with_output, method="init_state")
    size = 1, len(source[0]["inputs"])
    return dry_run.bytes_per_device(jax.eval_shape(lambda: start(jax.random.key(0), *size)[0]))
