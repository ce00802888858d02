"""What a reproduction of a paper's claim found."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """One claim, what it lets expect, what was seen, and whether they agree."""

    claim: str
    expected: str
    seen: str
    agrees: bool
