"""What a store publishes at each tick, for other processes and for its own next start: files in one folder.

    tick-<T>.json     which tick and position, by which declarations, and which of the files below make it up
    layer-<id>.bin    one layer of blocks; shared by all ticks that hold it, so a tick writes what it changed
    keys-<id>.bin     keys and texts that came since the publication before
    head-<id>.json    the events of the head at that position

Every file is whole under its name and never changes; the manifest is renamed into place last. Two ticks are kept. Layers,
keys and texts are mapped, not read. Knows nothing of the log or the lake.
"""

import logging
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa

from streaming_sql.array_file import checksum, map_arrays, text_arrays, texts_of, write_arrays, write_whole
from streaming_sql.block_layer import BlockLayer
from streaming_sql.group_state import GroupState
from streaming_sql.head import Head, HeadEvent
from streaming_sql.key_index import KeyIndex
from streaming_sql.layer_file import arrays_of, layer_of
from streaming_sql.online_store import OnlineStore, StoreView
from streaming_sql.plan import GroupPlan
from streaming_sql.text_codes import TextCodes
from warehouse.errors import HeadraceError
from warehouse.features.declarations import FeatureGroup, declarations_hash
from warehouse.features.render import macros_digest

_LOG = logging.getLogger("headrace.stream")
_FORMAT = 2
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
        manifest = self._folder / f"tick-{view.tick_us:020d}.json"
        if view.tick_us == self.tick_us:
            return manifest
        self._folder.mkdir(parents=True, exist_ok=True)
        groups: dict[str, dict[str, list[dict[str, Any]]]] = {}
        held: dict[int, tuple[BlockLayer, dict[str, Any]]] = {}
        for name, state in view.groups.items():
            groups[name] = {}
            for which, layers in (("layers", state.layers), ("fresh_layers", state.fresh_layers)):
                if layers is not None:
                    files = [self._layer(layer) for layer in layers]
                    groups[name][which] = [file for _, file in files]
                    held |= {id(layer): (layer, file) for layer, file in files}
        segment = self._write_segment(view)
        events = {name: _told_head(state, view.position) for name, state in view.groups.items() if state.plan.fresh}
        head = self._write(f"head-{uuid.uuid4().hex}.json", orjson.dumps(events))
        told = {
            "meaning": self._meaning,
            "session": self._session,
            "tick_us": view.tick_us,
            "position": list(view.position),
            "origin": dict(origin),
            "groups": groups,
            "segments": segment,
            "head": head,
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

    def _write(self, name: str, data: bytes) -> dict[str, Any]:
        crc = write_whole(self._folder / name, data)
        self.num_bytes_written += len(data)
        return {"file": name, "crc": crc}

    def _sweep(self) -> None:
        """Removes what no kept tick needs; whoever has it mapped keeps it."""
        manifests = sorted(self._folder.glob("tick-*.json"))
        # a publisher before us may have left a newer tick, which the log then closed again: ours is the one to read
        older = [path for path in manifests if path.name < f"tick-{self.tick_us:020d}.json"]
        kept = {f"tick-{self.tick_us:020d}.json", *(path.name for path in older[-(_TICKS_KEPT - 1) :])}
        wanted = set(kept)
        for name in kept:
            try:
                wanted |= set(_files(orjson.loads((self._folder / name).read_bytes())))
            except (OSError, ValueError, KeyError):
                _LOG.warning("%s cannot be read and is removed", self._folder / name)
                wanted.discard(name)
        for path in self._folder.iterdir():
            if path.name not in wanted and not path.is_dir():
                path.unlink(missing_ok=True)


def _files(manifest: Mapping[str, Any]) -> dict[str, int]:
    """File → CRC-32 of everything that a manifest names."""
    of_groups = (file for told in manifest["groups"].values() for files in told.values() for file in files)
    return {told["file"]: told["crc"] for told in (*of_groups, *manifest["segments"], manifest["head"])}


def _told_head(state: GroupState, position: tuple[int, ...]) -> list[list[Any]]:
    """The head's events that a reader at the position sees."""
    return [
        [
            key,
            event.event_ts,
            event.event_id,
            event.known_at,
            event.landed_us,
            event.log_partition,
            event.log_offset,
            event.values,
        ]
        for key, event in state.head.events()
        if event.is_visible(position)
    ]


def _head(plan: GroupPlan, told: list[list[Any]]) -> Head:
    is_map = [measure.name in plan.maps for measure in plan.fresh]

    def values(given: list[Any]) -> tuple[Any, ...]:
        return tuple(
            (one[0], tuple(one[1])) if has_entry and one is not None else one
            for one, has_entry in zip(given, is_map, strict=True)
        )

    return Head(
        (tuple(key), HeadEvent(event_ts, event_id, known_at, landed_us, partition, offset, values(measured)))
        for key, event_ts, event_id, known_at, landed_us, partition, offset, measured in told
    )


@dataclass(frozen=True)
class Published:
    """A manifest that is there."""

    path: Path
    told: Mapping[str, Any]

    @property
    def tick_us(self) -> int:
        return self.told["tick_us"]

    def check(self) -> None:
        """Raises ValueError naming the first file that is missing or not as it was written. Reads them all."""
        for name, crc in _files(self.told).items():
            path = self.path.parent / name
            if not path.exists() or checksum(path) != crc:
                raise ValueError(f"{path} is missing or damaged")


def newest_published(folder: Path) -> Published | None:
    """The newest manifest that can be read; None where there is none."""
    for path in sorted(folder.glob("tick-*.json"), reverse=True):
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
        self._indexes: dict[str, KeyIndex] = {}
        self._codes: dict[str, TextCodes] = {}

    def view(self, published: Published, with_head: bool = True) -> StoreView:
        """The view that was published. Raises ValueError if it is of other declarations or damaged, OSError if a file went."""
        told, folder = published.told, published.path.parent
        if told.get("meaning") != self._meaning:
            raise ValueError(f"{published.path} was published for other declarations")
        if told["session"] != self._session:
            self._session, self._layers = told["session"], {}
            self._indexes = {name: KeyIndex(plan.group.keys) for name, plan in self._plans.items()}
            self._codes = {name: TextCodes() for name in self._plans}
        for segment in told["segments"]:
            self._take(folder, segment)
        heads = orjson.loads((folder / told["head"]["file"]).read_bytes()) if with_head else {}
        layers: dict[str, BlockLayer] = {}
        states = {}
        for name, plan in self._plans.items():

            def mapped(files: list[dict[str, Any]], plan: GroupPlan = plan) -> tuple[BlockLayer, ...]:
                for file in (one["file"] for one in files):
                    layers[file] = self._layers.get(file) or layer_of(plan, map_arrays(folder / file))
                return tuple(layers[one["file"]] for one in files)

            group = told["groups"][name]
            states[name] = GroupState(
                plan,
                self._indexes[name],
                self._codes[name],
                mapped(group["layers"]),
                _head(plan, heads.get(name, [])),
                mapped(group["fresh_layers"]) if with_head and "fresh_layers" in group else None,
            )
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


class PublishedStore:
    """The newest published ticks, for a process that does not run the stream itself: `store` answers like the runner's own."""

    def __init__(self, folder: Path, groups: Mapping[str, FeatureGroup]):
        """Raises HeadraceError if nothing is published there, or for other declarations."""
        self._folder, self._reading = folder, Reading(groups)
        self.store = OnlineStore(groups)
        if not self.refresh():
            raise HeadraceError(
                f"nothing is published in {folder}: start `headrace stream run` or `headrace serve` there first"
            )

    def refresh(self) -> bool:
        """Moves to the newest tick; whether there was a newer one. Views that are in use stay as they are."""
        for _ in range(10):  # a publisher may sweep a tick away while we open it; the next one is then there
            published = newest_published(self._folder)
            if published is None or published.tick_us <= self.store.tick_us:
                return False
            try:
                self.store.show(self._reading.view(published))
            except FileNotFoundError:
                continue
            except ValueError as error:
                raise HeadraceError(f"{error}; restart the process that publishes") from error
            return True
        raise HeadraceError(f"{self._folder} is swept faster than it can be read")
