"""The demo at a tiny size: text, counts, twins, files, Ctrl-C, life without matplotlib."""

import csv
import functools
import json
import math
import os
import signal
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lsh_kernels import LSHMultiheadAttention, ReformerLM, demo, measure

NAMES = ["exact", "LSH, shared QK", "LSH, separate keys"]
ROOT = Path(__file__).parents[1]


def start(out, *arguments):
    """The demo as users run it, in a process of its own."""
    path = os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        [sys.executable, "-m", "lsh_kernels", "demo", "--length", "256", "--out", str(out), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        # a shell starts what it puts in the background with Ctrl-C ignored, and children inherit that
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )


def finish(process, status):
    out, err = process.communicate(timeout=100)
    assert process.returncode == status, err.decode()
    return out.decode()


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_demo_end_to_end(tmp_path):
    process = start(tmp_path, "--steps", "2", "--layers", "1", "--seed", "3")
    text = finish(process, 0)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["options"] == {"length": 256, "steps": 2, "layers": 1, "seed": 3}
    assert list(results["models"]) == list(results["layer"]) == NAMES
    for model in results["models"].values():
        assert [row["step"] for row in model["train"]] == [1, 2]
        assert all(1 < row["bits_per_byte"] < 12 and row["seconds"] > 0 for row in model["train"])
        assert model["heldout"][-1]["step"] == 2 and model["peak_bytes"] > 0
    first = [model["train"][0]["bits_per_byte"] for model in results["models"].values()]
    assert max(first) - min(first) < 0.5  # same weights, same batch
    for layer in results["layer"].values():
        assert [row["length"] for row in layer] == [32, 64, 128, 256, 512]
        peaks = [row["peak_bytes"] for row in layer]
        assert peaks == sorted(peaks) and all(row["seconds"] > 0 for row in layer)

    # the table says the same
    for name in NAMES:
        line = next(line for line in text.splitlines() if line.startswith(name))
        seconds = sorted(row["seconds"] for row in results["models"][name]["train"])
        cells = line.removeprefix(name).split()
        assert cells[0] == f"{results['models'][name]['heldout'][-1]['bits_per_byte']:.3f}"
        assert cells[2] == f"{sum(seconds) / 2:.3f}"
        assert float(cells[1].replace(",", "")) == pytest.approx(256 / (sum(seconds) / 2), abs=1)
        assert cells[3] == f"{results['models'][name]['peak_bytes'] / 2**20:,.0f}"
    assert f"unigram counts{results['text']['unigram']:28.3f}" in text
    assert f"bigram counts{results['text']['bigram']:29.3f}" in text
    assert "demo.png" in text and (tmp_path / "demo.png").read_bytes()[:4] == b"\x89PNG"

    losses = rows(tmp_path / "losses.csv")
    assert [(row["model"], row["step"]) for row in losses] == [(name, step) for name in NAMES for step in "12"]
    assert float(losses[-1]["heldout_bits_per_byte"]) == results["models"][NAMES[-1]]["heldout"][-1]["bits_per_byte"]
    assert len(rows(tmp_path / "layer.csv")) == 15
    for name in NAMES:
        saved = torch.load(tmp_path / demo.weights_name(name), weights_only=True)
        assert saved["model"] == name and saved["options"] == results["options"]
        demo.build_model(name, SimpleNamespace(**saved["options"])).load_state_dict(saved["state_dict"])

    # nothing of this machine but what the numbers need
    written = " ".join((tmp_path / name).read_text() for name in ("results.json", "losses.csv", "layer.csv"))
    assert set(results["machine"]) == {"cpu", "cores", "torch", "python", "commit"}
    for private in (str(Path.home()), str(tmp_path), str(ROOT), os.sep + "lib" + os.sep):
        assert private not in written


def test_demo_interrupted_leaves_what_was_measured(tmp_path):
    # seen in the progress bar: the first model is training
    process = start(tmp_path, "--steps", "1000000")
    seen = b""
    while b"/1000000" not in seen or b"bits/byte" not in seen:
        byte = process.stderr.read(1)
        assert byte, seen.decode()
        seen += byte
    process.send_signal(signal.SIGINT)
    text = finish(process, 130)
    results = json.loads((tmp_path / "results.json").read_text())
    done = len(results["models"]["exact"]["train"])
    assert done >= 1 and list(results["models"]) == ["exact"]
    line = next(line for line in text.splitlines() if line.startswith("exact"))
    assert line.startswith(f"exact ({done} steps)") and line.split()[3] == "-" and float(line.split()[5]) > 0
    assert len(rows(tmp_path / "losses.csv")) == done
    assert (tmp_path / "demo.png").exists()


