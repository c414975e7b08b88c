"""`python -m lsh_kernels diagnose` at a tiny size."""

import csv
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lsh_kernels import LSHConfig, demo, diagnose
from lsh_kernels.diagnostics import AttentionInputs, attention_recall, capture_attention

ROOT = Path(__file__).parents[1]


def read(folder):
    with open(folder / "recall.csv", newline="") as file:
        return json.loads((folder / "diagnosis.json").read_text()), list(csv.DictReader(file))


def save_tensors(path, **tensors):
    if path.suffix == ".npz":
        np.savez(path, **{name: tensor.numpy() for name, tensor in tensors.items()})
    else:
        torch.save(tensors, path)
    return str(path)


@pytest.mark.parametrize("suffix", [".pt", ".npz"])
def test_diagnose_tensors(suffix, tmp_path, capsys):
    query, key, value = torch.randn(3, 2, 3, 100, 8)
    mask = torch.arange(100).expand(2, 100) > 90
    file = save_tensors(tmp_path / f"qkv{suffix}", query=query, key=key, value=value, key_padding_mask=mask)
    arguments = ["--rounds", "4", "1", "--spans", "window", "--chunk-length", "8", "--local-window", "4", "--queries", "50"]
    assert diagnose.main([file, "--causal", *arguments, "--seed", "5", "--out", str(tmp_path / "out")]) == 0
    results, rows = read(tmp_path / "out")
    keys = [(row["local_window"], row["n_hashes"], row["head"]) for row in rows]
    assert keys == list(itertools.product("04", "14", "012"))
    inputs = AttentionInputs(query, key, value, True, mask)
    for row, saved in zip(rows, results["rows"], strict=True):
        config = LSHConfig(n_hashes=saved["n_hashes"], chunk_length=8, local_window=saved["local_window"])
        found = attention_recall(inputs, config, n_queries=50, seed=5)
        recall = found.recall[:, saved["head"]]
        assert saved["recall"] == float(row["recall"]) == pytest.approx(recall.nanmean().item())
        assert saved["recall_p10"] == pytest.approx(recall.nanquantile(0.1).item(), abs=0.02)
        assert saved["cosine_error"] == pytest.approx(found.cosine_error[:, saved["head"]].nanmean().item())
        known = ~recall.isnan()
        assert saved["n_keys"] == pytest.approx(found.n_keys[:, saved["head"]][known].double().mean().item())
        assert saved["perplexity"] == pytest.approx(found.perplexity[:, saved["head"]].nanmean().item())
        assert saved["n_queries"] == known.sum() < 100
    text = capsys.readouterr().out
    mean = np.mean([row["recall"] for row in results["rows"] if (row["local_window"], row["n_hashes"]) == (4, 1)])
    assert f"window + local 4{mean:24.3f}" in text
    assert (tmp_path / "out" / "diagnosis.png").read_bytes()[:4] == b"\x89PNG"
    sizes = found.bucket_sizes.transpose(2, 3)[~found.recall.isnan()].flatten().sort().values
    facts = results["layers"][""]
    assert (facts["keys"], facts["window"], len(facts["quantiles"])) == (100, 8, 101)
    assert facts["quantiles"][0] == sizes[0] and facts["quantiles"][-1] == sizes[-1]
    written = (tmp_path / "out" / "diagnosis.json").read_text()
    assert str(tmp_path) not in written and str(Path.home()) not in written


def test_diagnose_without_values_or_matplotlib(tmp_path, capsys, monkeypatch):
    file = save_tensors(tmp_path / "qk.pt", query=torch.randn(1, 1, 40, 8))
    arguments = [file, "--rounds", "1", "--local-window", "0", "--n-buckets", "2", "4", "--out", str(tmp_path)]
    assert diagnose.main(arguments) == 0
    results, rows = read(tmp_path)
    assert len(rows) == 3 and rows[0]["cosine_error"] == "" and results["layers"][""]["n_buckets"] == [2, 4]
    assert (tmp_path / "diagnosis.png").exists()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    (tmp_path / "diagnosis.png").unlink()
    assert diagnose.main(arguments) == 0
    assert "no diagnosis.png: matplotlib is not installed" in capsys.readouterr().out
    assert not (tmp_path / "diagnosis.png").exists()


def test_diagnose_of_nothing_but_padding(tmp_path, capsys):
    file = save_tensors(tmp_path / "qk.pt", query=torch.randn(1, 1, 40, 8), key_padding_mask=torch.ones(1, 40).bool())
    assert diagnose.main([file, "--out", str(tmp_path)]) == 0
    assert read(tmp_path)[1] == [] and "share of the softmax mass" in capsys.readouterr().out


@pytest.fixture
def short_text(monkeypatch):
    text = np.random.default_rng(0).integers(0, 256, 3000, np.uint8)
    monkeypatch.setattr(demo, "corpus", lambda: (None, text))


