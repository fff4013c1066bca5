"""What must stay true of the house: the core stands alone, and what you read is what runs.

The tests of the chapters stand beside this file: test_weights.py (quantize, rotate, fused),
test_quality.py (allocate, judge, peers, timing), test_gpu.py (gpu, design), test_drafts.py,
test_attend.py (attend, longtext), test_chat.py, test_parallel.py, test_gguf.py, test_watch.py;
test_smollm2.py has those of a real model. Here are those of record.py, and those that look at all
of minTEAL.
"""
import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import calibrate
import generate
import kernel
from beyond import (allocate, folders, gguf, judge, longtext, quantize, record, rotate, timing,
                    watch)
from demo import train
from model import Config, InputError, Llama, check_output, linear_names
from sparsify import realised_sparsity, reset_counts, sparse_mode, sparsify

ROOT = Path(__file__).parent.parent
CORE = ["model.py", "sparsify.py", "kernel.py", "generate.py", "calibrate.py", "test_all.py",
        "README.md"]
CHAPTERS = sorted(path.stem for path in (ROOT / "beyond").glob("*.py")
                  if not path.stem.startswith("test_"))
FILES = sorted([*ROOT.glob("*.py"), *ROOT.glob("beyond/*.py"), *ROOT.glob("demo/*.py")])


# --------------------------------------------------------------------------------------------------
# The house

def imports_of(path):
    """Return the names of all modules that importing a file may import, now or later.

    What a file imports when it runs as a command, under `if __name__ == "__main__"`, is left out.
    """
    names = set()
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body
                 if not (isinstance(node, ast.If) and "__name__" in ast.dump(node.test))]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_the_core_stands_alone(tmp_path):
    for name in CORE:
        shutil.copy(ROOT / name, tmp_path)
    ignore = shutil.ignore_patterns("training", "__pycache__")
    shutil.copytree(ROOT / "demo", tmp_path / "demo", ignore=ignore)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for command in (["-m", "pytest", "-q", "test_all.py"], ["generate.py", "--seed", "1"]):
        done = subprocess.run([sys.executable, *command], cwd=tmp_path, env=environment,
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_no_core_file_knows_a_chapter():
    for name in CORE[:-1]:
        assert not any(module.split(".")[0] == "beyond" for module in imports_of(ROOT / name)), name


def test_chapters_import_each_other_without_circles():
    left = {}
    for chapter in CHAPTERS:
        modules = imports_of(ROOT / "beyond" / f"{chapter}.py")
        left[chapter] = {module.split(".")[1] for module in modules if module.startswith("beyond.")}
    while left:
        leaves = [chapter for chapter, others in left.items() if not others & left.keys()]
        assert leaves, f"these import each other in a circle: {sorted(left)}"
        for leaf in leaves:
            del left[leaf]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_lines_end_at_100_columns(path):
    lines = path.read_text().splitlines()
    assert not [number for number, line in enumerate(lines, start=1) if len(line) > 100]


# --------------------------------------------------------------------------------------------------
# Every command that writes

TEXTS = ["--text", ROOT / "LICENSE"]


@pytest.mark.parametrize("module, work, options", [
    (calibrate, "load_model", ["--out", "{}/x", *TEXTS]),
    (calibrate, "write_imported", ["--import-teal", "x", "--out", "{}/x"]),
    (allocate, "load_model", ["--out", "{}/x", *TEXTS]),
    (allocate, "load", ["--figures", "{}"]),
    (rotate, "load_model", ["--out", "{}/x", *TEXTS]),
    (quantize, "quantize_folder", ["--out", "{}/x"]),
    (gguf, "convert", ["x.gguf", "--out", "{}/x"]),
    (judge, "load", ["--figure", "{}/x.png"]),
    (timing, "begin", ["--figure", "{}/x.png"]),
    (watch, "load_model", ["--figure", "{}/x.png"]),
    (longtext, "load", ["perplexity", "--out", "{}"]),
    (train, "train_tokenizer", ["--out", "{}", "--state", "{}"]),
], ids=lambda value: getattr(value, "__name__", None))
@pytest.mark.parametrize("kind", ["read-only", "no folder"])
def test_what_cannot_be_written_is_found_out_first(monkeypatch, tmp_path, module, work, options,
                                                   kind):
    folder = tmp_path / "folder"
    if kind == "read-only":
        folder.mkdir()
        access = os.access
        monkeypatch.setattr(os, "access", lambda path, mode: (
            Path(path).resolve() != folder.resolve() and access(path, mode)))   # root may do all
    else:
        folder.write_text("a file")
    monkeypatch.setattr(module, work, lambda *_: pytest.fail("something was computed"))
    options = [str(option).format(folder) for option in options]
    monkeypatch.setattr(sys, "argv", [module.__name__, *options])
    with pytest.raises((InputError, OSError)) as refused:
        module.main()
    message = str(refused.value)
    assert str(folder) in message and "tmp." not in message.replace(str(tmp_path), "")
    if isinstance(refused.value, InputError):
        assert kind in message and "see --" in message


@pytest.mark.parametrize("out", ["link", "folder", ""])
def test_a_new_folder_takes_the_place_of_nothing(tmp_path, out):
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="exists already; .*; see --out"):
        folders.check_new_folder(tmp_path / out)
    assert folders.check_new_folder(tmp_path / "new" / "folder") is None        # it is made


