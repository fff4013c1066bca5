"""What the tests of the chapters share: a small Llama, and settings that come first of all."""
import os
from pathlib import Path

import pytest

from model import Config, Llama

import torch

# Without a GPU Triton's kernels are interpreted, which is read when triton is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
torch.set_num_threads(1)             # tiny models: a second thread would wait more than it works

import kernel                        # noqa: E402

ROOT = Path(__file__).parent.parent.parent
NO_COMPILER = pytest.mark.skipif(not kernel.fits_c(torch.zeros(1)), reason="no C compiler")


def random_llama(dtype, seed=0, **shape):
    """Return a small Llama whose next tokens differ and whose activations matter."""
    torch.manual_seed(seed)
    model = Llama(Config(**shape))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if parameter.ndim == 2:
            parameter.copy_(torch.randn(parameter.shape) * 1.5 * parameter.shape[1] ** -0.5)
        else:
            parameter.copy_(1 + 0.2 * torch.randn(parameter.shape))
    return model.to(dtype).eval()