@pytest.mark.parametrize("name", demo.MODELS)
def test_diagnose_reads_the_demos_weights(name, short_text, tmp_path, capsys):
    settings = {"length": 128, "steps": 1, "layers": 2, "seed": 1}
    model = demo.build_model(name, SimpleNamespace(**settings))
    with torch.no_grad():
        model.embed.weight.mul_(3)
    file = tmp_path / demo.weights_name(name)
    torch.save({"model": name, "options": settings, "state_dict": model.state_dict()}, file)
    assert diagnose.main([str(file), "--spans", "window", "--rounds", "1", "--out", str(tmp_path)]) == 0
    results, rows = read(tmp_path)
    assert len(rows) == 2 * 2 * demo.NUM_HEADS
    text = demo.windows(torch.from_numpy(demo.corpus()[1]), 128)[: diagnose.N_TEXTS, :-1].long()
    with torch.no_grad(), capture_attention(model.eval()) as layers:
        model(text)
    assert list(layers) == list(results["layers"]) and layers["layers.0.self_attn"].is_causal
    for row in results["rows"]:
        config = LSHConfig(n_hashes=1, local_window=row["local_window"])
        found = attention_recall(layers[row["layer"]], config, n_queries=512)
        assert row["recall"] == pytest.approx(found.recall[:, row["head"]].nanmean().item(), abs=1e-6)
    assert name in capsys.readouterr().out


def test_diagnose_reads_the_reformers_weights(short_text, tmp_path):
    settings = {"length": 128, "steps": 1, "layers": 4, "seed": 1}
    model = demo.build_model(demo.REFORMER, SimpleNamespace(**settings))
    file = tmp_path / demo.weights_name(demo.REFORMER)
    torch.save({"model": demo.REFORMER, "options": settings, "state_dict": model.state_dict()}, file)
    assert diagnose.main([str(file), "--spans", "window", "--rounds", "1", "--out", str(tmp_path)]) == 0
    results, rows = read(tmp_path)
    # every other layer is local
    assert list(results["layers"]) == ["layers.blocks.1.f.attention", "layers.blocks.3.f.attention"]
    assert len(rows) == 2 * 2 * demo.NUM_HEADS and all(0 < float(row["recall"]) <= 1 for row in rows)


def test_diagnose_trains_the_demos_model(tmp_path):
    path = os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "lsh_kernels", "diagnose", "--length", "64", "--steps", "2", "--layers", "1"]
    done = subprocess.run(
        [*command, "--rounds", "1", "--spans", "window", "--out", str(tmp_path)],
        capture_output=True, text=True, timeout=200, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "covers 90%" in done.stdout or "does not cover 90%" in done.stdout
    assert (tmp_path / "lsh_shared_qk.pt").exists() and len(read(tmp_path)[1]) == 2 * demo.NUM_HEADS
    assert "training" in done.stderr and "2/2" in done.stderr


def test_diagnose_interrupted_leaves_what_was_measured(tmp_path, monkeypatch, capsys):
    calls = []

    def stop_at_the_third(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return attention_recall(*args, **kwargs)

    monkeypatch.setattr(diagnose, "attention_recall", stop_at_the_third)
    file = save_tensors(tmp_path / "qk.pt", query=torch.randn(1, 2, 40, 8))
    assert diagnose.main([file, "--out", str(tmp_path)]) == 130
    assert len(read(tmp_path)[1]) == 2 * 2 and (tmp_path / "diagnosis.png").exists()
    calls[:] = [None, None]
    assert diagnose.main([file, "--out", str(tmp_path)]) == 130  # nothing measured at all
    assert read(tmp_path)[1] == [] and "interrupted" in capsys.readouterr().err


def test_diagnose_says_how_many_rounds_it_takes():
    def row(rounds, recall, window=0):
        values = {"layer": "", "head": 0, "cosine_error": None, "n_keys": 3.0}
        return {"span": "window", "local_window": window, "n_hashes": rounds, "recall": recall, **values}

    means = diagnose.summary([row(1, 0.5), row(2, 0.85), row(2, 0.97), row(4, 0.99), row(4, 0.7, 16), row(8, 0.8, 16)])
    assert means["window", 0][2] == {"recall": pytest.approx(0.91), "cosine_error": None, "n_keys": 3.0}
    assert diagnose.rounds_needed(means, 0) == "window covers 90% of the softmax mass from R = 2 on (91.0%)"
    wanted = "window + local 16 does not cover 90% of the softmax mass up to R = 8 (80.0%)"
    assert diagnose.rounds_needed(means, 16) == wanted


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--queries", "0"], "--queries: got 0, wanted >= 1"),
        (["--rounds", "0"], "n_hashes: got 0, wanted >= 1"),
        (["--n-buckets", "3"], "n_buckets: got"),
        (["--local-window", "-1"], "--local-window: got -1, wanted >= 0"),
        (["missing.pt"], "FILE: got missing.pt, which is no file"),
    ],
)
def test_diagnose_checks_its_options(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        diagnose.main(arguments)
    assert message in capsys.readouterr().err


def test_diagnose_refuses_other_files(tmp_path):
    for saved in ({"q": torch.ones(1)}, [1], {"query": torch.ones(1, 1, 4, 4), "extra": torch.ones(1)}):
        torch.save(saved, tmp_path / "file.pt")
        with pytest.raises(SystemExit, match="FILE: got .*, wanted a dict of query"):
            diagnose.main([str(tmp_path / "file.pt"), "--out", str(tmp_path)])
