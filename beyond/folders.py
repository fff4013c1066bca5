"""Writing a checkpoint anew: what rotate.py and quantize.py share.

Both read a checkpoint folder, change its tensors and write another folder. A model may be larger
than memory, so this goes file by file:

    FOLDER/model-00001.safetensors  ─► change ─►  OUT.random/model-00001.safetensors ┐
    FOLDER/model-00002.safetensors  ─► change ─►  OUT.random/model-00002.safetensors ├─► OUT
    tokenizer, generation settings, config.json ─►  the same, with what has changed  ┘

The folder gets its name when all of it is there. A run that fails or is stopped leaves nothing.

The seam: `read_safetensors` and `write_safetensors` of model.py; the result is an ordinary folder.
"""
import contextlib
import os
import shutil
import tempfile
from pathlib import Path

from model import InputError, checked_shards, read_json, require, write_json, write_safetensors


def check_new_folder(out):
    """Raise InputError, before anything is computed, if `out` exists or cannot be made."""
    require(not os.path.lexists(out),
            f"{out}: exists already; this is written to a new folder; see --out")
    there = next(folder for folder in Path(out).absolute().parents if folder.exists())
    require(there.is_dir(), f"{out}: cannot be written: {there} is no folder; see --out")
    require(os.access(there, os.W_OK), f"{out}: cannot be written: {there} is read-only; see --out")


@contextlib.contextmanager
def new_folder(out):
    """Open a folder to fill: `with new_folder(out) as unfinished`. At the end it becomes `out`.

    Raises InputError if `out` exists, or cannot be written. What is not finished is removed.
    """
    check_new_folder(out)
    out = Path(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f"{out.name}.", dir=out.parent))
    except OSError as error:
        raise InputError(f"{out}: cannot be written: {error.strerror}") from None
    try:
        yield unfinished
        unfinished.chmod(0o755)          # mkdtemp makes a folder that only its owner can read
        os.rename(unfinished, out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def rewrite_checkpoint(folder, model, out, change, config_changes):
    """Write the checkpoint in `folder` anew to the new folder `out`, with its tokenizer.

    model: a Llama on the meta device, which every tensor is checked against
    change(path, tensors): returns the tensors {name: tensor} that take the place of those of a file
    config_changes: {key: value}, what is set in config.json
    """
    folder = Path(folder)
    weight_map = {}
    with new_folder(out) as unfinished:
        for path, tensors in checked_shards(folder, model):
            changed = change(path, tensors)
            write_safetensors(unfinished / path.name, changed, {"format": "pt"})
            weight_map |= dict.fromkeys(changed, path.name)
        if not (folder / "model.safetensors").exists():
            write_json(unfinished / "model.safetensors.index.json",
                       {"metadata": {}, "weight_map": weight_map})
        for file in folder.iterdir():
            settings = file.name in ("generation_config.json", "chat_template.jinja")
            if file.is_file() and (settings or "token" in file.name):
                shutil.copy(file, unfinished)
        tied = {"tie_word_embeddings": model.config.tie_word_embeddings}     # as it is, not as told
        write_json(unfinished / "config.json",
                   read_json(folder / "config.json") | tied | config_changes)


def is_quantized(folder):
    """Return whether the config.json of a checkpoint folder says that its weights are quantized."""
    return bool(read_json(Path(folder) / "config.json").get("quantization_config"))