@pytest.mark.parametrize("path", ["/dev/null", ".", ""])
def test_a_result_takes_the_place_of_files_alone(path):
    with pytest.raises(InputError, match="is no file to write; see --out"):
        check_output(path, "--out")


# --------------------------------------------------------------------------------------------------
# record.py

def tiny_model(dtype=torch.float32, **changes):
    """Return a small Llama with random weights, whose linears drop what is below 0.5."""
    config = Config(hidden_size=48, intermediate_size=80, num_hidden_layers=2,
                    num_attention_heads=6, num_key_value_heads=3, head_dim=8, vocab_size=33,
                    max_position_embeddings=64)
    for name, value in changes.items():
        setattr(config, name, value)
    model = Llama(config).to(dtype)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        if "norm" not in name:
            scale = parameter.shape[1] ** -0.5 if parameter.ndim == 2 else 1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    thresholds = dict.fromkeys(linear_names(config), 0.5) | {"lm_head": None}
    return sparsify(model.eval(), thresholds)


@pytest.mark.skipif(kernel.c_function(torch.float32) is None, reason="no C compiler")
class TestRecord:
    @pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.03),
                                                  (torch.float16, 0.005)])
    @pytest.mark.parametrize("mode", ["off", "decode", "all"])
    @pytest.mark.parametrize("changes", [{}, {"sliding_window": 7}, {"tie_word_embeddings": True},
                                         {"attention_bias": True, "mlp_bias": True}])
    def test_a_tape_computes_what_the_model_does(self, dtype, tolerance, mode, changes):
        model = tiny_model(dtype, **changes)
        if dtype != torch.float32:                         # rounding moves inputs across thresholds
            model.sparse_state.thresholds.fill_(-1)
        tokens = torch.arange(40)[None] % 33
        logits, caches = [], []
        with sparse_mode(model, mode), torch.no_grad():
            for make_step in (generate.plain_step, record.make_step):
                cache = model.make_cache(1, 40)
                model(tokens[:, :5], cache)
                reset_counts(model)
                step = make_step(model, cache)
                parts = tokens[:, 5:].split([1, 1, 4, 1, 8, 3, 1, 9, 1, 6], 1)
                steps = [step(part).clone() for part in parts]
                logits.append(torch.cat(steps, 1))
                caches.append((cache.used, realised_sparsity(model)))
        assert isinstance(step, record.RecordedStep) and step.tapes
        assert (logits[0] - logits[1]).norm() <= tolerance * logits[0].norm()
        assert caches[0] == caches[1]

    def test_every_operation_of_the_model_has_a_c_function(self):
        model = tiny_model(torch.bfloat16)
        cache = model.make_cache(1, 10)
        model(torch.arange(3)[None], cache)
        step = record.make_step(model, cache)
        tape, = step.tapes.values()
        in_python = [note for note in tape.notes if callable(note)]
        assert len(in_python) < 12           # the embedding and the angles of RoPE, once a step
        assert max(len(note) for note in tape.notes if not callable(note)) > 30

    def test_changed_thresholds_and_weights_count(self):
        model = tiny_model()
        cache = model.make_cache(1, 20)
        model(torch.arange(4)[None], cache)
        step = record.make_step(model, cache)
        token = torch.tensor([[5]])
        model.sparse_state.thresholds.fill_(0.8)
        model.model.layers[1].mlp.down_proj.weight_t.mul_(2)
        with torch.no_grad():
            ours = step(token).clone()
            cache.used -= 1
            theirs = model(token, cache)
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()

    def test_a_model_made_sparse_anew_is_recorded_anew(self):
        model = tiny_model()
        cache = model.make_cache(1, 20)
        model(torch.arange(4)[None], cache)
        step = record.make_step(model, cache)
        token = torch.tensor([[5]])
        with torch.no_grad():
            step(token)
            sparsify(model, dict.fromkeys(linear_names(model.config), 1.0))
            cache.used -= 1
            ours = step(token).clone()
            cache.used -= 1
            theirs = model(token, cache)
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()

    def test_nan_shows(self):
        model = tiny_model()
        cache = model.make_cache(1, 20)
        model(torch.arange(4)[None], cache)
        step = record.make_step(model, cache)
        model.model.layers[0].mlp.up_proj.weight_t[3] = float("nan")
        with torch.no_grad(), sparse_mode(model, "off"):
            assert step(torch.tensor([[5]])).isnan().all()

    def test_a_token_that_is_none_is_refused(self):
        model = tiny_model()
        cache = model.make_cache(1, 20)
        step = record.make_step(model, cache)
        with pytest.raises(ValueError, match="token id 33 is outside"):
            step(torch.tensor([[33]]))

    def test_a_forward_that_looks_at_values_runs_itself_and_says_so(self, capsys, monkeypatch):
        def gated(self, x):
            gate = F.silu(self.gate_proj(x))
            return gate * self.up_proj(x) if gate.max() > 0.5 else gate
        model = tiny_model()
        monkeypatch.setattr(type(model.model.layers[0].mlp), "gated", gated)
        record.RecordedStep.said.clear()
        cache = model.make_cache(1, 20)
        model(torch.arange(4)[None], cache)
        step = record.make_step(model, cache)
        token = torch.tensor([[5]])
        with torch.no_grad():
            ours = step(token).clone()
            cache.used -= 1
            assert torch.equal(ours, model(token, cache))
        said = capsys.readouterr().err
        assert said.count("record.py steps aside") == 1 and "looks at values" in said

    @pytest.mark.parametrize("name", ["accumulates", "out", "out with alpha", "numpy", "contains",
                                      "a part by value", "used", "a mask", "in place"])
    def test_whatever_a_forward_does_is_followed_or_run_by_itself(self, name, monkeypatch):
        def accumulates(x, y, context):
            total = torch.zeros(x.shape)
            total += x
            total += y
            return total

        def out(x, y, context):
            result = torch.empty_like(x)
            torch.maximum(x, y, out=result)
            return result

        change = {
            "accumulates": accumulates,
            "out": out,
            "out with alpha": lambda x, y, context: torch.add(
                x, y, alpha=0.5, out=torch.empty_like(x)),
            "numpy": lambda x, y, context: x + torch.from_numpy(np.tanh(np.asarray(y))),
            "contains": lambda x, y, context: x + y if 1e9 in x else x - y,
            "a part by value": lambda x, y, context: x + y * torch.arange(1.0, 9.0)[x.argmax() % 8],
            "used": lambda x, y, context: x + y if context.cache.used > 7 else x - y,
            "a mask": lambda x, y, context: x + y + y[y > 0].sum(),
            "in place": lambda x, y, context: x.mul(0.5).add_(y, alpha=2).clamp_(-3, 3),
        }[name]

        def forward(self, x, context):
            x = x + self.self_attn(self.input_layernorm(x), context)
            return change(x, self.mlp(self.post_attention_layernorm(x)), context)

        model = tiny_model()
        monkeypatch.setattr(type(model.model.layers[0]), "forward", forward)
        logits = []
        with torch.no_grad():
            for make_step in (generate.plain_step, record.make_step):
                cache = model.make_cache(1, 20)
                model(torch.arange(4)[None], cache)
                step = make_step(model, cache)
                tokens = (3, 17, 5, 9, 30, 2, 8)
                logits.append(torch.cat([step(torch.tensor([[i]])).clone() for i in tokens]))
        assert (logits[0] - logits[1]).norm() <= 1e-5 * logits[0].norm()

    def test_a_model_that_others_look_on_runs_itself(self):
        seen = []
        model = tiny_model()
        model.model.layers[0].register_forward_hook(lambda *_: seen.append(1))
        cache = model.make_cache(1, 20)
        step = record.make_step(model, cache)
        with torch.no_grad():
            step(torch.tensor([[5]]))
            step(torch.tensor([[5]]))
        assert len(seen) == 2

    def test_without_a_compiler_the_model_runs_itself(self, monkeypatch):
        monkeypatch.setattr(record, "c_functions", lambda: None)
        model = tiny_model()
        cache = model.make_cache(1, 20)
        step = record.make_step(model, cache)
        assert not isinstance(step, record.RecordedStep)


