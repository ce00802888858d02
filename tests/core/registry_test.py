"""Names of records, and the text forms that a command line and a config are written in."""

import dataclasses

import pytest

from attnjax.core import registry


def test_a_record_is_found_by_either_name():
    assert "softmax.multi_head_attention" in registry.names() == sorted(registry.names())
    assert registry.full_name("multi_head_attention") == "softmax.multi_head_attention"
    short, full = map(registry.get, ("multi_head_attention", "softmax.multi_head_attention"))
    assert short is full and isinstance(full, registry.Mechanism)


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(
        ValueError, match="no record is called 'multi_hed_.*did you mean.*multi_head"
    ):
        registry.get("multi_hed_attention")
    with pytest.raises(ValueError, match="no record is called 'zzz'$"):
        registry.get("zzz")


def test_an_ambiguous_name_is_refused(monkeypatch):
    monkeypatch.setattr(registry, "_names", lambda: ("a.twin", "b.twin"))
    assert registry.full_name("a.twin") == "a.twin"
    with pytest.raises(ValueError, match="'twin' is ambiguous: a.twin, b.twin"):
        registry.full_name("twin")


def test_records_are_keyword_only_and_frozen():
    record = registry.get("multi_head_attention")
    with pytest.raises(TypeError):
        registry.Probe(record.fn)
    with pytest.raises(dataclasses.FrozenInstanceError):
        record.papers = ()


def test_records_of_one_kind():
    probes = registry.of_kind(registry.Probe)
    assert probes and all(isinstance(record, registry.Probe) for record in probes.values())
    assert "softmax.multi_head_attention" not in probes


def test_options_are_literals():
    parsed = registry.parse("multi_head_attention(num_heads=2, shape=(1, -2), base=None)")
    options = dict(num_heads=2, shape=(1, -2), base=None)
    assert parsed == ("softmax.multi_head_attention", options)
    assert registry.parse(" softmax.multi_head_attention ") == (parsed[0], {})
    assert registry.parse_call("anything(x='y')") == ("anything", dict(x="y"))


@pytest.mark.parametrize(
    "text", ["gqa(", "gqa(2)", "gqa(x=open('f'))", "", "a b", "gqa(**{'x': 1})"]
)
def test_other_text_is_refused(text):
    with pytest.raises(ValueError, match="is not of the form name"):
        registry.parse_call(text)


def test_build_takes_options_over_defaults():
    module = registry.build(
        "multi_head_attention(num_heads=2)", num_heads=8, head_dim=4, no_field_of_it=1
    )
    assert (module.num_heads, module.head_dim) == (2, 4)


def test_build_refuses_what_is_no_option():
    with pytest.raises(ValueError, match="no option 'num_head'; did you mean num_heads"):
        registry.build("multi_head_attention(num_head=2)", head_dim=4)
    with pytest.raises(ValueError, match="needs the options head_dim, num_heads"):
        registry.build("multi_head_attention")
    with pytest.raises(ValueError, match="softmax_limits is a Probe, not a Mechanism"):
        registry.build("softmax_limits")
