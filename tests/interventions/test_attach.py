"""attach() edits any Hugging Face decoder, found by structure. It is the oracle of engine and training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, tiny_model
from safetensors.torch import load_file, save_file
from tiny_models import tiny_llama
from transformers import PreTrainedModel

from reftserve.interventions import (
    InterventionConfig,
    InterventionError,
    PlacedEdit,
    Positions,
    ShapeError,
    TrainableIntervention,
    attach,
    decoder_layers,
    fingerprint,
    model_checksum,
)

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def intervention(model: PreTrainedModel, positions: str = "f2+l2", **options: object) -> TrainableIntervention:
    hidden = model.config.get_text_config().hidden_size
    made = TrainableIntervention(InterventionConfig("loreft", (0, 2), positions, rank=2, **options), hidden)  # type: ignore[arg-type]
    for name, parameter in made.named_parameters():
        if "parametrizations" not in name:  # torch keeps signs there, so nothing may be added
            parameter.data += 0.3 * torch.randn_like(parameter)
    return made


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, 90, (1, 11), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_generate_with_a_cache_equals_one_teacher_forced_pass(name: str, ids: torch.Tensor) -> None:
    model = tiny_model(name)
    for positions in ("f2+l2", "l1", "prompt", "generated", "all"):
        edits = intervention(model, positions).lower()
        with torch.no_grad(), attach(model, edits, ids.shape[1]):
            out = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
            whole = model(out).logits[0, ids.shape[1] - 1 : -1]
        assert whole.argmax(-1).tolist() == out[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_exactly_the_named_rows_of_the_named_layers_change(name: str, ids: torch.Tensor) -> None:
    model = tiny_model(name)
    layers = decoder_layers(model)
    assert len(layers) == model.config.get_text_config().num_hidden_layers
    edits = intervention(model).lower()
    seen: list[torch.Tensor] = []

    def record(module: torch.nn.Module, args: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        seen.append(hidden.reshape(-1, hidden.shape[-1]))

    with torch.no_grad():
        before_the_edit = layers[0].register_forward_hook(record)
        with attach(model, edits, ids.shape[1]):
            after_the_edit = layers[0].register_forward_hook(record)
            model(ids)
    before_the_edit.remove()
    after_the_edit.remove()
    before, after = seen
    touched = [0, 1, ids.shape[1] - 2, ids.shape[1] - 1]
    torch.testing.assert_close(after[touched], edits[0].edit.apply(before[touched]), **CLOSE)
    untouched = [i for i in range(ids.shape[1]) if i not in touched]
    assert torch.equal(after[untouched], before[untouched])


def test_rows_of_a_padded_batch_are_edited_as_alone() -> None:
    model = tiny_llama()
    edits = intervention(model).lower()
    prompts = [torch.randint(3, 300, (n,)) for n in (3, 9, 6)]
    batch = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(p) for p in prompts], batch_first=True)
    with torch.no_grad():
        with attach(model, edits, torch.tensor([3, 9, 6])):
            together = model(batch, attention_mask=mask).logits
        for row, prompt in enumerate(prompts):
            with attach(model, edits, len(prompt)):
                torch.testing.assert_close(together[row, : len(prompt)], model(prompt[None]).logits[0], **CLOSE)


def test_two_interventions_at_one_layer_read_the_same_unedited_state(ids: torch.Tensor) -> None:
    model = tiny_llama()
    first, second = intervention(model).lower(), intervention(model, "l1").lower()
    with torch.no_grad(), attach(model, [*first, *second], 11):
        one = model(ids).logits
    with torch.no_grad(), attach(model, [*second, *first], 11):
        other = model(ids).logits
    torch.testing.assert_close(one, other, **CLOSE)


def test_training_and_lowered_forms_agree_and_gradients_reach_the_intervention_alone(ids: torch.Tensor) -> None:
    model = tiny_llama().requires_grad_(False)
    trainable = intervention(model, tied=False)
    before = model_checksum(model)
    with attach(model, trainable, 11):
        logits = model(ids).logits
    with torch.no_grad(), attach(model, trainable.lower(), 11):
        torch.testing.assert_close(model(ids).logits, logits, **CLOSE)
    logits.square().mean().backward()
    without = [name for name, p in trainable.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []
    assert all(p.grad is None for p in model.parameters())
    assert model_checksum(model) == before


def test_nothing_is_left_on_the_model_even_after_an_error(ids: torch.Tensor) -> None:
    model = tiny_llama()
    plain = model(ids).logits
    with pytest.raises(RuntimeError, match="on the way"), attach(model, intervention(model).lower(), 11):
        raise RuntimeError("on the way")
    too_high = [PlacedEdit(9, Positions.parse("l1"), intervention(model).lower()[0].edit)]
    with pytest.raises(ShapeError, match="layers 0 to 3"), attach(model, too_high, 11):
        pass
    assert torch.equal(model(ids).logits, plain)
    assert not any(layer._forward_hooks for layer in decoder_layers(model))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_fingerprint_depends_on_the_model_not_on_its_files(tiny_llama_folder: Path, tmp_path: Path) -> None:
    found = fingerprint(tiny_llama_folder)
    assert (found.architecture, found.hidden_size, found.num_layers) == ("LlamaForCausalLM", 32, 4)
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in tiny_llama_folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    half = len(tensors) // 2
    parts = [{name: tensors[name] for name in names} for names in (list(tensors)[:half], list(tensors)[half:])]
    for index, part in enumerate(parts):
        save_file(part, copy / f"model-{index}.safetensors")
    assert fingerprint(copy) == found
    first = next(iter(tensors))
    save_file(
        {**{n: tensors[n] for n in list(tensors)[:half]}, first: tensors[first] + 1}, copy / "model-0.safetensors"
    )
    assert [m.field for m in found.mismatches(fingerprint(copy))] == ["weights_hash"]
    (copy / "chat_template.jinja").write_text("other")
    assert [m.field for m in found.mismatches(fingerprint(copy))] == ["weights_hash", "chat_template_hash"]
    for file in copy.glob("*.safetensors"):
        file.unlink()
    (copy / "pytorch_model.bin").write_bytes(b"never read")
    with pytest.raises(InterventionError, match="safetensors"):
        fingerprint(copy)