# --------------------------------------------------------------------------------------------------
# What you read is what runs

CHANGES = {                  # {what: (a line of model.py, what it is replaced with)}
    "another activation": [(
        '{"silu": F.silu}', '{"silu": lambda x: F.gelu(x, approximate="tanh")}')],
    "a smaller residual": [("return x + self.mlp(", "return x + 0.5 * self.mlp(")],
    "a norm on q and k": [(
        "        q = rotate(q,",
        "        q, k = (F.rms_norm(y, (self.head_dim,)) for y in (q, k))\n"
        "        q = rotate(q,")],
    "RoPE with its pairs side by side": [(
        "    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)",
        "    half = x.shape[-1] // 2\n"
        "    c, s = cos[:, :half], sin[:, half:]\n"
        "    a, b = x[..., 0::2], x[..., 1::2]\n"
        "    return torch.stack((a * c - b * s, a * s + b * c), dim=-1).flatten(-2)")],
}

SCRIPT = r'''
import contextlib, io, sys
import torch
import generate
from beyond import __main__ as beyond
from calibrate import load_calibration
from model import DEMO, load_model
from sparsify import sparse_mode, sparsify

PROMPT, N = "class Stack:\n    def push(self, item):\n", 12
torch.set_num_threads(1)
model, tokenizer = load_model(DEMO, dtype=torch.float32)
prompt = tokenizer.encode(PROMPT)

def whole_sequences(mode):
    ids = list(prompt)
    with torch.no_grad(), sparse_mode(model, mode, dense_prefix=len(prompt)):
        for _ in range(N):
            ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
    return tokenizer.decode(ids)

expected = {"dense": whole_sequences("off")}
sparsify(model, load_calibration(model, DEMO).thresholds(0.5))
expected["sparse"] = whole_sequences("all")
expected["speculative"] = expected["dense"]
options = {"dense": ["--sparsity", "0"], "sparse": ["--sparsity", "0.5"],
           "speculative": ["--draft", "sparse"]}
for name, main in (("generate.py", generate.main), ("-m beyond", beyond.main)):
    for kind, more in options.items():
        sys.argv = [name, "--dtype", "float32", "--device", "cpu", "--prompt", PROMPT,
                    "--temperature", "0", "--max-new-tokens", str(N), *more]
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            main()
        text = out.getvalue().split("\n", 2)[2].split("\n---")[0]
        print(f"{name} {kind}:", "same" if text == expected[kind] else f"another, {text!r}")
print("logits", model(torch.tensor([prompt])).abs().sum().item())
'''


def test_a_change_to_the_model_counts_in_all_that_runs(tmp_path):
    ignore = shutil.ignore_patterns(".*", "__pycache__", "figures")
    shutil.copytree(ROOT, tmp_path / "copy", ignore=ignore)
    path = tmp_path / "copy" / "model.py"
    original = path.read_text()
    logits = set()
    for what, changes in {"nothing": [], **CHANGES}.items():
        changed = original
        for old, new in changes:
            assert changed.count(old) == 1, f"{what}: model.py no longer has {old}"
            changed = changed.replace(old, new)
        path.write_text(changed)
        done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=path.parent, capture_output=True,
                              text=True)
        assert done.returncode == 0, done.stderr
        *runs, last = done.stdout.splitlines()
        assert len(runs) == 6 and all(run.endswith(": same") for run in runs), f"{what}: {runs}"
        logits.add(last)
    assert len(logits) == 1 + len(CHANGES)                 # each change made a difference
