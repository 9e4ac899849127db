"""I3: cache blocks are shared exactly when tokens and edits up to their end agree."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import pytest
from engine_oracle import make_engine, request, run_until_done, save_random
from hypothesis import given, settings
from hypothesis import strategies as st

from reftserve.interventions import Intervention, load_artifact
from reftserve.server.engine import prefix_cache
from reftserve.server.engine.block_allocator import BlockAllocator
from reftserve.server.engine.engine import Engine
from reftserve.server.engine.messages import Submit
from reftserve.server.engine.prefix_cache import BlockKeys

BLOCK = 4
PROMPT = list(range(5, 45))


def cached_tokens(engine: Engine, submit: Submit) -> int:
    engine.submit(submit)
    return run_until_done(engine).finished[submit.request_id].cached_tokens


def edits_at(submit: Submit, interventions: dict[str, Intervention], index: int) -> list[object]:
    return [
        (ref.content_hash, number, ref.scale)
        for ref in submit.interventions
        for number, site in enumerate(interventions[ref.content_hash].sites)
        if index in site.positions.indices(len(submit.prompt_ids), index, index + 1)
    ]


@dataclass(frozen=True)
class Turn:
    """A request: the length of its common beginning, its own end, and its interventions."""

    shared: int
    own: int
    uses: list[tuple[int, float]]
    salt: str


turns = st.builds(
    Turn,
    shared=st.integers(0, 40),
    own=st.integers(1, 6),
    uses=st.lists(st.tuples(st.integers(0, 5), st.sampled_from([1.0, -1.5])), max_size=2, unique_by=lambda use: use[0]),
    salt=st.sampled_from(["", "", "tenant"]),
)


@settings(max_examples=settings().max_examples // 2)  # several runs each
@given(plans=st.lists(turns, min_size=2, max_size=6), max_batch_tokens=st.integers(3, 64), seed=st.integers(0, 1000))
def test_a_request_finds_exactly_the_blocks_whose_tokens_and_edits_agree(
    tiny_llama_folder: Path, artifacts: list[Path], plans: list[Turn], max_batch_tokens: int, seed: int
) -> None:
    engine = make_engine(tiny_llama_folder, blocks=400, block_size=BLOCK, max_batch_tokens=max_batch_tokens)
    rng = random.Random(seed)  # noqa: S311 - test data
    known = {intervention.content_hash: intervention for intervention in map(load_artifact, artifacts)}
    before: list[tuple[str, list[tuple[int, object]]]] = []
    for index, plan in enumerate(plans):
        submit = request(
            str(index),
            PROMPT[: plan.shared] + [rng.randrange(50, 300) for _ in range(plan.own)],
            uses=[(artifacts[artifact], scale) for artifact, scale in plan.uses],
            max_tokens=5,
            cache_salt=plan.salt,
        )
        engine.submit(submit)
        run = run_until_done(engine)
        tokens = submit.prompt_ids + run.tokens[submit.request_id]
        content = [(token, edits_at(submit, known, position)) for position, token in enumerate(tokens)]
        longest = 0
        for salt, other in before:
            if salt == plan.salt:
                agreeing = next((i for i, (a, b) in enumerate(zip(content, other, strict=False)) if a != b), None)
                # The last sampled token was never computed, so it has no keys and values.
                longest = max(longest, min(len(content), len(other) - 1) if agreeing is None else agreeing)
        expected = min(longest, len(submit.prompt_ids) - 1) // BLOCK * BLOCK
        assert run.finished[submit.request_id].cached_tokens == expected
        before.append((plan.salt, content))
    engine.close()


def test_interventions_that_edit_only_the_end_share_the_base_models_prefix(
    tiny_llama_folder: Path, tmp_path: Path
) -> None:
    engine = make_engine(tiny_llama_folder, blocks=200)
    assert cached_tokens(engine, request("base", PROMPT)) == 0
    for index in range(3):
        suffix_only = save_random(tmp_path / str(index), [(1, "l1"), (3, "l1")], rank=2, seed=index)
        assert cached_tokens(engine, request(str(index), PROMPT, uses=[(suffix_only, 1.0)])) == 36
    first = save_random(tmp_path / "first", [(1, "f1")], rank=2)
    assert cached_tokens(engine, request("edited start", PROMPT, uses=[(first, 1.0)])) == 0
    assert cached_tokens(engine, request("the same again", PROMPT, uses=[(first, 1.0)])) == 36
    assert cached_tokens(engine, request("other scale", PROMPT, uses=[(first, 0.5)])) == 0
    engine.close()


def test_an_intervention_shares_its_edited_blocks_with_itself_in_a_composition(
    tiny_llama_folder: Path, tmp_path: Path
) -> None:
    prefix, other = (
        save_random(tmp_path / name, [(1, "f2"), (1, "l1")], rank=2, seed=i) for i, name in enumerate("po")
    )
    suffix = save_random(tmp_path / "s", [(2, "l2")], rank=2, seed=3)
    engine = make_engine(tiny_llama_folder, blocks=200)
    assert cached_tokens(engine, request("alone", PROMPT, uses=[(prefix, 1.0)])) == 0
    assert cached_tokens(engine, request("composed", PROMPT, uses=[(suffix, 0.5), (prefix, 1.0)])) == 36
    assert cached_tokens(engine, request("another", PROMPT, uses=[(other, 1.0)])) == 0
    engine.close()


def test_the_next_turn_of_a_chat_finds_the_previous_answer_in_the_cache(tiny_llama_folder: Path) -> None:
    engine = make_engine(tiny_llama_folder, blocks=200)
    engine.submit(request("turn 1", PROMPT, max_tokens=9))
    answer = run_until_done(engine).tokens["turn 1"]
    assert cached_tokens(engine, request("turn 2", [*PROMPT, *answer, 7, 8])) == 48
    engine.close()


def test_no_salt_stands_for_the_key_of_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_cache, "_digest", bytes)  # keys are then their own content
    tokens = [1] * 2 * BLOCK
    first, second = BlockKeys("salt", (), 1, BLOCK).of(tokens, 2)
    [after_the_salt] = BlockKeys(first.decode(), (), 1, BLOCK).of(tokens, 1)
    assert first in after_the_salt
    assert after_the_salt != second


def test_hits_are_counted_and_can_be_switched_off(tiny_llama_folder: Path) -> None:
    engine = make_engine(tiny_llama_folder)
    assert [cached_tokens(engine, request(str(i), PROMPT)) for i in range(2)] == [0, 36]
    assert engine.stats().cached_prompt_tokens == 36
    off = make_engine(tiny_llama_folder, prefix_cache=False)
    assert [cached_tokens(off, request(str(i), PROMPT)) for i in range(2)] == [0, 0]
    for each in (engine, off):
        each.close()


def test_unreachable_blocks_are_evicted_before_reachable_ones() -> None:
    allocator = BlockAllocator(4, BLOCK)
    table: list[int] = []
    assert allocator.extend(table, 3 * BLOCK)
    kept = table[:2]
    for block, key in zip(kept, (b"a", b"b"), strict=True):
        allocator.publish(block, key)
    allocator.release(table, edited=False)
    other: list[int] = []
    assert allocator.extend(other, 2 * BLOCK)
    assert allocator.find([b"a", b"b"]) == kept
    assert allocator.extend(other, 3 * BLOCK)
    assert allocator.find([b"a", b"b"]) == kept[:1]  # the end of a chain is useless without its beginning
    assert not allocator.extend(other, 5 * BLOCK)
