"""Tests of parallel.py: several processes compute what one does, and all of them end."""
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from beyond import drafts, parallel, quantize, record
from beyond.conftest import random_llama
from generate import generate, generate_speculative
from model import (InputError, Llama, linear_names, load_tokenizer, read_safetensors,
                   write_safetensors)
from sparsify import realised_sparsity, reset_counts, sparse_mode, sparsify

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "demo"

# torchrun in small: for each request it starts the ranks of a script, and when one of them fails it
# ends the others, unless they are to end alone. What they need is imported once, before they part.
LAUNCHER = """
import gc, importlib, json, os, runpy, signal, socket, sys
import torch
importlib.import_module(sys.argv[1])
torch.nn.Embedding(1, 1, device="meta")                    # imports 800 modules more
gc.freeze()                                                # so that ranks end in less time

def start(rank, folder, command):
    pid = os.fork()
    if pid:
        return pid
    flags = os.O_CREAT | os.O_APPEND | os.O_WRONLY
    os.dup2(os.open("/dev/null" if rank else folder + "/in", os.O_RDONLY), 0)
    os.dup2(os.open(folder + "/out", flags), 1)
    os.dup2(os.open(folder + "/err", flags), 2)
    os.environ["RANK"] = str(rank)
    sys.stdin = open(0)
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")
    sys.exit()                                             # as every interpreter ends

for line in sys.stdin:
    folder, count, command, alone = json.loads(line)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    running = {start(rank, folder, command): rank for rank in range(count)}
    ended = {}
    while running:
        pid, status = os.wait()
        rank = running.pop(pid)
        ended[rank] = os.waitstatus_to_exitcode(status)
        for other in running if ended[rank] and not alone else ():
            os.kill(other, signal.SIGTERM)
    print(json.dumps([ended[rank] for rank in range(count)]), flush=True)
os._exit(0)
"""


class Launcher:
    def __init__(self):
        self.process = subprocess.Popen([sys.executable, "-c", LAUNCHER, __name__], text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT,
                                        env=environment())

    def start(self, folder, count, script, *arguments, alone=False):
        """Start a Python script as so many ranks. Its input is FOLDER/in, by default empty."""
        (folder / "rank.py").write_text(script)
        if not (folder / "in").exists():
            (folder / "in").touch()
        command = [str(folder / "rank.py"), *map(str, arguments)]
        self.process.stdin.write(json.dumps([str(folder), count, command, alone]) + "\n")
        self.process.stdin.flush()
        self.folder = folder

    def finish(self):
        """Return (the statuses of the ranks, what they wrote, their errors)."""
        statuses = json.loads(self.process.stdout.readline())
        written = (self.folder / "out").read_text()
        errors = (self.folder / "err").read_text()
        for name in ("out", "err"):
            (self.folder / name).unlink()
        return statuses, written, errors

    def run(self, *arguments, **options):
        self.start(*arguments, **options)
        return self.finish()


@pytest.fixture(scope="module")
def launcher():
    launcher = Launcher()
    yield launcher
    launcher.process.communicate()


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def tiny_model(**changes):
    """Return a small Llama, see conftest.py."""
    shape = dict(hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=12, vocab_size=61, max_position_embeddings=64)
    return random_llama(torch.float32, **shape | changes)


def close(result, expected, tolerance):
    """Return whether the relative error of a whole tensor is small; NaN never is."""
    return bool((result - expected).norm() <= tolerance * expected.norm())


# --------------------------------------------------------------------------------------------------
# The same as one process