def test_demo_reformer_end_to_end(tmp_path):
    text = finish(start(tmp_path, "--model", "reformer", "--steps", "2"), 0)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["options"] == {"length": 256, "steps": 2, "layers": 2, "seed": 0}
    assert list(results["models"]) == ["reformer"] and results["layer"] == {}
    model = results["models"]["reformer"]
    assert [row["step"] for row in model["train"]] == [1, 2] and model["peak_bytes"] > 0
    assert [line.split()[0] for line in text.splitlines() if line.startswith(("reformer", *NAMES))] == ["reformer"]
    assert (tmp_path / "demo.png").read_bytes()[:4] == b"\x89PNG"
    saved = torch.load(tmp_path / demo.weights_name("reformer"), weights_only=True)
    assert saved["model"] == "reformer" and saved["options"] == results["options"]
    model = demo.build_model("reformer", SimpleNamespace(**saved["options"]))
    model.load_state_dict(saved["state_dict"])
    assert type(model) is ReformerLM and model.config.pattern == ("local", "lsh") and model.config.reversible


def test_demo_trains_a_reformer_at_the_least_length(tmp_path):
    sent = []
    demo.train(sent.append, "reformer", SimpleNamespace(length=16, steps=1, layers=2, seed=0, out=tmp_path))
    assert [message[0] for message in sent] == ["text", "step", "heldout", "peak"]


def test_demo_chooses_its_models_and_length():
    assert vars(demo._parse([]))["models"] == NAMES and demo._parse([]).length == 8192
    assert demo._parse(["--model", "reformer"]).length == 16384
    options = demo._parse(["--model", "exact", "reformer", "--length", "99"])
    assert options.models == ["exact", "reformer"] and options.length == 99


def test_demo_reformer_loss_is_that_of_its_logits():
    model = demo.build_model("reformer", SimpleNamespace(seed=0, layers=2, length=99)).eval()
    text = torch.from_numpy(demo.corpus()[0][:100])
    expected = F.cross_entropy(model(text[None, :-1].long())[0], text[1:].long())
    torch.testing.assert_close(demo.next_byte_loss(model, text), expected)


def results_without_runs():
    return {
        "machine": measure.machine(),
        "options": {"length": 8, "steps": 1, "layers": 1, "seed": 0},
        "models": {"exact": {"train": [{"step": 1, "bits_per_byte": 8.0, "seconds": 0.5}], "heldout": []}},
        "layer": {"exact": [{"length": 4, "seconds": 0.1, "peak_bytes": 0}]},
    }


def test_demo_without_matplotlib_writes_the_rest_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    demo._write(tmp_path, results_without_runs())
    assert "no demo.png: matplotlib is not installed" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "losses.csv", "layer.csv"}


def test_demo_writes_what_there_is_when_a_run_fails(tmp_path, monkeypatch, capsys):
    def fail(options, results):
        results["models"]["exact"] = results_without_runs()["models"]["exact"]
        raise RuntimeError("a model died")

    monkeypatch.setattr(demo, "_measure", fail)
    with pytest.raises(RuntimeError, match="a model died"):
        demo.main(["--out", str(tmp_path)])
    assert len(rows(tmp_path / "losses.csv")) == 1
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("exact"))
    assert line.split() == ["exact", "(1", "steps)", "-", "16,384", "0.500", "-"]


def fail_in_child(send, name):
    send(name)
    raise SystemExit(7)


def test_demo_says_when_a_process_dies():
    messages = demo.messages(fail_in_child, ("exact",))
    assert next(messages) == "exact"
    with pytest.raises(RuntimeError, match="exit code 7"):
        next(messages)


def test_demo_ctrl_c_is_the_parents():
    before = signal.getsignal(signal.SIGINT)
    assert list(demo.messages(report_handler, ())) == [signal.SIG_IGN]
    assert signal.getsignal(signal.SIGINT) is before


def report_handler(send):
    send(signal.getsignal(signal.SIGINT))


@pytest.mark.parametrize("argument", ["--length=8", "--steps=0", "--layers=0"])
def test_demo_checks_its_options(argument, capsys):
    with pytest.raises(SystemExit, match="2"):
        demo.main([argument])
    assert "wanted >=" in capsys.readouterr().err


# the text


