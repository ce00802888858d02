"""Equal budgets: models of different mechanisms with the same number of parameters.

What a mechanism has more or less than another is given to the MLPs: their width changes, and
features, heads and so the sizes of decode states stay those of the config. Only where the MLPs
would become narrower than the model is the whole model made narrower.
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
    _, options = registry.parse_call(config.model)
    widths = range(options["features"], 0, -2 * options["num_heads"])  # even, for rotations
    fitting = filter(None, (_with_mlps(config, features, wanted) for features in widths))
    fitted = next(fitting, None)
    if fitted is None or abs(parameters(fitted) - wanted) > tolerance * wanted:
        raise ValueError(
            f"{config.mixers[0]} has no width with {wanted:,} parameters within {tolerance:.1%}: "
            "choose other parameters or tolerance"
        )
    return fitted


def _with_mlps(config, features, wanted):
    """The config so wide, with MLPs that make up the rest; None where those would be narrower."""
    wide = lambda F: dataclasses.replace(
        config, model=configs.changed(config.model, features=features, mlp_ratio=F / features)
    )
    least, more = parameters(wide(features)), parameters(wide(2 * features))
    F = features + round((wanted - least) * features / (more - least))  # the count is linear in F
    return None if features > F else wide(F)


def state_bytes(config) -> int | None:
    """Bytes of the decode state of one sequence as long as the task's; None without streaming."""
    records = [registry.get(registry.parse(text)[0]) for text in config.mixers]
    if not all(registry.Claim.STREAMABLE in record.claims for record in records):
        return None
    _, source = configs.make_task(config.task, "train")
    model = learning.make_model(learning.model_description(config, source))
    start = functools.partial(model.init_with_output, method="init_state")
    size = 1, len(source[0]["inputs"])
    return dry_run.bytes_per_device(jax.eval_shape(lambda: start(jax.random.key(0), *size)[0]))
