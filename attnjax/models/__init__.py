"""Backbones that take a mechanism by name: each file here with a line that starts `MODEL = `.

    models.create("lm", vocab_size=64, features=32, depth=2, num_heads=4, mixers=["gqa"])

The arguments are data that JSON can hold, so that a config, a command line and a card of the zoo
describe the same model.
"""

import functools
import importlib
import pathlib
from typing import Any

import flax.linen as nn

from attnjax.core import registry

_HERE = pathlib.Path(__file__).parent


@functools.cache
def kinds() -> tuple[str, ...]:
    """The names that `create` knows. Nothing is imported."""
    has_model = lambda path: "\nMODEL = " in path.read_text(encoding="utf-8")
    return tuple(sorted(path.stem for path in _HERE.glob("*.py") if has_model(path)))


def create(kind: str, **options: Any) -> nn.Module:
    """The model of a kind, with lists in `options` as tuples.

    Raises ValueError for an unknown kind or option, naming the nearest, or a missing option.
    """
    if kind not in kinds():
        nearest = registry.nearest(kind, kinds())
        raise ValueError(f"no model is called {kind!r}{nearest}; there are {', '.join(kinds())}")
    model = importlib.import_module(f"attnjax.models.{kind}").MODEL
    as_tuple = lambda value: tuple(value) if isinstance(value, list) else value
    options = {name: as_tuple(value) for name, value in options.items()}
    return registry.construct(kind, model, options)
