"""Tests of gguf.py: a Llama written as GGUF comes back as the same function."""
import sys

import pytest
import torch

from beyond import gguf as chapter
from beyond import timing
from model import Config, InputError, Llama, linear_names

gguf = pytest.importorskip("gguf")


def tiny_model(**changes):
    """Return a small Llama with random weights that bfloat16 holds exactly."""
    config = Config(hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                    num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=40,
                    max_position_embeddings=128)
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    model = Llama(config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        if "norm" not in name:
            parameter.copy_(torch.randn(parameter.shape) * 0.2)
        parameter.copy_(parameter.bfloat16())
    return model


def write_gguf(path, model, kind=None, freqs=None, **settings):
    """Write a model as llama.cpp's converter does, each tensor of type `kind` where that fits."""
    config = model.config
    kind = gguf.GGMLQuantizationType.F32 if kind is None else kind
    with chapter.writing(path, config, settings.pop("architecture", "llama")) as writer:
        writer.add_eos_token_id(7)
        for name, value in settings.items():
            writer.add_key_value(f"llama.{name.replace('__', '.')}", value,
                                 gguf.GGUFValueType.STRING)
        for name, parameter in model.named_parameters():
            values = parameter.clone()
            if "q_proj" in name or "k_proj" in name:
                halves = values.unflatten(0, (-1, 2, config.head_dim // 2))
                values = halves.transpose(1, 2).flatten(0, 2)
            of_type = kind if values.ndim == 2 else gguf.GGMLQuantizationType.F32
            data = gguf.quants.quantize(values.numpy(), of_type)
            writer.add_tensor(chapter.gguf_name(name), data, raw_dtype=of_type)
        if freqs is not None:
            writer.add_tensor("rope_freqs.weight", freqs.numpy())


@pytest.fixture(autouse=True)
def without_tokenizer(monkeypatch):
    monkeypatch.setattr(chapter, "save_tokenizer", lambda path, folder: None)


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"attention_bias": True}])
def test_the_function_is_the_same(tmp_path, changes):
    model = tiny_model(**changes)
    write_gguf(tmp_path / "model.gguf", model)
    chapter.convert(tmp_path / "model.gguf", tmp_path / "out")
    tokens = torch.arange(30)[None]
    ours = Llama.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.allclose(ours(tokens), model(tokens), atol=1e-4)
    assert '"eos_token_id": 7' in (tmp_path / "out" / "config.json").read_text()


@pytest.mark.parametrize("name, tolerance", [("Q8_0", 0.08), ("Q4_1", 0.5), ("F16", 1e-3)])
def test_types_that_the_package_dequantizes(tmp_path, name, tolerance):
    model = tiny_model()
    write_gguf(tmp_path / "model.gguf", model, gguf.GGMLQuantizationType[name])
    chapter.convert(tmp_path / "model.gguf", tmp_path / "out")
    tokens = torch.arange(30)[None]
    ours = Llama.from_pretrained(tmp_path / "out", dtype=torch.float32)
    expected = model(tokens)
    assert (ours(tokens) - expected).norm() < tolerance * expected.norm()


def test_scaling_of_llama3_is_recognised(tmp_path):
    scaling = chapter.LLAMA3_SCALINGS[1]
    model = tiny_model(rope_theta=5e5)
    plain = chapter.frequencies(model.config)
    model.config.rope_scaling = scaling
    freqs = (plain / chapter.frequencies(model.config)).float()
    write_gguf(tmp_path / "model.gguf", model, freqs=freqs)
    assert chapter.convert(tmp_path / "model.gguf", tmp_path / "out").rope_scaling == scaling
    write_gguf(tmp_path / "other.gguf", model, freqs=freqs + 1)
    with pytest.raises(InputError, match="rope_freqs.weight is not the scaling of Llama-3.1"):
        chapter.convert(tmp_path / "other.gguf", tmp_path / "other")


def test_a_large_model_is_written_in_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(chapter, "SHARD_BYTES", 20_000)
    model = tiny_model()
    write_gguf(tmp_path / "model.gguf", model)
    chapter.convert(tmp_path / "model.gguf", tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    tokens = torch.arange(30)[None]
    ours = Llama.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.allclose(ours(tokens), model(tokens), atol=1e-4)


@pytest.mark.parametrize("settings, message", [
    ({"architecture": "falcon"}, "general.architecture is 'falcon', supported is 'llama'"),
    ({"rope__scaling__type": "yarn"}, "llama.rope.scaling.type is 'yarn', supported is 'linear'"),
    ({"rope__dimension_count": "8"}, "llama.rope.dimension_count is '8', expected a number"),
])
def test_what_is_no_llama_is_refused(tmp_path, settings, message):
    write_gguf(tmp_path / "model.gguf", tiny_model(), **settings)
    with pytest.raises(InputError, match=message):
        chapter.convert(tmp_path / "model.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_no_gguf_is_refused(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"nothing of the kind")
    for name, message in (("model.gguf", "not a GGUF file"), ("absent.gguf", "cannot be read")):
        with pytest.raises(InputError, match=message):
            chapter.convert(tmp_path / name, tmp_path / "out")


@pytest.mark.parametrize("bits, kind", [(8, "Q8_0"), (4, "Q4_0")])
def test_a_file_to_time_llama_cpp_with_has_the_shapes(monkeypatch, tmp_path, bits, kind):
    config = Config(128, 256, 2, 2, 1, 64, 70, 64, tie_word_embeddings=True)
    monkeypatch.setitem(timing.PRESETS, "small", config)
    path = tmp_path / "small.gguf"
    monkeypatch.setattr(sys, "argv", ["timing.py", "--gguf", str(path), "--shapes", "small",
                                      "--bits", str(bits)])
    timing.main()
    reader = chapter.read_gguf(path)
    assert chapter.config_of(path, reader) == config
    tensors = {chapter.checkpoint_name(path, tensor.name): tensor for tensor in reader.tensors}
    parameters = dict(Llama.shapes(config).named_parameters())
    assert tensors.keys() == parameters.keys()
    assert {tensors[f"{name}.weight"].tensor_type.name for name in linear_names(config)} == {kind}
    assert tensors["model.embed_tokens.weight"].tensor_type.name == "Q8_0"
    for name, tensor in tensors.items():
        values = chapter.tensor_of(path, tensor, config)
        assert values.shape == parameters[name].shape
        assert values.ndim == 1 or 0.01 < values.float().std() < 0.03