def what_a_model_does(model, thresholds):
    """Return {name: tensor} of logits and texts: the same from one process and from a rank."""
    config = model.config
    tokens = torch.randint(config.vocab_size, (2, 20), generator=torch.Generator().manual_seed(0))
    thresholds = parallel.part_of_thresholds(thresholds)
    results = {"whole": model(tokens)}
    cache = model.make_cache(2, 20)
    parts = tokens.split([9, 3, 1, 1, 6], 1)
    results["cached"] = torch.cat([model(part, cache) for part in parts], 1)
    prompt = tokens[0, :6].tolist()
    results["greedy"] = torch.tensor(list(generate(model, prompt, 4)))
    sparsify(model, thresholds | {"lm_head": None})
    with sparse_mode(model, "all"):
        results["sparse"] = model(tokens)
    draft = tiny_model(vocab_size=config.vocab_size).double()
    parallel.follow_first(draft)
    texts = {
        "sparse greedy": generate(model, prompt, 4, make_step=record.make_step),
        "sampled": generate(model, prompt, 4, 1.0, seed=3),
        "drafted": generate_speculative(model, prompt, 4, "sparse", draft_tokens=3),
        "drafted by a model": generate_speculative(model, prompt, 4, draft, draft_tokens=3,
                                                   temperature=1.0, seed=1),
        "recycled": drafts.speculate(model, prompt, 4, "recycle", draft_tokens=7),
    }
    results |= {name: torch.tensor(list(text)) for name, text in texts.items()}
    with sparse_mode(model, "all"):
        reset_counts(model)
        model(tokens)
    parallel.count_together(model)
    results["realised"] = torch.tensor(realised_sparsity(model), dtype=torch.float64)
    return results


def one_rank(folder, thresholds, out):
    """Do what a model does with a part of it, in float64. Rank 0 writes down what came out."""
    with parallel.group("cpu"):
        model = parallel.from_pretrained(folder, dtype=torch.float64)
        size = sum(weight.numel() for name, weight in model.named_parameters() if "_proj" in name)
        with torch.no_grad():
            results = what_a_model_does(model, read_safetensors(thresholds))
        results["seed"] = torch.tensor(parallel.from_first(lambda: 5 + parallel.rank()))
        assert parallel.from_first(lambda: parallel.rank()) == 0
        if parallel.rank() == 0:
            results = {name: tensor.contiguous() for name, tensor in results.items()}
            write_safetensors(out, results | {"size": torch.tensor(size)})


@pytest.mark.parametrize("what, processes", [("demo", 4), ("biases", 2), ("tied", 2)])
def test_ranks_do_together_what_one_process_does(launcher, tmp_path, what, processes):
    folder = tmp_path / "model"
    if what == "demo":
        model = Llama.from_pretrained(DEMO)
        del model.model.layers[2:]                         # time for talk, not for layers
        model.config.num_hidden_layers = 2
    elif what == "biases":
        model = tiny_model(attention_bias=True, mlp_bias=True)
    else:
        model = tiny_model(tie_word_embeddings=True)
    model.save_pretrained(folder)
    model = Llama.from_pretrained(folder, dtype=torch.float64)
    thresholds = {}
    for name in linear_names(model.config):                # a number, or one a channel
        torch.manual_seed(len(thresholds))
        size = () if len(thresholds) % 3 else (model.get_submodule(name).in_features,)
        thresholds[name] = torch.rand(size) * (0.6 if what == "demo" else 1.5)
    write_safetensors(tmp_path / "thresholds", thresholds)
    size = sum(weight.numel() for name, weight in model.named_parameters() if "_proj" in name)
    biases = sum(bias.numel() for name, bias in model.named_parameters()
                 if name.endswith(("o_proj.bias", "down_proj.bias")))
    with torch.no_grad():
        expected = what_a_model_does(model, thresholds)
    script = f"import sys\nfrom {__name__} import one_rank\none_rank(*sys.argv[1:])"
    statuses, _, errors = launcher.run(tmp_path, processes, script, folder,
                                       tmp_path / "thresholds", tmp_path / "results")
    assert statuses == [0] * processes, errors
    results = read_safetensors(tmp_path / "results")
    assert 0.1 < expected["realised"] < 0.9
    assert not close(expected["sparse"], expected["whole"], 0.01)
    for name, tensor in expected.items():
        if tensor.dtype == torch.int64:
            assert torch.equal(results[name], tensor), name
        else:
            assert close(results[name], tensor, 1e-10), name
    assert results["seed"] == 5
    assert results["size"] == (size - biases) // processes + biases    # every rank has those


