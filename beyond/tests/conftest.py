"""What the tests of the chapters share: a small Llama, small tokenizers, commands run from here."""
import functools
import io
import os
import sys
from pathlib import Path

import pytest
import torch

# Without a GPU Triton's kernels are interpreted, which is read when triton is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
torch.set_num_threads(1)             # tiny models: a second thread would wait more than it works

import kernel                        # noqa: E402
from model import Config, InputError, Llama, command_line, linear_names, write_json    # noqa: E402
from sparsify import sparsify        # noqa: E402

ROOT = Path(__file__).parent.parent.parent
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NO_COMPILER = pytest.mark.skipif(not kernel.fits_c(torch.zeros(1)), reason="no C compiler")
SMOLLM2 = Path(os.environ.get("MINTEAL_SMOLLM2", "smollm2"))
NEEDS_SMOLLM2 = pytest.mark.skipif(not SMOLLM2.exists(), reason="needs SmolLM2: see gguf.py")
SHAPE = dict(hidden_size=32, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, head_dim=12, vocab_size=61, max_position_embeddings=64)

refused = functools.partial(pytest.raises, InputError)     # refused(match="what it says")


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def tiny_model(dtype=torch.float32, seed=0, threshold=None, make=None, **shape):
    """Return a small Llama whose next tokens differ and whose activations matter.

    threshold: what its linears drop (default: they are plain); make: what they are, see sparsify.
    """
    torch.manual_seed(seed)
    model = Llama(Config(**SHAPE | shape)).requires_grad_(False)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape)
        matrix = parameter.ndim == 2
        parameter.copy_(noise * 1.5 * parameter.shape[1] ** -0.5 if matrix else 1 + 0.2 * noise)
    model.to(dtype).eval()
    if threshold is None:
        return model
    return sparsify(model, thresholds_of(model, threshold), **{"make": make} if make else {})


def thresholds_of(model, threshold, **more):
    """Return {name: threshold} of all linears in the blocks."""
    return dict.fromkeys(linear_names(model.config), threshold) | more


def tokens_like(model, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, shape, generator=generator)


def close(y, expected, tolerance=1e-5):
    """Return whether the relative error of a whole tensor is small; NaN never passes."""
    y, expected = y.double().cpu(), expected.double().cpu()
    return bool((y - expected).norm() <= tolerance * expected.norm().clamp(min=1e-30))


def write_bpe(folder, bpe, begin=None, **settings):
    """Write a tokenizer in the hub's format. begin: the token that begins a text, if one does."""
    from tokenizers import processors
    if begin:
        bpe.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, bpe.token_to_id(begin))])
    bpe.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json",
               {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"} | settings)


def write_byte_level(folder, texts, marks, rule=True, **settings):
    """Write a byte-level BPE trained on texts. marks: special tokens; rule: <s> begins a text."""
    tokenizers = pytest.importorskip("tokenizers")
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = byte_level
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=marks, show_progress=False,
        initial_alphabet=byte_level.alphabet()))
    write_bpe(folder, bpe, "<s>" if rule else None, eos_token="</s>", added_tokens_decoder={
        str(i): {"content": text, "special": True} for i, text in enumerate(marks)}, **settings)
    return bpe.get_vocab_size()


def reference(folder, kind="Llama", **settings):
    """Save a small random model of transformers, every part of which matters; return it."""
    transformers = pytest.importorskip("transformers", reason="see requirements-dev.txt")
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 1e4}
    model = getattr(transformers, f"{kind}ForCausalLM")(
        getattr(transformers, f"{kind}Config")(**{
            "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 101,
            "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 128,
            "rope_parameters": rope} | settings)).eval()
    for name, parameter in model.named_parameters():
        scale = 1.5 * parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.3
        parameter.copy_(torch.randn(parameter.shape) * scale + ("norm" in name))
    model.save_pretrained(folder)
    return read_by_transformers(folder)


def read_by_transformers(folder):
    import transformers
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture
def run(monkeypatch, capsys):
    """Return a function (module, *options) that runs a command in this process: what it prints.

    typed: its standard input. run.refused(module, *options): its one line of error, after status 2.
    """
    def run_command(module, *options, typed="", expected=0):
        monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, options)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        status = 0
        try:
            with torch.enable_grad():
                command_line(module.main)
        except SystemExit as ended:
            status = ended.code or 0
        out, err = capsys.readouterr()
        assert status == expected, err
        run_command.error = err
        if expected:
            assert err.count("\n") == 1 and ".py: error: " in err or "beyond: error: " in err
        return err if expected else out
    run_command.refused = functools.partial(run_command, expected=2)
    return run_command
