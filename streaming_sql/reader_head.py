"""The head of one reader's group whose blocks have a table of texts of their own: events are found with that table's codes.

So the texts of all readers' blocks are in no table that grows with readers.
"""

from collections.abc import Sequence

from streaming_sql.group_state import GroupState
from streaming_sql.head import Head, HeadEvent
from streaming_sql.key_index import Key
from streaming_sql.text_codes import TextCodes


class ReaderHead(Head):
    """Reads another head; nothing is added to it."""

    def __init__(self, shared: GroupState, codes: TextCodes):
        """Use `of`."""
        super().__init__()
        self._shared, self._codes = shared, codes

    @classmethod
    def of(cls, shared: GroupState, codes: TextCodes) -> Head:
        """The group's head with map entries by these codes; itself where it has none."""
        return cls(shared, codes) if shared.plan.fresh_texts else shared.head

    def __len__(self) -> int:
        return len(self._shared.head)

    def visible(self, key: Key, position: Sequence[int], before_us: int) -> list[HeadEvent]:
        return [self._shared.recoded(event, self._codes) for event in self._shared.head.visible(key, position, before_us)]
