"""A published model as one file for other runtimes: ONNX, TorchScript, or `torch.export`; written once it is shown to score as
the server does.

Inputs are what the model takes after words have become codes; the file beside the export (`.json`) holds the vocabularies'
source (the version), the names of inputs and outputs, and what the check found. Probabilities come out, one column a head; the
two-tower gives a reader's vector. N candidates, L places of a history, Fu and Fn features, A attributes.
"""

import copy
import hashlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models_ml import l1, l2, two_tower
from models_ml.examples import Examples
from models_ml.l1 import L1, L1Network
from models_ml.l2 import L2
from models_ml.l2_network import L2Network
from models_ml.two_tower import TwoTower, TwoTowerNetwork
from warehouse.durable import write_out
from warehouse.errors import HeadraceError

FORMATS = {"onnx": ".onnx", "torchscript": ".ts", "torch": ".pt2"}
LOADERS: dict[str, Callable[[Path], Any]] = {"l1": l1.load, "l2": l2.load, "two_tower": two_tower.load}
MOST_DIFFERENCE = 1e-5
SWAP = 2e-5
"""Two of the first TOP may change places when their scores are this near."""
TOP = 20
CANDIDATES = 50

Call = Callable[[Mapping[str, np.ndarray]], np.ndarray]


@dataclass(frozen=True)
class Parity:
    """What the check found: the largest difference of a score from the served one, the requests whose first TOP are in the
    same order, and those where only near-equal scores changed places."""

    requests: int
    most_difference: float
    same_top: int
    swapped_top: int


class L1Scores(nn.Module):
    """float32 [N, T] from user [1, Fu], surface [1], features [N, Fn]."""

    def __init__(self, network: L1Network):
        super().__init__()
        self.network = network

    def forward(self, user: Tensor, surface: Tensor, features: Tensor) -> Tensor:
        return torch.sigmoid(self.network(user, surface, features.unsqueeze(0))[0])


class L2Scores(nn.Module):
    """float32 [N, T] from user [1, Fu], surface [1], attributes [1, A], history [1, L], note [N], features [N, Fn]."""

    table_ND: Tensor

    def __init__(self, network: L2Network):
        super().__init__()
        self.network = network
        with torch.no_grad():
            self.register_buffer("table_ND", network.notes.table())

    def forward(
        self, user: Tensor, surface: Tensor, attributes: Tensor, history: Tensor, note: Tensor, features: Tensor
    ) -> Tensor:
        reader = self.network.read(user, surface, attributes, history, self.table_ND)
        logits_K1NT = self.network.logits(reader, note.unsqueeze(0), features.unsqueeze(0), self.table_ND)
        return torch.sigmoid(logits_K1NT[:, 0]).mean(0)


class ReaderVector(nn.Module):
    """float32 [1, D] from history [1, L] and, where it is read, what is known of the reader [1, V]."""

    table_ND: Tensor

    def __init__(self, network: TwoTowerNetwork):
        super().__init__()
        self.network = network
        with torch.no_grad():
            self.register_buffer("table_ND", network.note_table())

    def forward(self, history: Tensor, reader: Tensor | None = None) -> Tensor:
        return self.network.user_vectors(history, self.table_ND, reader)


def scorer_of(network: nn.Module) -> nn.Module:
    """The module that is exported: a copy of the network in plain operations, for one request."""
    plain = copy.deepcopy(network).cpu().eval()
    for parameter in plain.parameters():
        parameter.requires_grad_(False)
    if isinstance(plain, L2Network):
        plain.fused = False
        return L2Scores(plain).eval()
    if isinstance(plain, L1Network):
        return L1Scores(plain).eval()
    if isinstance(plain, TwoTowerNetwork):
        return ReaderVector(plain).eval()
    raise HeadraceError(f"a {type(network).__name__} has no export")