def test_torchrun_writes_what_one_process_writes(launcher, tmp_path, monkeypatch, capsys):
    from beyond.__main__ import main
    options = ["--prompt", "class Stack:", "--max-new-tokens", "8", "--dtype", "float32",
               "--temperature", "1", "--seed", "5", "--device", "cpu"]
    sparse = [*options, "--sparsity", "0.5"]
    drafted = [*options, "--draft", "demo", "--draft-tokens", "3"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    ended = subprocess.run([*torchrun, "-m", "beyond", *sparse], capture_output=True, text=True,
                           cwd=ROOT, env=environment(), timeout=120)
    assert ended.returncode == 0, ended.stderr
    script = "from beyond.__main__ import main\nmain()\n"
    statuses, written, errors = launcher.run(tmp_path, 2, script, *drafted)
    assert statuses == [0, 0], errors
    for more, two in ((sparse, ended.stdout), (drafted, written)):
        monkeypatch.setattr(sys, "argv", ["beyond", *more])
        main()
        one = capsys.readouterr().out
        assert one.splitlines()[1:4] == two.splitlines()[1:4]
        assert "8 tokens" in two
        assert two.count("class Stack:") == 1              # rank 0 alone speaks
        skipped = [re.findall(r"[\d.]+% of the blocks", text) for text in (one, two)]
        assert skipped[0] == skipped[1]
        assert len(skipped[0]) == ("--sparsity" in more)


def quantized_logits(model, bits):
    """Quantize a model, or a rank's part, make it sparse, and return its logits and sparsity.

    Activations are not rounded: sums that differ in their last bit would be rounded otherwise.
    """
    quantize.ROUND_ACTIVATIONS = False
    tokens = torch.arange(20)[None]
    quantize.quantize(model, bits)
    logits = model(tokens)
    thresholds = parallel.part_of_thresholds(dict.fromkeys(linear_names(model.config), 0.3))
    sparsify(model, thresholds)
    with sparse_mode(model, "all"):
        sparse_logits = model(tokens)
    parallel.count_together(model)
    realised = torch.tensor(realised_sparsity(model))
    return {f"int{bits}": logits, f"int{bits} sparse": sparse_logits,
            f"int{bits} realised": realised}


def quantized_rank(folder, out):
    """Write down what a model does whose parts are quantized."""
    with parallel.group("cpu"), torch.no_grad():
        results = {}
        for bits in (8, 4):
            results |= quantized_logits(parallel.from_pretrained(folder), bits)
        if parallel.rank() == 0:
            write_safetensors(out, results)


def test_ranks_quantize_their_parts(launcher, tmp_path, monkeypatch):
    model = tiny_model(hidden_size=256, intermediate_size=256, head_dim=64)
    model.save_pretrained(tmp_path / "model")
    script = f"import sys\nfrom {__name__} import quantized_rank\nquantized_rank(*sys.argv[1:])"
    statuses, _, errors = launcher.run(tmp_path, 2, script, tmp_path / "model",
                                       tmp_path / "results")
    assert statuses == [0, 0], errors
    results = read_safetensors(tmp_path / "results")
    expected = {}
    monkeypatch.setattr(quantize, "ROUND_ACTIVATIONS", False)
    with torch.no_grad():
        for bits in (8, 4):
            model = Llama.from_pretrained(tmp_path / "model")
            expected |= quantized_logits(model, bits)
    for name in ("int4", "int4 sparse", "int4 realised"):  # a group of int4 lies within a part
        assert close(results[name], expected[name], 1e-5), name
    # In int8 an output of o and down has a scale for each part.
    assert close(results["int8"], expected["int8"], 0.02)
    assert close(results["int8 realised"], expected["int8 realised"], 0.02)
    assert 0.1 < expected["int8 realised"] < 0.9


def test_ranks_hold_a_conversation_and_wait_for_a_person(launcher, tmp_path):
    """They wait for a line longer than they wait for one another."""
    script = """
import datetime
from beyond import chat, parallel
from generate import generate
from model import load_tokenizer

parallel.PATIENCE = datetime.timedelta(seconds=3)

def main():
    with parallel.group("cpu"):
        tokenizer = load_tokenizer("demo")
        model = parallel.from_pretrained("demo")
        def template(messages):
            assert parallel.rank() == 0                    # it may hold the time
            text = "".join(f"# {message['content']}\\n" for message in messages)
            return tokenizer.encode(text + "def ")
        chat.chat(tokenizer, template, None, lambda prompt: generate(model.double(), prompt, 5),
                  from_first=parallel.from_first)

parallel.command_line(main)
"""
    os.mkfifo(tmp_path / "in")
    launcher.start(tmp_path, 2, script)
    with open(tmp_path / "in", "w") as person:
        person.write("one\n")
        person.flush()
        time.sleep(5)
        person.write("two\n")
    statuses, written, errors = launcher.finish()
    assert statuses == [0, 0], errors
    tokenizer = load_tokenizer(DEMO)
    model = Llama.from_pretrained(DEMO).double()
    expected, conversation = [], ""
    for line in ("one", "two"):
        conversation += f"# {line}\n"
        ids = generate(model, tokenizer.encode(conversation + "def "), 5)
        expected.append(tokenizer.decode(list(ids)))
        conversation += f"# {expected[-1]}\n"
    assert written.strip() == "\n".join(expected).strip()


# --------------------------------------------------------------------------------------------------
# What ends the ranks

@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_thread_of_gloo_outlives_its_group(tmp_path):
    """One that outlives Python may abort an orderly end. See `parallel.group`."""
    script = """
import os, pathlib
import torch
from beyond import parallel

def threads_of_gloo():
    names = [path.read_text() for path in pathlib.Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if "gloo" in name]

os.environ["RANK"] = "0" if os.fork() else "1"
with parallel.group("cpu"):
    import torch.distributed.nn.functional                 # as PyTorch does for a meta tensor
    parallel.summed(torch.ones(1))
    parallel.from_first(lambda: 1)
    assert len(threads_of_gloo()) > 3
assert not threads_of_gloo()
if parallel.rank() == 0:
    assert os.wait()[1] == 0
"""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environ = environment() | dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT,
                           env=environ, timeout=60)
    assert ended.returncode == 0, ended.stderr


