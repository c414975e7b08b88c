"""What the report makes of rows: which ones it takes, crossovers, tables and pictures."""

import measured
import peers
import pictures
import pytest
import report
from bench_folder import BENCH, bench, rows_csv, sample_rows


@pytest.mark.parametrize(
    "ours, exact, wanted",
    [
        ({1024: 2, 2048: 4, 4096: 8}, {1024: 1, 2048: 4, 4096: 16}, (2048, "2,048")),
        ({1024: 2, 4096: 8}, {1024: 1, 4096: 16}, (2048, "2,048")),
        # faster once, but not from there on
        ({1024: 1, 2048: 4, 4096: 8}, {1024: 2, 2048: 2, 4096: 32}, (2580, "2,580")),
        ({1024: 1, 2048: 1}, {1024: 2, 2048: 2}, (None, "at or below 1,024")),
        ({1024: 1, 2048: 3}, {1024: 2, 2048: 2}, (None, "none up to 2,048")),
        ({1024: 1}, {2048: 2}, (None, "not measured")),
    ],
)
def test_report_crossover(ours, exact, wanted):
    assert measured.crossover(ours, exact) == wanted


def written_report(folder):
    status = report.main(
        ["--results", str(folder / "results"), "--readme", str(folder / "README.md"), "--pictures", str(folder / "docs")]
    )
    assert status == 0
    return (folder / "README.md").read_text()


def test_report_writes_between_its_markers(tmp_path):
    rows_csv(tmp_path / "results" / "box.csv", sample_rows())
    rows_csv(tmp_path / "results" / "gpu.csv", sample_rows(device="Some GPU", cores="16")[:1])
    (tmp_path / "results" / "other.csv").write_text("layer,head\n0,0\n")
    (tmp_path / "README.md").write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    text = written_report(tmp_path)
    assert text.startswith(f"before\n{report.BEGIN}\n") and text.endswith(f"{report.END}\nafter\n") and "\nold\n" not in text
    assert "Rows run on a CPU: 19 on 2 cores of Some CPU. Rows run on a GPU: 1 on Some GPU. Rows modelled: none." in text
    assert text.index("### Some GPU") < text.index("### 2 cores of Some CPU")
    assert "| lsh_kernels torch | 8 |" in text and "| SDPA math | 77.5 |" in text
    assert "| sort, torch.sort int16 | 3 | 25.0% |" in text
    assert "memory at depth 24 is 1.200 times (bar: 1.100) that at depth 2" in text
    assert "a step takes 1.300 times (bar: 1.400) its time not reversible" in text
    assert "| lsh_kernels exact | 10 | 12 | 13 | 0 |" in text and "| not reversible | – | – | 10 | – |" in text
    assert "memory is 0.050 times (bar: 0.125) the plain MLP's" in text
    assert "time is 1.500 times (bar: 1.350) the plain MLP's" in text
    assert "forward, fixed batch: lsh_kernels torch is faster than the best exact attention from L = 2,048" in text
    assert "| lsh_kernels BucketCache | 8 |" in text
    assert "one new token: lsh_kernels BucketCache is faster than the best exact attention from L = 2,048" in text
    assert "- SDPA cuDNN (absent at 1,024): not a backend of the CPU" in text
    kinds = {f"box_{kind}.png" for kind in ("time", "memory", "roofline", "reversible")} | {"gpu_time.png"}
    assert {path.name for path in (tmp_path / "docs").iterdir()} == kinds
    assert all(f"](docs/{name})" in text for name in kinds)


def test_report_twice_is_the_same(tmp_path):
    rows_csv(tmp_path / "results" / "box.csv", sample_rows())
    first = written_report(tmp_path)
    pictures = {path.name: path.read_bytes() for path in (tmp_path / "docs").iterdir()}
    assert written_report(tmp_path) == first
    assert {path.name: path.read_bytes() for path in (tmp_path / "docs").iterdir()} == pictures


def test_report_takes_the_last_row_of_each_kind(tmp_path):
    again = [row | {"ms_p50": 5} for row in sample_rows()[:1]]
    rows_csv(tmp_path / "box.csv", sample_rows() + again)
    times = measured.select(measured.load(tmp_path), "ms_p50", suite="attention")
    assert times["lsh_kernels torch"] == {1024: 5, 4096: 8}


def test_report_takes_all_batches_of_a_fixed_number_of_tokens(tmp_path):
    rows = [row | {"regime": "tokens", "B": 4096 // row["L"]} for row in sample_rows()[:2]]
    rows_csv(tmp_path / "box.csv", rows)
    times = measured.select(measured.load(tmp_path), "ms_p50", suite="attention", regime="tokens")
    assert times == {"lsh_kernels torch": {1024: 2, 4096: 8}}


def test_report_has_a_line_of_its_own_for_every_peer():
    assert len({(line["linestyle"], line["marker"]) for line in pictures.LINES}) >= len(peers.PEERS | peers.VARIANTS)


def test_report_does_not_mix_shapes(tmp_path):
    """Of two head dims in one CSV the tables show the one measured last, at all its lengths."""
    other = [row | {"D": 128, "ms_p50": 7} for row in sample_rows()[:4:2]]
    rows_csv(tmp_path / "box.csv", other + [row | {"D": 64} for row in sample_rows()[:4]])
    times = measured.select(measured.load(tmp_path), "ms_p50", suite="attention")
    assert times == {"lsh_kernels torch": {1024: 2, 4096: 8}, "SDPA math": {1024: 1, 4096: 16}}
    rows_csv(tmp_path / "box.csv", other[:1])
    times = measured.select(measured.load(tmp_path), "ms_p50", suite="attention")
    assert times == {"lsh_kernels torch": {1024: 7}, "SDPA math": {1024: 7}}


def test_report_reads_the_rows_that_are_committed():
    rows = measured.load(BENCH / "results")
    assert {"lsh_kernels torch", "SDPA flash"} <= {row["provider"] for row in rows}
    assert all(row["suite"] in bench.SUITES and row["status"] in ("ok", "absent", "failed") for row in rows)


def test_report_refuses_a_text_without_markers(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"{report.END}\n{report.BEGIN}\n")
    with pytest.raises(ValueError, match=r"README\.md: wanted one"):
        report.write(readme, "text")
