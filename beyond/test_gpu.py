"""Tests of gpu.py and design.py: that they run, at toy sizes, and what they note."""
import json

import pytest
import torch

import kernel
from beyond import design, gpu
from generate import Sampling

pytestmark = pytest.mark.skipif(kernel.triton is None, reason="no Triton")
CPU = torch.device("cpu")


def test_the_report_at_toy_size(tmp_path, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("toy sizes are for Triton's interpreter")
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)     # no transformers
    report = gpu.measure(tmp_path / "out", CPU, smollm2=tmp_path / "none")
    assert not [rows for rows in report.data.values() for row in rows
                if "failed" in row or "left out" in row]
    assert "the times mean nothing" in report.lines[0]
    right = report.data["right"]
    assert [row["kind"] for row in right] == ["bfloat16", "float16", "float32", "int8", "int4"]
    assert all(row["worst"] <= 1 and row["same bits"] for row in right)
    rates = {(row["what"], row["level"]) for row in report.data["models: llama-3-8b"]}
    assert {("core", 0.5), ("beyond: fused", 0.4)} <= rates
    same = [row for row in report.data["texts: demo"] if "same" in row]
    assert same and all(row["same"] == row["of"] for row in same)
    assert report.data["profile"] and report.data["tiles"]
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report.data
    assert (tmp_path / "out" / "report.txt").read_text().splitlines() == "\n".join(
        report.lines).splitlines()
    assert (tmp_path / "out" / "report.png").read_bytes().startswith(b"\x89PNG")


def test_a_part_that_fails_or_does_not_fit_is_noted_and_the_rest_goes_on(tmp_path):
    report = gpu.Report(tmp_path, 1, CPU)
    report.part("bad", lambda report, rows: rows.append({"a": 1}) or 1 / 0)
    report.part("good", lambda report, rows, value: rows.append({"b": value}), 2)
    report.end = 0
    report.part("late", lambda report, rows: rows.append({"c": 3}))
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["bad"] == [{"a": 1}, {"failed": "ZeroDivisionError: division by zero"}]
    assert data["good"] == [{"b": 2}]
    assert data["late"] == [{"left out": "the minutes are over"}]


def test_a_wrong_product_shows(monkeypatch):
    monkeypatch.setitem(kernel.BACKENDS, "triton", lambda x, weight_t, threshold: x @ weight_t)
    assert gpu.worst_error("bfloat16", 2, 64, 33, -1.0, CPU)[0] <= 1
    assert gpu.worst_error("bfloat16", 2, 64, 33, 0.5, CPU)[0] > 1


def test_the_authors_kernel_is_given_what_it_takes(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "sparse_gemv.py").write_text("""
import msgspec
def splitk_sparse_gemv(x, weight, threshold, sparsity_bin):
    assert isinstance(threshold, float) and isinstance(sparsity_bin, int)
    assert weight.stride(1) > 1          # column major
    return (x * (x.abs() > threshold)) @ weight.T
""")
    x = torch.randn(1, 32)
    weight_t = torch.randn(32, 7)
    y = gpu.teal_product(tmp_path)(x, weight_t, 0.5, 0.25)
    torch.testing.assert_close(y, kernel.sparse_gemv(x, weight_t, 0.5, "torch"))


def test_launches_of_a_step():
    core, fused = (design.step_launches("llama-3.2-1b", "decode", fuse) for fuse in (False, True))
    assert core.counts["sparse_product_kernel"] == 7 * 16                  # a launch for each
    assert fused.counts["sparse_product_kernel"] == 2 * 16                 # o and down
    assert fused.counts["joint_product_kernel"] == 2 * 16
    assert core.counts["rms_norm"] == fused.counts["rms_norm"] == 2 * 16 + 1
    assert design.step_launches("llama-3.2-1b", "off").counts["mm"] == 7 * 16 + 1


@pytest.mark.parametrize("sampling, waits", [
    (Sampling(), 0), (Sampling(temperature=1.0), 0), (Sampling(temperature=0.7, top_k=5), 0),
    (Sampling(temperature=1.0, top_p=0.9), 1)])            # are the first 1024 tokens enough?
def test_a_step_does_not_wait_for_the_host(sampling, waits):
    for mode, fuse in (("off", False), ("decode", False), ("decode", True)):
        launches = design.step_launches("llama-3.2-1b", mode, fuse, sampling)
        waited = {name: count for name, count in launches.counts.items() if "wait" in name}
        assert sum(waited.values()) == waits, waited
