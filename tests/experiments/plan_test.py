import dataclasses
import json
import math
import re

import jax
import pytest

from experiments import config as configs
from experiments import plan, targets
from experiments.planning import accelerators, program
from experiments.planning import count as plan_count
from experiments.planning import mesh as plan_mesh

TINY = plan.Plan(
    task="mqar(vocab_size=32, length=16, num_pairs=2)",
    model="lm(features=8, depth=1, num_heads=2, mlp_ratio=2, max_length=16)",
    batch_size=8,
    target="h100:4",
)
CONTEXT = configs.Mesh(context=4)


@pytest.fixture
def here(monkeypatch):
    """Plans compile for the four CPU devices of a test, whatever the target."""
    compile_for = lambda target, fn, *shapes: fn.trace(*shapes).lower().compile()
    monkeypatch.setattr(plan_mesh, "devices", lambda target: tuple(jax.devices()))
    monkeypatch.setattr(targets, "compile_for", compile_for)


def plans(tmp_path, **options):
    file = tmp_path / "plan.json"
    assert plan.plan(dataclasses.replace(TINY, json=str(file), **options)) == 0
    return json.loads(file.read_text())


def test_memory_and_operations_of_a_step(here, tmp_path, capsys):
    data = plans(tmp_path)
    (found,) = data["plans"]
    V, L, D, F, T, tokens = 32, 1, 8, 16, 16, 8 * 16 // 4
    matrices = L * (4 * D * D + 3 * D * F) + V * D
    others = V * D + T * D + (2 * L + 1) * D  # embedding, positions, norms
    assert found["fits"] and found["length"] == T
    assert found["memory"]["parameters"] == 4 * (matrices + others)
    assert found["memory"]["optimiser"] == 8 * (matrices + others) + 8  # and two counters
    assert found["memory"]["batch"] == 3 * 4 * tokens
    # forward once, backward twice; attention has two products of T x T x features a sequence
    assert found["count"]["flops"] == 6 * matrices * tokens + 3 * 2 * 2 * L * T * D * tokens
    assert set(found["count"]["collectives"]) == {"all-reduce"}
    assert 0 < found["at_least_seconds"] < 1e-3
    out = capsys.readouterr().out
    assert "fits: " in out and "at least" in out


def test_strategies_are_compared(here, tmp_path, capsys):
    names = ("ring", "gather")
    data = plans(tmp_path, mesh=CONTEXT, context_strategies=names)
    found = {row["strategy"]: row for row in data["plans"]}
    assert set(found) == set(names)
    assert "collective-permute" in found["ring"]["count"]["collectives"]
    times = [row["at_least_seconds"] for row in data["plans"]]
    assert times == sorted(times)
    out = capsys.readouterr().out
    assert all(name in out for name in names)


def test_a_strategy_that_cannot_is_a_row_of_its_own(here, tmp_path, monkeypatch, capsys):
    def make(config, target, mesh, strategy):
        if strategy == "gather":
            raise NotImplementedError("gather can't honour this; ring would")
        return dataclasses.replace(program.refused(strategy, ""), fits=True, memory={"all": 5})

    monkeypatch.setattr(program, "make", make)
    data = plans(tmp_path, mesh=CONTEXT, context_strategies=("gather", "ring"))
    assert [row["strategy"] for row in data["plans"]] == ["ring", "gather"]
    assert "ring would" in capsys.readouterr().out
    with pytest.raises(NotImplementedError):  # on its own it is an error
        plans(tmp_path, mesh=CONTEXT, context_strategies=("gather",))


@pytest.mark.parametrize("most", [16, 17, 3000, 5000, 10**6])
def test_longest_is_found(here, tmp_path, monkeypatch, most):
    def fake(config, target, mesh, strategy):
        length = configs.make_task(config.task, "train")[1].length
        return program.Planned(
            strategy="", length=length, fits=length <= most, over=0, refused="",
            memory={"all": length}, count=None,
        )  # fmt: skip

    monkeypatch.setattr(program, "make", fake)
    longest = plans(tmp_path, longest=True)["longest"]["length"]
    assert longest <= most < max(longest * 1.07, longest + 128) + 128


