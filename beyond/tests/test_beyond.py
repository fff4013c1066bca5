"""What must stay true of the house: the core stands alone, and what you read is what runs.

Here are the tests of record.py, and those that look at all of minTEAL. Those of the other chapters
stand beside this file, each in the file of its name; those of all command lines in test_commands.
"""
import ast
import contextlib
import functools
import graphlib
import importlib
import io
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import generate
import kernel
import model as llama
from beyond import record
from beyond.tests import conftest
from beyond.tests.conftest import NO_COMPILER, ROOT, close, thresholds_of
from sparsify import SparseLinear, sparse_mode, sparsify

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
    graphlib.TopologicalSorter(imports).prepare()          # refuses a circle, by name


def test_lines_end_at_100_columns():
    assert not [f"{name}:{i}" for name, path in FILES.items()
                for i, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 100]


def test_the_core_stands_alone(tmp_path):
    """Its commands, one after the other in a process that finds nothing else."""
    for name in CORE:
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "demo", tmp_path / "demo",
                    ignore=shutil.ignore_patterns("training", "__pycache__"))
    texts = ["--text", str(ROOT / "LICENSE"), "--context", "128"]
    commands = [["model.py"], ["sparsify.py", *texts, "--sparsity", "0.5"],
                ["calibrate.py", *texts, "--out", "calibration"],
                ["generate.py", "--draft", "sparse", "--max-new-tokens", "8"]]
    script = f"""
import runpy, sys
for command in {commands}:
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")
import pytest
sys.exit(pytest.main(["-q", "test_all.py", "--co"]))
"""
    done = subprocess.run([sys.executable, "-E", "-c", script], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


# --------------------------------------------------------------------------------------------------
# record.py

SHAPE = dict(hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6,
             num_key_value_heads=3, head_dim=8, vocab_size=33)
tiny_model = functools.partial(conftest.tiny_model, threshold=0.5, **SHAPE)
TOKENS = torch.arange(40)[None] % 33


def texts_of(model, parts=7 * (1,)):
    """Return the logits after a prompt of so many tokens a step, plain and recorded; and a step."""
    kernel.say_once.cache_clear()
    logits = []
    for make_step in (generate.plain_step, record.make_step):
        cache = model.make_cache(1, 40)
        model(TOKENS[:, :5], cache)
        step = make_step(model, cache)
        tokens = TOKENS[:, 5:5 + sum(parts)]
        logits.append(torch.cat([step(part).clone() for part in tokens.split(parts, 1)], 1))
        assert cache.used == 5 + sum(parts)
    return *logits, step


def accumulated(x, y):
    total = torch.zeros(x.shape)
    total += x
    total += y
    return total


def converted_and_changed(x, y):
    half = y[None].bfloat16()
    wide = half.float()
    half.mul_(2)                         # comes too late for `wide`
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool)
    return (F.scaled_dot_product_attention(x[None], half.float(), wide, mask)
            + F.scaled_dot_product_attention(x[None], wide, half.float(), mask))[0]


