import json

import pytest
import torch

from bench import kernels as bench


def test_the_benchmark_prints_every_roofline_and_measures_what_it_can(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "CASE_LIMIT_S", 1.0)
    monkeypatch.setattr(bench, "ceilings", lambda device: (1e10, 1e11))
    path = tmp_path / "out" / "kernels.json"
    assert bench.main(["--quick", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    for case in bench.GPU_CASES:
        assert f"{case.operation:<17} {case.shape}" in printed
    if not torch.cuda.is_available():
        assert "No GPU here: none of the above is measured." in printed
        rows = json.loads(path.read_text())["rows"]
        assert [row["operation"] for row in rows] == [case.operation for case in bench.CPU_CASES]
        assert all(row["ours_us"] > 0 and row["eager_us"] > 0 and not row["note"] for row in rows)


def test_a_wrong_result_is_not_timed_and_fails_the_run(tmp_path, capsys, monkeypatch):
    def make(device, seed):
        return (lambda: torch.tensor([1.0, 2.0])), (lambda: torch.tensor([1.0, 1.0]))

    monkeypatch.setattr(bench, "CPU_CASES", (bench.Case("top_k", "wrong", 1, 1, make),))
    monkeypatch.setattr(bench, "GPU_CASES", bench.CPU_CASES)
    monkeypatch.setattr(bench, "ceilings", lambda device: (1e10, 1e11))
    assert bench.main(["--json", str(tmp_path / "kernels.json")]) == 1
    assert "WRONG: off by 1.0e+00" in capsys.readouterr().out


def test_an_unknown_operation_is_refused(capsys):
    with pytest.raises(SystemExit):
        bench.main(["--only", "attention"])
    assert "--only must be one of embedding_lookup, feature_arena" in capsys.readouterr().err
