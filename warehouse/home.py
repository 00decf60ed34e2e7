"""Where things are on this machine: one folder for everything Headrace writes, one for the data it reads."""

import os
from dataclasses import dataclass
from pathlib import Path

from warehouse.errors import HeadraceError

REPOSITORY = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Home:
    """The folder that holds all state; deleting it is a complete reset."""

    path: Path

    @classmethod
    def from_env(cls) -> "Home":
        """`$HEADRACE_HOME`, or `.headrace` in the repository root."""
        configured = os.environ.get("HEADRACE_HOME")
        return cls(Path(configured).resolve() if configured else REPOSITORY / ".headrace")

    def _folder(self, name: str) -> Path:
        folder = self.path / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise HeadraceError(
                f"cannot make the folder {folder} ({error.strerror}); point HEADRACE_HOME at a folder that can be written"
            ) from error
        return folder

    @property
    def lake(self) -> Path:
        return self._folder("lake")

    @property
    def log(self) -> Path:
        return self._folder("log")

    @property
    def dbt(self) -> Path:
        return self._folder("dbt")

    @property
    def exports(self) -> Path:
        return self._folder("exports")

    @property
    def models(self) -> Path:
        return self._folder("models")

    @property
    def training(self) -> Path:
        """Request rows and checkpoints: what a run of the trainer needs to go on."""
        return self._folder("training")

    @property
    def online(self) -> Path:
        return self._folder("online")

    @property
    def tmp(self) -> Path:
        return self._folder("tmp")


def data_root() -> Path:
    """`$HEADRACE_DATA`, or `../shared/data` beside the repository. It may not exist: the simulator then stands in."""
    configured = os.environ.get("HEADRACE_DATA")
    return Path(configured).resolve() if configured else REPOSITORY.parent / "shared" / "data"
