"""What a store publishes at each tick, for other processes and for its own next start: files in one folder.

    tick-<T>.json     which tick, what the publisher had read, by which declarations, and which of the files below make it up
    layer-<id>.bin    one layer of blocks; shared by all ticks that hold it, so a tick writes what it changed
    keys-<id>.bin     keys and texts that came since the publication before

Every file is whole under its name and never changes; the manifest is renamed into place last. Two ticks are kept. Layers are
mapped, not read. What no block of the tick holds is in the log. Knows nothing of the log or the lake.
"""

import logging
import uuid
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa

from streaming_sql.array_file import checksum, map_arrays, text_arrays, texts_of, write_arrays, write_whole
from streaming_sql.block_layer import BlockLayer
from streaming_sql.group_state import GroupState
from streaming_sql.head import Head
from streaming_sql.key_index import KeyIndex
from streaming_sql.layer_file import arrays_of, layer_of
from streaming_sql.online_store import StoreView
from streaming_sql.plan import GroupPlan
from streaming_sql.text_codes import TextCodes
from warehouse.features.declarations import FeatureGroup, declarations_hash
from warehouse.features.render import macros_digest

_LOG = logging.getLogger("headrace.stream")
_FORMAT = 3
UNUSABLE = (ValueError, KeyError, TypeError, OSError)
"""What taking up a published tick raises where it is damaged, gone, or of another version or world."""
_TICKS_KEPT = 2
_MOST_SEGMENTS = 24
"""Files of keys and texts before they are written as one again."""


def meaning_of(groups: Mapping[str, FeatureGroup]) -> str:
    """What published blocks mean: declarations, the algebra's SQL, the form of the files."""
    return f"{declarations_hash(dict(groups))}-{macros_digest()}-{_FORMAT}"


