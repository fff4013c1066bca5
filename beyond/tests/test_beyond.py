"""What must stay true of the house: the core stands alone, and what you read is what runs.

Here are the tests of record.py, and those that look at all of minTEAL. Those of the other chapters
stand beside this file, each in the file of its name.
"""
import ast
import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import generate
import kernel
import model as llama
from beyond import folders, record
from beyond.tests.conftest import NO_COMPILER, ROOT, random_llama
from model import InputError, check_output, linear_names
from sparsify import SparseLinear, skipped_share, sparse_mode, sparsify

LINE = ["model", "kernel", "sparsify", "calibrate", "generate"]      # imports go from right to left
CORE = [*(f"{name}.py" for name in LINE), "test_all.py", "README.md"]
FILES = {str(path.relative_to(ROOT)): path for folder in (".", "beyond", "beyond/lab", "demo",
                                                          "beyond/tests")
         for path in sorted((ROOT / folder).glob("*.py"))}


# --------------------------------------------------------------------------------------------------
# The house

def imports_of(path):
    """Return the modules of minTEAL that importing a file may import, now or later, as paths.

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
    return {name.replace(".", "/") + ".py" for name in names} & FILES.keys()


def test_imports_run_one_way():
    imports = {name: imports_of(path) for name, path in FILES.items()}
    for place, name in enumerate(LINE):
        later = {f"{other}.py" for other in LINE[place:]}
        assert not imports[f"{name}.py"] & later, name
    for name, others in imports.items():
        barred = {"beyond": "beyond/lab/", ".": "beyond/", "demo": "beyond/"}.get(
            str(Path(name).parent), "nothing")
        assert not any(other.startswith(barred) for other in others), name
    while imports:
        leaves = [name for name, others in imports.items() if not others & imports.keys()]
        assert leaves, f"these import each other in a circle: {sorted(imports)}"
        for leaf in leaves:
            del imports[leaf]


def test_the_core_stands_alone(tmp_path):
    for name in CORE:
        shutil.copy(ROOT / name, tmp_path)
    ignore = shutil.ignore_patterns("training", "__pycache__")
    shutil.copytree(ROOT / "demo", tmp_path / "demo", ignore=ignore)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    texts = [str(ROOT / "LICENSE"), "--context", "128"]
    for command in (["model.py"], ["sparsify.py", "--text", *texts, "--sparsity", "0.5"],
                    ["calibrate.py", "--text", *texts, "--out", "calibration"],
                    ["generate.py", "--draft", "sparse", "--max-new-tokens", "8"],
                    ["kernel.py", "--help"], ["-m", "pytest", "-q", "test_all.py", "--co"]):
        done = subprocess.run([sys.executable, *command], cwd=tmp_path, env=environment,
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.parametrize("name", FILES)
def test_lines_end_at_100_columns(name):
    lines = FILES[name].read_text().splitlines()
    assert not [number for number, line in enumerate(lines, start=1) if len(line) > 100]


# --------------------------------------------------------------------------------------------------
# Every command that writes

TEXTS = ["--text", ROOT / "LICENSE"]


@pytest.mark.parametrize("name, work, options", [
    ("calibrate", "load_model", ["--out", "{}/x", *TEXTS]),
    ("beyond.teal", "import_teal", ["x", "--model", llama.DEMO, "--out", "{}/x"]),
    ("beyond.allocate", "load", ["--out", "{}/x", *TEXTS]),
    ("beyond.rotate", "load_model", ["--out", "{}/x", *TEXTS]),
    ("beyond.quantize", "quantize_folder", ["--out", "{}/x"]),
    ("beyond.gguf", "convert", ["x.gguf", "--out", "{}/x"]),
    ("beyond.lab.figures", "load_model", ["--out", "{}"]),
    ("beyond.lab.judge", "load", ["--figure", "{}/x.png"]),
    ("beyond.lab.timing", "memory_bandwidth", ["--figure", "{}/x.png"]),
    ("beyond.lab.timing", "write_gguf", ["--gguf", "{}/x"]),
    ("beyond.lab.watch", "load_model", ["--figure", "{}/x.png"]),
    ("beyond.lab.longtext", "load", ["perplexity", "--out", "{}"]),
    ("demo.train", "train_tokenizer", ["--out", "{}", "--state", "{}"]),
])
@pytest.mark.parametrize("kind", ["read-only", "no folder"])
def test_what_cannot_be_written_is_found_out_first(monkeypatch, tmp_path, name, work, options,
                                                   kind):
    module = importlib.import_module(name)
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
    monkeypatch.setattr(sys, "argv", [name, *options])
    with pytest.raises((InputError, OSError)) as refused:
        module.main()
    message = str(refused.value)
    assert str(folder) in message and "tmp." not in message.replace(str(tmp_path), "")
    if isinstance(refused.value, InputError):
        assert "cannot be written" in message and "see --" in message


@pytest.mark.parametrize("out", ["link", "folder", ""])
def test_a_new_folder_takes_the_place_of_nothing(tmp_path, out):
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="exists already; .*; see --out"):
        folders.check_new_folder(tmp_path / out)
    assert folders.check_new_folder(tmp_path / "new" / "folder") is None        # it is made


@pytest.mark.parametrize("path", [".", ""])
def test_a_result_takes_the_place_of_files_alone(path):
    with pytest.raises(InputError, match="cannot be written there; see --out"):
        check_output(path, "--out")


# --------------------------------------------------------------------------------------------------
# record.py

def tiny_model(dtype=torch.float32, make=SparseLinear, **changes):
    """Return a small Llama with random weights, whose linears drop what is below 0.5."""
    shape = dict(hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6,
                 num_key_value_heads=3, head_dim=8, vocab_size=33, max_position_embeddings=64)
    model = random_llama(dtype, **shape | changes)
    thresholds = dict.fromkeys(linear_names(model.config), 0.5) | {"lm_head": None}
    return sparsify(model, thresholds, make)


TOKENS = torch.arange(40)[None] % 33


@torch.no_grad()
def texts_of(model, parts=(1, 1, 1, 1, 1, 1, 1), steps=(generate.plain_step, record.make_step)):
    """Return the logits of so many tokens at a time after a prompt, by two kinds of step.

    The last step comes with them.
    """
    logits = []
    for make_step in steps:
        cache = model.make_cache(1, 40)
        model(TOKENS[:, :5], cache)
        step = make_step(model, cache)
        tokens = TOKENS[:, 5:5 + sum(parts)]
        logits.append(torch.cat([step(part).clone() for part in tokens.split(parts, 1)], 1))
        assert cache.used == 5 + sum(parts)
    return *logits, step


def close(y, expected, tolerance=1e-5):
    """Return whether the relative error of a whole tensor is small; NaN never is."""
    return bool((y - expected).norm() <= tolerance * expected.norm())


@NO_COMPILER
class TestRecord:
    @pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-3),
                                                  (torch.float16, 1e-4)])
    @pytest.mark.parametrize("mode", ["off", "decode", "all"])
    @pytest.mark.parametrize("changes", [{}, {"sliding_window": 7}, {"tie_word_embeddings": True},
                                         {"attention_bias": True, "mlp_bias": True}])
    def test_a_tape_computes_what_the_model_does(self, dtype, tolerance, mode, changes):
        model = tiny_model(dtype, **changes)
        with sparse_mode(model, mode):
            plain, recorded, step = texts_of(model, (1, 1, 4, 1, 8, 3, 1, 9, 1, 6))
        assert isinstance(step, record.RecordedStep) and step.tapes and step.reason is None
        assert close(recorded, plain, tolerance)

    @pytest.mark.parametrize("tokens", [1, 4])
    def test_every_operation_of_the_model_has_a_c_function(self, tokens):
        model = tiny_model(torch.bfloat16)
        step = record.make_step(model, model.make_cache(1, 10), tokens)
        tape = step.tapes[tokens, "decode"]
        in_python = [note for note in tape.notes if callable(note)]
        assert len(in_python) < 12           # the embedding and the angles of RoPE, once a step
        assert max(len(note) for note in tape.notes if not callable(note)) > 30
        read = [tape.reads[key] for key, place in tape.places.items() if place is not None]
        # Keys, values and the norms' weights are converted for nobody: C reads them as they are.
        assert read.count(0) == 4 * len(model.model.layers) + 1

    @torch.no_grad()
    def test_what_changes_after_the_recording_counts(self):
        model = tiny_model(torch.bfloat16)
        cache = model.make_cache(1, 20)
        step = record.make_step(model, cache)
        for change in (lambda: model.sparse_state.thresholds.fill_(0.8),
                       lambda: model.model.layers[1].mlp.down_proj.weight_t.mul_(2),
                       lambda: model.model.norm.weight.mul_(-1),
                       lambda: sparsify(model, dict.fromkeys(linear_names(model.config), 1.0))):
            cache.used = 0
            before = step(TOKENS[:, :1]).clone()
            change()
            cache.used = 0
            ours = step(TOKENS[:, :1]).clone()
            cache.used = 0
            assert close(ours, model(TOKENS[:, :1], cache), 1e-3) and not close(ours, before, 0.01)

    def test_nan_shows(self):
        model = tiny_model()
        step = record.make_step(model, model.make_cache(1, 20))
        model.model.layers[0].mlp.up_proj.weight_t[3] = float("nan")
        with torch.no_grad(), sparse_mode(model, "off"):
            assert step(torch.tensor([[5]])).isnan().all()

    def test_a_token_that_is_none_is_refused(self):
        model = tiny_model()
        step = record.make_step(model, model.make_cache(1, 20))
        with pytest.raises(ValueError, match="token id 33 is outside"):
            step(torch.tensor([[33]]))

    @pytest.mark.parametrize("reason, kind", [("looks at values in `__bool__`", "value"),
                                              ("looks at values in `data_ptr`", "address"),
                                              ("others look on through hooks", "hook")])
    def test_a_model_that_cannot_be_recorded_runs_itself_and_says_so(self, capsys, monkeypatch,
                                                                     reason, kind):
        def gated(self, x):
            gate = F.silu(self.gate_proj(x))
            if kind == "address":            # as a kernel of one's own would use it
                return gate.add_(gate.data_ptr() % 2)
            return gate * self.up_proj(x) if gate.max() > 0.5 else gate

        seen = []
        model = tiny_model()
        if kind == "hook":
            model.model.layers[0].register_forward_hook(lambda *_: seen.append(1))
        else:
            monkeypatch.setattr(llama.MLP, "gated", gated)
        record.RecordedStep.said.clear()
        plain, ours, _ = texts_of(model)
        assert torch.equal(ours, plain)
        assert len(seen) in (0, 16)          # a hook is called in each of the steps and prompts
        said = capsys.readouterr().err
        assert said.count("record.py steps aside") == 1 and reason in said

    @pytest.mark.parametrize("name", ["accumulates", "out", "out with alpha", "numpy", "contains",
                                      "a part by value", "used", "a mask", "in place",
                                      "a conversion that changes"])
    def test_whatever_a_forward_does_is_followed_or_run_by_itself(self, name, monkeypatch):
        def accumulates(x, y, context):
            total = torch.zeros(x.shape)
            total += x
            total += y
            return total

        def conversion(x, y, context):
            half = y.bfloat16()
            wide = half.float()
            half.mul_(2)                     # comes too late for `wide`
            y = F.rms_norm(x, (48,), wide[0, 0], 1e-5)
            return y + F.rms_norm(x, (48,), half[0, 0].float(), 1e-5)

        change = {
            "accumulates": accumulates,
            "out": lambda x, y, context: torch.maximum(x, y, out=torch.empty_like(x)),
            "out with alpha": lambda x, y, context: torch.add(
                x, y, alpha=0.5, out=torch.empty_like(x)),
            "numpy": lambda x, y, context: x + torch.from_numpy(np.tanh(np.asarray(y))),
            "contains": lambda x, y, context: x + y if 1e9 in x else x - y,
            "a part by value": lambda x, y, context: x + y * torch.arange(1.0, 9.0)[x.argmax() % 8],
            "used": lambda x, y, context: x + y if context.cache.used > 7 else x - y,
            "a mask": lambda x, y, context: x + y + y[y > 0].sum(),
            "in place": lambda x, y, context: x.mul(0.5).add_(y, alpha=2).clamp_(-3, 3),
            "a conversion that changes": conversion,
        }[name]

        def forward(self, x, context):
            x = x + self.self_attn(self.input_layernorm(x), context)
            return change(x, self.mlp(self.post_attention_layernorm(x)), context)

        monkeypatch.setattr(llama.Block, "forward", forward)
        plain, ours, _ = texts_of(tiny_model())
        assert close(ours, plain)

    def test_a_subclass_of_a_readers_is_followed(self, monkeypatch):
        """Linears that keep the 12 largest inputs, and others of the model's parts."""
        class Largest(SparseLinear):
            def keep(self, x):
                return x.abs() >= x.abs().topk(12, -1).values[..., -1:]

            def product(self, x):
                return kernel.sparse_gemv(x * self.keep(x), self.weight_t, 0.0)

        class Attention(llama.Attention):
            def qkv(self, x):
                q, k, v = super().qkv(x)
                return F.rms_norm(q, q.shape[-1:]), F.rms_norm(k, k.shape[-1:]), v

        class MLP(llama.MLP):
            def gated(self, x):
                return F.relu(self.gate_proj(x)).square() * self.up_proj(x)

        class Block(llama.Block):
            def forward(self, x, context):
                return 0.5 * x + super().forward(x, context)

        logits = []
        for kind in (None, Attention, MLP, Block):
            if kind:
                monkeypatch.setattr(llama, kind.__name__, kind)
            model = tiny_model(make=Largest)
            plain, ours, step = texts_of(model)
            assert step.reason is None and close(ours, plain)
            logits.append(ours)
        assert not any(close(a, b, 0.01) for a, b in zip(logits, logits[1:]))
        small, large = 5 * 48 * (48 + 24 + 24 + 80 + 80) / 5, 48 * 48 + 80 * 48
        share = 1 - (small * 12 / 48 + 48 * 48 * 12 / 48 + 80 * 48 * 12 / 80) / (small + large)
        assert skipped_share(model, TOKENS[0].tolist(), 5) == pytest.approx(share)

    def test_without_a_compiler_the_model_runs_itself(self, monkeypatch, capsys):
        monkeypatch.setattr(record, "c_functions", lambda: None)
        model = tiny_model()
        assert not isinstance(record.make_step(model, model.make_cache(1, 20)), record.RecordedStep)
        assert not capsys.readouterr().err


