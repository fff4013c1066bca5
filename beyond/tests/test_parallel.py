"""Tests of parallel.py: several processes compute what one does, and all of them end."""
import multiprocessing.connection
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from beyond import __main__ as fast
from beyond import codes, drafts, parallel, quantize, record
from beyond.tests.conftest import ROOT, close, refused, thresholds_of, tiny_model, tokens_like
from generate import generate, generate_speculative
from model import DEMO, Llama, read_safetensors, write_safetensors
from sparsify import skipped_share, sparse_mode, sparsify

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
               "MASTER_ADDR": "127.0.0.1"}

# torchrun in small: the ranks of a script, forked from a process in which all is imported.
RANKS = multiprocessing.get_context("forkserver")
RANKS.set_forkserver_preload([__name__])
torch.nn.Embedding(1, 1, device="meta")                    # imports 800 modules more


def start(folder, arguments, environment):
    """Run a script as a rank, with files for its standard streams; rank 0 alone has input."""
    os.environ.update(environment)
    for place, name in enumerate(("in", "out", "err")):
        path = "/dev/null" if environment["RANK"] != "0" and not place else f"{folder}/{name}"
        os.dup2(os.open(path, os.O_APPEND | os.O_WRONLY if place else os.O_RDONLY), place)
    sys.stdin = open(0)
    sys.argv = [f"{folder}/rank.py", *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")


def launch(folder, count, script, *arguments, alone=False):
    """Run a script as so many ranks; return their statuses, output and errors.

    When one fails the others are ended, unless they are to end alone.
    """
    (folder / "rank.py").write_text(script)
    for name in ("in", "out", "err"):
        (folder / name).touch()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"WORLD_SIZE": str(count), "MASTER_PORT": str(free.getsockname()[1])}
    ranks = [RANKS.Process(target=start, args=(folder, list(map(str, arguments)), ENVIRONMENT
                                               | shared | {"RANK": str(rank)}))
             for rank in range(count)]
    for rank in ranks:
        rank.start()
    while running := [rank for rank in ranks if rank.exitcode is None]:
        multiprocessing.connection.wait([rank.sentinel for rank in running])
        if any(rank.exitcode for rank in ranks) and not alone:
            for rank in running:
                rank.terminate()
    return [rank.exitcode for rank in ranks], *((folder / name).read_text()
                                                for name in ("out", "err"))


# --------------------------------------------------------------------------------------------------
# The same as one process

def what_a_model_does(maker, folder, bits):
    """Return {name: tensor} of logits and texts: the same from one process and from a rank.

    bits: of a quantized model, whose activations are not rounded: sums that differ in their last
    bit would be rounded otherwise.
    """
    codes.ROUND_ACTIVATIONS = False
    model = maker.from_pretrained(folder, dtype=torch.float32 if bits else torch.float64)
    size = sum(tensor.numel() for name, tensor in model.named_parameters()
               if "_proj" in name and not name.endswith(("o_proj.bias", "down_proj.bias")))
    if bits:
        codes.quantize(model, bits)
    tokens = tokens_like(model, 2, 20)
    prompt = tokens[0, :6].tolist()
    cache = model.make_cache(2, 20)
    results = {
        "size": torch.tensor(size),
        "seed": torch.tensor(parallel.from_first(lambda: 5 + parallel.rank())),
        "whole": model(tokens),
        "cached": torch.cat([model(part, cache) for part in tokens.split([9, 3, 1, 1, 6], 1)], 1),
    }
    sparsify(model, thresholds_of(model, 0.3) | {"lm_head": None})
    with sparse_mode(model, "all"):
        results["sparse"] = model(tokens)
    share = parallel.mean(skipped_share(model, tokens[0].tolist(), 3))
    results["skipped"] = torch.tensor(share, dtype=torch.float64)
    if bits:
        return results
    draft = tiny_model(vocab_size=model.config.vocab_size).double()
    parallel.follow_first(draft)
    texts = {
        "sparse greedy": generate(model, prompt, 4, make_step=record.make_step),
        "sampled": generate(model, prompt, 4, 1.0, seed=3),
        "drafted": generate_speculative(model, prompt, 4, "sparse", draft_tokens=3),
        "drafted by a model": generate_speculative(model, prompt, 4, draft, draft_tokens=3,
                                                   temperature=1.0, seed=1),
        "recycled": drafts.speculate(model, prompt, 4, "recycle", draft_tokens=7),
    }
    return results | {name: torch.tensor(list(text)) for name, text in texts.items()}


def write_what_a_rank_does(folder, bits, out):
    """Write what the function above returns. No thread of gloo may be left: see parallel.group."""
    with parallel.group("cpu"), torch.no_grad():
        results = what_a_model_does(parallel, folder, int(bits))
        if parallel.rank() == 0:
            write_safetensors(out, results)
    threads = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    assert not [name for name in threads if "gloo" in name]


