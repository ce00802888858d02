"""What `make` and `pip install` give on a machine that isn't this one."""

import os
import pathlib
import re
import subprocess
import sys

import pytest
from packaging import requirements

import attnjax

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with `lib` as pip would install it, and the metadata in attnjax.egg-info."""
    folder = tmp_path_factory.mktemp("built")
    build = ["build", "--build-base", folder, "--build-lib", folder / "lib"]
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", folder, *build]
    subprocess.run(command, cwd=ROOT, check=True)
    return folder


def test_every_module_and_data_file_is_installed(built):
    for package in ("attnjax", "pallas_kernels", "experiments"):
        assert _files(ROOT, package) == _files(built / "lib", package)


def _files(root, package):
    paths = (root / package).rglob("*")
    return {p.relative_to(root) for p in paths if p.is_file() and "__pycache__" not in p.parts}


def test_the_list_of_papers_is_installed_as_a_file(built):
    installed = built / "lib/attnjax/papers.csv"
    assert not installed.is_symlink()
    assert installed.read_bytes() == (ROOT / "docs/papers.csv").read_bytes()


def test_metadata(built):
    text = (built / "attnjax.egg-info/PKG-INFO").read_text()
    assert f"\nVersion: {attnjax.__version__}\n" in text
    assert "\nRequires-Python: >=3.12\n" in text
    scripts = (built / "attnjax.egg-info/entry_points.txt").read_text()
    assert "attnjax = attnjax.cli:main" in scripts


def test_public_names():
    assert all(hasattr(attnjax, name) for name in dir(attnjax))
    assert attnjax.dot_product_attention.__name__ == "dot_product_attention"
    with pytest.raises(AttributeError, match="no attribute 'atention'"):
        attnjax.atention  # noqa: B018


def test_constraints_pin_what_setup_asks_for(built):
    pins = dict(line.split("==") for line in _lines(ROOT / "constraints.txt"))
    sections = (built / "attnjax.egg-info/requires.txt").read_text().split("\n\n[")
    asked = [s for s in sections if s.startswith(("jax", "experiments]", "test]"))]
    assert len(asked) == 3
    for line in "\n".join(asked).splitlines():
        if line and not line.endswith("]"):
            requirement = requirements.Requirement(line)
            name = re.sub(r"[-_.]+", "-", requirement.name).lower()
            assert requirement.specifier.contains(pins[name]), line


def _lines(path):
    return [line for line in path.read_text().splitlines() if not line.startswith("#")]


def _find_python(folder, **env):
    env = {"PATH": f"{folder}:/usr/bin:/bin", "HOME": str(folder)} | env
    command = ["sh", ROOT / "tools/find_python.sh"]
    return subprocess.run(command, env=env, capture_output=True, text=True)


def test_find_python_runs_candidates_before_it_believes_them(tmp_path):
    for version in ("3.12", "3.13", "3.14"):  # shims of a version manager: there, and dead
        _script(tmp_path / f"python{version}", "exit 127")
    _script(tmp_path / "python3", f'exec "{sys.executable}" "$@"')
    assert _find_python(tmp_path).stdout == "python3\n"


def test_find_python_looks_into_pyenv(tmp_path):
    folder = tmp_path / "versions"
    _script(folder / "3.9.1/bin/python3", "exit 1")
    _script(folder / "4.0.0/bin/python3", f'exec "{sys.executable}" "$@"')
    for name in ("python3.12", "python3.13", "python3.14", "python3", "python"):
        _script(tmp_path / name, "exit 1")
    found = _find_python(tmp_path, PYENV_ROOT=str(tmp_path))
    assert found.stdout == f"{folder}/4.0.0/bin/python3\n"


def test_find_python_says_in_one_line_what_is_missing(tmp_path):
    old = _script(tmp_path / "old", "exit 1")
    found = _find_python(tmp_path, PYTHON=str(old))
    assert (found.returncode, found.stdout) == (1, "")
    assert found.stderr == f"PYTHON={old} is no Python >= 3.12 with venv\n"


def _script(path, line):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)
    return path


def test_make_does_not_install_twice(tmp_path):
    """With a stamp newer than setup.py and constraints.txt, `make test` only runs the tests."""
    for name in ("Makefile", "setup.py", "constraints.txt"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    install = lambda: "pip install" in _make(tmp_path)
    assert install()
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv/installed").touch()
    assert not install()
    os.utime(tmp_path / ".venv/installed", (0, 0))
    assert install()


def _make(folder):
    command = ["make", "--dry-run", "test"]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout
