"""The four published models of one moment, and the check that this server can feed them."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from models_ml.first_layer import FirstLayer
from models_ml.on_device import VectorsOnDevice, device_from_env, moved
from models_ml.registry import Registry
from models_ml.row_memo import RowMemo
from models_ml.two_tower import TwoTower
from serving.catalogue import Catalogue
from serving.hydrate import available_names
from serving.settings import Settings
from serving.vector_index import ShardedVectors
from warehouse.errors import HeadraceError
from warehouse.features.declarations import FeatureGroup
from warehouse.features.kinds.declared import Kinds
from warehouse.home import Home

NAMES = ("item_to_item", "two_tower", "l1", "l2")
MEMOS = ("l1_notes", "l2_notes")
REMEDY = "run `headrace train all`"


@dataclass(frozen=True)
class Models:
    """Loaded at the production alias; immutable. note_vectors: float32 [V, D], those of the two-tower model, then those it has
    for the catalogue's notes that came after its training. rows_of_vectors: int64 [V], the catalogue row of each, -1 where the
    catalogue does not know the note; rows_of_neighbours: of each of item_to_item's names.
    codes_of_rows: int64 [N], how L2 encodes the note of each row.
    vectors: the two-tower vectors on a GPU, where HEADRACE_DEVICE names one; L1 and L2 are then there too. shards: the vectors
    for a search on the CPU."""

    item_to_item: Any
    two_tower: Any
    l1: Any
    l2: Any
    versions: Mapping[str, str]
    note_vectors: np.ndarray
    rows_of_vectors: np.ndarray
    rows_of_neighbours: np.ndarray
    codes_of_rows: np.ndarray
    num_notes: int  # rows of the catalogue
    shards: ShardedVectors
    vectors: VectorsOnDevice | None = None

    def codes_of(self, rows: np.ndarray) -> np.ndarray | None:
        """int64 [S]: how L2 encodes these rows of the catalogue; None where one is of an unknown note."""
        return None if (rows < 0).any() else self.codes_of_rows[rows]

    def memos(self) -> dict[str, RowMemo]:
        """What L1 and L2 keep of notes from request to request; on a device they keep nothing."""
        return {name: first.memo for name, (first, _) in self.first_layers().items()}

    def first_layers(self) -> dict[str, tuple[FirstLayer, np.ndarray]]:
        """Those that keep something of notes, each with the tags, int64 [N], under which it keeps the rows of the catalogue."""
        tagged = zip(MEMOS, (self.l1, self.l2), (np.arange(self.num_notes), self.codes_of_rows), strict=True)
        return {name: (model.first_layer, tag_N) for name, model, tag_N in tagged if hasattr(model, "first_layer")}

    @cached_property
    def vector_of_row(self) -> np.ndarray:
        """int64 [N]: the vector of each row of the catalogue, -1 for none. The rows of no vector are beyond the last or -1."""
        known = np.flatnonzero(self.rows_of_vectors >= 0)
        vector_of_row = np.full(self.num_notes, -1, dtype=np.int64)
        vector_of_row[self.rows_of_vectors[known]] = known
        return vector_of_row


def missing_models(home: Home) -> list[str]:
    """What to do about each model that has no production version; empty when all are there."""
    return [f"model {name} is not published; {REMEDY}" for name in NAMES if not (home.models / name / "production").exists()]


def load_models(
    home: Home, groups: Mapping[str, FeatureGroup], catalogue: Catalogue, settings: Settings, kinds: Kinds | None = None
) -> Models:
    """The production versions, on the device that HEADRACE_DEVICE names, with the vectors indexed as the settings say.

    Raises HeadraceError if one is missing, damaged, or reads features that are not served, or if there is no such device.
    """
    device = device_from_env()
    registry = Registry(home.models)
    loaded, versions = {}, {}
    for name in NAMES:
        path = registry.path(name)
        versions[name] = path.name
        try:
            loaded[name] = importlib.import_module(f"models_ml.{name}").load(path)
        except (RuntimeError, KeyError, TypeError, ValueError) as error:
            raise HeadraceError(
                f"model {name} {path.name} was made by another version of the code and cannot be loaded "
                f"({str(error).strip().splitlines()[-1].strip()}); {REMEDY}"
            ) from error
    of_user, of_candidate = available_names(groups, kinds or Kinds())
    for name in ("two_tower", "l1", "l2"):
        unknown = [feature for feature in loaded[name].user_features if feature not in of_user]
        if name != "two_tower":
            unknown += [feature for feature in loaded[name].note_features if feature not in of_candidate]
        if unknown:
            raise HeadraceError(
                f"model {name} {versions[name]} reads features that are not declared: {', '.join(unknown)}; "
                "export the training examples again and train again: `headrace export-training`, `headrace train all`"
            )
    note_vectors, rows_of_vectors = vectors_of(loaded["two_tower"], catalogue)
    shards = ShardedVectors(note_vectors, settings.vector_shards, settings.hnsw_from, rows_of_vectors)
    codes_of_rows = loaded["l2"].encoded_notes(catalogue.note_ids)
    loaded, vectors = moved(loaded, note_vectors, device, settings.most_candidates)
    return Models(
        **loaded,
        versions=versions,
        note_vectors=note_vectors,
        rows_of_vectors=rows_of_vectors,
        rows_of_neighbours=catalogue.rows(loaded["item_to_item"].names),
        codes_of_rows=codes_of_rows,
        num_notes=len(catalogue),
        shards=shards,
        vectors=vectors,
    )


def vectors_of(two_tower: TwoTower, catalogue: Catalogue) -> tuple[np.ndarray, np.ndarray]:
    """(float32 [V, D] the model's vectors, then those of the catalogue's notes that it was not trained on but knows something
    of; int64 [V] their rows of the catalogue)."""
    known_rows = catalogue.rows(two_tower.note_ids)
    new_rows = np.setdiff1d(np.arange(len(catalogue)), known_rows)
    new_vectors = two_tower.vectors_of(catalogue.notes.take(new_rows))
    is_known = new_vectors.any(axis=1)
    return np.concatenate([two_tower.note_vectors, new_vectors[is_known]]), np.append(known_rows, new_rows[is_known])
