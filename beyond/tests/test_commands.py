"""Tests of all command lines: bad input, help, and where results are to be written."""
import importlib
import os
import re
import shlex
from pathlib import Path

import pytest

from beyond.tests.conftest import ROOT

WINDOW = f"--text {ROOT / 'LICENSE'} --tokens 100"
BAD = {                      # {command: what its one line says, a pattern}
    "allocate --quantize int4": "--quantize needs --out",
    "allocate --priced --no-gradients": "--no-gradients: not allowed with argument --priced",
    "allocate --model random:llama-3.2-1b": "random weights",
    "allocate --out .": "cannot be written there; see --out",
    "teal x --model demo --out /tmp/x": "x/histograms/layer-0/.*No such file",
    "teal x --model nowhere": "nowhere: no such folder",
    "rotate --out demo": "demo: exists already.*see --out",
    "rotate --model random:llama-3.2-1b --out x": "random weights",
    "quantize --group 50": "--group is 50, expected a multiple of 32",
    "quantize --out demo": "demo: exists already",
    "quantize --model random:llama-3.2-1b": "random weights",
    "figures --calibration nowhere": "nowhere: no calibration",
    "judge --context 4000": "--context 4000 does not fit the model's context of 512",
    "judge --scored 600": "--scored is 600, expected 1 to 512",
    "judge --dense-prefix 512": "--dense-prefix is 512, expected 0 to 511",
    "judge --sources --batch 2": "--batch: not allowed with argument --sources",
    "judge --figure x.pdf": "--figure is x.pdf, expected a name that ends in .png",
    "judge --model random:llama-3.2-1b": "random weights: it has no quality to measure",
    f"judge {WINDOW}": "the text has 100 tokens, a window of 512 needs 513",
    f"judge {WINDOW} --context 64 --allocation x": "allocation 'x' is not in this calibration",
    "watch --figure x.png --text x --prompt y": "--prompt.* --text",
    "watch --figure x.png --model random:llama-3.2-1b": "random weights: there is no text to",
    f"watch --figure x.png --text {os.devnull}": "/dev/null has 1 tokens, expected more than",
    f"watch --figure x.png --prompt '{'x ' * 600}'": "the prompt has .* tokens, the model's",
    "longtext perplexity --model random:llama-3.2-1b": "random weights: only its speed",
    "longtext perplexity --context 513": "--context 513 does not fit the model's context of 512",
    "longtext needle --context 64": "--context 64, expected more than 64: so many are for the",
    "beyond --attend 513": "--attend 513, expected 1 to 512, the model's context",
    "beyond --attend 64 --attend-layers 1 7 -1": "--attend-layers -1 7, expected .* from 0 to 6",
    "beyond --attend-layers 1": "--attend-layers is for --attend, which is not given",
    "beyond --attend 64 --draft sparse": "no draft has steps that read less",
    "beyond --chat --prompt x": "--prompt is for a text, not for a chat",
    "beyond --chat --draft sparse --compare": "--compare is for a text, not for a chat",
    "beyond --chat --draft-tokens 3": "--draft-tokens are for --draft",
    "beyond --chat --top-p 2": "top_p is 2.0",
    "beyond --chat --model nowhere": "nowhere: no such folder",
    "beyond --chat --model random:llama-3.2-1b": "random weights and no tokenizer",
    "beyond --chat": "demo: no chat template",
}


def module_of(name):
    """Return the module that a command is: beyond.NAME, beyond.lab.NAME, or beyond itself."""
    place = "beyond.lab." if (ROOT / f"beyond/lab/{name}.py").exists() else "beyond."
    return importlib.import_module("beyond.__main__" if name == "beyond" else place + name)


@pytest.mark.parametrize("command", BAD)
def test_bad_input_on_the_command_line(run, monkeypatch, command):
    monkeypatch.chdir(ROOT)
    name, *options = shlex.split(command)
    assert re.search(BAD[command], run.refused(module_of(name), *options))


@pytest.mark.parametrize("name", "beyond allocate teal rotate quantize bits costs figures judge "
                                 "longtext timing watch".split())
def test_help_names_the_default_of_each_option(run, name):
    _, options = run(module_of(name), "--help").split("options:")
    described = re.split(r"\n  (?=-)", options)[2:]        # after --help
    assert all("default" in option for option in described)


def test_a_new_folder_takes_the_place_of_nothing(run, tmp_path):
    (tmp_path / "link").symlink_to("nowhere")
    error = run.refused(module_of("rotate"), "--out", tmp_path / "link")
    assert "exists already" in error and "see --out" in error


@pytest.mark.parametrize("name, work, options", [
    ("calibrate", "load_model", "--out {}/x"),
    ("beyond.teal", "import_teal", "x --model demo --out {}/x"),
    ("beyond.allocate", "load", "--out {}/x"),
    ("beyond.rotate", "load_model", "--out {}/x"),
    ("beyond.quantize", "quantize_folder", "--out {}/x"),
    ("beyond.gguf", "convert", "x.gguf --out {}/x"),
    ("beyond.lab.figures", "load_model", "--out {}"),
    ("beyond.lab.judge", "load", "--figure {}/x.png"),
    ("beyond.lab.timing", "write_gguf", "--gguf {}/x"),
    ("beyond.lab.watch", "load_model", "--figure {}/x.png"),
    ("beyond.lab.longtext", "load", "perplexity --out {}"),
    ("demo.train", "train_tokenizer", "--out {} --state {}"),
])
@pytest.mark.parametrize("kind", ["read-only", "no folder"])
def test_what_cannot_be_written_is_found_out_first(run, monkeypatch, tmp_path, name, work, options,
                                                   kind):
    module = importlib.import_module(name)
    monkeypatch.chdir(ROOT)
    folder = tmp_path / "folder"
    if kind == "read-only":
        folder.mkdir()
        access = os.access
        monkeypatch.setattr(os, "access", lambda path, mode: (
            Path(path).resolve() != folder.resolve() and access(path, mode)))   # root may do all
    else:
        folder.write_text("a file")
    monkeypatch.setattr(module, work, lambda *_: pytest.fail("something was computed"))
    message = run.refused(module, *options.format(folder, folder).split())
    assert str(folder) in message and "tmp." not in message.replace(str(tmp_path), "")
