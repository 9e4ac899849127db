"""Training from cached activations gives the losses and gradients of training without a cache, in every form."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_training import plain_loss
from training_data import beginning_alike, examples, plan
from transformers import PreTrainedModel

from reftserve.interventions import FAMILIES, Positions, TrainableIntervention
from reftserve.server.base.fused import FusedMLP, FusedRMSNorm
from reftserve.server.base.fused_attention import FusedAttention
from reftserve.server.base.kernel_choice import ALL_KERNELS, KernelChoice, NoKernels
from reftserve.server.datasets import EncodedExample, Splits
from reftserve.server.training.activation_cache import ActivationCache, Arena
from reftserve.server.training.plan import Plan
from reftserve.server.training.trainer import Trainer, advance
from reftserve.server.training.varlen import VarlenModel
from reftserve.server.training.varlen_attention import SpanAttention

TOLERANCE = 1e-5
POSITIONS = ["l1", "l3", "f1+l1", "f2+l2", "f3", "f4+l9", "prompt", "generated", "all"]
PLENTY = 1 << 30


Models = dict[str, tuple[PreTrainedModel, VarlenModel]]  # by architecture: a plain and a packed model


def pairs(kernels: KernelChoice) -> Models:
    found = {}
    for name in ARCHITECTURES:
        plain, packed = (tiny_model(name).requires_grad_(False) for _ in range(2))
        found[name] = (plain, VarlenModel(packed, kernels=kernels))
    return found


@pytest.fixture(scope="module")
def models() -> Models:
    return pairs(ALL_KERNELS)


@pytest.fixture(scope="module")
def models_without_kernels() -> Models:
    return pairs(NoKernels())


def filled_cache(
    packed: VarlenModel, run: Plan, data: list[EncodedExample], arena: Arena, lowest: int | None = None
) -> ActivationCache:
    positions = Positions.parse(run.positions)
    places = [positions] if run.tied else positions.split()
    cache = ActivationCache(packed, min(run.layers), places, arena)
    cache.fill(data)
    return cache


def trainer_of(cache: ActivationCache, run: Plan, data: list[EncodedExample], seed: int = 0) -> Trainer:
    return Trainer(cache, Splits(train=data, validation=data[:2], test=data[:2]), run, seed=seed)


def gradients(trainers: list[Trainer]) -> list[tuple[float, list[torch.Tensor]]]:
    kept: list[list[torch.Tensor]] = [[] for _ in trainers]
    for trainer, found in zip(trainers, kept, strict=True):

        def record(*_: object, trainer: Trainer = trainer, found: list[torch.Tensor] = found) -> None:
            parameters = trainer.intervention.parameters()
            found.extend(torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters)

        trainer.optimizer.register_step_pre_hook(record)
    return [(metrics.loss, found) for metrics, found in zip(advance(trainers), kept, strict=True)]


def plain_gradients(
    model: PreTrainedModel, run: Plan, batch: list[EncodedExample], hidden_size: int, seed: int = 0
) -> tuple[float, list[torch.Tensor]]:
    intervention = TrainableIntervention(run.intervention, hidden_size, seed=seed)
    loss = plain_loss(model, batch, intervention)
    loss.backward()
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in intervention.parameters()]
    return float(loss.detach()), found


def assert_equal(one: tuple[float, list[torch.Tensor]], other: tuple[float, list[torch.Tensor]]) -> None:
    assert one[0] == pytest.approx(other[0], abs=TOLERANCE)
    for found, expected in zip(one[1], other[1], strict=True):
        scale = max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(found, expected, atol=TOLERANCE * scale, rtol=0)


@settings(max_examples=100, deadline=None)
@given(
    architecture=st.sampled_from(ARCHITECTURES),
    native=st.booleans(),
    family=st.sampled_from(sorted(FAMILIES)),
    positions=st.sampled_from(POSITIONS),
    layers=st.sets(st.integers(0, 2), min_size=1),
    tied=st.booleans(),
    room=st.sampled_from(["none", "some", "disk", "plenty"]),
    max_rows=st.sampled_from([5, 40, 2048]),
    common=st.integers(0, 20),
    seed=st.integers(0, 1000),
)
def test_gradients_equal_those_of_the_plain_computation(
    models: Models,
    models_without_kernels: Models,
    tmp_path_factory: pytest.TempPathFactory,
    architecture: str,
    native: bool,
    family: str,
    positions: str,
    layers: set[int],
    tied: bool,
    room: str,
    max_rows: int,
    common: int,
    seed: int,
) -> None:
    plain, packed = (models if native else models_without_kernels)[architecture]
    run = plan(
        layers=sorted(layers),
        positions=positions,
        family=family,
        tied=tied,
        dropout=0.0,
        batch_size=6,
        max_grad_norm=1e9,
    )
    data = beginning_alike(examples(6, seed, vocabulary=100, tail=2), seed, common)
    arenas = {
        "none": lambda: Arena(0),
        "some": lambda: Arena(6_000),
        "disk": lambda: Arena(2_000, PLENTY, tmp_path_factory.mktemp("cache")),
        "plenty": lambda: Arena(PLENTY),
    }
    cache = filled_cache(packed, run, data, arenas[room]())
    assert len(cache) == {"none": 0, "plenty": 6, "disk": 6}.get(room, len(cache))
    trainer = trainer_of(cache, run, data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("reftserve.server.training.trainer.MAX_ROWS", max_rows)
        found = gradients([trainer])[0]
    assert_equal(found, plain_gradients(plain, run, data, packed.hidden_size))


@settings(max_examples=20, deadline=None)
@given(
    layers=st.lists(st.integers(0, 2), min_size=2, max_size=3),
    positions=st.lists(st.sampled_from(POSITIONS), min_size=3, max_size=3),
    room=st.sampled_from([0, PLENTY]),
    max_rows=st.sampled_from([40, 2048]),
    common=st.integers(0, 20),
    seed=st.integers(0, 1000),
)
def test_trials_in_shared_passes_learn_exactly_as_alone(
    models: Models,
    layers: list[int],
    positions: list[str],
    room: int,
    max_rows: int,
    common: int,
    seed: int,
) -> None:
    _, packed = models["llama"]
    data = beginning_alike(examples(7, seed, vocabulary=100, tail=2), seed, common)
    runs = [
        plan(layers=[layer], positions=at, tied=True, dropout=0.0, rank=1 + number, max_grad_norm=1e9)
        for number, (layer, at) in enumerate(zip(layers, positions, strict=False))
    ]
    shared = ActivationCache(packed, min(layers), {Positions.parse(at) for at in positions}, Arena(room))
    shared.fill(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("reftserve.server.training.trainer.MAX_ROWS", max_rows)
        together = gradients([trainer_of(shared, run, data, seed=number) for number, run in enumerate(runs)])
    for number, (run, found) in enumerate(zip(runs, together, strict=True)):
        alone = trainer_of(filled_cache(packed, run, data, Arena(PLENTY)), run, data, seed=number)
        assert_equal(found, gradients([alone])[0])


@pytest.mark.parametrize("positions", ["l1", "f3+l2"])
def test_scores_from_the_cache_are_those_of_the_plain_model(models: Models, positions: str) -> None:
    plain, packed = models["gemma3"]
    run = plan(layers=[1], positions=positions, tied=True)
    data = beginning_alike(examples(5, 3, vocabulary=100, tail=2), 3, common=12)
    trainer = trainer_of(filled_cache(packed, run, data, Arena(PLENTY)), run, data)
    for edits in ((), trainer.intervention.lower()):
        with torch.no_grad():
            expected = float(plain_loss(plain, data, edits))
        assert trainer.evaluate(data, edits)["loss"] == pytest.approx(expected, abs=TOLERANCE)


def test_a_suffix_only_pass_computes_the_last_prompt_token_and_the_completion(
    models: Models,
) -> None:
    _, packed = models["llama"]
    data = examples(4, 1, vocabulary=100, tail=2)
    cache = filled_cache(packed, plan(layers=[1], positions="l1"), data, Arena(PLENTY))
    assert [cache.span(e).rows for e in data] == [len(e.completion_ids) for e in data]


@pytest.mark.parametrize(("dropout", "rows_in_common"), [(0.0, 20), (0.5, 0)])
@pytest.mark.parametrize("trials", [1, 3])
def test_a_common_beginning_is_computed_once_a_step_unless_dropout_changes_it(
    models: Models, dropout: float, rows_in_common: int, trials: int
) -> None:
    _, packed = models["llama"]
    text = tuple(range(10, 30))
    data = [EncodedExample((*text, 40 + i, 50, 51), (7, 2)) for i in range(4)]
    run = plan(layers=[1], positions="f7+l2", dropout=dropout, batch_size=4)
    cache = filled_cache(packed, run, data, Arena(PLENTY))
    trainers = [trainer_of(cache, run, data, seed=number) for number in range(trials)]
    with counted_rows(packed) as rows:
        advance(trainers)
        trainers[0].evaluate(data, trainers[0].intervention.lower())
    all_rows = sum(example.length - 1 for example in data)
    assert rows == [trials * (all_rows - 3 * rows_in_common), all_rows - 3 * 20]


@pytest.mark.parametrize("positions", ["l1", "f7+l7"])
def test_the_head_computes_only_the_rows_that_predict_answers(models: Models, positions: str) -> None:
    _, packed = models["llama"]
    data = examples(4, 1, vocabulary=100, tail=3)
    run = plan(layers=[1], positions=positions, batch_size=4)
    cache = filled_cache(packed, run, data, Arena(PLENTY))
    trainer = trainer_of(cache, run, data)
    head: Any = packed.model.get_output_embeddings()
    seen: list[int] = []
    handle = head.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[-2]))
    trainer.advance()
    handle.remove()
    assert seen == [sum(len(example.completion_ids) for example in data)]


@contextmanager
def counted_rows(packed: VarlenModel) -> Iterator[list[int]]:
    counts: list[int] = []
    handle = packed.layers[-1].register_forward_hook(lambda module, inputs, output: counts.append(inputs[0].shape[1]))
    try:
        yield counts
    finally:
        handle.remove()


def test_on_the_cpu_passes_use_the_engines_modules_and_the_span_attention_kernel(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, packed = models["llama"]
    kinds = Counter(type(module) for module in packed.model.modules())
    assert (kinds[FusedAttention], kinds[FusedMLP], kinds[FusedRMSNorm]) == (3, 3, 7)
    data, widths = examples(3, 0, vocabulary=100), []
    run = plan(layers=[0], positions="l1", dropout=0.0)
    trainer = trainer_of(filled_cache(packed, run, data, Arena(PLENTY)), run, data)
    attend = SpanAttention.attend

    def recorded(self: SpanAttention, layer: int, query: torch.Tensor, *rest: Any) -> torch.Tensor:
        widths.append((layer, query.shape[1]))
        return attend(self, layer, query, *rest)

    monkeypatch.setattr(SpanAttention, "attend", recorded)
    trainer.advance()
    assert widths == [(1, 6), (2, 6)], "the layers above the edited one, with two rows of each example"


def test_the_cache_refuses_a_trainer_whose_edits_would_change_cached_activations(
    models: Models,
) -> None:
    _, packed = models["llama"]
    data = examples(4, 1, vocabulary=100, tail=2)
    cache = filled_cache(packed, plan(layers=[1], positions="l1"), data, Arena(PLENTY))
    for wrong in (plan(layers=[0], positions="l1"), plan(layers=[1], positions="l2")):
        with pytest.raises(ValueError, match="cache keeps"):
            trainer_of(cache, wrong, data)


def test_the_arena_stores_tensors_unchanged_in_a_file_without_a_name(tmp_path: Path) -> None:
    arena = Arena(100, 10_000, tmp_path)
    tensors = [torch.randn(5, 5), torch.randn(20, 20), torch.randn(9, 101).to(torch.bfloat16)]
    for tensor in tensors:
        stored = arena.store(tensor)
        assert stored is not None
        assert torch.equal(stored, tensor)
    assert arena.store(torch.zeros(2000)) is None
    assert list(tmp_path.iterdir()) == []
