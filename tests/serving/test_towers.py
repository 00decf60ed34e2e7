"""What the two-tower reads at a request is what it reads in training, and notes that came after it are among its candidates."""

import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from models_ml.examples import CLICKS, load_spine
from serving.catalogue import Catalogue
from serving.models import vectors_of


class Listening:
    """The shards, and the readers' vectors that they were asked with."""

    def __init__(self, shards):
        self._shards, self.asked = shards, []

    def best(self, user_D, eligible_N, limit):
        self.asked.append(user_D)
        return self._shards.best(user_D, eligible_N, limit)


def test_a_readers_vector_at_a_request_is_what_training_makes_of_the_logged_features(server, readers, tmp_path):
    world = server.engine.world
    tower, shards = world.models.two_tower, Listening(world.models.shards)
    assert set(tower.user_features) == {name for name in world.models.l2.user_features if name.startswith("user_")}
    assert tower.reader.attributes
    note = server.feed(readers[26])["notes"][0]
    event = {"eventId": "towers-click", "eventType": "click", "userId": readers[26], "noteId": note["noteId"]}
    assert server.post("/v1/events", event).status_code == 202
    server.engine.clock.advance_us(1)
    rows = []
    server.engine.world = dataclasses.replace(world, models=dataclasses.replace(world.models, shards=shards))
    try:
        for user_id in (readers[26], readers[27], "towers-newcomer"):
            answer = server.feed(user_id)
            logged = server.explain(answer["requestId"])["userFeatures"]
            clicks = server.engine.recent.get(answer["requestId"]).user.sequences[CLICKS]
            rows.append({"user_id": user_id, "note_id": note["noteId"], CLICKS: clicks, **logged})
            if user_id == "towers-newcomer":
                assert any("two_tower" in one["sources"] for one in answer["notes"])
    finally:
        server.engine.world = world
    assert note["noteId"] in rows[0][CLICKS]
    schema = pa.schema(
        [("user_id", pa.string()), ("note_id", pa.string()), (CLICKS, pa.list_(pa.string()))]
        + [(name, pa.float64()) for name in tower.user_features]
    )
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), tmp_path / "spine.parquet")
    examples, _ = load_spine(tmp_path / "spine.parquet", server.engine.home.exports)
    histories = examples.histories(tower.note_ids, tower.history_length)
    expected = tower.user_vectors(histories, tower.reader.of_rows(examples, np.arange(3)))
    np.testing.assert_allclose(np.stack(shards.asked), expected, atol=2e-6)
    nobody = np.full((3, len(tower.reader)), np.nan, np.float32)
    nobody[:, len(tower.user_features) :] = 0
    without = tower.user_vectors(histories, nobody)
    assert np.abs(expected - without).max() > 1e-3


def test_a_note_that_came_after_training_has_a_vector_before_its_first_view(server):
    world = server.engine.world
    tower, known = world.models.two_tower, world.catalogue.notes
    rows = [*known.to_pylist(), known.slice(3, 1).to_pylist()[0] | {"note_id": "n-new"}, {"note_id": "stranger"}]
    notes = pa.Table.from_pylist(rows, schema=known.schema).sort_by("note_id")
    catalogue = Catalogue.from_tables(notes, {})
    vectors, rows = vectors_of(tower, catalogue)
    assert len(vectors) == len(rows) == len(known) + 1  # nothing is known of the stranger
    assert rows[-1] == catalogue.row_of["n-new"]
    np.testing.assert_array_equal(vectors[:-1], tower.note_vectors)
    np.testing.assert_array_equal(vectors[-1], tower.vectors_of(notes.slice(rows[-1], 1))[0])
