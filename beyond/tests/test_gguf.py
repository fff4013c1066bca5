"""Tests of gguf.py: a Llama written as GGUF comes back as the same function and the same tokens.

What llama.cpp makes of a text stands here as it was seen (node-llama-cpp 3.22.1, vocabulary only).
"""
import pytest
import torch

from beyond import gguf as chapter
from beyond.tests import conftest
from beyond.tests.conftest import close, refused
from model import Config, Llama, load_tokenizer

gguf = pytest.importorskip("gguf")
pytest.importorskip("transformers")
ByteLevel = pytest.importorskip("tokenizers").pre_tokenizers.ByteLevel

TOKENS = torch.arange(30)[None]
ENDINGS = ["<|im_end|>", "<|eot_id|>", "<|custom|>", "</s>"]
BYTES = sorted(ByteLevel.alphabet())                       # what a byte-level tokenizer begins with
MERGES = ["1 2", "12 3", "3 4", "Ċ Ċ", "ĊĊ Ċ", "' s", "' S", "Ġ a", "Ġ Ġ", "a b", "ä º", "äº º"]
WORDS = [merge.replace(" ", "") for merge in MERGES] + ["Ġwhole"]
PIECES = {"▁": -9.0, "a": -8.0, "b": -7.0, "▁a": -3.0, "ab": -2.0, "▁▁": -1.0, "▁▁▁▁": -4.0}


def bytewise(pre="gpt-2", special=(), **changes):
    """Return a byte-level tokenizer's settings of a GGUF file; pre None: it says no kind."""
    tokens = [*BYTES, *WORDS, *special]
    types = [1] * (len(tokens) - len(special)) + [3] * len(special)
    settings = {"model": "gpt2", "tokens": tokens, "token_type": types, "merges": MERGES}
    settings |= {"pre": pre} | changes
    return {name: value for name, value in settings.items() if value is not None}


