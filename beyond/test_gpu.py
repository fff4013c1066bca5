"""Tests of gpu.py and design.py: that they run, at toy sizes, and what they note."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import generate
import kernel
import model as llama
from beyond import design, fused, gpu
from generate import Sampling

pytestmark = pytest.mark.skipif(kernel.triton is None, reason="no Triton")
CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# --------------------------------------------------------------------------------------------------
# gpu.py

TEAL = """
import msgspec
def splitk_sparse_gemv(x, weight, threshold, sparsity_bin):
    assert isinstance(threshold, float) and isinstance(sparsity_bin, int)
    assert weight.stride(1) > 1          # column major
    return (x * (x.abs() > threshold)) @ weight.T
"""

GPT_FAST = """
from dataclasses import dataclass
import torch
from torch import nn

@dataclass
class ModelArgs:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    dim: int
    intermediate_size: int
    n_local_heads: int
    rope_base: float

class Transformer(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.output = nn.Linear(args.dim, args.vocab_size, bias=False)
        self.seen = 0

    def setup_caches(self, batch, length):
        assert batch == 1
        self.max_seq_length = -(-length // 8) * 8

    def run(self, idx, input_pos):
        assert idx.shape == (1, 1) and input_pos.tolist() == [self.seen] < [self.max_seq_length]
        self.seen += 1
        return self.output(self.tok_embeddings(idx))
"""
OLDER = """
    def forward(self, idx, input_pos=None):
        return self.run(idx, input_pos)
"""
NEWER = """
    def forward(self, mask, idx, input_pos=None):
        assert mask.seq_lengths == (1, self.max_seq_length) and mask.shape[2] == 1
        keys = torch.arange(self.max_seq_length)
        assert mask.mask_mod(0, 0, input_pos, keys).sum() == self.seen + 1
        mask.mask_mod = None             # what it does to one row is nothing to the next
        return self.run(idx, input_pos)
"""


@pytest.fixture
def folders(tmp_path):
    """Folders that stand for the authors' code and for gpt-fast."""
    (tmp_path / "teal" / "kernels").mkdir(parents=True)
    (tmp_path / "teal" / "kernels" / "sparse_gemv.py").write_text(TEAL)
    (tmp_path / "gpt-fast").mkdir()
    (tmp_path / "gpt-fast" / "model.py").write_text(GPT_FAST + OLDER)
    return tmp_path / "teal", tmp_path / "gpt-fast"


def test_the_report_at_toy_size(tmp_path, monkeypatch, folders):
    find_spec = gpu.importlib.util.find_spec
    monkeypatch.setattr(gpu.importlib.util, "find_spec",
                        lambda name: None if name == "transformers" else find_spec(name))
    report = gpu.measure(tmp_path / "out", CPU, 9, *folders, smollm2=tmp_path / "none")
    assert not [rows for rows in report.data.values() for row in rows
                if "failed" in row or "left out" in row]
    assert "the times mean nothing" in "".join(report.lines[:3])
    right = report.data["right"]
    assert [row["kind"] for row in right] == ["bfloat16", "float16", "float32", "int8", "int4"]
    assert all(row["worst"] <= 1 and row["same bits"] for row in right) and report.is_right()
    rates = {(row["what"], row["level"]) for row in report.data["models: llama-3-8b"]}
    assert {("core", 0.5), ("beyond: fused", 0.4)} <= rates
    same = [row for row in report.data["texts: demo"] if "same" in row]
    assert same and all(row["same"] == row["of"] for row in same)
    assert report.data["profile"] and report.data["tiles"] and report.data["gpt-fast: llama-3-8b"]
    assert list(report.data)[-1] == "products: TEAL"       # nothing is after what may crash
    assert report.data["products: TEAL"][1]["kind"] == "TEAL float16"
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report.data
    assert (tmp_path / "out" / "report.txt").read_text().splitlines() == "\n".join(
        report.lines).splitlines()
    assert (tmp_path / "out" / "report.png").read_bytes().startswith(b"\x89PNG")


def fails(part):
    part.add({"a": 1})
    part.say(f"{1 / 0}")


def dies(part):
    part.add({"a": 2})
    os.kill(os.getpid(), signal.SIGKILL)


def hangs(part):
    child = subprocess.Popen(["sleep", "600"])
    part.add({"child": child.pid})
    part.say("hanging")
    time.sleep(600)


def works(part, value):
    part.check()
    part.add({"b": value, "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
              "touched": torch.cuda.is_initialized(), "interpreted": kernel.is_interpreted()})


class HurriedReport(gpu.Report):
    """A Report whose time is over when a part says that it hangs."""
    GRACE = 0

    def say(self, text=""):
        super().say(text)
        if text == "hanging":
            self.end = 0


def is_running(pid):
    """Return whether a process runs: one that nobody waited for yet has ended, too."""
    path = Path(f"/proc/{pid}/stat")
    return path.exists() and path.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_part_that_fails_dies_or_hangs_is_noted_and_the_rest_goes_on(tmp_path):
    report = HurriedReport(tmp_path, 9, CPU)
    report.part("bad", 99, fails)
    report.part("dead", 99, dies)
    report.part("good", 99, works, 2)
    report.part("late", 0, works, 3)
    report.part("hanging", 99, hangs)
    report.part("later", 99, works, 4)
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["bad"] == [{"a": 1}, {"failed": "ZeroDivisionError: division by zero"}]
    assert data["dead"] == [{"a": 2}, {"failed": "its process died: SIGKILL"}]
    # On a CPU no GPU is touched, where there is one.
    assert data["good"] == [{"b": 2, "visible": "", "touched": False, "interpreted": True}]
    assert data["late"] == [{"left out": "its 0 s are over"}]
    child, end = data["hanging"]
    assert end == data["later"][0] == {"left out": "the minutes are over"}
    for _ in range(100):                 # what a part has started ends with it
        if not is_running(child["child"]):
            break
        time.sleep(0.1)
    assert not is_running(child["child"])


@pytest.mark.parametrize("right, tests, status", [
    ({"worst": 0.5, "same bits": True}, {"status": 0}, 0),
    ({"worst": 0.5, "same bits": True}, {"left out": "the minutes are over"}, 0),
    ({"worst": 1.5, "same bits": True}, {"status": 0}, 1),
    ({"worst": float("nan"), "same bits": True}, {"status": 0}, 1),
    ({"worst": 0.5, "same bits": False}, {"status": 0}, 1),
    ({"failed": "RuntimeError: an illegal memory access"}, {"status": 0}, 1),
    ({"left out": "the minutes are over"}, {"status": 0}, 1),
    ({"worst": 0.5, "same bits": True}, {"status": 1}, 1)])
def test_the_exit_status_says_whether_products_are_right(right, tests, status, tmp_path,
                                                         monkeypatch):
    def measure(folder, device, *others):
        report = gpu.Report(folder, 1, device)
        report.data = {"right": [{"worst": 0.1, "same bits": True}, right], "tests": [tests]}
        return report

    monkeypatch.setattr(gpu, "measure", measure)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path), "--device", "cpu"])
    if status:
        with pytest.raises(SystemExit, match="1"):
            gpu.main()
    else:
        gpu.main()


