import dataclasses
import json

import pytest

from attnjax.zoo import card, digest, sealed

LEAF = {"sha256": "00", "shape": [2, 3], "dtype": "float32"}
FIELDS = {
    "name": "gla-tiny.mqar@1",
    "task": {"name": "mqar", "options": {"pairs": 8}},
    "model": {"kind": "lm", "options": {"mixer": "gla", "depth": 2}},
    "mechanisms": ("linear_recurrent.gla",),
    "config": {"optimizer": {"lr": 3e-3}},
    "commit": "0" * 40,
    "seed": 0,
    "command": "attnjax train mqar",
    "data_hash": "1234",
    "metrics": {"accuracy": card.summary([0.99, 0.5, 0.1])},
    "reference": {"value": 0.99, "source": "a figure"},
    "licence": "Apache-2.0",
    "created": "2026-11-21",
    "parameters": 6,
    "sha256": {"head/kernel": LEAF},
}


@pytest.mark.parametrize("change", [{}, {"reference": None}, {"metrics": {}}])
def test_round_trip(change):
    record = card.Card(**FIELDS | change)
    text = card.dumps(record)
    assert card.loads(text, path="file") == record
    assert card.loads(text.encode(), path="file") == record


def test_summary_is_of_all_seeds():
    assert card.summary([1.0, 2.0, 6.0]) == {
        "per_seed": [1.0, 2.0, 6.0],
        "mean": 3.0,
        "min": 1.0,
        "max": 6.0,
    }
    with pytest.raises(ValueError, match="one seed"):
        card.summary([])


@pytest.mark.parametrize(
    "name",
    ["", "gla", "gla-tiny", "gla-tiny.mqar", "gla-tiny.mqar@0", "gla-tiny.mqar@01", "GLA-t.mqar@1"]
    + [
        "../gla-tiny.mqar@1",
        "a/gla-tiny.mqar@1",
        "gla-tiny.mqar@1/",
        "gla-tiny..mqar@1",
        "a-b.c@1\n",
    ],
)
def test_names_have_one_form(name):
    with pytest.raises(ValueError, match="name=.* must look like"):
        card.Card(**FIELDS | {"name": name})


@pytest.mark.parametrize("name", ["gla-tiny.mqar@1", "gated_delta-s2.mqar-long-8k@12"])
def test_names_that_are_fine(name):
    assert card.Card(**FIELDS | {"name": name}).name == name


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("task", {"name": "mqar"}),
        ("model", {"kind": "lm", "options": {}, "import": "os.system"}),
        ("reference", {"value": 1.0}),
        ("metrics", {"accuracy": card.summary([0.5]) | {"mean": 0.9}}),
        ("metrics", {"accuracy": {"mean": 0.9}}),
        ("metrics", {"accuracy": 0.9}),
        ("sha256", {"head/kernel": "00"}),
    ],
)
def test_each_wrong_field_is_named(field, value):
    with pytest.raises(ValueError, match=field):
        card.Card(**FIELDS | {field: value})


@pytest.mark.parametrize(("field", "value"), [("seed", "0"), ("reference", 1.0), ("task", None)])
def test_what_could_not_be_loaded_is_not_written(field, value):
    record = card.Card(**FIELDS)
    object.__setattr__(record, field, value)
    with pytest.raises(ValueError, match=f"{field} of a card must be"):
        card.dumps(record)


def _sealed(body) -> str:
    return json.dumps(sealed.seal(body, what="card"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no card: "),
        ("[" * 99_999, "is no card: "),
        (b"\xff", "is no card: "),
        ("{}", "must be a body and its sha256"),
        (_sealed([]), "is no card: card must be a dict"),
        (_sealed({"name": "x"}), r"missing=\['command', .*\], unknown=\[\]"),
        (_sealed(FIELDS | {"mechanisms": [], "more": 1}), r"missing=\[\], unknown=\['more'\]"),
        (_sealed(FIELDS | {"mechanisms": 3}), "is no card: "),
        (_sealed(FIELDS | {"mechanisms": [], "seed": "0"}), "is no card: seed"),
        (_sealed(FIELDS | {"mechanisms": [], "metrics": {"a": []}}), "is no card: metrics"),
    ],
)
def test_text_that_is_no_card_is_refused_in_one_line(text, message):
    with pytest.raises(digest.CheckpointCorrupted, match=f"^file: .*{message}") as caught:
        card.loads(text, path="file")
    assert "\n" not in str(caught.value)


def test_no_field_can_be_changed_in_the_text():
    text = card.dumps(card.Card(**FIELDS))
    for field in dataclasses.fields(card.Card):
        body = json.loads(text)
        body["body"][field.name] = {"accuracy": card.summary([1.0])}
        with pytest.raises(digest.CheckpointCorrupted, match="^file: has changed since"):
            card.loads(json.dumps(body), path="file")
