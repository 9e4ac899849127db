"""Runs of tokens that the same edits touch: what the keys of cached blocks are made of."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from reftserve.interventions import Positions
from reftserve.interventions.edited_runs import ENDLESS, EditedRuns

HASH = "ab" * 32
positions = st.one_of(
    st.builds(Positions, first=st.integers(0, 9), last=st.integers(1, 9)),
    st.builds(Positions, first=st.integers(1, 9)),
    st.sampled_from(["prompt", "generated", "all"]).map(Positions.parse),
)
sites = st.lists(positions, min_size=1, max_size=6)


def edits_of(sites: list[Positions], n_prompt: int, index: int) -> frozenset[int]:
    return frozenset(number for number, each in enumerate(sites) if len(each.indices(n_prompt, index, index + 1)))


@given(sites=sites, lengths=st.lists(st.integers(1, 25), min_size=1, max_size=4))
def test_tokens_have_one_digest_exactly_when_the_same_edits_touch_them(
    sites: list[Positions], lengths: list[int]
) -> None:
    runs = EditedRuns(HASH, sites)
    sets: dict[bytes | None, frozenset[int]] = {None: frozenset()}
    for n_prompt in lengths:
        found = runs.of(n_prompt)
        for index in range(n_prompt + 5):
            [digest] = [run.edits for run in found if run.start <= index < run.stop] or [None]
            assert sets.setdefault(digest, edits_of(sites, n_prompt, index)) == edits_of(sites, n_prompt, index)
    assert len(set(sets.values())) == len(sets)


@given(sites=sites, n_prompt=st.integers(1, 25))
def test_runs_ascend_and_neighbours_differ(sites: list[Positions], n_prompt: int) -> None:
    runs = EditedRuns(HASH, sites).of(n_prompt)
    assert all(run.start < run.stop for run in runs)
    for earlier, later in itertools.pairwise(runs):
        assert earlier.stop < later.start or (earlier.stop == later.start and earlier.edits != later.edits)


def test_equal_sites_of_other_interventions_have_other_digests() -> None:
    ours, theirs = (EditedRuns(each, [Positions(last=1)]).of(4)[0].edits for each in (HASH, "cd" * 32))
    assert ours != theirs


def test_thousands_of_sites_give_at_most_one_run_a_token() -> None:
    different = [Positions(first=1 + i, last=1 + i) for i in range(4096)]
    assert 500 < len(EditedRuns(HASH, different).of(1000)) <= 1000
    assert len(EditedRuns(HASH, [Positions(first=7, last=7)] * 4096).of(1000)) == 2
    [run] = EditedRuns(HASH, [Positions.parse("all")] * 4096).of(1000)
    assert (run.start, run.stop) == (0, ENDLESS)