def test_what_cannot_be_shared_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(InputError, match="num_attention_heads is 8, which 3 processes cannot"):
        parallel.from_pretrained(DEMO)
    tiny_model().save_pretrained(tmp_path / "model")
    quantize.quantize_folder(tmp_path / "model", tmp_path / "quantized", 8)
    with pytest.raises(InputError, match="quantized folders are not split"):
        parallel.from_pretrained(tmp_path / "quantized")


@pytest.mark.parametrize("line, status, message", [
    ("raise InputError('all ranks meet this')", 2, "rank.py: error: all ranks meet this\n"),
    ("parallel.from_first(lambda: open('nowhere'))", 2, "No such file or directory: 'nowhere'"),
    ("if parallel.rank() == 1: raise InputError('rank 1 alone')", 2, "error: rank 1 alone"),
    ("1 / 0", 1, "ZeroDivisionError: division by zero"),
])
def test_an_error_ends_the_ranks_with_one_message(launcher, tmp_path, line, status, message):
    script = f"""
from beyond import parallel
from model import InputError
parallel.GRACE = 1

def main():
    with parallel.group("cpu"):
        parallel.from_first(lambda: 1)
        {line}
        parallel.from_first(lambda: 1)

parallel.command_line(main)
"""
    statuses, _, errors = launcher.run(tmp_path, 2, script)
    assert status in statuses, errors
    assert set(statuses) <= {status, -signal.SIGTERM}, errors      # not aborted
    assert errors.count(message) == 1 or status == 1
    assert message in errors
    assert ("Traceback" in errors) == (status == 1)


@pytest.mark.parametrize("when, message", [
    ("while it decodes", "rank.py: error: rank 0: another process has ended or does not answer"),
    ("before it joins", "rank.py: error: the processes cannot be joined"),
])
def test_a_rank_that_dies_ends_the_others_with_a_message(launcher, tmp_path, when, message):
    """Without torchrun, which would end them itself."""
    script = """
import datetime, os, sys
from beyond import parallel
from generate import generate

parallel.PATIENCE = datetime.timedelta(seconds=3)
dies = sys.argv[1] if parallel.rank() == 1 else None

def main():
    if dies == "before it joins":
        os._exit(9)
    with parallel.group("cpu"):
        model = parallel.from_pretrained("demo")
        for count, token in enumerate(generate(model, [1, 2, 3], 100)):
            if dies and count == 5:
                os._exit(9)

parallel.command_line(main)
"""
    statuses, _, errors = launcher.run(tmp_path, 2, script, when, alone=True)
    assert statuses == [2, 9], errors
    assert message in errors
    assert "Traceback" not in errors