class Publisher:
    """Writes the views of one store. One thread publishes, beside the one that moves the store."""

    def __init__(self, folder: Path, groups: Mapping[str, FeatureGroup]):
        self._folder, self._meaning = folder, meaning_of(groups)
        self._session = uuid.uuid4().hex
        self._layers: dict[int, tuple[BlockLayer, dict[str, Any]]] = {}
        self._segments: list[dict[str, Any]] = []
        self._num_keys: dict[str, int] = {}
        self._num_texts: dict[str, int] = {}
        self._tables: dict[str, tuple[KeyIndex, TextCodes]] = {}
        self.tick_us = 0
        """The newest tick that is published."""
        self.num_bytes_written = 0

    def publish(self, view: StoreView, origin: Mapping[str, Any]) -> Path:
        """Writes a view if its tick is new; returns the manifest. origin: what the view was made from, for whoever restores
        it (JSON). OSError if the disk does not take it: what was published before stays."""
        manifest = self._folder / _manifest(view.tick_us)
        if view.tick_us == self.tick_us:
            return manifest
        self._folder.mkdir(parents=True, exist_ok=True)
        groups: dict[str, list[dict[str, Any]]] = {}
        held: dict[int, tuple[BlockLayer, dict[str, Any]]] = {}
        for name, state in view.groups.items():
            files = [self._layer(layer) for layer in state.layers]
            groups[name] = [file for _, file in files]
            held |= {id(layer): (layer, file) for layer, file in files}
        segments = self._write_segment(view)
        told = {
            "meaning": self._meaning,
            "session": self._session,
            "tick_us": view.tick_us,
            "position": list(view.position),
            "origin": dict(origin),
            "groups": groups,
            "segments": segments,
        }
        write_whole(manifest, orjson.dumps(told))
        self._layers, self.tick_us = held, view.tick_us
        self._sweep()
        return manifest

    def _layer(self, layer: BlockLayer) -> tuple[BlockLayer, dict[str, Any]]:
        if id(layer) in self._layers:
            return self._layers[id(layer)]
        return layer, self._arrays(f"layer-{uuid.uuid4().hex}.bin", arrays_of(layer))

    def _write_segment(self, view: StoreView) -> list[dict[str, Any]]:
        """What came to keys and texts since the last one. Where rows or codes went, all of them: readers begin anew."""
        tables = {name: (state.index, state.codes) for name, state in view.groups.items()}
        gone = any(held[0] is not tables[name][0] or held[1] is not tables[name][1] for name, held in self._tables.items())
        self._tables = tables
        if gone:
            self._session = uuid.uuid4().hex
        if gone or len(self._segments) >= _MOST_SEGMENTS:
            self._segments, self._num_keys, self._num_texts = [], {}, {}
        arrays: dict[str, np.ndarray] = {}
        counts, num_keys, num_texts = {}, {}, {}
        for name, state in view.groups.items():
            first_key, first_text = self._num_keys.get(name, 0), self._num_texts.get(name, 0)
            keys, (texts, codes) = state.index.keys(first_key), state.codes.since(first_text)
            num_keys[name], num_texts[name] = first_key + len(keys), first_text + len(texts)
            counts[name] = {"first_key": first_key, "first_text": first_text}
            columns = zip(*keys, strict=True) if keys else [()] * len(state.plan.group.keys)
            for place, column in enumerate(columns):
                arrays |= text_arrays(f"{name}/key{place}", pa.array(column, pa.string()))
            arrays |= text_arrays(f"{name}/texts", pa.array(texts, pa.string()))
            arrays |= {f"{name}/rows": state.index.rows(first_key)[: len(keys)], f"{name}/codes": codes}
        if self._segments and (num_keys, num_texts) == (self._num_keys, self._num_texts):
            return self._segments
        file = self._arrays(f"keys-{uuid.uuid4().hex}.bin", arrays)
        self._segments = [*self._segments, {**file, "groups": counts}]
        self._num_keys, self._num_texts = num_keys, num_texts
        return self._segments

    def _arrays(self, name: str, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
        crc = write_arrays(self._folder / name, arrays)
        self.num_bytes_written += (self._folder / name).stat().st_size
        return {"file": name, "crc": crc}

    def _sweep(self) -> None:
        """Removes what no kept tick needs; whoever has it mapped keeps it."""
        manifests = sorted(self._folder.glob("tick-*.json"))
        # a publisher before us may have left a newer tick, which the log then closed again: ours is the one to read
        newest = _manifest(self.tick_us)
        older = [path.name for path in manifests if path.name < newest]
        kept = {newest, *older[-(_TICKS_KEPT - 1) :]}
        wanted = set(kept)
        for name in kept:
            try:
                wanted |= set(_files(orjson.loads((self._folder / name).read_bytes())))
            except (OSError, ValueError, KeyError, TypeError):  # damaged, or of another version
                _LOG.warning("%s cannot be read and is removed", self._folder / name)
                wanted.discard(name)
        for path in self._folder.iterdir():
            if path.name not in wanted and not path.is_dir():
                path.unlink(missing_ok=True)


def _manifest(tick_us: int) -> str:
    """Its name: names sort as ticks do."""
    return f"tick-{tick_us:020d}.json"


def _files(manifest: Mapping[str, Any]) -> dict[str, int]:
    """File → CRC-32 of everything that a manifest names."""
    of_groups = (file for files in manifest["groups"].values() for file in files)
    return {told["file"]: told["crc"] for told in (*of_groups, *manifest["segments"])}


@dataclass(frozen=True)
class Published:
    """A manifest that is there."""

    path: Path
    told: Mapping[str, Any]

    @property
    def tick_us(self) -> int:
        return self.told["tick_us"]

    def check(self, but: Container[str] = ()) -> set[str]:
        """The names of its files. Reads all but some; raises ValueError naming the first that is not as it was written,
        OSError if one is not there."""
        files = _files(self.told)
        for name, crc in files.items():
            if name not in but and checksum(self.path.parent / name) != crc:
                raise ValueError(f"{self.path.parent / name} is damaged")
        return set(files)


def newest_published(folder: Path, after_us: int = 0) -> Published | None:
    """The newest manifest that can be read, of a tick after `after_us`; None where there is none."""
    newer = (path for path in folder.glob("tick-*.json") if path.name > _manifest(after_us))
    for path in sorted(newer, reverse=True):
        try:
            return Published(path, orjson.loads(path.read_bytes()))
        except (OSError, ValueError):
            continue
    return None


class Reading:
    """Turns manifests of one folder into views, keeping keys and texts from one to the next."""

    def __init__(self, groups: Mapping[str, FeatureGroup]):
        self._plans = {name: GroupPlan.of(group) for name, group in groups.items()}
        self._meaning = meaning_of(groups)
        self._session = ""
        self._layers: dict[str, BlockLayer] = {}
        self._sound: set[str] = set()
        """Files of the newest tick: their checksums were right."""
        self._indexes: dict[str, KeyIndex] = {}
        self._codes: dict[str, TextCodes] = {}

    def has_same_meaning(self, published: Published) -> bool:
        """Whether it was published for these declarations, by this version."""
        return published.told.get("meaning") == self._meaning

    def view(self, published: Published) -> StoreView:
        """The view that was published, with an empty head. Its tables of keys and texts grow with later ones, and are not to be
        added to meanwhile (`GroupState.at`). Raises one of UNUSABLE if it cannot be had, ValueError if it is of other
        declarations."""
        told, folder = published.told, published.path.parent
        if not self.has_same_meaning(published):
            raise ValueError(f"{published.path} was published for other declarations")
        self._sound = published.check(but=self._sound)
        if told["session"] != self._session:
            self._session, self._layers = told["session"], {}
            self._indexes = {name: KeyIndex(plan.group.keys) for name, plan in self._plans.items()}
            self._codes = {name: TextCodes() for name in self._plans}
        for segment in told["segments"]:
            self._take(folder, segment)
        layers: dict[str, BlockLayer] = {}
        states = {}
        for name, plan in self._plans.items():
            files = [file["file"] for file in told["groups"][name]]
            layers |= {file: self._layers.get(file) or layer_of(plan, map_arrays(folder / file)) for file in files}
            mapped = tuple(layers[file] for file in files)
            states[name] = GroupState(plan, self._indexes[name], self._codes[name], mapped, Head())
        self._layers = layers
        return StoreView(told["tick_us"], tuple(told["position"]), states)

    def _take(self, folder: Path, segment: Mapping[str, Any]) -> None:
        """The keys and texts of a segment that are not here yet."""
        arrays = map_arrays(folder / segment["file"])
        for name, told in segment["groups"].items():
            index, codes = self._indexes[name], self._codes[name]
            columns = [texts_of(f"{name}/key{place}", arrays) for place in range(len(self._plans[name].group.keys))]
            new = max(len(index) - told["first_key"], 0)
            keys = zip(*(column.slice(new).to_pylist() for column in columns), strict=True)
            index.extend(keys, arrays[f"{name}/rows"][new:].tolist())
            new = max(len(codes) - told["first_text"], 0)
            codes.extend(texts_of(f"{name}/texts", arrays).slice(new).to_pylist(), arrays[f"{name}/codes"][new:].tolist())
