"""Our tokenizer gives the token ids and texts of transformers, for each form of a model's folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from reftserve.server.base.tokenizer import Tokenizer, load_tokenizer
from reftserve.server.errors import NotFound

END = 2  # <|im_end|>
TEXTS = [
    "",
    " ",
    "Why is the sky blue?",
    "  two  spaces \n\n\ttab ",
    "<|im_start|>user\nhi<|im_end|>\n",
    "<|im_end|><|im_end|> <|endoftext|>x <extra> <|late|>a <|late|>",
    "Grüße 你好 🦊 \u200b \u2028 \x00 e\u0301",
    "1234567890 + 3.14 == <unk> [MASK] </s><s>",
    "word " * 500,
]


def pair(folder: Path) -> tuple[Tokenizer, PreTrainedTokenizerBase]:
    return load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)


def assert_equal(ours: Tokenizer, theirs: PreTrainedTokenizerBase, texts: list[str]) -> None:
    assert len(ours) == len(theirs)
    assert (ours.eos_token, ours.eos_token_id) == (theirs.eos_token, theirs.eos_token_id)
    named = theirs.special_tokens_map
    assert {name: ours.special_tokens.get(name) for name in named} == named
    assert set(ours.special_texts) == {token.content for token in theirs.added_tokens_decoder.values() if token.special}
    assert ours.chat_template == theirs.chat_template
    for text in texts:
        for special in (True, False):
            ids = theirs(text, add_special_tokens=special)["input_ids"]
            assert ours.encode(text, add_special_tokens=special) == ids, text
            assert ours.decode(ids) == theirs.decode(ids)


def change_json(folder: Path, name: str, change: Callable[[dict[str, Any]], None]) -> None:
    file = folder / name
    content = json.loads(file.read_text()) if file.is_file() else {}
    change(content)
    file.write_text(json.dumps(content))


def plain(folder: Path) -> None:
    """The folder without changes."""


def adds_bos(folder: Path) -> None:
    entries = [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    special = {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}}
    template = {"type": "TemplateProcessing", "single": entries, "pair": entries, "special_tokens": special}
    change_json(folder, "tokenizer.json", lambda content: content.update(post_processor=template))


def asks_for_bos(folder: Path) -> None:
    """`add_bos_token` and `add_eos_token`, which have no effect if there is a tokenizer.json."""
    change_json(folder, "tokenizer_config.json", lambda content: content.update(add_bos_token=True, add_eos_token=True))


def later_tokens(folder: Path) -> None:
    late = {
        "300": {"content": "<|late|>", "lstrip": True, "rstrip": True, "normalized": False, "special": True},
        "301": {"content": "<extra>", "lstrip": False, "rstrip": False, "normalized": False, "special": False},
    }
    change_json(folder, "tokenizer_config.json", lambda content: content.update(added_tokens_decoder=late))


def older_files(folder: Path) -> None:
    """special_tokens_map.json and added_tokens.json, with names that the configuration lacks."""
    change_json(folder, "tokenizer_config.json", lambda content: content.pop("pad_token"))
    mask = {"content": "[MASK]", "lstrip": True, "rstrip": False, "normalized": False, "single_word": False}
    entries = {"pad_token": "<|endoftext|>", "mask_token": mask, "unk_token": "<unk>"}
    change_json(folder, "special_tokens_map.json", lambda content: content.update(entries))
    change_json(folder, "added_tokens.json", lambda content: content.update({"[MASK]": 300, "<extra>": 301}))


def objects(folder: Path) -> None:
    eos = {"__type": "AddedToken", "content": "<|im_end|>", "lstrip": False, "rstrip": False, "normalized": False}
    change_json(
        folder, "tokenizer_config.json", lambda content: content.update({"eos_token": eos, "image_token": "<extra>"})
    )


def unknown_tokens(folder: Path) -> None:
    entries = {"unk_token": "<unk>", "extra_special_tokens": ["<extra>", "<|late|>"]}
    change_json(folder, "tokenizer_config.json", lambda content: content.update(entries))


def several_templates(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "{{ bos_token }}!"}]
    change_json(folder, "tokenizer_config.json", lambda content: content.update(chat_template=named))


def no_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def cuts_and_pads(folder: Path) -> None:
    pad = {"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": None}
    pad |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>"}
    cut = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    change_json(folder, "tokenizer.json", lambda content: content.update(padding=pad, truncation=cut))


FORMS = [
    plain,
    adds_bos,
    asks_for_bos,
    later_tokens,
    older_files,
    objects,
    unknown_tokens,
    several_templates,
    no_template,
    cuts_and_pads,
]


@pytest.fixture
def folder(tiny_llama_folder: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "model"
    shutil.copytree(tiny_llama_folder, copy, ignore=shutil.ignore_patterns("*.safetensors"))
    return copy


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_ids_and_texts_equal_those_of_transformers(form: Callable[[Path], None], folder: Path) -> None:
    form(folder)
    ours, theirs = pair(folder)
    if isinstance(theirs.chat_template, dict):  # from a list, the template for chats without tools
        theirs.chat_template = theirs.chat_template["default"]
    assert_equal(ours, theirs, TEXTS)


@pytest.mark.real_model
def test_ids_and_texts_of_the_real_model_equal_those_of_transformers(smollm2_folder: Path) -> None:
    ours, theirs = pair(smollm2_folder)
    assert_equal(ours, theirs, TEXTS)
    messages = [{"role": "user", "content": "Grüße"}, {"role": "assistant", "content": "hm"}]
    for prompt in (True, False):
        expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        assert ours.render(messages, add_generation_prompt=prompt) == expected


@pytest.fixture(scope="module")
def both(tiny_llama_folder: Path) -> tuple[Tokenizer, PreTrainedTokenizerBase]:
    return pair(tiny_llama_folder)


@settings(deadline=None)
@given(text=st.text(max_size=60))
def test_any_text_has_the_ids_of_transformers(both: tuple[Tokenizer, PreTrainedTokenizerBase], text: str) -> None:
    ours, theirs = both
    assert ours.encode(text) == theirs(text)["input_ids"]


def test_the_bytes_of_tokens_join_to_the_text(both: tuple[Tokenizer, PreTrainedTokenizerBase]) -> None:
    tokenizer, _ = both
    text = "Grüße 🦊 fox"
    ids = tokenizer.encode(text)
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()


def test_tokens_have_the_bytes_that_llguidance_finds(
    both: tuple[Tokenizer, PreTrainedTokenizerBase], smollm2_folder: Path
) -> None:
    for tokenizer in (both[0], load_tokenizer(smollm2_folder)):
        vocabulary = tokenizer.vocabulary()
        found = {token: tokenizer.token_bytes(token) for token in range(len(tokenizer))}
        # llguidance marks special tokens with the byte 255 and therefore drops it.
        assert {token: raw.replace(b"\xff", b"") for token, raw in found.items()} == {
            token: vocabulary.decode_bytes([token]) for token in found
        }


class Recorder:
    """Records the methods of the tokenizers library that are called."""

    def __init__(self, backend: Any) -> None:
        self.called: set[str] = set()
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        self.called.add(name)
        return getattr(self._backend, name)


def test_the_first_look_at_a_tokens_bytes_does_not_read_the_vocabulary(smollm2_folder: Path) -> None:
    backend: Any = Recorder(load_tokenizer(smollm2_folder).backend)
    assert Tokenizer(backend).token_bytes(1000)
    assert "id_to_token" in backend.called
    assert backend.called.isdisjoint({"get_vocab", "to_str"})


def test_a_text_is_encoded_by_the_method_that_lets_other_threads_run(smollm2_folder: Path) -> None:
    backend: Any = Recorder(load_tokenizer(smollm2_folder).backend)
    assert Tokenizer(backend).encode("The quick brown fox.")
    assert {name for name in backend.called if name.startswith("encode")} == {"encode_batch_fast"}


def test_byte_tokens_and_marked_spaces_have_their_bytes() -> None:
    pieces = {"<unk>": 0, "▁the": 1, "<0xF0>": 2, "ä": 3, "<0xZZ>": 4}
    backend = Backend(models.BPE(pieces, [], unk_token="<unk>", byte_fallback=True))  # noqa: S106
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(["<unk>"])
    tokenizer = Tokenizer(backend)
    assert [tokenizer.token_bytes(token) for token in range(6)] == [
        b"<unk>",
        b" the",
        b"\xf0",
        "ä".encode(),
        b"<0xZZ>",
        b"",
    ]


def test_the_end_token_of_the_model_configuration_is_used_if_the_tokenizer_has_none(folder: Path) -> None:
    change_json(folder, "tokenizer_config.json", lambda content: content.pop("eos_token"))
    assert load_tokenizer(folder).eos_token_id == END
    change_json(folder, "tokenizer_config.json", lambda content: content.update(eos_token=None))
    assert load_tokenizer(folder).eos_token_id is None


def test_a_folder_without_tokenizer_json_is_refused_with_instructions(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(NotFound, match=r"holds no tokenizer\.json.*save_pretrained"):
        load_tokenizer(folder)
