"""Checkpoints that are whole or absent: written beside training by one thread, renamed when the disk has them.

`<folder>/step-NNNNNNNNNN/` holds `state.pt` (tensors only, read with `weights_only`) and `state.json` (step, position, metric
state, fingerprint, the SHA-256 of the other file). `best` is a link to the folder of the best one: a link is exchanged at one
stroke, a folder is not. Random state is not among them: it is a function of (seed, step, rank).
"""

import errno
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from warehouse.durable import sync_folder, write_durably
from warehouse.errors import HeadraceError
from warehouse.locks import try_lock

BEST = "best"
TENSORS, SCALARS = "state.pt", "state.json"
_STEP, _BEST = re.compile(r"^step-[0-9]{10}$"), re.compile(r"^best-[0-9]{10}$")


@dataclass
class Progress:
    """Where training is. consumed: rows of all epochs that the weights have seen, over all ranks. metrics: running sums, and
    the best validation loss so far with the step it is of. fingerprint: what must not differ when training goes on."""

    step: int = 0
    consumed: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    fingerprint: dict[str, Any] = field(default_factory=dict)


class Checkpoints:
    """The checkpoints of one run under one folder, which only one run may use at a time.

    Raises HeadraceError when another process trains in the folder, and when the disk refuses a checkpoint (at the next call:
    the write runs beside training).
    """

    def __init__(self, folder: Path, keep: int = 2):
        self.folder, self._keep = folder, keep
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = try_lock(folder / ".lock")
        except OSError as error:
            raise HeadraceError(f"cannot keep checkpoints in {folder}: {error.strerror}") from error
        if lock is None:
            raise HeadraceError(f"another process trains in {folder}; wait for it, or train into another folder")
        self._lock = lock
        for draft in folder.glob(".draft-*"):
            if draft.is_symlink():
                draft.unlink()
            shutil.rmtree(draft, ignore_errors=True)

    def clear(self) -> None:
        """Forgets what is there: a run from the start."""
        (self.folder / BEST).unlink(missing_ok=True)
        for name in (*self._names(), *self._names(_BEST)):
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def save(self, progress: Progress, tensors: Mapping[str, Any], best: bool = False) -> None:
        """Copies the tensors and returns; the thread writes the file. best: under `best` too, which stays."""
        self.wait()
        copied = _copied(tensors)
        scalars = asdict(progress)
        self._pending = self._writer.submit(self._write, f"step-{progress.step:010d}", scalars, copied, best)

    def wait(self) -> None:
        """Until the last checkpoint is on the disk; raises what kept it from there."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        try:
            self.wait()
        finally:
            self._writer.shutdown()
            self._lock.close()

    def newest(self, say: Callable[[str], None]) -> tuple[Progress, dict[str, Any]] | None:
        """The last whole checkpoint, or None. A damaged one is named through `say` and the one before it is taken."""
        for name in reversed(self._names()):
            try:
                return self.read(name)
            except HeadraceError as error:
                say(f"{error}; going back to the checkpoint before it")
        return None

    def read(self, name: str) -> tuple[Progress, dict[str, Any]]:
        """(progress, tensors). Raises HeadraceError when it is not what was written."""
        folder = self.folder / name
        try:
            scalars = json.loads((folder / SCALARS).read_bytes())
            content = (folder / TENSORS).read_bytes()
        except (OSError, ValueError) as error:
            raise HeadraceError(f"checkpoint {folder} cannot be read: {error}") from error
        if hashlib.sha256(content).hexdigest() != scalars.pop("sha256"):
            raise HeadraceError(f"checkpoint {folder / TENSORS} is damaged: its SHA-256 is not the one written beside it")
        return Progress(**scalars), torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)

    def has(self, name: str) -> bool:
        return (self.folder / name / SCALARS).is_file()

    def _names(self, kind: re.Pattern[str] = _STEP) -> list[str]:
        return sorted(entry.name for entry in self.folder.iterdir() if kind.match(entry.name))

    def _write(self, name: str, scalars: dict[str, Any], tensors: Any, best: bool) -> None:
        content = io.BytesIO()
        torch.save(tensors, content)
        files = {TENSORS: content.getvalue()}
        scalars = {**scalars, "sha256": hashlib.sha256(files[TENSORS]).hexdigest()}
        files[SCALARS] = (json.dumps(scalars, sort_keys=True) + "\n").encode()
        try:
            self._place(name, files)
            if best:
                self._place_best(f"best-{scalars['step']:010d}", files)
        except OSError as error:
            what = "no space is left on the disk" if error.errno in (errno.ENOSPC, errno.EDQUOT) else str(error)
            newest = (self._names() or ["none"])[-1]
            raise HeadraceError(
                f"checkpoint {name} cannot be written to {self.folder}: {what}; the last whole one is {newest}: "
                "make room, then go on with --resume"
            ) from error
        for old in self._names()[: -self._keep]:
            shutil.rmtree(self.folder / old, ignore_errors=True)

    def _place_best(self, name: str, files: Mapping[str, bytes]) -> None:
        if not self._is_whole(name):  # of the same step it is there already when a run was resumed
            self._place(name, files)
        link = self.folder / f".draft-{BEST}"
        link.unlink(missing_ok=True)
        link.symlink_to(name)
        link.replace(self.folder / BEST)
        sync_folder(self.folder)
        for old in self._names(_BEST):
            if old != name:
                shutil.rmtree(self.folder / old, ignore_errors=True)

    def _is_whole(self, name: str) -> bool:
        try:
            self.read(name)
        except HeadraceError:
            return False
        return True

    def _place(self, name: str, files: Mapping[str, bytes]) -> None:
        draft, final = self.folder / f".draft-{name}", self.folder / name
        shutil.rmtree(draft, ignore_errors=True)
        try:
            draft.mkdir()
            for file_name, content in files.items():
                write_durably(draft / file_name, content)
            sync_folder(draft)
            shutil.rmtree(final, ignore_errors=True)  # a rename cannot replace a folder that has files
            os.rename(draft, final)
            sync_folder(self.folder)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise


def _copied(value: Any) -> Any:
    """The same with every tensor copied to the CPU: training goes on changing its own."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _copied(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_copied(part) for part in value]
    return value
