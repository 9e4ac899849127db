"""Model folders that cannot be served: one sentence with the file and the remedy, before torch is imported."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from reftserve.server.base.folder import open_base, resolve_model_folder
from reftserve.server.base.model import load_model
from reftserve.server.base.model_errors import UnsupportedModel
from reftserve.server.base.transformers_source import architecture, causal_classes, default_value
from reftserve.server.errors import NotFound
from reftserve.server.settings import Settings

TINY: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
OTHERS: dict[str, Callable[[], transformers.PreTrainedModel]] = {
    "bloom": lambda: transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=300, hidden_size=16, n_layer=2, n_head=2)
    ),
    "mamba": lambda: transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=300, hidden_size=16, num_hidden_layers=2, state_size=4)
    ),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=300, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    ),
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**TINY)),
    "bert as a decoder": lambda: transformers.BertLMHeadModel(transformers.BertConfig(**TINY)),
    "roberta": lambda: transformers.RobertaForMaskedLM(transformers.RobertaConfig(**TINY)),
    "granite hybrid": lambda: transformers.GraniteMoeHybridForCausalLM(
        transformers.GraniteMoeHybridConfig(
            **TINY, layer_types=["mamba", "attention"], mamba_n_heads=4, mamba_d_head=8, num_local_experts=0
        )
    ),
    "llama without a head": lambda: transformers.LlamaModel(transformers.LlamaConfig(**TINY)),
}


@pytest.fixture
def folder(tiny_llama_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_llama_folder, tmp_path / "model")


def settings(folder: Path) -> Settings:
    return Settings(model=str(folder), data=folder.parent / "data")


def refusal(folder: Path) -> str:
    with pytest.raises((NotFound, UnsupportedModel)) as found:
        open_base(settings(folder))
    said = str(found.value)
    assert "\n" not in said
    assert len(said) < 600, said
    assert str(folder) in said
    return said


def configure(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def into_shards(folder: Path) -> list[Path]:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {f"model-0000{n + 1}-of-00002.safetensors": names[n::2] for n in range(2)}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return [folder / file for file in parts]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "config.json is not JSON: it is empty"),
        ("{", "config.json is not JSON: Expecting"),
        ('{"model_type": "llama",}', "config.json is not JSON: .*line 1"),
        ("[]", "config.json holds a list; expected a JSON object"),
        ("[" * 100_000, "config.json is not JSON: "),
        ("{}", "config.json names no model_type"),
    ],
)
def test_a_config_that_is_empty_or_no_json_is_refused(folder: Path, content: str, reason: str) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(NotFound, match=reason):
        open_base(settings(folder))
    refusal(folder)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"architectures": ...}, 'add "architectures": ["LlamaForCausalLM"]'),
        ({"model_type": "lama"}, "model_type 'lama', which transformers 5.*does not know; did you mean llama"),
        ({"model_type": "xyzzy"}, "model_type 'xyzzy'.*a newer one may"),
        ({"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}, "'mine'.*auto_map.*never run"),
        ({"model_type": "vit", "architectures": ["ViTModel"]}, "describes ViTModel, which is no decoder"),
        ({"quantization_config": {"quant_method": "gptq"}}, "'gptq'.*gptqmodel.*before quantization"),
        ({"quantization_config": {"quant_method": "awq"}}, "'awq'.*gptqmodel.*before quantization"),
        ({"quantization_config": {"quant_method": "fp8"}}, "'fp8'; only float32.*before quantization"),
        ({"vocab_size": ...}, "config.json has no 'vocab_size'"),
    ],
)
def test_a_config_that_cannot_be_served_is_refused(folder: Path, fields: dict[str, Any], reason: str) -> None:
    configure(folder, **fields)
    with pytest.raises((NotFound, UnsupportedModel), match=reason.replace("[", r"\[")):
        open_base(settings(folder))
    refusal(folder)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("bloom", "BloomForCausalLM, whose attention transformers"),
        ("mamba", "MambaForCausalLM, whose layers keep a state"),
        ("granite hybrid", "GraniteMoeHybridForCausalLM, whose layers keep a state"),
        ("t5", "T5ForConditionalGeneration, which is no decoder"),
        ("bert", "BertModel, which has no language model's head"),
        ("roberta", "RobertaForMaskedLM, which has no language model's head"),
        ("bert as a decoder", "an encoder (bert), whose attention is not causal"),
        ("llama without a head", "LlamaModel, which has no language model's head.*write that name"),
    ],
)
def test_models_that_are_no_decoders_with_attention_are_refused(folder: Path, kind: str, reason: str) -> None:
    for file in ("config.json", "model.safetensors"):
        (folder / file).unlink()
    OTHERS[kind]().save_pretrained(folder)
    with pytest.raises(UnsupportedModel, match=reason.replace("(", r"\(").replace(")", r"\)")):
        resolve_model_folder(settings(folder))
    refusal(folder)


@pytest.mark.parametrize(
    ("others", "reason"),
    [
        ([], "holds no weights; expected model.safetensors, or model.safetensors.index.json"),
        (["pytorch_model.bin"], r"pickles only \(pytorch_model.bin\).*never read.*save_pretrained"),
        (["consolidated.00.pth"], r"pickles only \(consolidated.00.pth\)"),
        (["model-q4.gguf"], r"GGUF only \(model-q4.gguf\).*gguf_file='model-q4.gguf'"),
        (["consolidated.safetensors"], r"consolidated.safetensors, but neither model.safetensors nor"),
    ],
)
def test_a_folder_without_safetensors_is_refused(folder: Path, others: list[str], reason: str) -> None:
    (folder / "model.safetensors").unlink()
    for name in others:
        (folder / name).write_bytes(b"x")
    with pytest.raises(NotFound, match=reason):
        open_base(settings(folder))
    refusal(folder)


def test_weights_that_are_cut_short_are_refused_with_both_sizes(folder: Path) -> None:
    file = folder / "model.safetensors"
    whole = file.stat().st_size
    cut(file)
    assert f"{file} is no complete safetensors file: it has {whole - 100} of {whole} bytes" in refusal(folder)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "(0 bytes); download it again"),
        (b"\xff" * 100, "(100 bytes); download it again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git-lfs pointer; run `git lfs pull`"),
    ],
)
def test_weights_that_are_no_safetensors_are_refused(folder: Path, content: bytes, reason: str) -> None:
    (folder / "model.safetensors").write_bytes(content)
    assert reason in refusal(folder)


def test_shards_are_read_and_a_missing_or_cut_one_is_refused(folder: Path) -> None:
    first, second = into_shards(folder)
    assert resolve_model_folder(settings(folder)) == folder.resolve()
    cut(second)
    assert f"{second} is no complete safetensors file" in refusal(folder)
    second.unlink()
    assert f"lacks {second.name} of the 2 files that model.safetensors.index.json names" in refusal(folder)
    shutil.copy(first, second)
    assert f"{second} lacks the tensor" in refusal(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    assert "has no weight_map" in refusal(folder)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("tokenizer.json", None, "holds no tokenizer.json; convert"),
        ("tokenizer.json", "{", "tokenizer.json cannot be read: EOF"),
        ("tokenizer.json", '{"model": 1}', "tokenizer.json cannot be read: "),
        ("tokenizer_config.json", "", "tokenizer_config.json is not JSON: it is empty"),
        ("generation_config.json", "{", "generation_config.json is not JSON"),
    ],
)
def test_a_tokenizer_that_is_missing_or_damaged_is_refused(
    folder: Path, name: str, content: str | None, reason: str
) -> None:
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    assert reason in refusal(folder)


def test_a_peft_adapter_is_refused_with_the_name_of_its_base(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    assert "holds a PEFT adapter, not a base model; its base is 'org/base'" in refusal(folder)


def test_weights_of_another_model_are_refused_when_they_are_loaded(folder: Path) -> None:
    configure(folder, num_hidden_layers=5)
    with pytest.raises(
        UnsupportedModel, match=r"lack .* parameters of LlamaForCausalLM, such as model\.layers\.4"
    ) as found:
        load_model(folder, torch.float32, torch.device("cpu"))
    assert "\n" not in str(found.value)


def test_a_context_that_the_config_leaves_out_is_transformers_default(folder: Path) -> None:
    configure(folder, max_position_embeddings=...)
    default = transformers.LlamaConfig().max_position_embeddings
    assert open_base(settings(folder)).max_context == default
    model = load_model(folder, torch.float32, torch.device("cpu"))
    assert model.config.max_position_embeddings == default


@pytest.mark.parametrize(
    "kind", ["llama", "mistral", "qwen2", "qwen3", "gpt2", "gpt_neox", "opt", "gemma3_text", "nemotron"]
)
def test_what_is_read_from_transformers_source_is_what_it_does(kind: str) -> None:
    found = architecture(kind)
    assert found is not None
    model = getattr(transformers, found.name)
    assert found.uses_attention_interface == model._supports_attention_backend
    assert (found.is_stateful, found.is_encoder) == (False, False)
    config = model.config_class()
    context = default_value(kind, ("max_position_embeddings", "n_positions"))
    assert context == config.max_position_embeddings
    assert causal_classes()[kind] == found.name


def test_a_folder_is_refused_without_importing_torch(folder: Path) -> None:
    configure(folder, quantization_config={"quant_method": "gptq"})
    code = (
        "import sys\nfrom reftserve.server.base.folder import resolve_model_folder\n"
        "from reftserve.server.settings import Settings\n"
        f"try:\n    resolve_model_folder(Settings(model={str(folder)!r}))\n"
        "except Exception as cause:\n    print(cause)\n"
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "'gptq'" in done.stdout


@pytest.mark.parametrize("command", ["serve", "worker", "doctor"])
def test_serve_worker_and_doctor_say_the_same_about_a_folder(folder: Path, command: str) -> None:
    cut(folder / "model.safetensors")
    flags = ["--model", str(folder), "--data", str(folder.parent / "data")]
    done = subprocess.run(
        [sys.executable, "-m", "reftserve.server.commands", command, *flags], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    [line] = [line for line in (done.stdout + done.stderr).splitlines() if "safetensors" in line]
    assert refusal(folder) in line
    assert "Traceback" not in done.stdout + done.stderr
