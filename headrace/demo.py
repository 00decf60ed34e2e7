"""`headrace demo`: the whole thread on real data, from events to a feed, and the proof that all executions agree.

Knows only the rooms' command lines and the server's HTTP: it does nothing that a user could not type.
"""

import argparse
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress
from rich.table import Table

from headrace.children import exit_when_told, started
from warehouse.errors import HeadraceError
from warehouse.home import Home, data_root
from warehouse.lake import Lake
from warehouse.locks import try_lock
from warehouse.time_algebra import FIVE_MINUTES_US, floor_5m

SMALLEST_DISK_BYTES = 2 * 2**30
SCRIPTED_USERS = 40
SMALL = ["--users", "400", "--notes", "400", "--days", "4"]
SHOWN_USERS = 3
_DBT_STEP = re.compile(r"(\d+) of (\d+) (?:OK created|PASS|START) (?:sql lake_incremental model|test|unit_test)? ?([\w.]+)")
SPEED = 60
"""The scripted visit runs the clock this fast, so that a tick passes in seconds."""


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="headrace demo",
        description="Lands events, builds features, trains models, serves feeds, checks every served value against the lake.",
        epilog="examples:\n  headrace demo\n  headrace demo --once\n  headrace demo --source simulator --port 8080",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--once", action="store_true", help="stop when everything has been shown, do not keep serving")
    parser.add_argument(
        "--source", choices=("auto", "kuairand", "simulator"), default="auto", help="auto: KuaiRand if it is there"
    )
    parser.add_argument("--small", action="store_true", help="a small simulated feed and one pass of training: two minutes")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--retrain", action="store_true", help="train although models are there")
    given = parser.parse_args(words[1:])
    home = Home.from_env()
    exit_when_told()
    with _only_demo(home):
        _check_ground(home, given.host, given.port)
        return _Demo(home, given).run()


