"""Measure a checkpoint of the zoo, or a run, on the test split of its task again.

attnjax evaluate vit_mha-tiny.digits@1
attnjax evaluate runs/digits
"""

import dataclasses
import math
import pathlib
import sys
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Repeats the metrics of a checkpoint on the whole test split of its task."""

    target: str
    """A name in the zoo, as `attnjax zoo list` gives them, or a run directory."""
    root: str | None = None
    """Another zoo folder."""
    tolerance: float = 1e-3
    """Largest relative difference from the card that is still the same."""


def main(argv: Sequence[str] | None = None) -> int:
    """0 where metrics are what the card says (or there is none), 1 where not, 2 for bad input."""
    import tyro

    # the target is positional: it is what the command is about
    config = tyro.cli(
        tyro.conf.configure(tyro.conf.PositionalRequiredArgs)(Evaluate),
        prog="attnjax evaluate",
        description=__doc__,
        args=sys.argv[1:] if argv is None else argv,
    )
    from attnjax import zoo

    try:
        return evaluate(config)
    except (ValueError, zoo.CheckpointCorrupted) as error:
        print(f"attnjax evaluate: {error}", file=sys.stderr)
        return 2


def evaluate(config: Evaluate) -> int:
    """Prints the metrics, beside those of the card where there is one."""
    from attnjax import models, zoo
    from experiments import evaluation, finished

    if pathlib.Path(config.target).is_dir():
        run = finished.load(config.target)
        module = models.create(run.description["kind"], **run.description["options"])
        measured = finished.measure(run.config.task, module, run.params)
        print(evaluation.text(measured))
        return 0
    module, params, card = zoo.load(config.target, root=config.root)
    measured = finished.measure(finished.task_text(card), module, params)
    same = True
    for name, value in measured.items():
        said = card.metrics[name]["per_seed"][0]
        close = math.isclose(value, said, rel_tol=config.tolerance, abs_tol=1e-6)
        same &= close
        print(f"{name}: {value:.4f}, card {said:.4f}: {'the same' if close else 'DIFFERENT'}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
