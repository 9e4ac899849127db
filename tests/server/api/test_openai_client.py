"""OpenAI's client works unchanged: every call that the server supports, checked by the client's types."""

from __future__ import annotations

import openai
import pytest
from api_data import BASE, chat_lines, finished

HELLO = [{"role": "user", "content": "hello"}]


def test_models_lists_the_base_first_then_interventions(client: openai.OpenAI, trained: str) -> None:
    names = [model.id for model in client.models.list()]
    assert names[0] == BASE
    assert "greeter" in names
    assert client.models.retrieve(BASE).id == BASE
    assert client.models.retrieve(trained).id == trained


def test_a_chat_completion_is_deterministic_at_temperature_zero(client: openai.OpenAI) -> None:
    answers = [
        client.chat.completions.create(model=BASE, messages=HELLO, temperature=0, max_completion_tokens=8)  # type: ignore[arg-type]
        for _ in range(2)
    ]
    first, second = answers
    assert first.choices[0].message.content == second.choices[0].message.content
    assert first.choices[0].finish_reason in ("stop", "length")
    assert first.usage is not None
    assert first.usage.completion_tokens <= 8
    assert first.usage.total_tokens == first.usage.prompt_tokens + first.usage.completion_tokens


def test_a_stream_carries_the_same_text_and_its_usage(client: openai.OpenAI) -> None:
    fields = {"model": BASE, "messages": HELLO, "temperature": 0, "max_tokens": 12, "extra_body": {"ignore_eos": True}}
    whole = client.chat.completions.create(**fields)  # type: ignore[call-overload]
    chunks = list(client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True}))  # type: ignore[call-overload]
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 12


def test_usage_reports_cached_prompt_tokens_and_a_salt_separates_the_cache(client: openai.OpenAI) -> None:
    prompt = list(range(3, 103))

    def cached(**fields: object) -> int:
        completion = client.completions.create(model=BASE, prompt=prompt, max_tokens=1, n=2, extra_body=fields)
        assert completion.usage is not None
        assert completion.usage.prompt_tokens == 100
        return completion.usage.prompt_tokens_details.cached_tokens  # type: ignore[attr-defined, no-any-return]

    cached()
    assert cached() == 96
    assert cached(cache_salt="mine") == 0
    assert cached(cache_salt="mine") == 96


def test_n_answers_differ_and_a_seed_makes_them_reproducible(client: openai.OpenAI) -> None:
    def answers() -> list[str | None]:
        completion = client.chat.completions.create(
            model=BASE,
            messages=HELLO,
            n=3,
            seed=11,
            temperature=1.5,
            max_tokens=12,  # type: ignore[arg-type]
        )
        return [choice.message.content for choice in completion.choices]

    first = answers()
    assert len(set(first)) == 3
    assert answers() == first


def test_a_stop_string_ends_the_answer_before_it(client: openai.OpenAI) -> None:
    fields = {
        "model": BASE,
        "prompt": "the quick",
        "temperature": 0,
        "max_tokens": 30,
        "extra_body": {"ignore_eos": True},
    }
    free = client.completions.create(**fields).choices[0].text  # type: ignore[call-overload]
    stop = free[5:8]
    stopped = client.completions.create(**fields, stop=[stop]).choices[0]  # type: ignore[call-overload]
    assert stopped.text == free[: free.index(stop)]
    assert stopped.finish_reason == "stop"


def test_completions_take_texts_and_token_ids_and_echo(client: openai.OpenAI) -> None:
    many = client.completions.create(model=BASE, prompt=["a", "b"], max_tokens=3, temperature=0, n=2)
    assert [choice.index for choice in many.choices] == [0, 1, 2, 3]
    ids = client.completions.create(model=BASE, prompt=[[40, 41], [50]], max_tokens=3, temperature=0)
    assert len(ids.choices) == 2
    one = client.completions.create(model=BASE, prompt=[40, 41], max_tokens=3, temperature=0)
    assert one.choices[0].text == ids.choices[0].text
    echoed = client.completions.create(model=BASE, prompt="abc", max_tokens=3, temperature=0, echo=True)
    assert echoed.choices[0].text.startswith("abc")
    streamed = client.completions.create(model=BASE, prompt="abc", max_tokens=3, temperature=0, echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == echoed.choices[0].text


def test_fields_that_change_no_answer_are_accepted(client: openai.OpenAI) -> None:
    completion = client.chat.completions.create(
        model=BASE,
        messages=HELLO,  # type: ignore[arg-type]
        max_tokens=2,
        user="me",
        metadata={"a": "b"},
        store=False,
        frequency_penalty=0,
        presence_penalty=0,
    )
    assert completion.choices


def test_a_file_can_be_uploaded_listed_read_and_deleted(client: openai.OpenAI) -> None:
    data = chat_lines(12)
    file = client.files.create(file=("set.jsonl", data), purpose="fine-tune")
    assert (file.filename, file.bytes, file.purpose) == ("set.jsonl", len(data), "fine-tune")
    assert client.files.retrieve(file.id).id == file.id
    assert file.id in [listed.id for listed in client.files.list()]
    assert client.files.content(file.id).read() == data
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)


