"""The records that a test runs for: `@every(registry.Probe)` runs one for each probe."""

import pytest

from attnjax.core import registry

NAMES = {name: registry.get(name) for name in registry.names()}


def each(names):
    """Runs a test for each name. The scope puts it next to the other tests of that name."""
    return pytest.mark.parametrize("name", names, scope="module")


def every(kind):
    return each([name for name, record in NAMES.items() if isinstance(record, kind)])


def has(name, claim):
    return claim in getattr(NAMES[name], "claims", ())


def every_mechanism_with(claim):
    return each([name for name in NAMES if has(name, claim)])


every_mechanism = every(registry.Mechanism)
