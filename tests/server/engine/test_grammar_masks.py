"""Structured output: the answer of a random model follows the grammar."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
from engine_oracle import Run, make_engine, request, run_until_done
from llguidance import LLMatcher

from reftserve.server.base.tokenizer import Tokenizer, load_tokenizer
from reftserve.server.engine.engine import Engine
from reftserve.server.engine.grammar_masks import Compiled, GrammarCompiler, forbidden_tokens

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
GRAMMAR = LLMatcher.grammar_from_json_schema(SCHEMA, defaults={"whitespace_flexible": False})
REGEX = r"[a-c]{2,4}-\d{3}"
PROMPT = [5, 6, 7]


@pytest.fixture(scope="module")
def tokenizer(tiny_llama_folder: Path) -> Tokenizer:
    return load_tokenizer(tiny_llama_folder)


def structured(name: str, grammar: str, seed: int = 0, **fields: object) -> object:
    fields = {"max_tokens": 60, "temperature": 1.0, "seed": seed, "stop_token_ids": (2,), **fields}
    return request(name, PROMPT, grammar=grammar, **fields)  # type: ignore[arg-type]


def text(tokenizer: Tokenizer, run: Run, name: str) -> str:
    return tokenizer.decode([token for token in run.tokens[name] if token != 2])


def run_all(engine: Engine, *submits: object) -> Run:
    for submit in submits:
        engine.submit(submit)  # type: ignore[arg-type]
    return run_until_done(engine)


def test_answers_follow_their_grammars_in_a_batch_with_free_answers(
    tiny_llama_folder: Path, tokenizer: Tokenizer, artifacts: list[Path]
) -> None:
    engine = make_engine(tiny_llama_folder)
    submits = [
        submit
        for seed in range(10)
        for submit in (
            structured(f"schema-{seed}", GRAMMAR, seed),
            structured(f"regex-{seed}", LLMatcher.grammar_from_regex(REGEX), seed, uses=[(artifacts[seed % 6], 1.0)]),
            request(f"free-{seed}", PROMPT, max_tokens=20, temperature=1.0, seed=seed),
        )
    ]
    run = run_all(engine, *submits)
    alone = make_engine(tiny_llama_folder)
    for seed in range(10):
        assert run.finished[f"schema-{seed}"].finish_reason == "stop"
        answer = json.loads(text(tokenizer, run, f"schema-{seed}"))
        assert set(answer) == {"name", "age"}
        assert len(answer["name"]) <= 5
        assert answer["age"] <= 99
        assert re.fullmatch(REGEX, text(tokenizer, run, f"regex-{seed}"))
        free = run_all(alone, request("free", PROMPT, max_tokens=20, temperature=1.0, seed=seed))
        assert free.tokens["free"] == run.tokens[f"free-{seed}"]
    for each in (engine, alone):
        each.close()


class CollectsTogether(GrammarCompiler):
    """Reports grammars only when all are compiled, so that their sequences start in one step."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer, (2,), len(tokenizer))
        self._compiled: list[Compiled] = []

    def collect(self) -> list[Compiled]:
        self._compiled += super().collect()
        if self.pending:
            return []
        done, self._compiled = self._compiled, []
        return done


def test_a_preempted_answer_still_follows_its_grammar(tiny_llama_folder: Path, tokenizer: Tokenizer) -> None:
    engine = make_engine(tiny_llama_folder, blocks=16)
    assert engine.grammars is not None
    engine.grammars.close()
    engine.grammars = CollectsTogether(tokenizer)
    grammar = LLMatcher.grammar_from_regex("[a-z]{40}")
    run = run_all(engine, *(structured(str(seed), grammar, seed) for seed in range(4)))
    assert engine.stats().preemptions > 0
    assert all(re.fullmatch("[a-z]{40}", text(tokenizer, run, str(seed))) for seed in range(4))
    engine.close()


