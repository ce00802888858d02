import pathlib

from attnjax import catalogue

DOCS = pathlib.Path(__file__).parents[1] / "docs"


def test_the_committed_catalogue_is_what_the_records_say():
    written = (DOCS / "catalogue.md").read_text(encoding="utf-8")
    assert written == catalogue.markdown(), "docs/catalogue.md is out of date: run `make docs`"
