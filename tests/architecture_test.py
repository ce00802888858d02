"""Who may import whom, and that nothing stands outside the order of the folders."""

import ast
import pathlib

import pytest

from attnjax.core import registry

ROOT = pathlib.Path(__file__).parents[1]
LAYERS = (  # path prefix -> the first-party prefixes that it may import beside its own folder
    ("pallas_kernels/", ()),
    ("attnjax/core/", ()),
    ("attnjax/ops/", ("attnjax.core", "pallas_kernels")),
    ("attnjax/parallel/", ("attnjax.core", "attnjax.ops", "pallas_kernels")),
    ("attnjax/models/", ("attnjax.core", "attnjax.parallel")),
    ("attnjax/zoo/", ("attnjax.core", "attnjax.models")),
    ("attnjax/tasks/", ("attnjax.core",)),
    ("experiments/", ("attnjax",)),
)
FACE = ("__init__", "cli", "commands", "papers", "catalogue")  # attnjax/*.py: may import anything
FAMILY = ("attnjax.core", "attnjax.ops", "pallas_kernels")
HEAVY = {"optax", "orbax", "tensorflow_datasets", "grain"}
HEAVY_ALLOWED = ("experiments/", "attnjax/tasks/", "attnjax/zoo/")
FILES = [
    path
    for top in ("pallas_kernels", "attnjax", "experiments")
    for path in sorted((ROOT / top).rglob("*.py"))
]
every_file = pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def below(name, prefixes):
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


@every_file
def test_imports_point_down(path):
    name = path.relative_to(ROOT).as_posix()
    ours = [i for i in imports(path) if below(i, ("attnjax", "pallas_kernels", "experiments"))]
    for prefix, allowed in LAYERS:
        if name.startswith(prefix):
            own = prefix.rstrip("/").replace("/", ".")
            assert all(below(i, (*allowed, own)) for i in ours), ours
            return
    if path.parent.name == "attnjax" and path.stem in FACE:
        return
    assert all(below(i, FAMILY) for i in ours), ours  # and no mechanism imports another


@every_file
def test_heavy_libraries_stay_in_experiments_tasks_and_zoo(path):
    used = {name.partition(".")[0] for name in imports(path)}
    if not path.relative_to(ROOT).as_posix().startswith(HEAVY_ALLOWED):
        assert not used & HEAVY
    assert not used & {"chex", "pytest"}, "for tests alone"


@every_file
def test_modules_leave_meshes_and_transforms_to_others(path):
    if path.relative_to(ROOT).as_posix().startswith(("attnjax/models/", "attnjax/core/sharding")):
        return
    text = path.read_text()
    for word in ("with_logical_", "nn.Partitioned", "nn.scan(", "nn.jit(", "nn.remat("):
        assert word not in text


@pytest.mark.parametrize("name", registry.names())
def test_every_record_has_a_test_file_of_its_own(name):
    family, _, file = name.partition(".")
    assert (ROOT / "tests" / family / f"{file}_test.py").exists()


def test_every_family_file_is_a_record_or_helps_one():
    """A family folder holds records and nothing else, except the data sources' shared code."""
    known = {tuple(name.split(".")) for name in registry.names()}
    families = {family for family, _ in known} - {"tasks"}
    for family in families:
        for path in (ROOT / "attnjax" / family).glob("*.py"):
            assert path.stem == "__init__" or (family, path.stem) in known


@every_file
def test_every_file_says_what_it_is(path):
    doc = ast.get_docstring(ast.parse(path.read_text()))
    assert doc or (path.name == "__init__.py" and not path.read_text().strip())