def test_a_completed_grammar_ends_the_answer_even_if_the_end_of_turn_is_ignored(
    tiny_llama_folder: Path, tokenizer: Tokenizer
) -> None:
    engine = make_engine(tiny_llama_folder)
    run = run_all(engine, structured("one", LLMatcher.grammar_from_regex("(yes|no)"), stop_token_ids=()))
    assert text(tokenizer, run, "one") in ("yes", "no")
    assert run.finished["one"].finish_reason == "stop"
    engine.close()


def test_max_tokens_cuts_off_a_grammars_answer(tiny_llama_folder: Path) -> None:
    engine = make_engine(tiny_llama_folder)
    run = run_all(engine, structured("long", LLMatcher.grammar_from_regex("[a-z]{40}"), max_tokens=5))
    assert run.finished["long"].finish_reason == "length"
    assert len(run.tokens["long"]) == 5
    engine.close()


def test_an_invalid_grammar_fails_its_request_alone(tiny_llama_folder: Path) -> None:
    engine = make_engine(tiny_llama_folder)
    run = run_all(
        engine, structured("wrong", LLMatcher.grammar_from_lark("start: )")), request("free", PROMPT, max_tokens=3)
    )
    assert run.finished["wrong"].finish_reason == "error"
    assert "grammar" in (run.finished["wrong"].error or "")
    assert run.finished["free"].finish_reason == "length"
    engine.close()


def test_cancelling_during_compilation_of_the_grammar_leaves_nothing(tiny_llama_folder: Path) -> None:
    engine = make_engine(tiny_llama_folder)
    engine.submit(structured("gone", GRAMMAR))  # type: ignore[arg-type]
    engine.cancel("gone")
    run = run_until_done(engine)
    assert run.finished["gone"].finish_reason == "cancelled"
    assert (engine.stats().running, engine.stats().waiting) == (0, 0)
    engine.close()


def compiled(compiler: GrammarCompiler, grammar: str) -> Compiled:
    compiler.request("one", grammar)
    while not (done := compiler.collect()):
        time.sleep(0.001)
    return done[0]


def test_a_model_may_know_fewer_tokens_than_its_tokenizer(tokenizer: Tokenizer) -> None:
    width = len(tokenizer) - 1
    compiler = GrammarCompiler(tokenizer, (2,), width)
    answer = compiled(compiler, LLMatcher.grammar_from_regex("[a-c]{3}"))
    assert answer.matcher is not None
    forbidden = forbidden_tokens([answer.matcher], width)
    assert forbidden.shape == (1, width)
    assert {tokenizer.decode([token])[0] for token in (~forbidden[0]).nonzero()[0]} == {"a", "b", "c"}
    compiler.close()


def test_a_failing_compiler_reports_the_error_and_keeps_working() -> None:
    compiler = GrammarCompiler([], (2,), 10)  # type: ignore[arg-type]  # no tokenizer at all
    for _ in range(2):
        answer = compiled(compiler, LLMatcher.grammar_from_regex("a"))
        assert answer.matcher is None
        assert answer.error
        assert not compiler.pending
    compiler.close()


def test_a_vocabulary_that_llguidance_cannot_read_fails_grammars_only() -> None:
    unreadable = Mock(spec=Tokenizer, __len__=lambda _: 10)
    unreadable.vocabulary.side_effect = ValueError("no bytes")
    compiler = GrammarCompiler(unreadable, (), 10)
    compiler.request("asked", GRAMMAR)
    compiler.close()
    [compiled] = compiler.collect()
    assert compiled.matcher is None
    assert "cannot read this base's vocabulary: no bytes" in (compiled.error or "")


def test_the_vocabulary_is_read_before_the_first_grammar_arrives(tokenizer: Tokenizer) -> None:
    counted = Mock(spec=Tokenizer, wraps=tokenizer, __len__=lambda _: len(tokenizer))
    compiler = GrammarCompiler(counted, (2,), 300)
    assert counted.vocabulary.call_count == 1
    compiler.request("asked", GRAMMAR)
    compiler.close()
    assert compiler.collect()[0].matcher is not None
    assert counted.vocabulary.call_count == 1