class _Demo:
    def __init__(self, home: Home, given: argparse.Namespace):
        self.home, self.given, self.console = home, given, Console()
        self.url = f"http://{given.host}:{given.port}"
        self.steps: list[tuple[str, float]] = []

    def run(self) -> int:
        self._land()
        self._step("dbt build: staging, blocks, training sets, tests", lambda: self._dbt("build"))
        self._step("export training examples", lambda: self._headrace("export-training"))
        report = self.home.models / "report.json"
        if self.given.retrain or not report.exists():
            epochs = ["--epochs", "1"] if self.given.small else []
            what = "train two-tower, item-to-item, L1, L2 and the LightGBM floor"
            self._step(what, lambda: self._headrace("train", "all", *epochs))
        else:
            self.console.print(
                f"[dim]models are there already, judged in {report}; `headrace demo --retrain` trains again[/dim]"
            )
        start = self._clock_start()
        with self._server(f"{start}@{SPEED}"):
            self._step(f"serve {SCRIPTED_USERS} feeds, post a click, wait for the next tick", self._visit)
        self._step("dbt build: what the visit added", lambda: self._dbt("build"))
        agrees = self._step(
            "recompute every served feature from the lake", lambda: self._headrace("parity", "--min", "1000", check=False)
        )
        self._summary()
        if agrees != 0:
            return 1
        if self.given.once:
            return 0
        self.console.print(f"\nserving until Ctrl-C: open [bold]{self.url}/ui[/bold] (API: {self.url}/docs)")
        return self._headrace(
            "serve", "--host", self.given.host, "--port", str(self.given.port), clock=self._clock_start(), check=False
        )

    def _land(self) -> None:
        source, size = self.given.source, SMALL if self.given.small else []
        if self.given.small:
            source = "simulator"
        if source == "auto":
            source = "kuairand" if (data_root() / "kuairand").is_dir() else "simulator"
            if source == "simulator":
                self.console.print(f"no data under {data_root()} (HEADRACE_DATA): the seeded simulator stands in")
        self._step(f"land {source}", lambda: self._headrace("land", source, *size))

    def _step(self, what: str, work: Callable[[], Any]) -> Any:
        self.console.rule(f"[bold]{what}", align="left")
        started = time.monotonic()
        answer = work()
        self.steps.append((what, time.monotonic() - started))
        return answer

    def _environment(self, clock: str) -> dict[str, str]:
        return {**os.environ, "HEADRACE_HOME": str(self.home.path), "HEADRACE_CLOCK": clock}

    def _headrace(self, *words: str, clock: str = "", check: bool = True) -> int:
        command = [sys.executable, "-m", "headrace.cli", *words]
        return _run(command, self._environment(clock), check)

    def _dbt(self, *words: str) -> None:
        """Runs dbt with a bar in the place of its many lines; all of them are shown if it fails."""
        command = [str(Path(sys.executable).with_name("dbt")), "--no-use-colors", *words]
        bar, lines = Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=self.console), []
        with (
            started(command, self._environment(""), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process,
            bar,
        ):
            assert process.stdout is not None
            task = bar.add_task("dbt parses the project", total=None)
            for line in process.stdout:
                lines.append(line)
                if found := _DBT_STEP.search(line):
                    bar.update(task, completed=int(found[1]), total=int(found[2]), description=found[3])
            process.wait()
        if process.returncode != 0:
            self.console.print("".join(lines), markup=False, highlight=False)
            raise HeadraceError(f"`dbt {' '.join(words)}` ended with status {process.returncode}; see above")
        self.console.print(next((line.partition("Done.")[2].strip() for line in reversed(lines) if "Done." in line), ""))

    def _clock_start(self) -> str:
        """The replay clock starts just after everything that has landed, so that no tick is served twice."""
        with Lake.open(self.home).duckdb() as connection:
            (last_us,) = connection.execute("select max(epoch_us(landed_at)) from lake.events").fetchall()[0]
        start = datetime.fromtimestamp(last_us / 1_000_000, UTC) + timedelta(seconds=1)
        return start.strftime("%Y-%m-%dT%H:%M:%SZ")

    @contextmanager
    def _server(self, clock: str) -> Iterator[None]:
        command = [sys.executable, "-m", "headrace.cli", "serve", "--host", self.given.host, "--port", str(self.given.port)]
        with started(command, self._environment(clock)) as process:
            _wait_until_ready(process, self.url)
            yield
        if process.returncode not in (0, -15):
            raise HeadraceError(f"the server ended with status {process.returncode}; see its output above")

    def _visit(self) -> None:
        users = self._users()
        pages = {user: self._feed(user) for user in users}
        for user in users[:SHOWN_USERS]:
            self._print_page(user, pages[user])
        self._click_and_look(users[0], pages[users[0]])

    def _users(self) -> list[str]:
        """Readers with the longest click history: their feeds have most to show."""
        with Lake.open(self.home).duckdb() as connection:
            rows = connection.execute(
                "select user_id from staging.stg_engagements where event_type = 'click' and user_id is not null "
                f"group by user_id order by count(*) desc, user_id limit {SCRIPTED_USERS}"
            ).fetchall()
        return [row[0] for row in rows]

    def _feed(self, user: str) -> dict[str, Any]:
        return _call(f"{self.url}/v1/feed", {"userId": user, "feedType": "EXPLORE", "limit": 20})

    def _explain(self, page: dict[str, Any], note_id: str) -> dict[str, Any]:
        return _call(f"{self.url}/v1/explain/{page['requestId']}?noteId={note_id}")

    def _print_page(self, user: str, page: dict[str, Any]) -> None:
        table = Table(title=f"feed of user {user} (request {page['requestId'][:8]}, model {page['modelVersion']})", box=None)
        for column in ("#", "note", "author", "sources", "L1", "final"):
            table.add_column(column, justify="right" if column in ("#", "L1", "final") else "left")
        for note in page["notes"]:
            table.add_row(
                str(note["position"]),
                note["noteId"],
                str(note["authorId"]),
                ", ".join(note["sources"]),
                _number(note.get("l1Score")),
                _number(note["finalScore"]),
            )
        self.console.print(table)

    def _click_and_look(self, user: str, page: dict[str, Any]) -> None:
        """A click counts in the very next request of its user, and in the note's features at the next tick."""
        note = page["notes"][0]
        before = self._explain(page, note["noteId"])
        self._print_features(before)
        _call(
            f"{self.url}/v1/events",
            {
                "eventId": f"demo-click:{page['requestId']}:{note['noteId']}",
                "eventType": "click",
                "userId": user,
                "noteId": note["noteId"],
                "authorId": note["authorId"],
                "impressionId": note["impressionId"],
                "requestId": page["requestId"],
            },
        )
        next_page = self._feed(user)
        after = self._explain(next_page, next_page["notes"][0]["noteId"])
        self._must_grow(
            "user_num_clicks", f"user {user}, in the very next request", before["userFeatures"], after["userFeatures"]
        )
        known_us = floor_5m(_in_us(after["requestTs"])) + FIVE_MINUTES_US  # the click's own block has ended there
        deadline = time.monotonic() + 60
        while _in_us(_call(f"{self.url}/v1/status")["tick"]) < known_us:
            if time.monotonic() > deadline:
                raise HeadraceError(f"the tick after {after['requestTs']} did not close within a minute")
            time.sleep(0.25)
        told = self._features_of_note(note["noteId"])
        was = before["candidates"][0]["features"]
        self._must_grow("note_num_clicks", f"note {note['noteId']}, at the next tick", was, told)

    def _features_of_note(self, note_id: str) -> dict[str, Any]:
        """The note's block features as another reader's request sees them."""
        for user in self._users():
            page = self._feed(user)
            for candidate in _call(f"{self.url}/v1/explain/{page['requestId']}?noteId={note_id}", missing={"candidates": []})[
                "candidates"
            ]:
                if candidate["features"]:
                    return candidate["features"]
        raise HeadraceError(f"no reader of the demo was shown note {note_id} again")

    def _must_grow(self, measure: str, whose: str, before: dict[str, Any], after: dict[str, Any]) -> None:
        """The click must be in some window of the measure: from a single one an old click may have left as it came."""
        windows = [name for name in before if name.startswith(measure)]
        grown = [name for name in windows if (after[name] or 0) > (before[name] or 0)]
        if not grown:
            values = {name: (before[name], after[name]) for name in windows}
            raise HeadraceError(f"the click did not count: {measure} of {whose}, before and after: {values}")
        name = grown[0]
        self.console.print(f"posted a click: {name} of {whose}: {_number(before[name])} → {_number(after[name])}")

    def _print_features(self, told: dict[str, Any]) -> None:
        note = told["candidates"][0]
        table = Table(
            title=f"note {note['noteId']}: features at watermark {told['featureWatermark']}, known at {told['knownPosition']}",
            box=None,
        )
        table.add_column("feature")
        table.add_column("value", justify="right")
        for name, value in sorted((note.get("features") or {}).items()):
            table.add_row(name, _number(value))
        self.console.print(table)

    def _summary(self) -> None:
        table = Table(title="what took how long", box=None)
        table.add_column("step")
        table.add_column("seconds", justify="right")
        for what, seconds in self.steps:
            table.add_row(what, f"{seconds:.1f}")
        self.console.print(table)


def _in_us(instant: str) -> int:
    """`2022-05-05T16:10:00.000000Z` in microseconds since 1970-01-01 UTC."""
    return round(datetime.fromisoformat(instant).timestamp() * 1_000_000)


def _run(command: list[str], environment: dict[str, str], check: bool) -> int:
    with started(command, environment) as process:
        status = process.wait()
    if check and status != 0:
        words = " ".join(Path(word).name if os.sep in word else word for word in command)
        raise HeadraceError(f"`{words}` ended with status {status}; see above")
    return status


def _call(url: str, body: dict[str, Any] | None = None, missing: Any = None) -> Any:
    """The JSON answer; `missing`, if given, stands for a 404."""
    request = urllib.request.Request(
        url, None if body is None else json.dumps(body).encode(), {"content-type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        if error.code == 404 and missing is not None:
            return missing
        raise HeadraceError(f"{url} answered {error.code}: {error.read().decode(errors='replace')[:500]}") from None


def _wait_until_ready(process: subprocess.Popen, url: str) -> None:
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise HeadraceError(f"the server ended with status {process.returncode} before it was ready; see its output above")
        try:
            with urllib.request.urlopen(f"{url}/readyz", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.25)
    raise HeadraceError(f"the server was not ready within 3 minutes; ask {url}/readyz why")


@contextmanager
def _only_demo(home: Home) -> Iterator[None]:
    home.path.mkdir(parents=True, exist_ok=True)
    handle = try_lock(home.path / "demo.lock")
    if handle is None:
        raise HeadraceError(f"another demo runs on {home.path}; wait for it, or give this one a HEADRACE_HOME of its own")
    with handle:
        yield


def _check_ground(home: Home, host: str, port: int) -> None:
    free = shutil.disk_usage(home.path).free
    if free < SMALLEST_DISK_BYTES:
        raise HeadraceError(
            f"{home.path} has {free / 2**30:.1f} GiB free; the demo needs {SMALLEST_DISK_BYTES / 2**30:.0f} GiB"
        )
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        why = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        raise HeadraceError(f"cannot listen on {host}:{port} ({why}); choose another with PORT=8080 (or --port)") from None


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.4g}"
