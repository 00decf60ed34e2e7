"""One feature group of one view: layers of blocks and the head, read together. Immutable, so a request sees one instant.

Shape letters: N keys asked for, F features, M sum columns of a family, W window lengths of a family.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from streaming_sql import moments
from streaming_sql.block_layer import BlockLayer
from streaming_sql.entry_maps import buckets, distinct_counts, most_frequent, quantiles
from streaming_sql.expressions import write_derived
from streaming_sql.head import Head, HeadEvent
from streaming_sql.key_index import Key, KeyIndex, KeysBeside
from streaming_sql.plan import GroupPlan
from streaming_sql.text_codes import CodesBeside, TextCodes
from streaming_sql.window_reader import Instant, WindowReader
from warehouse.features.measures import Measure
from warehouse.time_algebra import Window

_FEW = 1024
"""Keys or texts that are kept without asking whether anything has them."""
_UNUSED_AT = 2
"""How many times the used ones there may be before the others go."""


@dataclass(frozen=True)
class FeatureMatrix:
    """Values of one group: `values` float64 [N, F] in the order of `names`, NaN for NULL; `sequences` are lists of text, `maps`
    from text to numbers in byte order of the text; N of each."""

    names: tuple[str, ...]
    values: np.ndarray
    sequences: dict[str, list[list[str]]]
    maps: dict[str, list[dict[str, float]]] = field(default_factory=dict)


@dataclass(frozen=True)
class GroupState:
    """Layers and head of one group."""

    plan: GroupPlan
    index: KeyIndex
    codes: TextCodes
    layers: tuple[BlockLayer, ...]
    head: Head
    fresh_layers: tuple[BlockLayer, ...] | None = None
    """What event-fresh measures read instead of `layers`, where the view's position knows
    retractions that its tick does not."""

    def layers_of(self, family: str) -> tuple[BlockLayer, ...]:
        return self.layers if family != "event" or self.fresh_layers is None else self.fresh_layers

    def without_unused(self) -> "GroupState":
        """The state with new tables that have forgotten the keys and texts which no block and no head event has, once those are
        as many as the rest; itself otherwise, and while there are several layers, as what went shows when they merge."""
        if len(self.layers) > 1:
            return self
        rows = self.layers[0].rows if self.layers else np.zeros(0, dtype=np.int64)
        state = self
        if len(self.index) > _FEW + _UNUSED_AT * len(rows):
            state = replace(state, index=self.index.kept(rows))
        if len(self.codes) > _FEW and len(self.codes) > _UNUSED_AT * len(codes := self._codes_in_use()):
            state = replace(state, codes=self.codes.kept(codes))
        return state

    def at(self, tick_us: int, made: "GroupState") -> "GroupState":
        """The state at a newer tick whose layers were made elsewhere, with the numbers that keys and texts have there; of the
        head what the tick does not hold. Events are copied where a number changes: views of before go on reading theirs."""
        index, codes = KeysBeside(made.index), CodesBeside(made.codes)
        left = ((key, event) for key, event in self.head.events() if event.known_at > tick_us)
        head = Head((key, self.recoded(event, codes)) for key, event in left)
        return replace(self, index=index, codes=codes, layers=made.layers, head=head, fresh_layers=None)

    def recoded(self, event: HeadEvent, codes: TextCodes) -> HeadEvent:
        """A head event by the codes of another table; itself where they are the same."""
        values = event.values
        for place in self.plan.fresh_texts:
            if values[place] is not None:
                code, numbers = values[place]
                (text,) = self.codes.texts([code])
                values = (*values[:place], (codes.code(text), numbers), *values[place + 1 :])
        return event if values == event.values else replace(event, values=values)

    def _codes_in_use(self) -> np.ndarray:
        """int64, ascending: of map entries in blocks and in the head."""
        places = self.plan.fresh_texts
        in_head = [
            event.values[place][0] for _, event in self.head.events() for place in places if event.values[place] is not None
        ]
        of_texts = [name for name, shape in self.plan.maps.items() if shape.has_texts]
        in_blocks = [layer.maps[name].entry for layer in self.layers for name in of_texts]
        return np.unique(np.concatenate([np.array(in_head, dtype=np.int64), *in_blocks]))

    def code(self, event: HeadEvent) -> None:
        """Puts the codes of texts into a new head event's map entries."""
        for place in self.plan.fresh_texts:
            value = event.values[place]
            if value is not None:
                coded = (self.codes.code(value[0]), value[1])
                event.values = (*event.values[:place], coded, *event.values[place + 1 :])

    def block_keys(self, keys: Sequence[Key], t_us: int) -> list[Key]:
        """The keys of the blocks that readers with these entity keys read at t."""
        parts = tuple(part.of(t_us) for part in self.plan.group.calendar)
        return [(*key, *parts) for key in keys]

    def assemble(self, keys: Sequence[Key], at: Instant) -> FeatureMatrix:
        """All features of the group for the entity keys (unknown keys get the empty values)."""
        block_keys = self.block_keys(keys, at.t_us)
        rows = self.index.find(block_keys)
        heads: list[list[HeadEvent]] = []
        if self.plan.fresh and len(self.head):
            heads = [self.head.visible(key, at.position, at.t_us) for key in block_keys]
        group = self.plan.group
        names = self.plan.group.feature_names
        matrix = np.empty((len(keys), len(names)))
        sequences: dict[str, list[list[str]]] = {}
        maps: dict[str, list[dict[str, float]]] = {}
        for family in self.plan.families:
            reader = WindowReader(
                self.plan, family, self.layers_of(family.name), rows, heads if family.name == "event" else [], at
            )
            reader.write_sums(matrix)
            for name, measure, window in self.plan.reads[family.name].rest:
                if measure.shape == "number":
                    matrix[:, self.plan.place_of[name]] = self._number(reader, measure, window)
                elif measure.shape == "list":
                    sequences[f"{group.entity}_{name}"] = self._list(reader, measure, window)
                else:
                    found = reader.maps(measure, window)
                    is_average = measure.aggregation == "avg"
                    maps[f"{group.entity}_{name}"] = buckets(found, len(keys), is_average, self.codes)
        if self.plan.derived:
            write_derived(self.plan.derived, self.plan.place_of, matrix)
        return FeatureMatrix(names, matrix, sequences, maps)

    def _list(self, reader: WindowReader, measure: Measure, window: Window) -> list[list[str]]:
        if measure.aggregation != "top_k":
            return reader.lists(measure, window)
        assert measure.k is not None
        found = reader.maps(measure, window)
        return most_frequent(found, reader.num_keys, measure.k, self.codes)

    def _number(self, reader: WindowReader, measure: Measure, window: Window) -> np.ndarray:
        """float64 [N], NaN for NULL unless an empty value is declared."""
        match measure.aggregation:
            case "var":
                value = moments.variance(reader.moments(measure, window))
            case "stddev":
                value = np.sqrt(moments.variance(reader.moments(measure, window)))
            case "first" | "last":
                value = reader.first_or_last(measure, window)
            case "approx_quantile":
                value = quantiles(reader.maps(measure, window), reader.num_keys, measure)
            case "approx_count_distinct":
                value = distinct_counts(reader.maps(measure, window), reader.num_keys)
            case _:
                value = _finalized(measure, reader.numbers(measure, window))
        return value if measure.empty is None else np.where(np.isnan(value), measure.empty, value)


def _finalized(measure: Measure, parts: list[np.ndarray]) -> np.ndarray:
    """float64 [N], NaN for NULL."""
    if measure.aggregation == "avg":
        total, count = parts[0].astype(np.float64), parts[1].astype(np.float64)
        return np.divide(total, count, out=np.full(len(count), np.nan), where=count > 0)
    if measure.aggregation in ("min", "max"):
        return np.where(np.isinf(parts[0]), np.nan, parts[0])
    return parts[0].astype(np.float64)
