"""Interventions on disk, and the oracle's model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engine_oracle import save_random
from kernel_fixtures import kernels, one_thread
from transformers import AutoModelForCausalLM, PreTrainedModel

__all__ = ["kernels", "one_thread"]


@pytest.fixture(scope="session")
def oracle_model(tiny_llama_folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_llama_folder, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("artifacts")
    specs: list[tuple[list[tuple[int, str]], int, int]] = [
        ([(1, "l1")], 4, 0),
        ([(layer, "f7+l7") for layer in range(4)], 2, 0),
        ([(0, "f3"), (0, "l2"), (2, "f3"), (2, "l2")], 3, 0),
        ([(2, "prompt")], 8, 2),
        ([(1, "generated")], 2, 0),
        ([(3, "all"), (0, "all")], 1, 3),
    ]
    return [
        save_random(root / str(i), placements, rank=rank, seed=i, activation=activation)
        for i, (placements, rank, activation) in enumerate(specs)
    ]
