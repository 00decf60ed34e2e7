"""What one writes first: FastAPI, one dict of features per candidate, eager PyTorch, one request at a time per thread.

    python -m bench.serving.peer --port 8001        # on the home and clock of the environment

The same world, generators, models and features as the real server, and less to do: every feature lies ready in a dict from the
start (as if a store answered at no cost), and there are no policy but an author cap, no forward log, no explanations and no
deadlines.
"""

import argparse
import os
import socket
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

from serving.engine import Engine
from serving.settings import Settings
from serving.world import World
from warehouse.clock import Clock
from warehouse.home import Home
from warehouse.time_algebra import MINUTE_US

USER, NOTE, AUTHOR, USER_AUTHOR = ("user_id",), ("note_id",), ("author_id",), ("user_id", "author_id")


class FeedRequest(BaseModel):
    userId: str
    limit: int = 20


class FeedNote(BaseModel):
    position: int
    noteId: str
    authorId: str | None
    sources: list[str]
    recallScore: float
    l1Score: float
    predictions: dict[str, float]
    finalScore: float


class FeedResponse(BaseModel):
    notes: list[FeedNote]
    degraded: list[str]
    timings: dict[str, float]
    numCandidates: int


class Plain:
    """Features of every key as dicts, and the cascade over them."""

    def __init__(self, world: World):
        self.world, self.models, self.settings = world, world.models, world.settings
        self.view = world.store.view()
        self.t_us = max(world.clock.now_us(), self.view.tick_us)
        self.features: dict[tuple[str, ...], dict[tuple[str, ...], dict[str, float]]] = {}
        self.unknown: dict[tuple[str, ...], dict[str, float]] = {}
        self.last_clicks: dict[str, list[str]] = {}
        keys = {
            USER: [(user_id,) for user_id, _ in world.readers.most_active(len(world.readers))],
            NOTE: [(note_id,) for note_id in world.catalogue.note_ids],
            AUTHOR: [(author_id,) for author_id in world.catalogue.rows_of_author],
        }
        for group in world.groups.values():
            held = keys.get(group.entity_keys) or self.view.groups[group.name].index.keys(0)
            self._hold(group.name, group.entity_keys, held)
        self.trending = [world.catalogue.note_ids[row] for row in world.trending.rows(world, self.view, self.t_us)]
        freshness_N = world.catalogue.freshness_us
        self.fresh = [world.catalogue.note_ids[row] for row in np.argsort(-freshness_N, kind="stable")[:20_000]]
        self.exists = {
            note_id
            for note_id, is_there in zip(world.catalogue.note_ids, world.catalogue.exists_at(self.t_us), strict=True)
            if is_there
        }

    def _hold(self, name: str, columns: tuple[str, ...], keys: list[tuple[str, ...]]) -> None:
        matrix = self.view.assemble(name, keys, self.t_us)
        of_group = self.features.setdefault(columns, {})
        for key, values in zip(keys, matrix.values.tolist(), strict=True):
            of_group.setdefault(key, {}).update(zip(matrix.names, values, strict=True))
        nobody = self.view.assemble(name, [("",) * len(columns)], self.t_us)
        self.unknown.setdefault(columns, {}).update(zip(nobody.names, nobody.values[0].tolist(), strict=True))
        for column, lists in matrix.sequences.items():
            if column == "user_last_clicks_30d":
                self.last_clicks.update({key[0]: clicks for key, clicks in zip(keys, lists, strict=True)})

    def features_of(self, columns: tuple[str, ...], *key: str | None) -> Mapping[str, float]:
        return self.features[columns].get(key, self.unknown[columns])  # type: ignore[arg-type]

    def candidates(self, user_id: str, user: Mapping[str, float], history: list[str]) -> list[dict[str, Any]]:
        limits, readers, catalogue = self.settings.generators, self.world.readers, self.world.catalogue
        seen = {*readers.seen(user_id), *history, *readers.hidden(user_id)}

        def usable(note_ids: Any, limit: int) -> list[str]:
            found = []
            for note_id in note_ids:
                if note_id not in seen and note_id in self.exists:
                    found.append(note_id)
                    if len(found) == limit:
                        break
            return found

        tower = self.models.two_tower
        values_F = np.array([user[name] for name in tower.user_features])
        products = tower.note_vectors @ tower.user_vector(history, values_F, readers.attributes(user_id))
        most = limits["two_tower"] + len(seen)
        best = np.argpartition(-products, most)[:most]
        best = best[np.argsort(-products[best])]
        seeds = history[-self.settings.item_to_item_seeds :]
        neighbours = self.models.item_to_item.neighbours(seeds, 2 * limits["item_to_item"]) if seeds else []
        followed = [
            catalogue.note_ids[row]
            for author_id in readers.follows(user_id)
            for row in catalogue.rows_of_author.get(author_id, ())
        ]
        lists = {
            "trending": usable(self.trending, limits["trending"]),
            "fresh": usable(self.fresh, limits["fresh"]),
            "item_to_item": usable((note_id for note_id, _ in neighbours), limits["item_to_item"]),
            "two_tower": usable((tower.note_ids[place] for place in best), limits["two_tower"]),
            "followed_authors": usable(followed, limits["followed_authors"]),
        }
        found: dict[str, dict[str, Any]] = {}
        for source, note_ids in lists.items():
            for rank, note_id in enumerate(note_ids):
                candidate = found.setdefault(note_id, {"noteId": note_id, "recallScore": 0.0, "sources": []})
                candidate["recallScore"] += 1 / (61 + rank)
                candidate["sources"].append(source)
        return sorted(found.values(), key=lambda candidate: -candidate["recallScore"])

    def hydrate(self, user_id: str, candidates: list[dict[str, Any]]) -> None:
        catalogue = self.world.catalogue
        for candidate in candidates:
            row = catalogue.row_of[candidate["noteId"]]
            author_id = candidate["authorId"] = catalogue.author_ids[row]
            candidate["features"] = {
                **self.features_of(NOTE, candidate["noteId"]),
                **self.features_of(AUTHOR, author_id),
                **self.features_of(USER_AUTHOR, user_id, author_id),
                "note_duration_ms": float(catalogue.duration_ms_N[row]),
                "note_age_min": (self.t_us - int(catalogue.created_us_N[row])) / MINUTE_US,
            }

    @torch.inference_mode()
    def l1(self, user: Mapping[str, float], candidates: list[dict[str, Any]]) -> None:
        model = self.models.l1
        user_1U, note_1NI = _tensors(model, user, candidates)
        logits_NT = model.network(user_1U, torch.tensor([model.code_of_surface(None)]), note_1NI)[0]
        for candidate, score in zip(candidates, (torch.sigmoid(logits_NT) @ model.weights_T).tolist(), strict=True):
            candidate["l1Score"] = score

    @torch.inference_mode()
    def l2(self, user_id: str, user: Mapping[str, float], history: list[str], candidates: list[dict[str, Any]]) -> None:
        model = self.models.l2
        user_1U, note_1NI = _tensors(model, user, candidates)
        codes = [model._code_of.get(note_id, 0) for note_id in history[-model.history_length :]][::-1]
        history_1L = torch.tensor([codes + [0] * (model.history_length - len(codes))])
        attributes_1A = torch.from_numpy(model.encoded_attributes(self.world.readers.attributes(user_id)))[None]
        surface_1 = torch.tensor([model.code_of_surface(None)])
        reader = model.network.read(user_1U, surface_1, attributes_1A, history_1L, model.table_ND)
        note_1N = torch.tensor([[model._code_of.get(candidate["noteId"], 0) for candidate in candidates]])
        logits_KNT = model.network.logits(reader, note_1N, note_1NI, model.table_ND)[:, 0]
        weights = self.settings.head_weights
        for candidate, row in zip(candidates, torch.sigmoid(logits_KNT).mean(0).tolist(), strict=True):
            candidate["predictions"] = dict(zip(model.heads, row, strict=True))
            candidate["finalScore"] = sum(weights.get(head, 0.0) * score for head, score in candidate["predictions"].items())

    def page(self, candidates: list[dict[str, Any]], limit: int) -> list[dict[str, Any]]:
        of_author: dict[str | None, int] = {}
        page: list[dict[str, Any]] = []
        for candidate in sorted(candidates, key=lambda candidate: -candidate["finalScore"]):
            author_id = candidate["authorId"]
            if of_author.get(author_id, 0) < self.settings.max_notes_per_author:
                of_author[author_id] = of_author.get(author_id, 0) + 1
                page.append({**candidate, "position": len(page)})
            if len(page) == limit:
                break
        return page

    def feed(self, user_id: str, limit: int) -> FeedResponse:
        timings: dict[str, float] = {}

        def timed(stage: str, started: float) -> None:
            timings[stage] = (time.perf_counter() - started) * 1000

        started = began = time.perf_counter()
        user = self.features_of(USER, user_id)
        history = [*self.world.readers.history_before_the_log(user_id), *self.last_clicks.get(user_id, [])]
        candidates = self.candidates(user_id, user, history)
        timed("retrieve", began)
        began = time.perf_counter()
        self.hydrate(user_id, candidates)
        timed("hydrate_candidates", began)
        began = time.perf_counter()
        self.l1(user, candidates)
        timed("l1", began)
        began = time.perf_counter()
        survivors = sorted(candidates, key=lambda candidate: -candidate["l1Score"])[: self.settings.l1_top_k]
        self.l2(user_id, user, history, survivors)
        timed("l2", began)
        page = self.page(survivors, limit)
        timed("total", started)
        return FeedResponse(
            notes=[FeedNote(**note) for note in page], degraded=[], timings=timings, numCandidates=len(candidates)
        )


