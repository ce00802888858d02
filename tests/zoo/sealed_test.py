import json

import pytest

from attnjax.zoo import digest, sealed

BODY = {"b": [1, 2.5, None, True], "a": {"text": "ü", "empty": {}}}


def test_round_trip_through_text():
    text = json.dumps(sealed.seal(BODY, what="it"), indent=3)
    assert sealed.unseal(json.loads(text), path="file") == BODY


def test_the_order_of_keys_makes_no_difference():
    assert sealed.seal(BODY, what="it") == sealed.seal(dict(reversed(BODY.items())), what="it")
    assert sealed.canonical(BODY) == '{"a":{"empty":{},"text":"\\u00fc"},"b":[1,2.5,null,true]}'


@pytest.mark.parametrize("body", [(1, 2), {1: 2}, float("inf"), b"bytes", {"a": object()}])
def test_what_json_would_change_is_refused(body):
    with pytest.raises(ValueError, match="^it must be"):
        sealed.seal(body, what="it")


@pytest.mark.parametrize("document", [[], {}, {"body": 1}, {"body": 1, "sha256": "", "more": 2}, 3])
def test_what_was_never_sealed_is_refused(document):
    with pytest.raises(digest.CheckpointCorrupted, match="^file: must be a body and its sha256"):
        sealed.unseal(document, path="file")


@pytest.mark.parametrize("changed", [1, True, [1], {"b": [1]}, float("nan")])
def test_a_changed_body_is_refused(changed):
    document = sealed.seal(1.0, what="it") | {"body": changed}
    with pytest.raises(digest.CheckpointCorrupted, match="^file: has changed since"):
        sealed.unseal(document, path="file")
