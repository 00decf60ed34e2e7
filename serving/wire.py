"""The shapes of the HTTP edge: camelCase on the wire, snake_case inside, unknown fields refused by name."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator
from pydantic.alias_generators import to_camel

from serving.nearby import PATTERN

Id = Annotated[str, StringConstraints(min_length=1, max_length=256, pattern=r"^[^\x00-\x1f\x7f]+$")]


def _as_sent(value: Any) -> Any:
    """JSON has numbers: `true` and `"5"` are none, although Python would take them for some."""
    if isinstance(value, bool | str):
        raise ValueError(f"must be a number, got {'true or false' if isinstance(value, bool) else 'text'}")
    return value


Whole = Annotated[int, BeforeValidator(_as_sent)]
Number = Annotated[float, BeforeValidator(_as_sent)]
FeedType = Literal["EXPLORE", "FOLLOW", "NEARBY"]
EventType = Literal["view", "click", "long_view", "like", "comment", "share", "follow", "hide", "watch", "retraction"]


class Wire(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=False, extra="forbid", allow_inf_nan=False)


class Context(Wire):
    """What is known of the request itself. Keys that are declared as features (`kind: request`) are checked and read; others
    may be sent and are not read."""

    model_config = ConfigDict(alias_generator=to_camel, extra="allow", allow_inf_nan=False)

    surface: Annotated[Id | None, Field(description="Where the feed is shown; the most usual one when absent")] = None
    geohash: Annotated[
        str | None,
        Field(pattern=PATTERN, description="Where the request comes from; NEARBY needs it. 5 letters are about 5 km"),
    ] = None


class FeedRequest(Wire):
    user_id: Id
    feed_type: FeedType = "EXPLORE"
    context: Context = Field(default_factory=Context)
    limit: Whole | None = Field(None, ge=1, le=200, description="Notes on the page; `page_size` of the settings by default")
    deadline_ms: Number | None = Field(
        None, ge=1, le=60_000, description="Milliseconds the answer is of use; stages that would come later are skipped"
    )


class RetrieveRequest(Wire):
    user_id: Id
    feed_type: FeedType = "EXPLORE"
    context: Context = Field(default_factory=Context)
    limit: Whole = Field(500, ge=1, le=5000)


class Note(Wire):
    """A candidate. Only `noteId` must be there; the rest is what an earlier stage said and is carried through."""

    model_config = ConfigDict(alias_generator=to_camel, extra="ignore", allow_inf_nan=False)

    note_id: Id
    author_id: Id | None = None
    recall_score: Number | None = None
    source: str | None = Field(None, max_length=64)
    sources: list[Annotated[str, StringConstraints(max_length=64)]] = Field(default_factory=list, max_length=32)
    l1_score: Number | None = None


class RankL1Request(Wire):
    user_id: Id
    candidates: list[Note]
    context: Context = Field(default_factory=Context)
    top_k: Whole = Field(500, ge=1, le=10_000, alias="topK")


class RankL2Request(Wire):
    user_id: Id
    candidates: list[Note]
    context: Context = Field(default_factory=Context)
    top_k: Whole = Field(20, ge=1, le=10_000, alias="topK")


class RetrievedNote(Wire):
    note_id: str
    author_id: str | None
    recall_score: float = Field(description="Sum over sources of 1 / (60 + rank)")
    source: str = Field(description="The first of `sources`")
    sources: list[str] = Field(description="Every generator that brought the note")
    topic: str | None


class L1RankedNote(Wire):
    note_id: str
    author_id: str | None
    recall_score: float | None
    source: str | None
    sources: list[str]
    l1_score: float | None = Field(description="Null when the stage was skipped")
    position: int


class L2RankedNote(L1RankedNote):
    predictions: dict[str, float] = Field(description="Probability per head")
    final_score: float | None


class FeedNote(Wire):
    position: int
    note_id: str
    author_id: str | None
    topic: str | None
    impression_id: str = Field(description="Send it back with the view and the actions of this note")
    source: str
    sources: list[str]
    recall_score: float
    l1_score: float | None
    predictions: dict[str, float]
    final_score: float
    slot: str = Field(description="What put the note here: ranked, exploration, cold_start or promoted")
    propensity: float = Field(description="Probability that this note took this place, given the places before it")


class FeedResponse(Wire):
    request_id: str
    model_version: str = Field(description="Of L2, the model that decides the order")
    model_versions: dict[str, str]
    request_ts: str
    feature_watermark: str = Field(description="T: the tick of every block-fresh value")
    known_position: list[int] = Field(description="K: the log position of every fresh value")
    notes: list[FeedNote]
    degraded: list[str] = Field(description="What was skipped, failed or relaxed; empty on a good day")
    cached: list[str] = Field(description="Caches that had an answer: user, candidates, l1")
    num_candidates: int = Field(description="Notes that were found, before ranking")
    timings: dict[str, float] = Field(description="Milliseconds per stage")


class EventIn(Wire):
    """One fact: who did what to which note, when."""

    event_id: Id = Field(description="Chosen by the client; sending it again changes nothing")
    event_type: EventType
    user_id: Id
    note_id: Id | None = None
    author_id: Id | None = Field(None, description="Filled from the note when absent")
    event_ts: str | None = Field(
        None,
        description="ISO-8601 with a zone; the server's clock when absent",
        examples=["2022-05-05T16:10:00Z"],
        json_schema_extra={"format": "date-time"},
    )
    surface: Id | None = None
    request_id: Id | None = None
    impression_id: Id | None = Field(None, description="Of the feed's answer, so that actions are joined to what was shown")
    watch_ms: Whole | None = Field(None, ge=0, le=86_400_000, description="Of a `watch`: milliseconds played")
    retracts: Id | None = Field(
        None, description="Of a `retraction`: the eventId that it takes back; it need not have come yet"
    )
    properties: dict[str, Any] | None = Field(None, description="Anything else, at most 8 KiB as JSON")

    @model_validator(mode="after")
    def fits_its_type(self) -> "EventIn":
        if self.event_type == "watch" and self.watch_ms is None:
            raise ValueError("a watch needs watchMs, the milliseconds played")
        if self.event_type != "watch" and self.watch_ms is not None:
            raise ValueError(f"watchMs belongs to a watch, not to a {self.event_type}")
        if self.event_type == "retraction" and self.retracts is None:
            raise ValueError("a retraction needs retracts, the eventId that it takes back")
        if self.event_type != "retraction" and self.retracts is not None:
            raise ValueError(f"retracts belongs to a retraction, not to a {self.event_type}")
        if self.event_type not in ("follow", "retraction") and self.note_id is None:
            raise ValueError(f"a {self.event_type} needs noteId")
        if self.event_type == "follow" and self.note_id is None and self.author_id is None:
            raise ValueError("a follow needs authorId, or noteId whose author is followed")
        return self


class EventResult(Wire):
    event_id: str | None
    status: Literal["accepted", "rejected"]
    partition: int | None = None
    offset: int | None = None
    error: str | None = None


class EventsResponse(Wire):
    accepted: int
    rejected: int
    results: list[EventResult] = Field(description="In the order sent; an eventId sent before has its first position")


class Problem(BaseModel):
    """The body of every error."""

    detail: str
    errors: list[dict[str, str]] = Field(default_factory=list)
