"""Tests of folders.py: every spelling of a checkpoint folder, read as transformers reads it."""
import shutil

import pytest
import torch

from beyond import folders
from beyond.tests.conftest import (close, read_by_transformers, reference, refused, tiny_model,
                                   tokens_like)
from model import DEMO, load_model, read_json, read_safetensors, write_json, write_safetensors

LINEAR = {"rope_type": "linear", "factor": 2.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}


def plain(folder, **changes):
    """Write a small checkpoint folder, its config.json changed; return its model."""
    model = tiny_model(num_hidden_layers=1, vocab_size=4096)
    model.save_pretrained(folder)
    shutil.copy(DEMO / "tokenizer.model", folder)
    write_json(folder / "config.json", read_json(folder / "config.json") | changes)
    return model


@pytest.mark.parametrize("spelling", [
    {"rope_theta": 5e5, "rope_scaling": LLAMA3},
    {"rope_theta": 5e5, "rope_scaling": {
        "type" if key == "rope_type" else key: value for key, value in LLAMA3.items()}},
    {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}},
    {"rope_scaling": LLAMA3, "rope_parameters": LINEAR | {"rope_theta": 5e5}},
    {"rope_scaling": LINEAR, "rope_parameters": LLAMA3, "rope_theta": 777.0},
    {"rope_scaling": {}, "rope_parameters": LLAMA3, "rope_theta": 5e5},
    {"rope_scaling": LLAMA3, "original_max_position_embeddings": 16},
    {"rope_scaling": None, "rope_parameters": LINEAR | {"rope_theta": 9.0}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1}},
])
def test_every_spelling_of_rope(tmp_path, spelling):
    reference(tmp_path)
    raw = {key: value for key, value in read_json(tmp_path / "config.json").items()
           if not key.startswith("rope")}
    write_json(tmp_path / "config.json", raw | spelling)
    theirs = read_by_transformers(tmp_path)
    ours = folders.in_memory(folders.mapped(tmp_path))
    tokens = tokens_like(ours, 1, 60)
    assert close(ours(tokens), theirs(tokens).logits, 1e-4)


@pytest.mark.parametrize("changes, message", [
    ({"architectures": ["LlamaForSequenceClassification"]}, "architectures is"),
    ({"hidden_size": 32.0}, "hidden_size is 32.0, expected a whole number"),
    ({"attention_bias": "yes"}, 'attention_bias is "yes", expected false or true'),
    ({"model_type": "mistral", "sliding_window": 0}, "sliding_window is 0"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config is"),
    ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, 'rope_type is "yarn"'),
    ({"rope_scaling": {"factor": 8.0}}, "factor is 8.0"),
    ({"rope_scaling": "linear"}, "not the config.json of a Llama"),
    ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "low_freq_factor is 4.0, expected less"),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "rotary_factor"),
])
def test_a_setting_that_nothing_here_reads_is_refused_by_name(tmp_path, changes, message):
    plain(tmp_path, **changes)
    with refused(match="config.json: ") as error:
        folders.load_model(tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_an_adapter_is_refused_and_a_plain_folder_is_the_cores(tmp_path):
    model = plain(tmp_path)
    ours, tokenizer = folders.load_model(tmp_path)
    cores, _ = load_model(tmp_path)
    tokens = torch.tensor([tokenizer.encode("def f(x):")])
    assert torch.equal(ours(tokens), model(tokens)) and torch.equal(cores(tokens), model(tokens))
    with refused(match="beyond.gguf makes a folder of a GGUF file"):
        folders.load_model("x.gguf")
    (tmp_path / "tokenizer.model").unlink()                # an adapter's folder may have none
    (tmp_path / "adapter_config.json").write_text("{}")
    with refused(match="adapter_config.json: an adapter; merge it into its base"):
        folders.load_model(tmp_path)


def test_a_head_that_is_tied_in_name_only(tmp_path):
    """Merged adapters may leave a head that is not the embedding: what is stored counts."""
    model = plain(tmp_path, tie_word_embeddings=True)
    ours, _ = folders.load_model(tmp_path)
    tokens = torch.arange(9)[None]
    assert torch.equal(ours(tokens), model(tokens)) and not ours.config.tie_word_embeddings
    tensors = read_safetensors(tmp_path / "model.safetensors")
    del tensors["lm_head.weight"]
    write_safetensors(tmp_path / "model.safetensors", tensors)
    ours, _ = folders.load_model(tmp_path)
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