def test_a_wrong_product_shows(monkeypatch):
    monkeypatch.setitem(kernel.BACKENDS, "triton", lambda x, weight_t, threshold: x @ weight_t)
    assert gpu.worst_error("bfloat16", 2, 64, 33, -1.0, CPU)[0] <= 1
    assert gpu.worst_error("bfloat16", 2, 64, 33, 0.5, CPU)[0] > 1


@pytest.mark.parametrize("outputs", [33, 1 << 19])         # of a small block, and of a large one
def test_an_output_that_is_not_written_shows(outputs, monkeypatch):
    def all_but_one(x, weight_t, threshold):
        right = x @ weight_t
        kept = torch.empty_like(right).copy_(right)
        del kept                         # the right values are what lies in the memory that is next
        y = torch.empty_like(right)
        y[:, 1:] = right[:, 1:]
        return y

    monkeypatch.setitem(kernel.BACKENDS, "triton", all_but_one)
    error, same = gpu.worst_error("float32", 1, 8, outputs, -1.0, DEVICE)
    assert error != error and not same
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_authors_kernel_is_given_what_it_takes(folders):
    x = torch.randn(1, 32)
    weight_t = torch.randn(32, 7)
    y = gpu.teal_product(folders[0])(x, weight_t, 0.5, 0.25)
    torch.testing.assert_close(y, kernel.sparse_gemv(x, weight_t, 0.5, "torch"))
    assert "msgspec" not in sys.modules or hasattr(sys.modules["msgspec"], "__file__")


