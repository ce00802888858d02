"""Attention mechanisms as pure JAX functions and thin Flax modules, checked against their papers.

    attnjax.names()                      every record, as "family.name"
    attnjax.get("gqa")                   one record: its function, module, claims and papers
    attnjax.build("gqa", num_heads=4)    a Flax module, by name and options
    attnjax.dot_product_attention(...)   softmax attention over (B T N H)
    attnjax.papers.rows()                every paper, and what the library holds of it
    attnjax.models, attnjax.zoo          backbones that take a mechanism by name; trained models

Each name is imported when it is first used, so that `import attnjax` costs nothing.
"""

import importlib

__version__ = "0.1.0"

_HOME = {
    "names": "core.registry",
    "get": "core.registry",
    "build": "core.registry",
    "dot_product_attention": "ops.dot_product_attention",
}
_MODULES = ("models", "papers", "zoo")

__all__ = ["__version__", *_HOME, *_MODULES]


def __getattr__(name: str):
    if name in _HOME:
        return getattr(importlib.import_module(f"attnjax.{_HOME[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"attnjax.{name}")
    raise AttributeError(f"module 'attnjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
