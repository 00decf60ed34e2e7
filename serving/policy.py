"""Rules of the page, applied last: no note twice, not too much of one author, and never a short page while candidates exist."""

from collections.abc import Sequence

import numpy as np

AUTHOR_CAP_RELAXED = "author_cap_relaxed"


def arrange(
    order: np.ndarray, note_ids: Sequence[str], author_ids: Sequence[str | None], page_size: int, max_notes_per_author: int
) -> tuple[list[int], list[str]]:
    """Positions of the candidates to show, in order, and the rules that had to give way.

    order: positions of candidates, best first. A note above its author's cap waits; if the page is still short at the end,
    those that waited fill it, best first. A note without an author has no cap. Authors' caps of 0 mean no cap.
    """
    page: list[int] = []
    waiting: list[int] = []
    shown_notes: set[str] = set()
    shown_of_author: dict[str, int] = {}
    for position in order.tolist():
        if len(page) == page_size:
            break
        note_id, author_id = note_ids[position], author_ids[position]
        if note_id in shown_notes:
            continue
        shown_notes.add(note_id)
        if author_id is not None and 0 < max_notes_per_author <= shown_of_author.get(author_id, 0):
            waiting.append(position)
            continue
        if author_id is not None:
            shown_of_author[author_id] = shown_of_author.get(author_id, 0) + 1
        page.append(position)
    missing = page_size - len(page)
    filled = waiting[:missing]
    return page + filled, [AUTHOR_CAP_RELAXED] if filled else []