class QuietPart:
    """What a part is given, without a report."""
    device, toy = CPU, True

    def check(self):
        pass


@torch.no_grad()
@pytest.mark.parametrize("forward", [OLDER, NEWER])
def test_gpt_fast_of_either_signature(forward, folders):
    (folders[1] / "model.py").write_text(GPT_FAST + forward)
    assert gpu.gpt_fast_rate(folders[1], QuietPart(), "llama-3-8b", 5) > 0
    (folders[1] / "model.py").write_text((GPT_FAST + forward).replace("self.seen += 1", ""))
    with pytest.raises(AssertionError):  # positions are looked at
        gpu.gpt_fast_rate(folders[1], QuietPart(), "llama-3-8b", 5)


@torch.no_grad()
def test_transformers_writes_what_it_writes_without_a_static_cache(monkeypatch):
    transformers = pytest.importorskip("transformers", reason="see requirements-dev.txt")
    steady_rate, models, texts = gpu.steady_rate, [], []

    def watched(part, decode, tokens):
        def step(token, position):
            texts.append(decode(token, position))
            return texts[-1]
        return steady_rate(part, step, tokens)

    def to(model, dtype):                # in which no two logits are as large
        torch.manual_seed(0)
        models.append(torch.nn.Module.to(model, torch.float64))
        for parameter in model.parameters():
            if parameter.ndim == 2:      # activations that matter
                parameter.normal_(std=1.5 * parameter.shape[1] ** -0.5)
        return model

    monkeypatch.setattr(gpu, "steady_rate", watched)
    monkeypatch.setattr(transformers.LlamaForCausalLM, "to", to)
    assert gpu.transformers_rate(QuietPart(), "llama-3-8b", 6) > 0
    ids = [1]
    for _ in range(6):
        ids.append(models[0](torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item())
    assert [token.item() for token in texts] == ids[1:] and len(set(ids)) > 2


# --------------------------------------------------------------------------------------------------
# The kernel of fused.py

@pytest.mark.filterwarnings("ignore:invalid value")        # of the interpreter's numpy
def test_joint_products_do_not_multiply_what_is_dropped():
    torch.manual_seed(0)
    x = torch.randn(3, 70)
    weights = [torch.randn(70, out) for out in (64, 31)]
    x[0, 9] = 0.1                        # another row keeps it
    for weight in weights:
        weight[9] = float("inf")
    thresholds = [torch.tensor(0.4, device=DEVICE)] * 2
    y = fused.joint_gemv(x.to(DEVICE), [weight.to(DEVICE) for weight in weights], thresholds).cpu()
    terms = torch.where((x.abs() > 0.4)[:, :, None], x[:, :, None] * torch.cat(weights, 1), 0.0)
    torch.testing.assert_close(y, terms.sum(1), equal_nan=True)
    assert y[0].isfinite().all() and not y[1].isfinite().any()


# --------------------------------------------------------------------------------------------------
# design.py

def test_a_plan_counts_the_grid_and_the_last_wave():
    card = design.Card(90, 132e9 * 1000, 132, 1e9, 228 << 10, 64, 32)      # needs 700,000 bytes
    def plan(fit, grid, ahead, compute=9.0):
        return design.Plan("", card, fit, grid, {0.5: ahead}, compute)

    assert card.need == pytest.approx(700_000)
    enough = plan(8, 132 * 6, 350_000)   # the grid has six, where eight would fit
    assert enough.over_need(0.5) == pytest.approx(3)       # not cut off at 1,
    assert enough.share(0.5) == 1 and enough.limit(0.5) == ""               # as the share is
    few = plan(8, 132, 350_000)
    assert few.share(0.5) == pytest.approx(0.5) and few.limit(0.5) == "latency"
    waves = plan(4, 132 * 5, 175_000)    # four at once, and then one alone with a quarter
    assert waves.over_need(0.5) == pytest.approx(1) and waves.limit(0.5) == "the last wave"
    assert waves.share(0.5) == pytest.approx(1 / (4 / 5 + 1 / 5 * 4))
    idle = plan(4, 66, 1e9, compute=1.0)                   # on half of the multiprocessors
    assert idle.share(0.5) == pytest.approx(0.5)
    slow = plan(4, 132 * 4, 350_000, compute=0.6)
    assert slow.share(0.5) == pytest.approx(0.6) and slow.limit(0.5) == "computing"


def test_the_kernel_as_it_was():
    plan = design.plan_before(design.CARDS["h100"])
    assert (plan.fit, plan.run) == (3, 4)
    way, need = 12, 3.35e12 * 0.7e-6 / 132 / 1024          # KB at 50 %
    assert plan.over_need(0.5) == pytest.approx(way / need)
    assert plan.share(0.5) == pytest.approx(1 / (0.75 / (way / need) + 0.25 / (4 / need)))


def test_the_tables_of_another_card():
    ended = subprocess.run([sys.executable, "-m", "beyond.design", "--card", "a100"],
                           capture_output=True, text=True, cwd=Path(kernel.__file__).parent)
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.splitlines()
    assert "sm_80" in lines[0] and f"triton {kernel.triton.__version__}" in lines[0]
    names = [line[1:9] for line in lines if " stages " in line or " as it was " in line]
    assert names[0] == "bfloat16" and {"float32,", "int8, 1 ", "int4, 1 "} <= set(names)
    assert len(names) == 1 + len(design.CONFIGURATIONS) + 4


def test_launches_of_a_step():
    core, joint = (design.step_launches("llama-3.2-1b", "decode", fuse) for fuse in (False, True))
    assert core.counts["sparse_product_kernel"] == 7 * 16                  # a launch for each
    assert joint.counts["sparse_product_kernel"] == 2 * 16                 # o and down
    assert joint.counts["joint_product_kernel"] == 2 * 16
    assert joint.counts["rotate_kernel"] == 16
    assert core.counts["rms_norm"] == joint.counts["rms_norm"] == 2 * 16 + 1
    dense = design.step_launches("llama-3.2-1b", "off").counts
    assert dense["mm"] == 7 * 16 + 1
    for counts in (core.counts, dense):
        assert counts["where"] == 1 and "scalar_tensor" not in counts      # the mask, once a step
        assert counts["argmax"] == counts["max"] == counts["stack"] == 1   # of generate itself


@pytest.mark.parametrize("sampling, waits", [
    (Sampling(), {}), (Sampling(temperature=1.0), {}), (Sampling(temperature=0.7, top_k=5), {}),
    (Sampling(temperature=1.0, top_p=0.9), {"__bool__": 1})])   # are the first 1024 tokens enough?
def test_a_token_waits_for_the_host_once(sampling, waits):
    for mode, fuse in (("off", False), ("decode", False), ("decode", True)):
        launches = design.step_launches("llama-3.2-1b", mode, fuse, sampling)
        assert launches.waits == {"tolist": 1, **waits}                    # 1: the token's own


@pytest.mark.parametrize("wait", [
    lambda x: x.cpu(), lambda x: x.to("cpu"), lambda x: x.to(device=CPU), lambda x: x.tolist(),
    lambda x: x[0, 0].item(), lambda x: bool(x[0, 0] > 0), lambda x: float(x[0, 0]),
    lambda x: x.nonzero(), lambda x: x.numpy(), lambda x: x[x > 0], lambda x: torch.equal(x, x)])
def test_whatever_waits_for_the_host_is_noticed(wait, monkeypatch):
    def rope_tables(*arguments, original=llama.rope_tables):
        cos, sin = original(*arguments)
        wait(cos.float())
        return cos, sin

    monkeypatch.setattr(llama, "rope_tables", rope_tables)
    launches = design.step_launches("llama-3.2-1b", "off")
    assert sum(launches.waits.values()) > 1, launches.waits


def test_a_launch_that_generate_adds_is_counted(monkeypatch):
    before = design.step_launches("llama-3.2-1b", "off").total
    choose = Sampling.choose
    monkeypatch.setattr(generate.Sampling, "choose",
                        lambda self, logits, generator: choose(self, logits + 1, generator))
    assert design.step_launches("llama-3.2-1b", "off").total == before + 1
