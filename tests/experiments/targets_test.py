"""Targets where their compilers are missing; where they aren't, compile_tests has the rest."""

import importlib.util

import pytest

from experiments import targets


@pytest.mark.parametrize(("target", "compiler"), [("v5e:2x2", "libtpu"), ("h100:1", "jax_plugins")])
def test_a_missing_compiler_is_named(target, compiler):
    if importlib.util.find_spec(compiler):
        pytest.skip(f"{compiler} is installed")
    with pytest.raises(NotImplementedError, match=f"target='{target}' needs the extra `plan`"):
        targets.devices(target)
