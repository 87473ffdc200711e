"""The devices that tests run on: the host, and a GPU where there is one."""

from __future__ import annotations

import pytest
import torch

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible")
EACH = ["cpu", pytest.param("cuda", marks=gpu)]