def example_inputs(scorer: nn.Module, num_notes: int = 3) -> dict[str, Tensor]:
    """Inputs of the right shapes and types."""
    network = scorer.network
    if isinstance(network, TwoTowerNetwork):
        history = {"history": torch.ones(1, len(network.recency_L), dtype=torch.int64)}
        return history | ({"reader": torch.ones(1, network.num_values)} if network.num_values else {})
    assert isinstance(network, L1Network | L2Network)
    inputs = {"user": torch.ones(1, len(network.user_inputs.names)), "surface": torch.ones(1, dtype=torch.int64)}
    if isinstance(network, L2Network):
        inputs["attributes"] = torch.zeros(1, network.attributes.in_features)
        inputs["history"] = torch.ones(1, network.config.history_length, dtype=torch.int64)
        inputs["note"] = torch.ones(num_notes, dtype=torch.int64)
    return {**inputs, "features": torch.ones(num_notes, len(network.note_inputs.names))}


def program_of(scorer: nn.Module) -> torch.export.ExportedProgram:
    """`torch.export` with any number of candidates."""
    inputs = example_inputs(scorer)
    any_number = torch.export.Dim("num_notes", min=1, max=1 << 20)
    shapes: dict[str, Any] = {name: {0: any_number} if name in ("note", "features") else None for name in inputs}
    with torch.no_grad():
        return torch.export.export(scorer, (), kwargs=inputs, dynamic_shapes=shapes)


def dry_run(objective: nn.Module) -> None:
    """Before the first step: raises HeadraceError when the network that is to be trained could not be exported."""
    network = objective.network
    assert isinstance(network, nn.Module)
    try:
        program_of(scorer_of(network))
    except Exception as error:
        raise HeadraceError(
            f"{type(network).__name__} cannot be exported, so it is not trained: {str(error).strip().splitlines()[0]}"
        ) from error


def content_of(scorer: nn.Module, form: str) -> bytes:
    """The file's content in one of FORMATS."""
    stream = io.BytesIO()
    with _quiet(), torch.no_grad():
        if form == "torchscript":
            torch.jit.save(torch.jit.trace(scorer, tuple(example_inputs(scorer).values()), check_trace=False), stream)
        elif form == "torch":
            torch.export.save(program_of(scorer), stream)
        else:
            onnx = torch.onnx.export(program_of(scorer), (), dynamo=True, verbose=False)
            assert onnx is not None
            return onnx.model_proto.SerializeToString()
    return stream.getvalue()


def runner_of(content: bytes, form: str, names: tuple[str, ...], threads: int = 1) -> Call:
    """Runs an exported file: inputs by name -> scores. threads: of onnxruntime; the others go by `torch.set_num_threads`."""
    if form == "onnx":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.force_spinning_stop", "1")  # else its threads keep a core from others
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        return lambda inputs: session.run(None, dict(inputs))[0]
    with _quiet():
        if form == "torchscript":
            loaded = torch.jit.load(io.BytesIO(content))
            return lambda inputs: _no_grad(lambda: loaded(*(torch.from_numpy(inputs[name]) for name in names)))
        module = torch.export.load(io.BytesIO(content)).module()
    return lambda inputs: _no_grad(lambda: module(**{name: torch.from_numpy(part) for name, part in inputs.items()}))


def requests_of(
    model: L1 | L2 | TwoTower, examples: Examples, count: int
) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray]]:
    """(inputs, scores as the server computes them) of `count` requests: readers of test rows, each with CANDIDATES notes of
    other test rows, drawn with a fixed seed."""
    rng = np.random.default_rng(0)
    test_rows = examples.test_rows
    rows = rng.choice(test_rows, count, replace=count > len(test_rows))
    if isinstance(model, TwoTower):
        note_ids = model.note_ids
        history_RL = examples.histories(note_ids, model.history_length)
        reader_RV = model.reader.of_rows(examples, rows)
        for row, reader_1V in zip(rows, reader_RV[:, None], strict=True):
            history_1L = history_RL[[row]]
            inputs = {"history": history_1L} | ({"reader": reader_1V} if model.reader else {})
            yield inputs, model.user_vectors(history_1L, reader_1V)
        return
    user_RF = examples.columns(model.user_features)
    note_RF = examples.columns(model.note_features)
    users = examples.users
    place_of = {user_id: place for place, user_id in enumerate(users["user_id"].to_pylist())}
    for row in rows:
        others = rng.choice(test_rows, CANDIDATES)
        surface = examples.words["surface"][int(row)].as_py()
        inputs = {
            "user": user_RF[[row]].astype(np.float32),
            "surface": np.array([model.code_of_surface(surface)]),
            "features": note_RF[others].astype(np.float32),
        }
        if isinstance(model, L1):
            # the served L1 answers the weighted mean of its heads
            yield inputs, model.score(user_RF[row], note_RF[others], surface=surface)
            continue
        place = place_of.get(examples.words["user_id"][int(row)].as_py())
        watched = [] if place is None else users["history_note_ids"][place].as_py() or []
        attributes = None if place is None else users["attributes"][place].as_py()
        history = [*watched, *examples.clicks_R[int(row)].as_py()]
        note_ids = examples.words["note_id"].take(others).to_pylist()
        served = model.score(user_RF[row], history, note_ids, note_RF[others], surface=surface, user_attributes=attributes)
        yield (
            {
                **inputs,
                "attributes": model.encoded_attributes(attributes)[None],
                "history": model.encoded_history(history)[None],
                "note": model.encoded_notes(note_ids),
            },
            np.column_stack([served[head] for head in model.heads]),
        )


