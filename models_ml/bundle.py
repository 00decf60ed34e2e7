"""A network as registry files and back: weights in safetensors, everything else (settings, vocabularies) in JSON. Never
pickle."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import nn

WEIGHTS = "weights.safetensors"
SETTINGS = "model.json"


def to_files(network: nn.Module, settings: dict[str, Any]) -> dict[str, bytes]:
    """settings: all that `from_folder` needs to build the same network again; JSON."""
    weights = {name: tensor.detach().contiguous() for name, tensor in network.state_dict().items()}
    return {
        WEIGHTS: save(weights),
        SETTINGS: (json.dumps(settings, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n").encode(),
    }


def read_settings(folder: Path) -> dict[str, Any]:
    """The JSON half, as given to `to_files`."""
    return json.loads((Path(folder) / SETTINGS).read_bytes())


def read_weights(network: nn.Module, folder: Path) -> None:
    """Fills a network of the same shape; raises RuntimeError when a tensor is missing, left over or of another shape."""
    network.load_state_dict(load_file(Path(folder) / WEIGHTS), strict=True)
    network.eval()
