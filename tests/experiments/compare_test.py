"""A comparison from its command line to its page, and the parts that its numbers come from."""

import dataclasses
import json
import pathlib
import re
import shutil

import numpy as np
import pytest

from attnjax.core import registry
from attnjax.tasks import source
from experiments import budget, cells, compare, confidence, evaluation, step_cost, train
from experiments import config as configs
from experiments.comparing import plan, report

MECHANISMS = ("multi_head_attention", "hedgehog")
TASK = "mqar(vocab_size=16, length=8, num_pairs=2)"
TINY = {
    "task": TASK,
    "model": "lm(features=8, depth=1, num_heads=2)",
    "seeds": "2",
    "steps": "2",
    "batch-size": "16",
    "runs": "1",
}


def arguments(path, mechanisms=MECHANISMS, lengths=("8",), **changes):
    options = TINY | {"directory": str(path)} | {k.replace("_", "-"): v for k, v in changes.items()}
    flags = [word for name, value in options.items() for word in (f"--{name}", value)]
    return [*flags, "--lengths", *lengths, "--mechanisms", *mechanisms]


def results(path):
    return json.loads((path / "results.json").read_text())


@pytest.fixture(autouse=True)
def few_tests(monkeypatch):
    monkeypatch.setattr(source.Generated, "sizes", source.Generated.sizes | {"test": 32})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("compare") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source.Generated, "sizes", source.Generated.sizes | {"test": 32})
        assert compare.main(arguments(path)) == 0
    return path


def test_every_mechanism_is_trained_measured_and_shown(finished):
    found = results(finished)
    page = (finished / "report.html").read_text()
    assert [row["mechanism"] for row in found["rows"]] == list(MECHANISMS)
    for row in found["rows"]:
        assert f"<td>{row['mechanism']}</td>" in page
        assert [cell["seed"] for cell in row["cells"]] == [0, 1]
        for cell in row["cells"]:
            assert [point["step"] for point in cell["curve"]] == [1, 2]
            assert cell["accuracy"] == cell["curve"][-1]["accuracy"]
            assert cell["updates"] is None and cell["failure"] is None
        assert row["cells"][0]["bits"] != row["cells"][1]["bits"]
        assert [cost["length"] for cost in row["costs"]] == [8]
        assert all(cost["seconds"] > 0 and cost["memory"] > 4000 for cost in row["costs"])
        assert abs(row["parameters"] / found["parameters"] - 1) <= found["tolerance"]
    assert found["machine"].strip() in page
    assert {path.stem for path in finished.glob("*.png")} == {"curves", "states", "costs"}


def test_the_page_is_one_file(finished):
    page = (finished / "report.html").read_text()
    sources = re.findall(r"src='(.{22})", page)
    assert sources == ["data:image/png;base64,"] * 3
    assert "http" not in page.replace(results(finished)["machine"], "")


def test_the_table_has_the_interval_over_seeds(finished):
    row = results(finished)["rows"][1]
    mean, half = confidence.t_interval([cell["bits"] for cell in row["cells"]])
    assert f"{mean:.3f} ± {half:.3f}" in (finished / "report.html").read_text()


def test_a_finished_cell_is_not_trained_again(finished, tmp_path, monkeypatch):
    path = shutil.copytree(finished, tmp_path / "copy")
    before, trained, measured = results(path), [], []
    lines = next(path.rglob("metrics.jsonl")).read_text()

    def train_another(config):
        trained.append((*config.mixers, config.seed))
        folder = pathlib.Path(config.directory)
        folder.mkdir()
        (folder / "metrics.jsonl").write_text(lines)

    def measure_another(config, *, runs):
        measured.append(config.mixers)
        return {"seconds": 1.0, "memory": 5000}

    monkeypatch.setattr(train, "train", train_another)
    monkeypatch.setattr(step_cost, "measure", measure_another)
    assert compare.main(arguments(path)) == 0
    assert trained == measured == [] and results(path) == before
    more = arguments(path, ("hedgehog", "gqa(num_kv_heads=1)"), seeds="1",
                     parameters=str(before["parameters"]))  # fmt: skip
    assert compare.main(more) == 0
    assert trained == [("gqa(num_kv_heads=1)", 0)] and measured == [("gqa(num_kv_heads=1)",)]
    assert [row["mechanism"] for row in results(path)["rows"]] == ["hedgehog", measured[0][0]]


def test_a_stopped_training_is_not_finished(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "train", lambda config: 0)  # as after a signal at the first step
    assert compare.main(arguments(tmp_path)) == 0
    assert "the same command goes on" in capsys.readouterr().err
    assert not list(tmp_path.rglob("cell.json")) and not (tmp_path / "report.html").exists()


