"""What networks know of a note: its id, its author and its first topic, as embeddings that add up.

An id never trained on keeps its start, zero, so a note without history of its own is its author plus its topic.
N notes, D width; code = 1 + place in a list of words, 0 = unknown, which adds nothing.
"""

from dataclasses import dataclass

import pyarrow as pa
import torch
from torch import Tensor, nn

from models_ml.examples import Examples, distinct, encode, first_topics


@dataclass(frozen=True)
class NoteWords:
    """The vocabularies, in the order of the codes; saved with a model."""

    note_ids: list[str]
    authors: list[str]
    topics: list[str]

    @staticmethod
    def of(examples: Examples) -> "NoteWords":
        notes = examples.notes
        return NoteWords(notes["note_id"].to_pylist(), distinct(notes["author_id"]), distinct(first_topics(notes)))


class NoteTower(nn.Module):
    """Three embedding tables and, in buffers, which author and topic each note has."""

    author_of_note: Tensor
    topic_of_note: Tensor

    def __init__(self, words: NoteWords, width: int, id_dropout: float):
        super().__init__()
        self.id_dropout = id_dropout
        self.note = embedding(len(words.note_ids), width, spread=0.0)
        self.author = embedding(len(words.authors), width, spread=0.02)
        self.topic = embedding(len(words.topics), width, spread=0.1)
        self.register_buffer("author_of_note", torch.zeros(len(words.note_ids) + 1, dtype=torch.int64))
        self.register_buffer("topic_of_note", torch.zeros(len(words.note_ids) + 1, dtype=torch.int64))

    def describe(self, notes: pa.Table, words: NoteWords) -> None:
        """Fills the buffers from the dimension `lake.notes`, whose rows are in the order of `words.note_ids`."""
        self.author_of_note[1:] = torch.from_numpy(encode(notes["author_id"], words.authors))
        self.topic_of_note[1:] = torch.from_numpy(encode(first_topics(notes), words.topics))

    def table(self) -> Tensor:
        """float32 [N + 1, D], row 0 zeros. In training the ids of some notes are dropped, so that author and topic learn to
        stand alone."""
        notes = torch.arange(len(self.author_of_note), device=self.author_of_note.device)
        return self(notes, self.author_of_note, self.topic_of_note)

    def rows(self, codes_C: Tensor) -> Tensor:
        """float32 [C, D]: the same of some notes."""
        return self(codes_C, self.author_of_note[codes_C], self.topic_of_note[codes_C])

    def forward(self, note_B: Tensor, author_B: Tensor, topic_B: Tensor) -> Tensor:
        id_part_BD = self.note(note_B)
        if self.training and self.id_dropout:
            id_part_BD = id_part_BD * (torch.rand(len(note_B), 1, device=note_B.device) >= self.id_dropout)
        return id_part_BD + self.author(author_B) + self.topic(topic_B)


def embedding(num_words: int, width: int, spread: float) -> nn.Embedding:
    """A table [num_words + 1, width], normal with this spread; row 0, of the unknown, stays zeros."""
    table = nn.Embedding(num_words + 1, width, padding_idx=0)
    with torch.no_grad():
        table.weight.normal_(std=spread) if spread else table.weight.zero_()
        table.weight[0].zero_()
    return table
