"""One thread a process: the models are tiny, and two threads that wait for each other on a busy machine cost minutes. Without a GPU, Triton's kernels
run in its interpreter, which must be chosen before Triton is imported."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # for the subprocesses that tests start

import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
