import dataclasses
import inspect
import json
import sys
from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import numpy as np
import pytest

from attnjax import cli, papers, zoo
from attnjax.core import registry


def test_list_names_every_record_once(capsys):
    assert cli.main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if "." in line] == registry.names()


@pytest.mark.parametrize("claim", ["causal", "CAUSAL"])
def test_list_by_family_and_claim(claim, capsys, monkeypatch):
    claims = {"a.one": {"CAUSAL"}, "a.two": set(), "b.three": {"CAUSAL", "CROSS"}}
    monkeypatch.setattr(registry, "names", lambda: list(claims))
    monkeypatch.setattr(registry, "get", lambda name: _mechanism(claims[name]))
    cli.main(["list", "--family", "a", "--claim", claim])
    out = capsys.readouterr().out
    assert "a.one" in out and "a.two" not in out and "b.three" not in out
    assert "mechanism" in out and "causal" in out


def _ignore(*args):
    return {}


class _Small(nn.Module):
    num_heads: int
    variant: Literal["v1.5", "v2"] = "v1.5"
    fn: Callable | None = _ignore


def _mechanism(claims):
    made = frozenset(registry.Claim[name] for name in claims)
    return registry.Mechanism(
        fn=_ignore, module=_Small, papers=(), example=_ignore, oracle=_ignore, claims=made
    )


@pytest.mark.parametrize("name", registry.names())
def test_show_says_what_a_record_is(name, capsys):
    cli.main(["show", name])
    out = capsys.readouterr().out
    record, module = registry.get(name), sys.modules[f"attnjax.{name}"]
    assert module.__doc__.strip() in out
    assert all(key in out for key in record.papers)
    assert all(f"{option}: " in out for option in inspect.signature(record.fn).parameters)


def test_papers_as_json_is_one_object_a_paper(capsys):
    cli.main(["papers", "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert {row["key"]: row["title"] for row in rows} == papers.titles()
    assert {row["status"] for row in rows} <= {"works", "none", "missing"}


def test_papers_lists_every_key(capsys):
    cli.main(["papers"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[3:] if line.strip()] == list(papers.titles())


def test_show_of_a_mechanism_gives_claims_options_and_defaults(capsys, monkeypatch):
    monkeypatch.setattr(registry, "get", lambda name: _mechanism({"CAUSAL"}))
    cli.main(["show", "mqar"])
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert f"causal {registry.Claim.CAUSAL.value}" in lines
    assert "_Small takes default" in lines
    assert "num_heads: int" in lines
    assert "variant: Literal['v1.5', 'v2'] 'v1.5'" in lines
    assert "fn: Callable | None _ignore" in lines
    assert not any("parent" in line for line in lines)


@pytest.fixture
def model(tmp_path, monkeypatch):
    """The card of a model in a zoo that `attnjax zoo` looks into."""
    texts = dict.fromkeys(("commit", "command", "data_hash", "licence", "created"), "some text")
    card = zoo.Card(
        name="gqa-tiny.copy@1",
        task={"name": "copy", "options": {}},
        model={"kind": "lm", "options": {}},
        mechanisms=("softmax.gqa",),
        config={},
        seed=3,
        metrics={"accuracy": zoo.summary([0.25, 0.75])},
        reference=None,
        **texts,
    )
    zoo.save(card.name, {"scale": np.ones((3, 5), "float32")}, card, root=tmp_path)
    monkeypatch.setenv("ATTNJAX_ZOO", str(tmp_path))
    return card


def test_zoo_list_gives_size_and_mean_metric(model, capsys):
    cli.main(["zoo", "list", "*.copy@1"])
    [line] = [line for line in capsys.readouterr().out.splitlines() if model.name in line]
    assert line.split() == [model.name, "15", "accuracy", "0.5", "some", "text"]


def test_zoo_show_gives_every_field_of_the_card(model, capsys):
    cli.main(["zoo", "show", model.name])
    fields = [line.split()[0] for line in capsys.readouterr().out.splitlines()[3:] if line.strip()]
    assert fields == [f.name for f in dataclasses.fields(model) if f.name != "sha256"]


def test_zoo_show_names_the_nearest_model(model, capsys):
    assert cli.main(["zoo", "show", "gqa-tiny.copy@2"]) == 2
    assert f"did you mean {model.name}?" in capsys.readouterr().err


def test_a_damaged_card_is_one_line(model, tmp_path, capsys):
    (tmp_path / model.name / "card.json").write_text("{}")
    assert cli.main(["zoo", "list"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "card.json" in line
