"""One torch thread: pytest's workers already share the cores."""

import torch

torch.set_num_threads(1)
