"""Set what must be set before triton is imported: without a GPU its kernels are interpreted."""
import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
torch.set_num_threads(1)             # tiny models: a second thread would wait more than it works