def test_demo_text_is_split_by_file_name(tmp_path, monkeypatch):
    wanted = {True: [], False: []}
    for i in range(64):
        folder = tmp_path / f"package{i % 3}"
        folder.mkdir(exist_ok=True)
        (folder / f"m{i}.py").write_bytes(b"%d" % i)
        wanted[zlib.crc32(f"package{i % 3}/m{i}.py".encode()) % 16 == 0].append(i)
    for skipped in ("site-packages", "package0/tests", "__pycache__"):
        (tmp_path / skipped).mkdir()
        (tmp_path / skipped / "m.py").write_bytes(b"no")
    monkeypatch.setattr(demo.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    got = [sorted(int(part) for part in text.tobytes().split(b"\0")) for text in demo.corpus()]
    assert got == [wanted[False], wanted[True]] and wanted[True]


def test_demo_text_is_there():
    train, heldout = demo.corpus()
    assert len(train) > 10 * len(heldout) and len(heldout) > 16 * 8192
    assert b"def " in train.tobytes() and not set(heldout.tobytes().split(b"\0")) & set(train.tobytes().split(b"\0")) - {b""}


def test_demo_windows_span_the_heldout_text():
    text = torch.arange(250, dtype=torch.uint8)
    got = demo.windows(text, 20)
    assert got.shape == (demo.N_HELDOUT, 21) and got[0, 0] == 0 and got[-1, -1] == 249
    assert (got.long().diff(dim=1) == 1).all()
    assert demo.windows(text[:21], 20).shape == (demo.N_HELDOUT, 21)
    with pytest.raises(ValueError, match="--length: got 20, wanted < 20"):
        demo.windows(text[:20], 20)


def test_demo_counts_are_cross_entropies():
    train = torch.tensor([0, 1, 0, 1, 0, 2], dtype=torch.uint8)
    facts = demo.text_facts(train, torch.tensor([[0, 1, 0], [0, 2, 2]], dtype=torch.uint8))  # targets 1 0 2 2
    unigram = np.full(256, 1.0)
    unigram[:3] += [3, 2, 1]
    unigram /= 262
    bigram = np.tile(unigram, (256, 1))
    for a, b in ((0, 1), (1, 0), (0, 1), (1, 0), (0, 2)):
        bigram[a, b] += 1
    bigram /= bigram.sum(1, keepdims=True)
    assert facts["unigram"] == pytest.approx(-np.log2(unigram[[1, 0, 2, 2]]).mean())
    assert facts["bigram"] == pytest.approx(-np.log2(bigram[[0, 1, 0, 2], [1, 0, 2, 2]]).mean())
    assert facts["unigram_of_heldout"] == pytest.approx(1.5)
    assert (facts["train_bytes"], facts["heldout_targets"]) == (6, 4)


# the models


def test_demo_twins_start_from_the_same_weights():
    options = SimpleNamespace(seed=4, layers=2)
    models = {name: demo.build_model(name, options) for name in NAMES}
    exact = models["exact"].state_dict()
    for name, shared_qk in (("LSH, shared QK", True), ("LSH, separate keys", False)):
        state = models[name].state_dict()
        assert list(state) == list(exact) and all(torch.equal(state[key], exact[key]) for key in exact)
        layers = [layer.self_attn for layer in models[name].layers]
        assert all(type(m) is LSHMultiheadAttention and m.shared_qk is shared_qk for m in layers)
        assert all(m.config.local_window > 0 for m in layers)
    assert all(type(layer.self_attn) is nn.MultiheadAttention for layer in models["exact"].layers)
    assert type(demo.attention_layer("exact")) is nn.MultiheadAttention
    assert demo.attention_layer("LSH, shared QK").shared_qk and not demo.attention_layer("LSH, separate keys").shared_qk


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", [*NAMES, "reformer"])
def test_demo_models_are_causal(name, training, monkeypatch):
    # as in the demo's processes; torch's fast path would read the mask of zeros
    monkeypatch.setattr(torch.backends.mha, "get_fastpath_enabled", lambda: False)
    model = demo.build_model(name, SimpleNamespace(seed=0, layers=2, length=100)).train(training)
    text = torch.randint(0, 256, (1, 100))
    changed = torch.cat([text[:, :60], torch.randint(0, 256, (1, 40))], dim=1)
    with torch.no_grad():
        torch.manual_seed(1)
        a = model(text)
        torch.manual_seed(1)
        b = model(changed)
    torch.testing.assert_close(a[:, :60], b[:, :60], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(a[:, 60:], b[:, 60:], atol=1e-2)


def fastpath(send):
    send(torch.backends.mha.get_fastpath_enabled())


def test_demo_processes_have_no_fast_path():
    assert list(demo.messages(fastpath, ())) == [False]


def test_demo_exact_attention_takes_the_flash_kernel(monkeypatch):
    with torch.profiler.profile() as profile:
        layer, x = demo.attention_layer("exact"), torch.randn(1, 64, demo.EMBED_DIM)
        layer(x, x, x, attn_mask=demo.no_mask(64), is_causal=True, need_weights=False)
    assert any("_scaled_dot_product_flash_attention_for_cpu" in event.key for event in profile.key_averages())
    assert demo.no_mask(8192).untyped_storage().nbytes() == 4


def test_demo_update_learns():
    model = demo.build_model("LSH, shared QK", SimpleNamespace(seed=0, layers=1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=demo.LEARNING_RATE)
    text = torch.from_numpy(demo.corpus()[0][:257])
    losses = [demo.update(model, optimizer, text) for _ in range(5)]
    assert losses[-1] < 0.8 * losses[0]


def test_demo_learning_rate_warms_up_and_decays():
    rates = [demo.learning_rate(step, 60) for step in range(60)]
    assert rates[0] == pytest.approx(1 / 6) and max(rates) == rates[6] == 1 and rates == rates[:6] + sorted(rates[6:])[::-1]
    assert 0.1 <= rates[-1] < 0.11 and demo.learning_rate(0, 1) == 1


def test_demo_sinusoids():
    positions = demo.sinusoids(3)
    assert positions.shape == (3, demo.EMBED_DIM)
    half = demo.EMBED_DIM // 2
    assert positions[2, 0].item() == pytest.approx(math.sin(2)) and positions[2, half].item() == pytest.approx(math.cos(2))
    assert positions[1, half - 1].item() == pytest.approx(math.sin(10_000 ** -((half - 1) / half)))
