"""The HTTP process imports neither torch nor transformers: it starts in a second and needs a third of the memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import openai
import pytest
from api_data import BASE
from running_server import running_server

# They can be found, as folders are checked by transformers' source, and not imported.
WITHOUT = """
import sys
from importlib.machinery import PathFinder

class Refused:
    def create_module(self, spec):
        raise ImportError(f"{spec.name} must not be imported")

class Finder:
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "accelerate"):
            spec = PathFinder.find_spec(name, path)
            spec.loader = Refused()
            return spec

sys.meta_path.insert(0, Finder)
"""
APP = """
from pathlib import Path
from reftserve.client.schemas import ChatMessage
from reftserve.server.app import create_app, open_services
from reftserve.server.base.prompts import encode_rendered, render_answer, render_chat
from reftserve.server.main import serve
from reftserve.server.settings import Settings

services = open_services(Settings(model=sys.argv[1], data=Path(sys.argv[2])))
create_app(services, print)
messages = [ChatMessage(role="user", content="hi"), ChatMessage(role="assistant", content="yes")]
tokenizer = services.base.tokenizer
print(tokenizer.decode(encode_rendered(tokenizer, render_chat(tokenizer, messages[:1]))))
print(render_answer(tokenizer, messages), tokenizer.token_bytes(5))
"""
COMMAND = """
from reftserve.server.commands import app
app()
"""


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT + script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_application_opens_renders_and_tokenizes_without_torch_and_transformers(
    tiny_llama_folder: Path, tmp_path: Path
) -> None:
    ended = run(APP, str(tiny_llama_folder), str(tmp_path))
    assert ended.returncode == 0, ended.stderr
    assert "<|im_start|>user\nhi<|im_end|>" in ended.stdout
    assert "yes<|im_end|>" in ended.stdout


@pytest.mark.parametrize("command", ["serve", "worker", "doctor"])
def test_a_command_reports_a_missing_model_without_torch_and_transformers(command: str, tmp_path: Path) -> None:
    ended = run(COMMAND, command, "--model", str(tmp_path / "none"), "--data", str(tmp_path))
    assert ended.returncode == 1
    assert "is neither a folder with a model" in " ".join((ended.stdout + ended.stderr).split())
    assert "torch" not in ended.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_a_server_that_has_answered_has_not_loaded_torch_or_transformers(
    tiny_llama_folder: Path, tmp_path: Path
) -> None:
    # A server of its own: an upload loads pyarrow, and other tests upload to the shared one.
    with running_server(tiny_llama_folder, tmp_path, worker=False) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any")
        client.chat.completions.create(model=BASE, messages=[{"role": "user", "content": "hi"}], max_tokens=2)
        engine = Path(f"/proc/{server.child('engine.process').pid}/maps").read_text()
        maps = Path(f"/proc/{server.process.pid}/maps").read_text()
    assert "libtorch" in engine, "so this test would see it"
    assert "libtorch" not in maps
    assert "pyarrow" not in maps
