"""Spans: a pass computes every token of every example once, and a common beginning once for all."""

from __future__ import annotations

from itertools import chain

from hypothesis import given
from hypothesis import strategies as st
from training_data import beginning_alike, examples

from reftserve.interventions import Positions
from reftserve.server.datasets import EncodedExample
from reftserve.server.training.spans import Batch, Span, in_passes

POSITIONS = st.sampled_from(["l1", "f3", "f2+l2", "f4+l9", "prompt", "generated", "all"])
batches = st.builds(
    lambda count, common, seed, edited, at_random: Batch(
        beginning_alike(examples(count, seed, tail=2), seed, common), edited, at_random
    ),
    count=st.integers(1, 9),
    common=st.integers(0, 20),
    seed=st.integers(0, 1000),
    edited=st.lists(POSITIONS.map(Positions.parse), max_size=2),
    at_random=st.booleans(),
)


def whole(batch: Batch) -> list[Span]:
    return [Span(example, 0, example.length - 1) for example in batch.examples]


def tokens(span: Span) -> tuple[int, ...]:
    before = () if span.parent is None else tokens(span.parent)
    return before + (span.example.prompt_ids + span.example.completion_ids)[span.start : span.stop]


def edited(positions: Positions, example: EncodedExample, stop: int) -> list[int]:
    return positions.indices(len(example.prompt_ids), 0, stop).tolist()


@given(batch=batches)
def test_a_span_and_its_parent_together_hold_the_examples_tokens(batch: Batch) -> None:
    spans = [span for family in batch.families(whole(batch)) for span in family]
    assert sorted(map(tokens, spans)) == sorted((e.prompt_ids + e.completion_ids)[:-1] for e in batch.examples)
    for span in spans:
        assert span.targets == len(span.example.completion_ids)
        assert span.parent is None or span.parent.targets == 0


@given(batch=batches)
def test_a_parents_tokens_are_edited_equally_in_all_examples_and_without_dropout(batch: Batch) -> None:
    for family in batch.families(whole(batch)):
        for span in family:
            if span.parent is None:
                continue
            for positions in batch.edited:
                in_common = edited(positions, span.parent.example, span.start)
                assert in_common == edited(positions, span.example, span.start)
                assert not (in_common and batch.at_random)


@given(batch=batches, max_rows=st.integers(1, 100))
def test_passes_contain_every_span_once_within_the_row_limit(batch: Batch, max_rows: int) -> None:
    families = batch.families(whole(batch))
    passes = in_passes(families, max_rows)
    assert sorted(map(tokens, chain(*passes))) == sorted(map(tokens, chain(*families)))
    for spans in passes:
        parents = {span.parent for span in spans if span.parent is not None}
        assert sum(span.rows for span in [*spans, *parents]) <= max_rows or len(spans) == 1


def test_examples_with_different_beginnings_are_different_families() -> None:
    texts = (1, 5, 6, 7, 8), (1, 9, 10, 11)
    batch = Batch([EncodedExample((*text, 20 + i, 30), (2,)) for i in range(3) for text in texts])
    lengths = [[span.start for span in family] for family in batch.families(whole(batch))]
    assert sorted(lengths) == [[4, 4, 4], [5, 5, 5]]


def test_kept_prefixes_do_not_affect_families() -> None:
    batch = Batch([EncodedExample((1, 2, 3, 20 + i), (2,)) for i in range(3)])
    spans = [Span(example, 2, example.length - 1) for example in batch.examples]
    assert [span for family in batch.families(spans) for span in family] == spans


def test_a_short_beginning_of_long_examples_gets_no_parent_span() -> None:
    for count, worth in ((20, True), (300, False)):
        batch = Batch([EncodedExample((1, 2, 3, 4, *range(i, i + count)), (2,)) for i in range(20, 23)])
        assert [family[0].parent is not None for family in batch.families(whole(batch))] == [worth]