@pytest.mark.parametrize("kind, processes, bits, tolerance", [
    ("demo", 4, 0, 1e-10), ("biases, tied", 2, 0, 1e-10),
    ("wide", 2, 4, 1e-5),                # a group of 4 bits lies within a part
    ("wide", 2, 8, 0.05),                # of o and down each part has its scales
])
def test_ranks_do_together_what_one_process_does(tmp_path, monkeypatch, kind, processes, bits,
                                                 tolerance):
    monkeypatch.setattr(codes, "ROUND_ACTIVATIONS", True)  # and put back what it was
    if kind == "demo":
        model = Llama.from_pretrained(DEMO)
        del model.model.layers[2:]                         # time for talk, not for layers
        model.config.num_hidden_layers = 2
    elif kind == "wide":
        model = tiny_model(hidden_size=256, intermediate_size=256, head_dim=64, num_hidden_layers=1)
    else:
        model = tiny_model(attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
    folder = str(tmp_path / "model")
    model.save_pretrained(folder)
    script = f"import sys, {__name__} as tests\ntests.write_what_a_rank_does(*sys.argv[1:])"
    statuses, _, errors = launch(tmp_path, processes, script, folder, bits, tmp_path / "results")
    assert statuses == [0] * processes, errors
    results = read_safetensors(tmp_path / "results")
    expected = what_a_model_does(Llama, folder, bits)
    assert 0.1 < expected["skipped"] < 0.9
    assert not close(expected["sparse"], expected["whole"], 0.01)
    assert results.pop("size") == expected.pop("size") // processes
    for name, tensor in expected.items():
        assert close(results[name], tensor, tolerance), name


def test_torchrun_writes_what_one_process_writes(tmp_path, run):
    options = ["--prompt", "class Stack:", "--max-new-tokens", "8", "--dtype", "float32",
               "--temperature", "1", "--seed", "5", "--device", "cpu"]
    sparse = [*options, "--sparsity", "0.5"]
    drafted = [*options, "--draft", "demo", "--draft-tokens", "3"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    ended = subprocess.run([*torchrun, "-m", "beyond", *sparse], capture_output=True, text=True,
                           cwd=ROOT, env=ENVIRONMENT, timeout=120)
    assert ended.returncode == 0, ended.stderr
    statuses, written, errors = launch(tmp_path, 2, "from beyond.__main__ import main\nmain()\n",
                                       *drafted)
    assert statuses == [0, 0], errors
    for more, two in ((sparse, ended.stdout), (drafted, written)):
        one = run(fast, *more)
        assert one.splitlines()[1:4] == two.splitlines()[1:4]
        assert "8 tokens" in two and two.count("class Stack:") == 1    # rank 0 alone speaks
        skipped = [re.findall(r"[\d.]+% of the blocks", text) for text in (one, two)]
        assert skipped[0] == skipped[1] and len(skipped[0]) == ("--sparsity" in more)


def test_what_cannot_be_shared_is_refused(tmp_path, monkeypatch):
    tiny_model().save_pretrained(tmp_path / "model")
    quantize.quantize_folder(tmp_path / "model", tmp_path / "quantized", 8)
    monkeypatch.setenv("WORLD_SIZE", "3")
    for folder, message in ((DEMO, "num_attention_heads is 8, which 3 processes cannot"),
                            (tmp_path / "quantized", "quantized folders are not split")):
        with refused(match=message):
            parallel.from_pretrained(folder)


# --------------------------------------------------------------------------------------------------
# What ends the ranks

ENDING = f"""
import datetime, os, sys
from beyond import parallel
from generate import generate
from model import InputError
parallel.GRACE = 1

def die_in_a_text():
    for count, _ in enumerate(generate(parallel.from_pretrained({str(DEMO)!r}), [1, 2, 3], 100)):
        if parallel.rank() == 1 and count == 5:
            os._exit(9)

def main():
    if sys.argv[1] == "die at once":
        parallel.PATIENCE = datetime.timedelta(seconds=3)
        if parallel.rank() == 1:
            os._exit(9)
    with parallel.group("cpu"):
        parallel.from_first(lambda: 1)
        exec(sys.argv[1])
        parallel.from_first(lambda: 1)

parallel.command_line(main)
"""


@pytest.mark.parametrize("line, statuses, message", [
    ("raise InputError('all ranks meet this')", {2}, "rank.py: error: all ranks meet this"),
    ("parallel.from_first(lambda: open('nowhere'))", {2}, "No such file or directory: 'nowhere'"),
    ("if parallel.rank() == 1: raise InputError('rank 1 alone')", {2}, "error: rank 1 alone"),
    ("1 / 0", {1}, "ZeroDivisionError: division by zero"),
    ("die_in_a_text()", {2, 9}, "rank 0: another process has ended or does not answer"),
    ("die at once", {2, 9}, "rank.py: error: the processes cannot be joined"),
])
def test_what_ends_one_rank_ends_all_with_one_message(tmp_path, line, statuses, message):
    """In seconds, and where a rank dies without torchrun, which would end the others itself."""
    began = time.perf_counter()
    ended, _, errors = launch(tmp_path, 2, ENDING, line, alone=9 in statuses)
    assert time.perf_counter() - began < 60                # PATIENCE is ten minutes
    assert set(ended) - {-signal.SIGTERM} == statuses, errors      # not aborted
    assert message in errors
    assert ("Traceback" in errors) == (statuses == {1})
    assert errors.count(message) == 1 or statuses == {1}