def test_another_length_changes_task_and_positions():
    config = configs.Experiment(task="copy(length=8, num_tokens=4)", model="lm(max_length=12)")
    longer = program.at_length(config, 128)
    assert longer.task == "copy(length=124, num_tokens=4)"
    assert longer.model == "lm(max_length=128)"


def test_a_program_that_the_compiler_refuses(here, monkeypatch, capsys):
    def compile_for(target, fn, *shapes):
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: the total memory (324.32G) exceeds available HBM (15.75G)."
        )

    monkeypatch.setattr(targets, "compile_for", compile_for)
    assert plan.plan(dataclasses.replace(TINY, target="v5e:2x2")) == 1
    assert "does not fit: 308.57 GiB more" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(target=""), "--target must say"),
        (dict(target="v5:4x4"), "did you mean v5"),
        (dict(target="tpu"), "there are v5e, v6e, v5p, h100"),
        (dict(target="v5e:3x3"), "2x2"),
        (dict(target="v5p:4x4"), "2x2x1"),
        (dict(target="h100:16"), "2x8"),
        (dict(mesh=configs.Mesh(data=3)), "h100:4 has 4"),
        (dict(batch_size=6), "multiple of 4"),
        (dict(mesh=CONTEXT, task="mqar(length=66)"), "64 or 68"),
        (dict(context_strategies=("ring",)), "mesh.context > 1"),
        (dict(mesh=CONTEXT, context_strategies=("rang",)), "ring"),
        (dict(mesh=CONTEXT, strategy="rang"), "must be one of the mixers'"),
        (dict(mesh=CONTEXT, strategy="ring", context_strategies=("ring",)), "not both"),
        (dict(parallel="pmap"), "parallel=pmap"),
        (dict(dry_run=True), "dry_run"),
        (dict(task="digits", model="vit", longest=True), "length"),
    ],
)
def test_what_cannot_be_planned_is_refused(here, options, says):
    with pytest.raises(ValueError, match=re.escape(says)) as error:
        plan.plan(dataclasses.replace(TINY, **options))
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "says"), [(["mqra"], "mqar"), (["mqar", "--target", "v4:2x2"], "v5e:4x4")]
)
def test_on_the_command_line_it_is_one_line(capsys, options, says):
    assert plan.main(options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("attnjax plan: ") and says in line


@pytest.mark.parametrize("error", [RuntimeError, NotImplementedError, ModuleNotFoundError])
@pytest.mark.parametrize(
    ("target", "compiler"), [("v5e:2x2", "libtpu"), ("h100:8", "CUDA plugin of jax")]
)
def test_a_compiler_that_is_missing_names_the_extra(monkeypatch, error, target, compiler):
    def devices(target):
        raise error("not installed")

    monkeypatch.setattr(targets, "devices", devices)
    with pytest.raises(ValueError, match=rf"{compiler}: pip install 'attnjax\[plan\]'"):
        plan.plan(dataclasses.replace(TINY, target=target))


def test_every_accelerator_has_a_public_source():
    for name, accelerator in accelerators.ACCELERATORS.items():
        assert accelerator.name == name and accelerator.source.startswith("https://")
        assert all(math.isfinite(x) and x > 0 for x in (accelerator.flops, accelerator.links))


@pytest.mark.parametrize(
    ("source", "short"),
    [
        ("state[\\'params\\'][\\'embed\\'][\\'embedding\\']", "state/params/embed/embedding"),
        ("jit(update)/jvp(LM)/LM._through/while/body/eval_jaxpr/layers.<lambda>/block_0/"
         "block_0._after/mlp/up/dense/dot_general",
         "forward block_0._after/mlp/up/dense/dot_general"),
        ("jit(update)/transpose(jvp(LM))/while/checkpoint/rematted_computation/mixer/out/add",
         "again mixer/out/add"),
        ("jit(update)/transpose(jvp(LM))/(a/b/mul:c/d/add)", "backward a/b/mul"),
        ("shard_map", "shard_map"),
    ],
)  # fmt: skip
def test_names_of_places_are_short(source, short):
    assert plan_count.short(source) == short