def test_a_job_trains_publishes_and_reports_events(client: openai.OpenAI, trained: str) -> None:
    assert trained == "greeter@1"
    job = next(job for job in client.fine_tuning.jobs.list() if job.fine_tuned_model == trained)
    assert job.status == "succeeded"
    assert (job.trained_tokens or 0) > 0
    assert (job.finished_at or 0) >= job.created_at
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=5))
    assert "Published greeter@1" in events[0].message
    metrics = [event for event in events if event.type == "metrics" and "train_loss" in event.data]  # type: ignore[operator]
    assert metrics, "events page by themselves until the first"
    assert "Created" in events[-1].message
    assert client.fine_tuning.jobs.checkpoints.list(job.id).data[0].step_number > 0
    table = client.files.content(job.result_files[0]).text.splitlines()
    assert table[0].startswith("step,train_loss")
    assert len(table) > 2


def test_the_trained_intervention_answers_and_composes(client: openai.OpenAI, trained: str) -> None:
    def answer(**fields: object) -> str:
        fields["extra_body"] = {"ignore_eos": True, **fields.get("extra_body", {})}  # type: ignore[dict-item]
        completion = client.completions.create(prompt="hello there", max_tokens=12, temperature=0, **fields)  # type: ignore[call-overload]
        return str(completion.choices[0].text)

    plain = answer(model=BASE)
    assert answer(model=trained) != plain
    assert answer(model=trained) == answer(model="greeter") == answer(model="greeter@latest")
    composed = answer(model=BASE, extra_body={"interventions": [{"name": "greeter", "version": 1}]})
    assert composed == answer(model=trained)
    nothing = answer(model=BASE, extra_body={"interventions": [{"name": "greeter", "scale": 0.0}]})
    assert nothing == plain


def test_a_job_can_be_cancelled_while_it_runs(client: openai.OpenAI) -> None:
    file = client.files.create(file=("long.jsonl", chat_lines(40)), purpose="fine-tune")
    reft = {"hyperparameters": {"n_epochs": 1000, "batch_size": 1}}
    job = client.fine_tuning.jobs.create(
        model=BASE,
        training_file=file.id,
        suffix="never",
        method={"type": "reft", "reft": reft},  # type: ignore[typeddict-item]
    )
    while not any(event.type == "metrics" for event in client.fine_tuning.jobs.list_events(job.id).data):
        assert client.fine_tuning.jobs.retrieve(job.id).status in ("validating_files", "queued", "running")
    client.fine_tuning.jobs.cancel(job.id)
    assert finished(client, job.id).status == "cancelled"
    with pytest.raises(openai.ConflictError):
        client.fine_tuning.jobs.cancel(job.id)
    assert "never" not in [model.id for model in client.models.list()]


def test_a_supervised_method_is_a_recipe(client: openai.OpenAI) -> None:
    file = client.files.create(file=("set.jsonl", chat_lines(20)), purpose="fine-tune")
    validation = client.files.create(
        file=("held.jsonl", chat_lines(30)[len(chat_lines(20)) + 1 :]), purpose="fine-tune"
    )
    job = client.fine_tuning.jobs.create(
        model=BASE,
        training_file=file.id,
        validation_file=validation.id,
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": "auto"}}},
    )
    done = finished(client, job.id)
    assert done.status == "succeeded", done.error
    assert (done.fine_tuned_model or "").startswith("intervention-")
