"""Models that every test may use: tiny random ones for logic, the real SmolLM2 for what users do."""

from __future__ import annotations

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
from tiny_models import tiny_llama, tiny_tokenizer

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def tiny_llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete tiny model on disk: safetensors, tokenizer, chat template."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tokenizer = tiny_tokenizer()
    tiny_llama(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct, from REFTSERVE_TEST_MODEL or where `make model` puts it."""
    kept = REPOSITORY / "reftserve-data" / "models" / "HuggingFaceTB--SmolLM2-135M-Instruct"
    folder = Path(os.environ.get("REFTSERVE_TEST_MODEL", kept))
    if not (folder / "config.json").is_file():
        pytest.fail(f"no model in {folder}: run `make model`, or set REFTSERVE_TEST_MODEL to its folder")
    return folder