@NO_COMPILER
class TestRecord:
    @pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-3),
                                                  (torch.float16, 1e-4)])
    @pytest.mark.parametrize("mode", ["off", "decode", "all"])
    @pytest.mark.parametrize("changes", [{}, {"sliding_window": 7}, {"tie_word_embeddings": True},
                                         {"attention_bias": True, "mlp_bias": True}])
    def test_a_tape_computes_what_the_model_does(self, dtype, tolerance, mode, changes):
        model = sparsify(tiny_model(dtype, **changes), {"lm_head": None})
        with sparse_mode(model, mode):
            plain, recorded, step = texts_of(model, (1, 1, 4, 1, 8, 3, 1, 9, 1, 6))
        assert close(recorded, plain, tolerance)
        assert step.reason is None and len(step.tapes) == 5
        for tape in step.tapes.values():                   # the embedding and the angles of RoPE
            assert sum(map(callable, tape.notes)) < 12

    def test_what_changes_after_the_recording_counts(self):
        model = tiny_model(torch.bfloat16)
        cache = model.make_cache(1, 20)
        step = record.make_step(model, cache)

        def first(run):
            cache.used = 0
            return run(TOKENS[:, :1]).clone()

        for change in (lambda: model.sparse_state.thresholds.fill_(0.8),
                       lambda: model.model.layers[1].mlp.down_proj.weight_t.mul_(2),
                       lambda: model.model.norm.weight.mul_(-1),
                       lambda: sparsify(model, thresholds_of(model, 1.0))):
            before = first(step)
            change()
            after = first(step)
            assert close(after, first(lambda tokens: model(tokens, cache)), 1e-3)
            assert not close(after, before, 0.01)

    def test_nan_shows_and_a_token_that_is_none_is_refused(self):
        model = tiny_model()
        step = record.make_step(model, model.make_cache(1, 20))
        with pytest.raises(IndexError):
            step(torch.tensor([[33]]))
        model.model.layers[0].mlp.up_proj.weight_t[3] = float("nan")
        with sparse_mode(model, "off"):
            assert step(torch.tensor([[5]])).isnan().all()

    @pytest.mark.parametrize("change, reason", [
        (accumulated, None), (converted_and_changed, None),
        (lambda x, y: torch.maximum(x, y, out=torch.empty_like(x)), None),
        (lambda x, y: torch.add(x, y, alpha=0.5, out=torch.empty_like(x)), None),
        (lambda x, y: x.mul(0.5).add_(y, alpha=2).clamp_(-3, 3), None),
        (lambda x, y: x + y if y.max().tolist() > 0.5 else x, "looks at values in `tolist`"),
        (lambda x, y: x + y if 1e9 in x else x - y, "looks at values in `__contains__`"),
        (lambda x, y: x + torch.from_numpy(np.tanh(np.asarray(y))), "in `__array__`"),
        (lambda x, y: x + y + y.data_ptr() % 2, "looks at values in `data_ptr`"),
        (lambda x, y: x + y * torch.arange(1.0, 9.0)[x.argmax() % 8], "which part it looks at"),
        (lambda x, y: x + y + y[y > 0].sum(), "picks by a mask"),
        (None, "has no attribute 'used'"),                 # looks at the cache
    ])
    def test_whatever_a_forward_does_is_followed_or_run_by_itself(self, change, reason, monkeypatch,
                                                                  capsys):
        def forward(self, x, context):
            x = x + self.self_attn(self.input_layernorm(x), context)
            y = self.mlp(self.post_attention_layernorm(x))
            return change(x, y) if change else x + y if context.cache.used > 7 else x - y

        monkeypatch.setattr(llama.Block, "forward", forward)
        plain, ours, _ = texts_of(tiny_model())
        assert close(ours, plain)
        said = capsys.readouterr().err
        assert said.count("record.py steps aside") == bool(reason) and (reason or "") in said

    def test_a_model_that_others_look_on_runs_itself(self, capsys):
        seen = []
        model = tiny_model()
        model.model.layers[0].register_forward_hook(lambda *_: seen.append(1))
        texts_of(model)
        assert len(seen) == 16           # in each of the steps and prompts
        assert "others look on through hooks" in capsys.readouterr().err

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

    def test_without_a_compiler_the_model_runs_itself(self, monkeypatch, capsys):
        monkeypatch.setattr(kernel, "fits_c", lambda _: False)
        model = tiny_model()
        assert not isinstance(record.make_step(model, model.make_cache(1, 20)), record.RecordedStep)
        assert not capsys.readouterr().err


# --------------------------------------------------------------------------------------------------
# What you read is what runs

