import types

import pytest

from attnjax import papers, parallel
from attnjax.core import registry


@pytest.fixture
def library(tmp_path, monkeypatch):
    """Two records and three papers, of which one record has a test and one paper a reason."""
    (tmp_path / "tests/a").mkdir(parents=True)
    (tmp_path / "tests/a/one_test.py").touch()
    (tmp_path / "papers.csv").write_text(
        "key,title,reason\nfirst,First,\nsecond,Second,\nthird,Third,a survey\n"
    )
    sources = {"a.one": ("first",), "a.two": ("first", "second")}
    monkeypatch.setattr(papers, "_HERE", tmp_path)
    monkeypatch.setattr(papers, "_TESTS", tmp_path / "tests")
    monkeypatch.setattr(registry, "names", lambda: list(sources))
    get = lambda name: types.SimpleNamespace(papers=sources[name])
    monkeypatch.setattr(registry, "get", get)
    monkeypatch.setattr(parallel, "papers", dict)
    return sources


def test_status_of_a_paper(library):
    first, second, third = papers.rows()
    assert (first.status, first.records) == ("works", ("a.one", "a.two"))
    assert first.tests == ("tests/a/one_test.py",)
    assert (second.status, second.records, second.tests) == ("missing", ("a.two",), ())
    assert (third.status, third.reason, third.records) == ("none", "a survey", ())


def test_a_strategy_counts_as_a_record_does(library, monkeypatch):
    monkeypatch.setattr(parallel, "papers", lambda: {"a.one": ("second",)})
    assert papers.rows()[1].status == "works"


def test_without_tests_the_records_decide(library, monkeypatch):
    monkeypatch.setattr(papers, "_TESTS", papers._HERE / "nowhere")
    assert [row.status for row in papers.rows()] == ["works", "works", "none"]


def test_a_record_that_names_no_paper_is_an_error(library):
    library["a.two"] = ("secnd",)
    with pytest.raises(ValueError, match="a.two names no paper: 'secnd'; did you mean second"):
        papers.rows()


def test_all_papers_of_the_collection_are_there():
    assert len(papers.titles()) == len(papers._entries()) == 376
    assert all(papers.titles().values())


def test_benchmarks_name_papers_too():
    assert papers._benchmarks()["experiments.benchmarks.context_parallel"] == ("longca-bench",)