def _tensors(model: Any, user: Mapping[str, float], candidates: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
    user_1U = torch.tensor([[user[name] for name in model.user_features]], dtype=torch.float32)
    rows = [[candidate["features"][name] for name in model.note_features] for candidate in candidates]
    return user_1U, torch.tensor([rows], dtype=torch.float32)


def create_app(plain: Plain) -> FastAPI:
    app = FastAPI()

    @app.post("/v1/feed")
    def feed(body: FeedRequest) -> FeedResponse:
        return plain.feed(body.userId, body.limit)

    @app.get("/readyz")
    def readyz() -> dict[str, str]:
        return {"status": "ready"}

    return app


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--workers", type=int, default=1, help="processes, which share what the first has loaded")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    engine = Engine(Home.from_env(), Clock.from_env(), Settings.from_env())
    engine.start()
    if not engine.wait(600):
        parser.exit(2, "; ".join(engine.missing()) + "\n")
    assert engine.world is not None
    plain = Plain(engine.world)
    engine.stop()  # what it holds in memory is enough from here on
    with socket.create_server(("127.0.0.1", arguments.port), reuse_port=True) as first:
        own = first
        for _ in range(arguments.workers - 1):
            if os.fork() == 0:
                own = socket.create_server(("127.0.0.1", arguments.port), reuse_port=True)
                break
        # the first use of PyTorch after a fork makes its thread pool anew, which two requests at once may not do
        torch.set_num_threads(1)
        uvicorn.Server(uvicorn.Config(create_app(plain), log_level="warning")).run(sockets=[own])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
