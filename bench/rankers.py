"""L1 over 2,000 candidates and L2 over 500 as a whole, beside their networks as they were trained, on this machine's CPU.

    python -m bench.rankers [--threads 2]

Networks with random weights, features fitted on drawn values, at the shape of the project's own: 20 reader features, 49 of a
candidate. Checked against the network first (2e-6), and against the network exported to ONNX, under onnxruntime; all take
turns, and the fastest tenth counts. Both keep what notes add to their first layer while the notes' features stay the same: a
request over notes seen before is timed, with rows and codes as the server gives them but without its stamp of the tick, so that
features are compared; and one over none. The reader has met the authors of one candidate in thirty. Four readers' requests in
one call are timed too. Where there is a GPU, whole requests on it follow.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict

import numpy as np
import torch

from bench.kernels import microseconds
from models_ml.examples import LABELS
from models_ml.export import content_of, runner_of, scorer_of
from models_ml.l1 import L1, L1Config, L1Network
from models_ml.l2 import L2
from models_ml.l2_network import L2Config, L2Network, Shape
from models_ml.notes import NoteWords
from models_ml.on_device import L1OnDevice, L2OnDevice
from models_ml.scoring import RankingRequest

WINDOWS = ("1h", "6h", "1d", "7d")
USER_FEATURES = tuple(
    f"user_num_{what}_{window}" for what in ("views", "clicks", "long_views", "likes", "hides") for window in WINDOWS
)
NOTE_FEATURES = (
    *(f"{entity}_{name}" for entity in ("note", "author", "user_author") for name in (
        *(f"num_{what}_{window}" for what in ("views", "clicks", "long_views") for window in WINDOWS),
        "num_shares_7d", "total_watch_ms_7d", "ctr_7d", "ctr_1d",
    )),
    "note_age_min",
)  # fmt: skip
TOLERANCE = 2e-6

Scores = Callable[[], np.ndarray]


def values(rows: int, names: tuple[str, ...], seed: int) -> np.ndarray:
    """float64 [rows, names]: counts and times over several orders of magnitude, one in twenty NULL."""
    rng = np.random.default_rng(seed)
    drawn = np.exp(rng.normal(1, 2, (rows, len(names))))
    drawn[rng.random(drawn.shape) < 0.05] = np.nan
    return drawn


def candidates_of(reader: int, rows: int) -> np.ndarray:
    """float64 [rows, NOTE_FEATURES]: the same notes for all readers, each of whom met other authors."""
    drawn = values(rows, NOTE_FEATURES, 2)
    of_reader = [column for column, name in enumerate(NOTE_FEATURES) if name.startswith("user_")]
    drawn[:, of_reader] = 0
    met = np.random.default_rng(reader).permutation(rows)[: max(1, rows // 30)]
    drawn[met[:, None], of_reader] = values(len(met), tuple(NOTE_FEATURES[column] for column in of_reader), 20 + reader)
    return drawn


def l1_model() -> L1:
    torch.manual_seed(0)
    config = L1Config()
    network = L1Network(config, USER_FEATURES, NOTE_FEATURES, 3)
    _fit(network)
    settings = {
        "config": asdict(config), "user_features": USER_FEATURES, "note_features": NOTE_FEATURES,
        "surfaces": ["home", "nearby", "search"], "default_surface": "home",
    }  # fmt: skip
    return L1(network, settings)


def l1_scores(candidates: int = 2000) -> dict[str, Scores]:
    """One request, the same by the network and by onnxruntime, one whose notes were never seen, and as the first of four."""
    model = l1_model()
    network = model.network
    user, notes, rows = values(1, USER_FEATURES, 1)[0], candidates_of(0, candidates), np.arange(candidates)

    @torch.inference_mode()
    def plain() -> np.ndarray:
        user_1U, notes_1NI = _tensors(user, notes)
        logits_NT = network(user_1U, torch.tensor([1]), notes_1NI)[0]
        return (torch.sigmoid(logits_NT) @ model.weights_T).numpy()

    exported, weights_T = _under_onnxruntime(network), model.weights_T.numpy()

    def onnx() -> np.ndarray:
        user_1U, notes_1NI = _tensors(user, notes)
        return exported({"user": user_1U, "surface": torch.tensor([1]), "features": notes_1NI[0]}) @ weights_T

    def ours() -> np.ndarray:
        return model.score(user, notes, surface="home", rows=rows)

    def never_seen() -> np.ndarray:
        model.forget()
        return ours()

    four = [RankingRequest(user, notes, "home", rows=rows)]
    for place in range(1, 4):
        other = values(1, USER_FEATURES, 4 + place)[0]
        four.append(RankingRequest(other, candidates_of(place, candidates), "home", rows=rows))
    return {
        "ours": ours,
        "the network": plain,
        "onnxruntime": onnx,
        "notes never seen": never_seen,
        "four together": lambda: model.score_many(four)[0],
    }


def l2_model(history: int = 100, width: int = 64) -> L2:
    torch.manual_seed(0)
    config = L2Config(heads=LABELS, width=width, history_length=history)
    words = NoteWords([f"n{i}" for i in range(8000)], ["a"], ["t"])
    shape = Shape(words, USER_FEATURES, NOTE_FEATURES, ("home",), ("age=20s",))
    network = L2Network(config, shape)
    _fit(network)
    with torch.no_grad():
        network.notes.note.weight[1:].normal_(std=0.3)
    return L2(
        network, {"config": asdict(config), "shape": {**shape._asdict(), "words": asdict(words)}, "default_surface": "home"}
    )


def l2_scores(candidates: int = 500, history: int = 100) -> dict[str, Scores]:
    """The first head of one request, the same by the network and by onnxruntime, of one whose notes were never seen, and as the
    first of four."""
    model = l2_model(history)
    network, note_ids = model.network, model.shape.words.note_ids
    user, notes = values(1, USER_FEATURES, 1)[0], candidates_of(0, candidates)
    watched, asked, rows = note_ids[:history], note_ids[-candidates:], np.arange(candidates)
    codes = model.encoded_notes(asked)
    codes_1L = torch.arange(history, 0, -1)[None]
    codes_1N = torch.arange(8001 - candidates, 8001)[None]

    @torch.inference_mode()
    def plain() -> np.ndarray:
        user_1U, notes_1NI = _tensors(user, notes)
        reader = network.read(user_1U, torch.tensor([1]), torch.zeros(1, 1), codes_1L, model.table_ND)
        logits_KNT = network.logits(reader, codes_1N, notes_1NI, model.table_ND)[:, 0]
        return torch.sigmoid(logits_KNT).mean(0)[:, 0].numpy()

    exported = _under_onnxruntime(network)

    def onnx() -> np.ndarray:
        user_1U, notes_1NI = _tensors(user, notes)
        inputs = {"user": user_1U, "surface": torch.tensor([1]), "attributes": torch.zeros(1, 1), "history": codes_1L}
        return exported({**inputs, "note": codes_1N[0], "features": notes_1NI[0]})[:, 0]

    def ours() -> np.ndarray:
        return model.score(user, watched, asked, notes, surface="home", rows=rows, codes=codes)[model.heads[0]]

    def never_seen() -> np.ndarray:
        model.forget()
        return ours()

    four = [RankingRequest(user, notes, "home", watched, asked, None, rows, codes)]
    for place in range(1, 4):
        other_history = note_ids[place * history : (place + 1) * history]
        other = values(1, USER_FEATURES, 4 + place)[0]
        features = candidates_of(place, candidates)
        four.append(RankingRequest(other, features, "home", other_history, asked, None, rows, codes))
    return {
        "ours": ours,
        "the network": plain,
        "onnxruntime": onnx,
        "notes never seen": never_seen,
        "four together": lambda: model.score_many(four)[0][model.heads[0]],
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.rankers", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    torch.set_num_threads(parser.parse_args().threads)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for name, goal_ms, scores in (("L1, 2,000 candidates", 1, l1_scores()), ("L2, 500 x 100 x d64", 2, l2_scores())):
        expected = scores["the network"]()
        off = max(float(np.abs(score() - expected).max()) for score in scores.values())
        if off > TOLERANCE:
            print(f"{name}: WRONG, off by {off:.1e}")
            return 1
        times = zip(scores, microseconds([[score] for score in scores.values()], torch.device("cpu")), strict=True)
        print(
            f"{name}, goal {goal_ms} ms: "
            + ", ".join(f"{what} {us / 1e3:.2f} ms" for what, us in times)
            + f"; off by {off:.0e}"
        )
    if torch.cuda.is_available():
        on_a_gpu(torch.device("cuda"))
    return 0


def on_a_gpu(device: torch.device) -> None:
    """Whole requests there, from numbers in the host's memory to scores in it: one copy, one graph, one copy back."""
    l1, l2 = l1_model(), l2_model()
    ids = l2.shape.words.note_ids
    user, notes = values(1, USER_FEATURES, 1)[0], values(2000, NOTE_FEATURES, 2)
    l1_there, l2_there = L1OnDevice(l1, device, 2000), L2OnDevice(l2, device, 500)
    head = l2.heads[0]
    for name, tolerance, there, here in (
        ("L1, 2,000 candidates", 1e-5, lambda: l1_there.score(user, notes), lambda: l1.score(user, notes)),
        (
            "L2, 500 x 100 x d64", 1e-2,  # the history's layers run in bf16
            lambda: l2_there.score(user, ids[:100], ids[-500:], notes[:500])[head],
            lambda: l2.score(user, ids[:100], ids[-500:], notes[:500])[head],
        ),
    ):  # fmt: skip
        off = float(np.abs(there() - here()).max())
        failure = (l1_there if name.startswith("L1") else l2_there).ranker.graphed.failure
        state = f"WRONG, off by {off:.1e}" if off > tolerance else f"off by {off:.0e}"
        there_us, here_us = microseconds([[there], [here]], torch.device("cpu"))
        where = torch.cuda.get_device_name()
        print(f"{name}: {there_us / 1e3:.2f} ms on {where}, {here_us / 1e3:.2f} ms on this CPU; {state} {failure}")


def _fit(network: L1Network | L2Network) -> None:
    network.user_inputs.fit(values(800, USER_FEATURES, 3))
    network.note_inputs.fit(values(800, NOTE_FEATURES, 4))


def _under_onnxruntime(network: L1Network | L2Network) -> Callable[[dict[str, torch.Tensor]], np.ndarray]:
    scorer = scorer_of(network)
    run = runner_of(content_of(scorer, "onnx"), "onnx", (), torch.get_num_threads())
    return lambda inputs: run({name: tensor.numpy() for name, tensor in inputs.items()})


def _tensors(user: np.ndarray, notes: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(user.astype(np.float32))[None], torch.from_numpy(notes.astype(np.float32))[None]


if __name__ == "__main__":
    sys.exit(main())
