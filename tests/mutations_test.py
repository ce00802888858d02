import pytest

from tests import mutations


@pytest.mark.parametrize("mutation", mutations.MUTATIONS, ids=lambda mutation: mutation.kind)
def test_the_line_to_break_is_still_there(mutation):
    """Planting all takes minutes; that a change of the sources moved one away is seen here."""
    assert mutation.old in (mutations.ROOT / mutation.file).read_text()
