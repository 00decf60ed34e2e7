"""`headrace features verify` on declarations that use every aggregation: its events exercise them, and it finds a fault."""

import pytest

from tests.parity.test_batch_equals_oracle import GROUPS
from warehouse.features import verify

NAMES = ("maps", "moments_and_events", "fresh_sessions", "fresh_hours_of_days")


def verdicts_of(seed: int) -> dict[str, verify.Verdict]:
    groups = {name: GROUPS[name] for name in NAMES}
    verdicts = {name: verify.Verdict(name) for name in groups}
    assert list(verify.verify(groups, seed, 600, verdicts, num_reads=12)) == list(NAMES)
    return verdicts


def test_all_values_agree_and_some_are_not_empty():
    for verdict in verdicts_of(2).values():
        assert verdict.agrees, verdict.differences
        assert verdict.not_empty >= 8


def test_a_map_that_counts_wrong_is_found(monkeypatch: pytest.MonkeyPatch):
    right = verify.values

    def wrong(group, events, read):
        found = right(group, events, read)
        return {name: {key: number + 1 for key, number in v.items()} if isinstance(v, dict) else v for name, v in found.items()}

    monkeypatch.setattr(verify, "values", wrong)
    found = verdicts_of(2)["maps"]
    assert not found.agrees
    assert all("_by_" in difference for difference in found.differences)
