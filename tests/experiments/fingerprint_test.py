import pytest

from experiments import fingerprint

SAVED = {"config": {"lr": 0.1, "steps": 100, "axes": (1, 2)}, "data": {"batch": 16}, "code": "abc"}


def _check(now, *allow_changes):
    saved, now = fingerprint.normalise(SAVED), fingerprint.normalise(now)
    fingerprint.check(saved, now, allow_changes=allow_changes, path="run/3")


def test_the_same_run_passes():
    _check(SAVED)
    _check(SAVED | {"config": {"steps": 100, "axes": [1, 2], "lr": 0.1}})


@pytest.mark.parametrize(
    ("change", "fields"),
    [
        ({"data": {"batch": 32}}, {"data.batch": (16, 32)}),
        ({"code": None}, {"code": ("abc", None)}),
        ({"data": {}}, {"data.batch": (16, "nothing")}),
        ({"data": {"batch": 16, "seed": 0}}, {"data.seed": ("nothing", 0)}),
        ({"data": 16}, {"data.batch": (16, "nothing"), "data": ("nothing", 16)}),
        ({"config": SAVED["config"] | {"axes": (2, 1)}}, {"config.axes": ([1, 2], [2, 1])}),
    ],
)
def test_each_differing_field_is_named_with_both_values(change, fields):
    with pytest.raises(fingerprint.FingerprintMismatch) as caught:
        _check(SAVED | change)
    assert caught.value.fields == fields
    name, (old, new) = next(iter(fields.items()))
    assert str(caught.value).startswith(f"run/3: {name} was {old!r} and is {new!r}")


def test_a_long_list_of_differences_is_cut():
    with pytest.raises(fingerprint.FingerprintMismatch, match=r"config.axes was .* \(and 2 more\)"):
        _check({})


def test_allowed_changes_pass_and_others_do_not():
    now = {
        "config": {"lr": 0.2, "steps": 200, "axes": (1, 2)},
        "data": {"batch": 16},
        "code": "abc",
    }
    _check(now, "config")
    _check(now, "config.steps", "config.lr")
    with pytest.raises(fingerprint.FingerprintMismatch, match="config.lr was 0.1 and is 0.2;"):
        _check(now, "config.steps", "config.l", "conf")


@pytest.mark.parametrize("value", [object(), float("nan"), b"bytes"])
def test_what_is_no_json_is_refused(value):
    with pytest.raises(ValueError, match="fingerprint must be JSON"):
        fingerprint.normalise({"config": value})