def test_a_cell_that_is_not_finite_is_told_and_not_counted(finished, tmp_path, monkeypatch):
    def fail(config):
        raise train.NotFinite("step 3: loss nan")

    config = dataclasses.replace(configs.named("mqar"), target=0.99)
    monkeypatch.setattr(train, "train", fail)
    cell = cells.trained(config, tmp_path)
    assert cell["failure"] == "step 3: loss nan" and cell["accuracy"] is None
    found = results(finished)
    found["rows"][0]["cells"][1] = cell
    page = report.write(tmp_path, found).read_text()
    assert "multi_head_attention, seed 0, is not counted: step 3: loss nan" in page
    accuracy = found["rows"][0]["cells"][0]["accuracy"]
    assert f"<td class='number'>{accuracy:.3f}</td>" in page


def test_the_target_ends_a_cell(tmp_path):
    assert compare.main(arguments(tmp_path, MECHANISMS[:1], target="0.0", seeds="1")) == 0
    [cell] = results(tmp_path)["rows"][0]["cells"]
    assert cell["updates"] == 1 and [point["step"] for point in cell["curve"]] == [1]


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(mechanisms=["hedgehogg"]), "did you mean hedgehog"),
        (dict(mechanisms=["gqa(num_kv_head=1)"]), "did you mean num_kv_heads"),
        (dict(mechanisms=["cbam"]), "cbam is not a causal mechanism"),
        (dict(mechanisms=["hedgehog", "hedgehog"]), "mechanisms=hedgehog hedgehog must be"),
        (dict(task="mqra"), "did you mean mqar"),
        (dict(task="digits"), "task=digits must be one of tokens"),
        (dict(task="mqar(num_pair=2)"), "did you mean num_pairs"),
        (dict(model="lm(depth=1)", parameters="99"), "needs the options features, num_heads"),
        (dict(model="vit(features=8)"), "fits model lm, not vit"),
        (dict(seeds="0"), "seeds=0 must be at least 1"),
        (dict(lengths=["0"]), "must be at least 1"),
        (dict(lengths=["1024"]), "batch_size=1 must be a multiple of 4"),
        (dict(parameters="99"), "multi_head_attention: no width has 99 parameters"),
    ],
)
def test_wrong_input_is_one_line_before_any_training(change, message, tmp_path, capsys):
    assert compare.main(arguments(tmp_path / "no", **change)) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert not (tmp_path / "no").exists()


def model(text="multi_head_attention", **options):
    task = "mqar(vocab_size=16, length=8, num_pairs=2)"
    described = configs.text("lm", dict(features=16, depth=2, num_heads=2, max_length=8) | options)
    return configs.Experiment(task=task, model=described, mixers=(text,), batch_size=8)


@pytest.mark.parametrize("text", ["gqa(num_kv_heads=1)", "hedgehog", "multi_head_attention"])
def test_mlps_make_up_for_what_a_mechanism_has(text):
    wanted = budget.parameters(model())
    fitted = budget.fit(model(text), wanted, tolerance=0.01)
    assert abs(budget.parameters(fitted) - wanted) <= 0.01 * wanted
    _, options = registry.parse_call(fitted.model)
    assert options["features"] == 16
    ratio = options["mlp_ratio"]
    assert ratio == 4 if text == "multi_head_attention" else (ratio > 4) == text.startswith("gqa")


def test_a_mechanism_with_too_many_parameters_gets_a_narrower_model():
    wanted = budget.parameters(model(features=8))
    fitted = budget.fit(model(), wanted, tolerance=0.05)
    _, options = registry.parse_call(fitted.model)
    assert options["features"] == 8 and abs(budget.parameters(fitted) - wanted) <= 0.05 * wanted


def test_decode_states_are_counted_in_bytes():
    caches = 2 * 2 * 8 * 16 * 4  # layers, keys and values, tokens, features, bytes
    counters = 3 * 4  # of each cache, and of the model
    assert budget.state_bytes(model()) == caches + counters
    assert budget.state_bytes(model("gqa(num_kv_heads=1)")) == caches // 2 + counters
    [longer] = plan.at_lengths(model("hedgehog"), (16,))
    assert budget.state_bytes(model("hedgehog")) == budget.state_bytes(longer)


def test_batches_have_as_many_tokens_at_each_length():
    for config, length in zip(plan.at_lengths(model(), (8, 32)), (8, 32), strict=True):
        _, text = configs.make_task(config.task, "train")
        assert config.batch_size * length == 8 * 8 and len(text[0]["inputs"]) == length
        assert registry.parse_call(config.model)[1]["max_length"] == length


def test_t_interval_of_known_numbers():
    mean, half = confidence.t_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3 and half == pytest.approx(2.776445 * (2.5 / 5) ** 0.5, rel=1e-6)
    assert confidence.t_interval([7.0]) == (7.0, None)
    assert confidence.of([{"x": 7.0}, {"x": None}], "x") == (7.0, None)
    assert confidence.of([{"x": None}], "x") is None
    with pytest.raises(ValueError, match="one value"):
        confidence.t_interval([])


def test_the_most_frequent_answer_is_counted_by_weight():
    config = model()
    _, test = configs.make_task(config.task, "test")
    answers = np.concatenate([test[i]["targets"][test[i]["weights"] > 0] for i in range(32)])
    expected = np.bincount(answers).max() / len(answers)
    assert evaluation.commonest(config) == pytest.approx(expected)