def check(model: L1 | L2 | TwoTower, run: Call, examples: Examples, count: int) -> Parity:
    """Scores of an exported file beside the served ones. Raises HeadraceError when one differs by more than MOST_DIFFERENCE or
    the first TOP of a request are others, up to swaps within SWAP."""
    most, same, swapped = 0.0, 0, 0
    for number, (inputs, served) in enumerate(requests_of(model, examples, count)):
        scores = run(inputs)
        if isinstance(model, L1):
            scores = scores @ model.weights_T.numpy()
        most = max(most, float(np.abs(scores - served).max(initial=0.0)))
        if most > MOST_DIFFERENCE:
            raise HeadraceError(
                f"request {number}: a score differs by {most:.2g} from the served one; {MOST_DIFFERENCE:g} is allowed"
            )
        if isinstance(model, TwoTower):
            same += 1
            continue
        ours, theirs = (values.reshape(len(values), -1).mean(1) for values in (scores, served))
        our_top, their_top = (np.argsort(-values, kind="stable")[:TOP] for values in (ours, theirs))
        if np.array_equal(our_top, their_top):
            same += 1
        elif np.abs(theirs[our_top] - theirs[their_top]).max() <= SWAP:
            swapped += 1
        else:
            raise HeadraceError(f"request {number}: its first {TOP} are not those that are served")
    return Parity(count, most, same, swapped)


def export(model: Any, about: Mapping[str, Any], examples: Examples, form: str, path: Path, count: int) -> Parity:
    """Writes `path` and `path`.json, if the file scores as the server does on `count` requests; raises HeadraceError, and
    writes nothing, if not. about: goes into the JSON."""
    scorer = scorer_of(model.network)
    content = content_of(scorer, form)
    names = tuple(example_inputs(scorer))
    parity = check(model, runner_of(content, form, names), examples, count)
    described = {
        **about,
        "format": form,
        "sha256": hashlib.sha256(content).hexdigest(),
        "inputs": {name: [*tensor.shape[:-1], tensor.shape[-1]] for name, tensor in example_inputs(scorer).items()},
        "outputs": ["reader_vector"] if isinstance(model, TwoTower) else list(model.heads),
        "parity": asdict(parity),
    }
    write_out(path, content)
    write_out(path.with_name(path.name + ".json"), (json.dumps(described, indent=1) + "\n").encode())
    return parity


def _no_grad(call: Callable[[], Tensor]) -> np.ndarray:
    with torch.inference_mode():
        return call().numpy()


class _quiet:  # noqa: N801  (a context manager, used like a function)
    """Exporters talk of their own future; what is said of this model is kept for the error."""

    def __enter__(self) -> None:
        self._warnings = warnings.catch_warnings()
        self._warnings.__enter__()
        warnings.simplefilter("ignore")
        self._level = logging.getLogger("torch.onnx").level
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)

    def __exit__(self, *error: object) -> None:
        self._warnings.__exit__(*error)  # type: ignore[arg-type]
        logging.getLogger("torch.onnx").setLevel(self._level)
