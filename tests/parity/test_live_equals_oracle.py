"""The live store (feed, micro-batches, head, layers of blocks) against the oracle on generated events, partitions
interleaved in any way."""

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streaming_sql.verify import live_answers
from tests.parity.generated_events import CLOCKS_CHANGE_US, event_log
from tests.parity.test_batch_equals_oracle import GROUPS, assert_equal
from warehouse.features.generated import START_US
from warehouse.features.oracle import values
from warehouse.features.verify import in_float64

WITH_CALENDAR = [name for name, group in GROUPS.items() if group.calendar]
WITHOUT = [name for name, group in GROUPS.items() if not group.calendar]


@pytest.mark.parametrize(("names", "start_us"), [(WITHOUT, START_US), (WITH_CALENDAR, CLOCKS_CHANGE_US)])
@settings(max_examples=6)
@given(seed=st.integers(0, 2**32))
def test_the_live_store_equals_the_equation(names, start_us, seed):
    random = Random(seed)
    groups = {name: GROUPS[name] for name in random.sample(names, 3)}
    events = event_log(random, start_us=start_us, num_retractions=random.choice((1, 5, 20)))
    assert_live(groups, events, random)


def assert_live(groups, events, random):
    """Every feature of some reads of each group; integers to the bit as far as float64 tells them apart."""
    asked = set()
    for name, read, answer in live_answers(groups, events, random):
        asked.add(name)
        for feature, value in values(groups[name], events, read).items():
            assert_equal(answer[feature], in_float64(value), (feature, read))
    assert asked == set(groups)
