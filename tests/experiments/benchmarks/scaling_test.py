import dataclasses
import json

import pytest

from attnjax import cli
from attnjax.core import registry
from attnjax.core.registry import Claim
from experiments.benchmarks import scaling

LENGTHS = (64, 128, 256)
SHORT = scaling.Config(lengths=LENGTHS, fitted_from=64)
POINTS = [{"length": n, "bytes": 7 * n, "seconds": 1e-9 * n**2} for n in LENGTHS]


@pytest.mark.parametrize("power", [0.0, 1.0, 1.5, 2.0])
def test_finds_known_powers_in_the_lengths_from_one_on(power):
    values = [100.0] + [0.3 * n**power for n in LENGTHS]  # the first is all overhead
    assert scaling.exponent((8, *LENGTHS), values, first=64) == pytest.approx(power, abs=1e-6)


def test_what_did_not_run_counts_in_no_exponent():
    assert scaling.exponent(LENGTHS, [2.0, 4.0, None], first=64) == pytest.approx(1.0)
    assert scaling.exponent(LENGTHS, [2.0, None, None], first=64) is None


def claiming(monkeypatch, name, *claims):
    """The record of a mechanism, but with these claims."""
    record = dataclasses.replace(registry.get(name), claims=frozenset(claims))
    monkeypatch.setattr(registry, "get", lambda _: record)
    return record


def test_a_false_claim_of_time_is_caught(monkeypatch):
    claiming(monkeypatch, "softmax.gqa", *scaling.CLAIMS.values())
    row = scaling.judge("softmax.gqa", POINTS, SHORT)
    assert row["exponents"] == pytest.approx({"seconds": 2.0, "bytes": 1.0})
    assert row["false_claims"] == ["LINEAR_COMPUTE"]
    claiming(monkeypatch, "softmax.gqa", Claim.LINEAR_MEMORY)
    assert not scaling.judge("softmax.gqa", POINTS, SHORT)["false_claims"]


def test_a_false_claim_of_memory_is_caught(monkeypatch):
    monkeypatch.setattr(scaling, "fastest", lambda *_: 0.1)
    record = claiming(monkeypatch, "softmax.gqa", Claim.LINEAR_MEMORY)
    config = scaling.Config(lengths=LENGTHS, fitted_from=128)  # so short that the matrix is held
    row = scaling.judge("softmax.gqa", scaling.measure(record, config), config)
    assert row["exponents"]["bytes"] > 1.5 and row["false_claims"] == ["LINEAR_MEMORY"]


def test_stops_at_a_limit(monkeypatch):
    record, seconds = registry.get("softmax.gqa"), iter((0.1, 5.0))
    monkeypatch.setattr(scaling, "fastest", lambda *_: next(seconds))
    slow = scaling.measure(record, SHORT)
    assert [point["seconds"] for point in slow] == [0.1, 5.0]
    large = scaling.measure(record, dataclasses.replace(SHORT, gigabytes=0.0))
    assert len(large) == 1 and large[0]["seconds"] is None and large[0]["bytes"] > 0


def test_the_command_measures_writes_and_judges(tmp_path, capsys):
    out = tmp_path / "numbers.json"
    argv = [
        "--lengths",
        "8",
        "16",
        "--fitted-from",
        "8",
        "--runs",
        "1",
        "--most",
        "9",
        "--out",
        str(out),
    ]
    names = ["gqa", "swin"]
    assert cli.main(["benchmark", "scaling", "--mechanisms", *names, *argv]) == 0
    page = json.loads(out.read_text())
    assert page["machine"]["cores"] and page["versions"]["jax"] and page["config"]["runs"] == 1
    rows = {row["name"]: row for row in page["mechanisms"]}
    assert list(rows) == ["softmax.gqa", "window.swin"]
    assert set(rows["window.swin"]["claims"]) == {"LINEAR_COMPUTE", "LINEAR_MEMORY"}
    for row in rows.values():
        assert [point["length"] for point in row["points"]] == [8, 16]
        assert all(point["seconds"] > 0 and point["bytes"] > 0 for point in row["points"])
    assert "window.swin" in capsys.readouterr().out
    assert cli.main(["benchmark", "scaling", "--mechanisms", "eca_net", *argv]) == 0
    names = [row["name"] for row in json.loads(out.read_text())["mechanisms"]]
    assert names == ["channel_spatial.eca_net", "softmax.gqa", "window.swin"]
    capsys.readouterr()
    argv[argv.index("9")] = "-9"
    assert cli.main(["benchmark", "scaling", "--mechanisms", "swin", *argv]) == 2
    assert "another machine, versions or settings" in capsys.readouterr().err
    argv[-1] = str(tmp_path / "others.json")
    assert cli.main(["benchmark", "scaling", "--mechanisms", "eca_net", *argv]) == 1
    assert "false" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["nothing_like_it", "set_transformer"])
def test_a_wrong_name_is_named(name, capsys):
    assert cli.main(["benchmark", "scaling", "--mechanisms", name]) == 2
    assert name in capsys.readouterr().err


def test_refuses_lengths_that_show_nothing():
    with pytest.raises(ValueError, match="two or more from"):
        scaling.Config(lengths=(8,))
