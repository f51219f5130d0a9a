"""One thread a process: the models are tiny, and two threads that wait for each other on a busy machine cost minutes."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # for the subprocesses that tests start

import torch

torch.set_num_threads(1)
