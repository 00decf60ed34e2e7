"""Runs one measurement in a process of its own, so that its peak memory is its own."""

import multiprocessing
import resource
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


def in_child(call: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """(what it returns, the process's peak memory in GiB). call: a function of a module."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(sender, call, arguments))
    process.start()
    sender.close()
    try:
        answer = receiver.recv()
    except EOFError:
        process.join()
        raise SystemExit(f"{call.__name__}{arguments} died with exit status {process.exitcode}") from None
    process.join()
    return answer


def _run(sender: Connection, call: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    answer = call(*arguments)
    sender.send((answer, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20))