# --------------------------------------------------------------------------------------------------
# What you read is what runs

CHANGES = {                  # {what: (a line of model.py, what it is replaced with)}
    "another activation": (
        '{"silu": F.silu}', '{"silu": lambda x: F.gelu(x, approximate="tanh")}'),
    "a smaller residual": ("return x + self.mlp(", "return x + 0.5 * self.mlp("),
    "a norm on q and k": (
        "        q = rotate(q,",
        "        q, k = (F.rms_norm(y, (self.head_dim,)) for y in (q, k))\n"
        "        q = rotate(q,"),
    "RoPE with its pairs side by side": (
        "    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)",
        "    half = x.shape[-1] // 2\n"
        "    c, s = cos[:, :half], sin[:, half:]\n"
        "    a, b = x[..., 0::2], x[..., 1::2]\n"
        "    return torch.stack((a * c - b * s, a * s + b * c), dim=-1).flatten(-2)"),
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
    for what, (old, new) in ({"nothing": ("", "")} | CHANGES).items():
        assert not old or original.count(old) == 1, f"{what}: model.py no longer has {old}"
        path.write_text(original.replace(old, new) if old else original)
        done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=path.parent, capture_output=True,
                              text=True)
        assert done.returncode == 0, done.stderr
        *runs, last = done.stdout.splitlines()
        assert len(runs) == 6 and all(run.endswith(": same") for run in runs), f"{what}: {runs}"
        logits.add(last)
    assert len(logits) == 1 + len(CHANGES)                 # each change made a difference