def of_sentencepiece(**changes):
    """Return the settings of a small SentencePiece vocabulary."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *PIECES, "<mark>"]
    types = [2, 3, 3] + [6] * 256 + [1] * len(PIECES) + [4]
    scores = [0.0] * 259 + [*PIECES.values()] + [0.0]
    return {"model": "llama", "tokens": tokens, "token_type": types, "scores": scores} | changes


def tiny_model(**changes):
    """Return a small Llama of numbers that bfloat16 holds exactly."""
    shape = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=16,
                 vocab_size=300, max_position_embeddings=128)
    return conftest.tiny_model(torch.bfloat16, **shape | changes).float()


def write_gguf(path, model, tokenizer=None, kind="F32", part=(0, 1), without=(), more=None,
               **settings):
    """Write a model as llama.cpp's converter does, each matrix of type `kind`; return the path.

    part: (which, of how many files). without: tensors to leave out, by their names in GGUF.
    more: tensors to add. settings: of the model, or with a whole name; with __ for a point.
    """
    config, kind = model.config, gguf.GGMLQuantizationType[kind]
    tokenizer = bytewise() if tokenizer is None else tokenizer
    values = {f"tokenizer.ggml.{name}": value for name, value in tokenizer.items()}
    for name, value in settings.items():
        whole = name.startswith(("general", "tokenizer"))
        values["llama." * (not whole) + name.replace("__", ".")] = value
    tensors = {}
    for name, parameter in model.named_parameters():
        tensor = parameter.clone()
        if "q_proj" in name or "k_proj" in name:
            halves = tensor.unflatten(0, (-1, 2, config.head_dim // 2))
            tensor = halves.transpose(1, 2).flatten(0, 2)
        tensors[chapter.gguf_name(name)] = tensor
    tensors |= more or {}
    with chapter.writing(path, config) as writer:
        for name, value in values.items():
            numbers = gguf.GGUFValueType.UINT32 if type(value) is int else None
            writer.add_key_value(name, value, numbers or gguf.GGUFValueType.get_type(value))
        if part[1] > 1:
            writer.add_uint16("split.no", part[0])
            writer.add_uint16("split.count", part[1])
            writer.add_int32("split.tensors.count", len(tensors) - len(without))
        for name in [name for name in tensors if name not in without][part[0]::part[1]]:
            of_type = kind if tensors[name].ndim == 2 else gguf.GGMLQuantizationType.F32
            data = gguf.quants.quantize(tensors[name].numpy(), of_type)
            writer.add_tensor(name, data, raw_dtype=of_type)
    return path


def check_refused(path, message, tmp_path):
    """Check that a file is refused by one line, and nothing is written."""
    before = sorted(tmp_path.iterdir())
    with refused(match=message) as error:
        chapter.convert(path, tmp_path / "out")
    assert str(error.value).startswith(str(path.parent)) and "\n" not in str(error.value)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("changes, parts, options, tolerance", [
    ({}, 1, {}, 1e-4), ({"attention_bias": True}, 3, {}, 1e-4),
    ({"tie_word_embeddings": True}, 3, {}, 1e-4),
    ({}, 1, {"kind": "Q8_0"}, 0.08), ({}, 1, {"kind": "Q4_1"}, 0.5),
    ({"attention_bias": True, "mlp_bias": True}, 1,        # biases that are missing are zero
     {"without": ("blk.1.attn_output.bias", "blk.0.ffn_up.bias")}, 1e-4),
])
def test_the_function_is_the_same(tmp_path, monkeypatch, changes, parts, options, tolerance):
    monkeypatch.setattr(chapter, "SHARD_BYTES", 20_000)
    model = tiny_model(**changes)
    if "without" in options:
        model.model.layers[1].self_attn.o_proj.bias.zero_()
        model.model.layers[0].mlp.up_proj.bias.zero_()
    paths = [write_gguf(tmp_path / f"m-{i + 1:05}-of-{parts:05}.gguf", model, part=(i, parts),
                        **options) for i in range(parts)]
    chapter.convert(paths[-1], tmp_path / "out")           # any of its files stands for all
    ours = Llama.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert close(ours(TOKENS), model(TOKENS), tolerance)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2


@pytest.mark.parametrize("changes, message", [
    ({"without": ("blk.1.ffn_up.weight",)}, r"blk.1.ffn_up.weight: missing, expected \[96, 64\]"),
    ({"without": ("token_embd.weight",)}, "tensor token_embd.weight is missing"),
    ({"block_count": 1}, r"tensor blk.1.*\], expected none in a"),
    ({"more": {"blk.0.attn_norm.bias": torch.ones(64)}}, r"norm.bias: \[64\], expected none in"),
    ({"more": {"output.weight": torch.ones(299, 64)}}, r"output.weight: \[299, 64\], expected"),
    ({"more": {"output_norm.weight": torch.full((64,), torch.inf)}}, "output_norm.*not finite"),
    ({"general__architecture": "falcon"}, "general.architecture is 'falcon', supported is 'llama'"),
    ({"rope__dimension_count": 8}, "rope.dimension_count is 8, supported is the 16 of a head"),
    ({"attention__causal": False}, "attention.causal is False, supported is True"),
    ({"expert_count": 8}, "expert_count is 8, supported is 0"),
    ({"rope__scaling__type": "yarn"}, "rope.scaling.type is 'yarn', supported is 'linear'"),
    ({"rope__scaling__factor": "2"}, 'factor is "2", expected a number above 0'),
    ({"rope__scaling__attn_factor": 0.5}, "attn_factor is 0.5, supported is 1"),
    ({"tokenizer": {}}, "tokenizer.ggml.model is None, supported are 'llama' and 'gpt2'"),
    ({"tokenizer": bytewise("gemma-9")}, "tokenizer.ggml.pre is 'gemma-9', a kind that is not"),
    ({"tokenizer": bytewise("llama-bpe")}, "tokenizer.ggml.bos_token_id is missing"),
    ({"tokenizer": bytewise(merges=["x y"])}, "its tokenizer cannot be read: .*out of vocabulary"),
    ({"tokenizer": bytewise(merges=None)}, "cannot be read: tokenizer.ggml.merges is missing"),
    ({"tokenizer": bytewise(special=ENDINGS * 9)}, "tokens are 305, 273 different"),
])
def test_what_is_no_whole_llama_is_refused(tmp_path, changes, message):
    write_gguf(tmp_path / "model.gguf", tiny_model(tie_word_embeddings=True), **changes)
    check_refused(tmp_path / "model.gguf", message, tmp_path)


def test_what_is_no_gguf_or_not_all_of_it_is_refused(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"nothing of the kind")
    check_refused(tmp_path / "model.gguf", "cannot be read as a GGUF file: ", tmp_path)
    check_refused(tmp_path / "absent.gguf", "cannot be read as .*: No such file", tmp_path)
    writer = gguf.GGUFWriter(tmp_path / "big.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_block_count(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    check_refused(tmp_path / "big.gguf", "big.gguf: cannot be read .* it is big-endian", tmp_path)
    for name, message in (("m-00001-of-00002.gguf", "m-00002-of-00002.gguf: cannot be read"),
                          ("renamed.gguf", "renamed.gguf: one of the 2 files of a model")):
        write_gguf(tmp_path / name, tiny_model(), part=(0, 2))
        check_refused(tmp_path / name, message, tmp_path)


@pytest.mark.parametrize("settings, factor", [             # llama-model.cpp, load_hparams
    ({}, None),
    ({"factor": 4.0}, 4.0),                                # linear is what is not said
    ({"_linear": 4.0}, 4.0),                               # the older rope.scale_linear
    ({"_linear": 4.0, "factor": 2.0}, 2.0),
    ({"type": "linear", "factor": 0.0}, None),
    ({"type": "none", "factor": 4.0}, None),
])
def test_scaling_as_llama_cpp_reads_it(tmp_path, settings, factor):
    settings = {f"rope__{'scale' if name == '_linear' else 'scaling__'}{name}": value
                for name, value in settings.items()}
    write_gguf(tmp_path / "model.gguf", tiny_model(), **settings)
    config = chapter.convert(tmp_path / "model.gguf", tmp_path / "out")
    assert config == Config.read(tmp_path / "out")
    assert config.rope_scaling == (factor and {"rope_type": "linear", "factor": factor})


def test_scaling_of_llama3_is_recognised(tmp_path):
    scaling = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    model = tiny_model(rope_theta=5e5)
    plain = chapter.frequencies(model.config)
    model.config.rope_scaling = scaling
    freqs = (plain / chapter.frequencies(model.config)).float()
    path = write_gguf(tmp_path / "model.gguf", model, more={"rope_freqs.weight": freqs})
    assert chapter.convert(path, tmp_path / "out").rope_scaling == scaling
    write_gguf(path, model, more={"rope_freqs.weight": torch.ones(8)})
    assert chapter.convert(path, tmp_path / "ones").rope_scaling is None
    for other, settings in ((freqs + 1, {}), (freqs, {"rope__scaling__factor": 2.0})):
        write_gguf(path, model, more={"rope_freqs.weight": other}, **settings)
        check_refused(path, "rope_freqs.weight is not the scaling of Llama-3.1", tmp_path)


def tokenizer_of(tmp_path, tokenizer, **settings):
    write_gguf(tmp_path / "model.gguf", tiny_model(), tokenizer, **settings)
    chapter.convert(tmp_path / "model.gguf", tmp_path / "out")
    return load_tokenizer(tmp_path / "out")


TEXT = "01234ab'S \n\n\n a whole  人"


@pytest.mark.parametrize("settings, expected", [
    ({"pre": None}, "0|12|34|ab|'|S|Ġ|ĊĊĊ|Ġa|Ġ|w|h|o|l|e|Ġ|Ġ|äºº"),
    ({"pre": "falcon"}, "0|12|34|ab|'|S|Ġ|ĊĊĊ|Ġa|Ġ|w|h|o|l|e|Ġ|Ġ|äºº"),
    ({"pre": "gpt-2"}, "0|123|4|ab|'|S|Ġ|ĊĊĊ|Ġa|Ġ|w|h|o|l|e|Ġ|Ġ|äºº"),
    ({"pre": "smollm"}, "0|1|2|3|4|ab|'|S|Ġ|ĊĊĊ|Ġa|Ġ|w|h|o|l|e|Ġ|Ġ|äºº"),
    ({"pre": "llama-bpe"}, "<s>|0|12|34|ab|'S|Ġ|ĊĊĊ|Ġa|Ġwhole|Ġ|Ġ|äºº"),
    ({"pre": "llama-bpe", "add_bos_token": False}, "0|12|34|ab|'S|Ġ|ĊĊĊ|Ġa|Ġwhole|Ġ|Ġ|äºº"),
    ({"pre": "tekken"}, "<s>|0|1|2|3|4|ab|'S|Ġ|ĊĊĊ|Ġa|Ġwhole|Ġ|Ġ|äºº"),
    ({"pre": "qwen2"}, "0|1|2|3|4|ab|'S|Ġ|ĊĊĊ|Ġa|Ġ|w|h|o|l|e|Ġ|Ġ|äºº"),
    ({"pre": "deepseek-coder"}, "0|1|2|3|4|ab|'|S|Ġ|Ċ|Ċ|Ċ|Ġa|Ġ|w|h|o|l|e|Ġ|Ġ|äºº"),
    ({"pre": "deepseek-llm"}, "0|123|4|ab|'|S|Ġ|Ċ|Ċ|Ċ|Ġa|Ġ|w|h|o|l|e|ĠĠ|äºº"),
    ({"add_bos_token": True, "add_eos_token": True},
     "<s>|0|123|4|ab|'|S|Ġ|ĊĊĊ|Ġa|Ġ|w|h|o|l|e|Ġ|Ġ|äºº|<s>"),
])
def test_each_kind_cuts_and_begins_a_text_as_in_llama_cpp(tmp_path, settings, expected):
    ends = {"bos_token_id": 269, "eos_token_id": 269}
    tokenizer = tokenizer_of(tmp_path, bytewise(special=["<s>"], **ends | settings))
    pieces = tokenizer.pieces()
    ids = tokenizer.encode(TEXT)
    assert "|".join(pieces[i] for i in ids) == expected
    assert tokenizer.decode(ids) == TEXT


@pytest.mark.parametrize("prefix, text, expected", [
    (True, " a", "▁▁|a"), (True, "ab<mark>a", "▁|ab|<mark>|▁a"),
    (True, "<s>é", "▁|<0x3C>|<0x73>|<0x3E>|<0xC3>|<0xA9>"),
    (False, "  ab", "▁▁|ab"), (False, "ab<mark>a", "ab|<mark>|a"),
])
def test_sentencepiece_and_blanks(tmp_path, prefix, text, expected):
    changes = {} if prefix else {"add_space_prefix": False, "add_bos_token": True}
    tokenizer = tokenizer_of(tmp_path, of_sentencepiece(**changes))
    begin, *ids = tokenizer.encode(text)
    assert begin == 1 and tokenizer.eos_ids == (2,)        # what llama.cpp takes them for
    assert "|".join(tokenizer.pieces()[i] for i in ids) == expected
    if "mark" not in text:
        assert tokenizer.decode([begin, *ids]) == text


@pytest.mark.parametrize("settings, expected", [           # llama.cpp knows ends by name, too
    ({}, ["</s>", "<|eot_id|>", "<|im_end|>"]),
    ({"eos_token_id": 269}, ["<|im_end|>", "</s>", "<|eot_id|>"]),
    ({"eos_token_id": 272, "eot_token_id": 271},
     ["</s>", "<|custom|>", "<|eot_id|>", "<|im_end|>"]),
    ({"eos_token_id": 999}, ["</s>", "<|eot_id|>", "<|im_end|>"]),
])
def test_a_turn_ends_where_it_ends_in_llama_cpp(tmp_path, settings, expected):
    tokenizer = tokenizer_of(tmp_path, bytewise(special=ENDINGS, **settings))
    assert [tokenizer.pieces()[i] for i in tokenizer.eos_ids] == expected
    assert tokenizer.decode(tokenizer.eos_ids) == ""


def test_a_chat_template_is_the_file_s(tmp_path):
    template = "{% for message in messages %}{{ message['content'] }}<|im_end|>{% endfor %}"
    tokenizer = tokenizer_of(tmp_path, bytewise(special=ENDINGS, eos_token_id=269),
                             tokenizer__chat_template=template)
    ids = tokenizer.tokenizer.apply_chat_template([{"role": "user", "content": "a b"}],
                                                  return_dict=False)
    assert [tokenizer.pieces()[i] for i in ids] == ["a", "Ġ", "b", "<|im_end|>"]


def test_a_file_to_time_llama_cpp_with_has_the_shapes(monkeypatch, run, tmp_path):
    from beyond.lab import timing
    config = Config(128, 256, 2, 2, 1, 64, 70, 64, tie_word_embeddings=True)
    monkeypatch.setitem(timing.PRESETS, "small", config)
    path = tmp_path / "small.gguf"
    run(timing, "--gguf", path, "--shapes", "small", "--bits", 4)
    settings, tensors = chapter.read_gguf(path)
    assert chapter.config_of(path, settings, tensors) == config
    kinds = {tensor.tensor_type.name for tensor in tensors.values()}
    assert kinds == {"Q4_0", "Q8_0", "F32"}                # the head's is Q8_0, the norms' F32
    for tensor in tensors.values():
        values = chapter.tensor_of(path, tensor, config)
        assert values.ndim == 1 or 0.01 < values.float().std() < 0.03
