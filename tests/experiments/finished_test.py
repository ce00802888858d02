"""A finished run: measured again, published to a zoo, evaluated from there, shown in a report."""

import json
import pathlib
import shutil

import jax
import pytest

from attnjax import zoo
from experiments import demo as demos
from experiments import evaluate, finished, memory, report, run_directory, train
from tests.experiments import runs

NAME = "vit_mha-tiny.digits-test@1"


def config(path, seed=0):
    return runs.tiny(
        path,
        task="digits",
        model="vit(features=8, depth=1, num_heads=2, patch=4)",
        mixers=("multi_head_attention",),
        steps=4,
        eval_every=4,
        seed=seed,
    )


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("finished")
    paths = [root / "a", root / "b"]
    for seed, path in enumerate(paths):
        assert train.train(config(path, seed)) == 0
    return root, paths


@pytest.fixture(scope="module")
def published(two_runs):
    root, paths = two_runs
    reference = {"value": 0.989, "source": "an SVC"}
    card = finished.publish(NAME, paths, root=root / "zoo", command="again", reference=reference)
    return root, paths, card


def test_a_card_tells_what_the_runs_measured(published):
    root, paths, card = published
    logged = [run_directory.metrics(path)[-1]["test_accuracy"] for path in paths]
    assert card.metrics["accuracy"]["per_seed"] == pytest.approx(logged)
    assert card.mechanisms == ("softmax.multi_head_attention",) and card.seed == 0
    module, params, again = zoo.load(NAME, root=root / "zoo")
    measured = finished.measure(finished.task_text(again), module, params)
    assert measured["accuracy"] == card.metrics["accuracy"]["per_seed"][0]
    assert again.parameters == sum(x.size for x in jax.tree.leaves(params))


def test_evaluate_repeats_the_card(published, capsys):
    root, paths, _ = published
    assert evaluate.main([NAME, "--root", str(root / "zoo")]) == 0
    assert "the same" in capsys.readouterr().out
    assert evaluate.main([str(paths[0])]) == 0
    assert evaluate.main(["vit_mha-tiny.digit-test@1", "--root", str(root / "zoo")]) == 2
    assert f"did you mean {NAME}" in capsys.readouterr().err


def test_evaluate_notices_a_card_that_says_more_than_is_true(published, tmp_path, capsys):
    import dataclasses

    root, _, card = published
    module, params, _ = zoo.load(NAME, root=root / "zoo")
    better = {"accuracy": zoo.summary([1.0]), "loss": card.metrics["loss"]}
    zoo.save(NAME, params, dataclasses.replace(card, metrics=better), root=tmp_path)
    assert evaluate.main([NAME, "--root", str(tmp_path)]) == 1
    assert "DIFFERENT" in capsys.readouterr().out


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no run"):
        finished.load(tmp_path)


def test_the_report_shows_every_model(published):
    root, paths, card = published
    shutil.copytree(paths[0], root / NAME)
    used = memory.of_a_step(config(paths[0]))
    assert used > sum(4 * x.size for x in jax.tree.leaves(zoo.load(NAME, root=root / "zoo")[1]))
    metrics = {"loss": 1.0, "accuracy": 0.5}
    row = demos.Row(NAME, "multi_head_attention", root / NAME, metrics, 99, 1.0, used)
    text = dict(loss=1.0, accuracy=0.5, bits_per_token=4.0)
    file = root / NAME / "metrics.jsonl"
    lines = [
        json.dumps(x | {"test_bits_per_token": 4.0}) for x in run_directory.metrics(root / NAME)
    ]
    file.write_text("\n".join(lines) + "\n")
    other = demos.Row(NAME, "<other>", root / NAME, text, 99, 1.0, used)
    baselines = {"digits": {"svc": 0.989}, "source_text": {"unigram_bits_per_byte": 4.4}}
    page = report.write(root, [row, other], baselines)
    content = page.read_text()
    for word in ("0.5000", "0.9890", "4.000", "&lt;other&gt;", "unigram bits per byte"):
        assert word in content
    for name in ("accuracy", "bits_per_token", "vit_mha-tiny_maps"):
        picture = pathlib.Path(page.parent, "pictures", f"{name}.png")
        assert picture.stat().st_size > 1000 and f"pictures/{name}.png" in content
