"""The four published models of one moment, and the check that this server can feed them."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from models_ml.on_device import VectorsOnDevice, device_from_env, moved
from models_ml.registry import Registry
from models_ml.row_memo import RowMemo
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
    """Loaded at the production alias; immutable. rows_of_vectors: int64 [V], the catalogue row of each of the two-tower
    model's vectors, -1 where the catalogue does not know the note; rows_of_neighbours: of each of item_to_item's names.
    codes_of_rows: int64 [N], how L2 encodes the note of each row.
    vectors: the two-tower vectors on a GPU, where HEADRACE_DEVICE names one; L1 and L2 are then there too. shards: the vectors
    for a search on the CPU."""

    item_to_item: Any
    two_tower: Any
    l1: Any
    l2: Any
    versions: Mapping[str, str]
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
        named = zip(MEMOS, (self.l1, self.l2), strict=True)
        return {name: model.memo for name, model in named if hasattr(model, "memo")}

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
    for name in ("l1", "l2"):
        unknown = [feature for feature in loaded[name].user_features if feature not in of_user]
        unknown += [feature for feature in loaded[name].note_features if feature not in of_candidate]
        if unknown:
            raise HeadraceError(
                f"model {name} {versions[name]} reads features that are not declared: {', '.join(unknown)}; "
                "export the training examples again and train again: `headrace export-training`, `headrace train all`"
            )
    shards = ShardedVectors(loaded["two_tower"].note_vectors, settings.vector_shards, settings.hnsw_from)
    codes_of_rows = loaded["l2"].encoded_notes(catalogue.note_ids)
    loaded, vectors = moved(loaded, device, settings.most_candidates)
    return Models(
        **loaded,
        versions=versions,
        rows_of_vectors=catalogue.rows(loaded["two_tower"].note_ids),
        rows_of_neighbours=catalogue.rows(loaded["item_to_item"].names),
        codes_of_rows=codes_of_rows,
        num_notes=len(catalogue),
        shards=shards,
        vectors=vectors,
    )