CHANGES = {                  # {a line of model.py: what it is replaced with}
    '{"silu": F.silu}': '{"silu": lambda x: F.gelu(x, approximate="tanh")}',
    "return x + self.mlp(": "return x + 0.5 * self.mlp(",
    "        q = rotate(q,": (                             # a norm on q and k
        "        q, k = (F.rms_norm(y, (self.head_dim,)) for y in (q, k))\n"
        "        q = rotate(q,"),
    "    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)": (
        "    half = x.shape[-1] // 2\n"                    # RoPE with its pairs side by side
        "    c, s = cos[:, :half], sin[:, half:]\n"
        "    a, b = x[..., 0::2], x[..., 1::2]\n"
        "    return torch.stack((a * c - b * s, a * s + b * c), dim=-1).flatten(-2)"),
}


def check_all_that_runs(monkeypatch):
    """Check the texts of both commands against whole sequences of the model; return its logits."""
    import generate
    from beyond import __main__ as fast
    from calibrate import load_calibration
    from model import DEMO, load_model
    from sparsify import sparse_mode, sparsify

    def whole_sequences(mode):
        ids = list(prompt)
        with sparse_mode(model, mode, dense_prefix=len(prompt)):
            for _ in range(12):
                ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
        return tokenizer.decode(ids)

    text = "class Stack:\n    def push(self, item):\n"
    model, tokenizer = load_model(DEMO, dtype=torch.float32)
    prompt = tokenizer.encode(text)
    dense = whole_sequences("off")
    sparsify(model, load_calibration(model, DEMO).thresholds(0.5))
    for options, expected in (("--sparsity 0", dense), ("--draft sparse", dense),
                              ("--sparsity 0.5", whole_sequences("all"))):
        for main in (generate.main, fast.main):
            monkeypatch.setattr(sys, "argv", [
                "command", "--dtype", "float32", "--device", "cpu", "--prompt", text,
                "--temperature", "0", "--max-new-tokens", "12", *options.split()])
            with contextlib.redirect_stdout(io.StringIO()) as out:
                main()
            assert out.getvalue().split("\n", 2)[2].split("\n---")[0] == expected
    return model(torch.tensor([prompt])).abs().sum().item()


def test_a_change_to_the_model_counts_in_all_that_runs(tmp_path, monkeypatch):
    """Of a copy of minTEAL, which is imported anew after each change."""
    folder = tmp_path / "copy"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".*", "__pycache__", "figures"))
    ours = {Path(name).stem for name in FILES if "/" not in name} | {"beyond", "demo"}
    original = (folder / "model.py").read_text()
    logits = set()

    def imported():
        return [name for name in sys.modules if name.split(".")[0] in ours]

    for old, new in [("", ""), *CHANGES.items()]:
        assert not old or original.count(old) == 1, f"model.py no longer has {old}"
        (folder / "model.py").write_text(original.replace(old, new) if old else original)
        with monkeypatch.context() as patch:
            for name in imported():
                patch.delitem(sys.modules, name)
            patch.syspath_prepend(folder)
            logits.add(check_all_that_runs(patch))
            assert sys.modules["model"].__file__.startswith(str(folder))
            for name in imported():
                del sys.modules[name]
    assert len(logits) == 1 + len(CHANGES)                 # each change made a difference


def test_a_head_may_be_sparse_too(monkeypatch):
    main = importlib.import_module("beyond.__main__")
    arguments = main.settle(main.make_parser().parse_args(["--head-sparsity", "0.4"]))
    model = conftest.tiny_model()
    monkeypatch.setattr(generate, "load_calibration", lambda *_: SimpleNamespace(
        thresholds=lambda *_: conftest.thresholds_of(model, 0.1)))
    read = []
    model.lm_head.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    model(torch.arange(1, 17)[None])                       # what a model without tokenizer is given
    main.Writer(arguments, model, None).prepare()
    dropped = (read[0].abs() <= model.lm_head.threshold).float().mean()
    assert abs(dropped - 0.4) < 0.01
