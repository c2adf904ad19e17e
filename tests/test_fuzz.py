"""Any bytes to codec, provider and channel: short runs of `make fuzz`'s Python targets, and what it has found."""

from __future__ import annotations

import pytest

import frames
from fuzz import mutation, targets

SHORT = {"frames": 4000, "provider": 1500, "channel": 1500}


@pytest.mark.parametrize("target", targets.TARGETS)
def test_any_bytes(target: str) -> None:
    subject = targets.TARGETS[target]()
    try:
        targets.attack(subject, 7, 0, SHORT[target])
    finally:
        subject.close()


def test_inputs_are_worth_trying() -> None:
    """Many begin with a whole frame, of each kind; many with none; the same number is always the same input."""
    kinds: dict[int, int] = {}
    malformed = 0
    for number in range(2000):
        data = mutation.stream(7, number)
        assert data == mutation.stream(7, number)
        try:
            first = frames.decode(data, targets.LIMIT)
        except frames.Malformed:
            malformed += 1
            continue
        if first is not None:
            kinds[first[0].kind] = kinds.get(first[0].kind, 0) + 1
    assert set(range(6)) <= kinds.keys()
    assert min(kinds[kind] for kind in range(6)) > 20
    assert malformed > 200


def test_a_decoder_that_differs_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "HEADER_MAX", 65534)
    monkeypatch.setitem(frames._SCALARS, 12, ("not_run", range(3)))
    with pytest.raises(targets.Finding):
        targets.attack(targets.Frames(), 7, 0, 4000)
