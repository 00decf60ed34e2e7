"""Latency of `/v1/feed` over loopback HTTP against a server in this process, on the current home.

    python -m bench.serving [--requests 300] [--clients 1] [--json]

Closed loop: each client sends its next request when the last one is answered, so the numbers are latencies at that
concurrency and not at a rate of arrival; a slow answer delays the requests behind it (coordinated omission). The readers are
the most active ones of the home, cycled. Prints p50, p99, the share of each stage and the machine.
"""

import argparse
import json
import os
import platform
import socket
import threading
import time

import httpx
import numpy as np
import uvicorn

from serving.app import create_app
from warehouse.errors import HeadraceError
from warehouse.home import Home

WARM_UP = 20
MOST_REQUESTS = 20_000


def main() -> int:
    parser = argparse.ArgumentParser(description="Latency of /v1/feed over loopback HTTP on this home.")
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--clients", type=int, default=1, help="requests under way at once")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if not (1 <= arguments.requests <= MOST_REQUESTS and 1 <= arguments.clients <= 64):
        parser.error(f"--requests must be 1 to {MOST_REQUESTS} and --clients 1 to 64")
    try:
        result = measure(Home.from_env(), arguments.requests, arguments.clients)
    except HeadraceError as error:
        parser.exit(2, f"{error}\n")
    print(json.dumps(result) if arguments.json else as_text(result))
    return 0


def measure(home: Home, num_requests: int, num_clients: int) -> dict:
    """Starts a server, sends the requests, stops it. Raises HeadraceError if the server cannot become ready."""
    app = create_app(home)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.05)
        if not app.state.engine.wait(600):
            raise HeadraceError("; ".join(app.state.engine.missing()))
        base_url = f"http://127.0.0.1:{port}"
        readers = [
            reader["userId"] for reader in httpx.get(f"{base_url}/ui/data", timeout=30, trust_env=False).json()["readers"]
        ]
        _send(base_url, readers, WARM_UP)
        started = time.perf_counter()
        answers = _at_once(base_url, readers, num_requests, num_clients)
        elapsed_s = time.perf_counter() - started
        num_notes = len(app.state.engine.world.catalogue)
    finally:
        server.should_exit = True
        thread.join()
    return _summary(answers, elapsed_s, num_clients, num_notes)


def _at_once(base_url: str, readers: list[str], num_requests: int, num_clients: int) -> list[tuple[float, dict]]:
    answers: list[tuple[float, dict]] = []
    shares = [num_requests // num_clients + (client < num_requests % num_clients) for client in range(num_clients)]
    threads = [
        threading.Thread(
            target=lambda start=start, share=share: answers.extend(_send(base_url, readers[start:] + readers[:start], share))
        )
        for start, share in enumerate(shares)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def _send(base_url: str, readers: list[str], num_requests: int) -> list[tuple[float, dict]]:
    """(milliseconds, timings of the stages) of each request."""
    answers = []
    with httpx.Client(base_url=base_url, timeout=60, trust_env=False) as client:
        for number in range(num_requests):
            started = time.perf_counter()
            answer = client.post("/v1/feed", json={"userId": readers[number % len(readers)]})
            took_ms = (time.perf_counter() - started) * 1000
            answer.raise_for_status()
            answers.append((took_ms, answer.json()["timings"]))
    return answers


def _summary(answers: list[tuple[float, dict]], elapsed_s: float, num_clients: int, num_notes: int) -> dict:
    took_ms = [took for took, _ in answers]
    stages = {stage: float(np.median([timings[stage] for _, timings in answers])) for stage in answers[0][1]}
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "notes": num_notes,
        "requests": len(answers),
        "clients": num_clients,
        "feeds_per_s": len(answers) / elapsed_s,
        "p50_ms": float(np.percentile(took_ms, 50)),
        "p99_ms": float(np.percentile(took_ms, 99)),
        "stage_p50_ms": stages,
    }


def as_text(result: dict) -> str:
    lines = [
        f"{result['machine']}; {result['notes']:,} notes; {result['requests']} requests, {result['clients']} at once",
        f"  p50 {result['p50_ms']:.1f} ms   p99 {result['p99_ms']:.1f} ms   {result['feeds_per_s']:.1f} feeds/s",
        "  median per stage: " + ", ".join(f"{stage} {ms:.1f}" for stage, ms in result["stage_p50_ms"].items()),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
