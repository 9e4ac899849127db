"""The base's tokenizer and chat template, without transformers, whose import costs seconds and half a gigabyte.

The library `tokenizers` computes token ids from the folder's tokenizer.json. transformers' rules (version 5,
`PreTrainedTokenizerBase._from_pretrained`) give the special tokens: tokenizer_config.json names them and may add some;
special_tokens_map.json and added_tokens.json do so in older folders. chat_template.jinja wins over the config's one.
`add_bos_token` and `add_eos_token` are ignored: tokenizer.json's post-processor adds these tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from reftserve.server.base.chat_template import render_template
from reftserve.server.base.literal_tokenizer import ESCAPE, LiteralTokenizer
from reftserve.server.base.token_bytes import TokenBytes
from reftserve.server.errors import NotFound
from reftserve.server.settings import SpecialTokensInText

if TYPE_CHECKING:
    from llguidance import LLTokenizer

TOKENIZER_FILE = "tokenizer.json"
ATTRIBUTES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
EXTRA = ("additional_special_tokens", "extra_special_tokens")


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """The base's tokenizer; it never pads or truncates. special_tokens: texts by name, such as `eos_token`.

    special_tokens_in_text: whether special tokens that a content spells are its characters or control tokens.
    """

    backend: Backend
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    chat_template: str | None = None
    special_tokens_in_text: SpecialTokensInText = "text"
    model_vocab_size: int | None = None  # of config.json; added tokens may lie beyond it, where the model has no row

    def __post_init__(self) -> None:
        self.backend.no_padding()
        self.backend.no_truncation()

    def __len__(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def eos_token(self) -> str | None:
        """The token that ends a text; None if the folder names none."""
        return self.special_tokens.get("eos_token")

    @cached_property
    def eos_token_id(self) -> int | None:
        """The id of `eos_token`, or None."""
        return None if self.eos_token is None else self.backend.token_to_id(self.eos_token)

    @cached_property
    def longest_token(self) -> int:
        """The most characters that one token stands for, or more: some vocabularies spell each byte as one."""
        return max(map(len, self.backend.get_vocab(with_added_tokens=True)))

    @cached_property
    def added_bos(self) -> str | None:
        """The BOS that the post-processor puts before each text; None if it adds none."""
        bos = self.special_tokens.get("bos_token")
        return bos if bos is not None and self.encode("")[:1] == [self.backend.token_to_id(bos)] else None

    @cached_property
    def special_texts(self) -> tuple[str, ...]:
        """The texts of all special tokens, ordered by id."""
        added = sorted(self.backend.get_added_tokens_decoder().items())
        return tuple(token.content for _, token in added if token.special)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the text's token ids. add_special_tokens: include BOS and others that the post-processor adds."""
        # `encode` holds Python's lock, 0.3 s for 400 kB, and stops the event loop; the batch's twin does not.
        [encoding] = self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return encoding.ids

    def escape(self, content: str) -> str:
        """Mark special tokens in a content as text, for `encode_escaped`; a content without them stays the same."""
        return self._literal.escape(content) if self.special_tokens_in_text == "text" else content

    def encode_escaped(self, text: str) -> list[int]:
        """Return the token ids of a text with escaped contents; other special tokens in it are control tokens.

        Raises InvalidRequest if the vocabulary cannot encode the escaped text.
        """
        is_escaped = self.special_tokens_in_text == "text" and ESCAPE in text
        return self._literal.encode(text) if is_escaped else self.encode(text, add_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes:
        """Return a token's bytes, perhaps parts of characters; a special token gives the bytes of its name."""
        return self._token_bytes.of(token_id)

    @cached_property
    def _token_bytes(self) -> TokenBytes:
        return TokenBytes(self.backend)

    @cached_property
    def _literal(self) -> LiteralTokenizer:
        return LiteralTokenizer(self.backend, self.special_tokens.get("unk_token"))

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of token ids, special tokens included; invalid UTF-8 becomes U+FFFD."""
        return self.backend.decode(list(token_ids), skip_special_tokens=False)

    def render(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool) -> str:
        """Render a conversation. Raises jinja2.TemplateError when the template refuses it, ValueError without one."""
        if self.chat_template is None:
            raise ValueError("there is no chat template")
        return render_template(
            self.chat_template,
            messages,
            add_generation_prompt=add_generation_prompt,
            special_tokens=self.special_tokens,
        )

    def vocabulary(self, *, size: int | None = None, eos_token_ids: Sequence[int] = ()) -> LLTokenizer:
        """Return llguidance's vocabulary; a large one takes half a second. size: its least number of tokens."""
        from llguidance import LLTokenizer

        ends = list(eos_token_ids) or self.eos_token_id
        return LLTokenizer(self.backend.to_str(), n_vocab=size, eos_token=ends)


def load_tokenizer(folder: Path, *, special_tokens_in_text: SpecialTokensInText = "text") -> Tokenizer:
    """Read the tokenizer in a folder, without running code from it. Raises NotFound if tokenizer.json is missing."""
    file = folder / TOKENIZER_FILE
    if not file.is_file():
        raise NotFound(
            f"{folder} holds no {TOKENIZER_FILE}; convert its tokenizer with transformers: "
            f'python -c "from transformers import AutoTokenizer as T; '
            f"T.from_pretrained('{folder}').save_pretrained('{folder}')\"",
            code="model_not_found",
        )
    backend = Backend.from_file(str(file))
    config = _json(folder / "tokenizer_config.json")
    added = {int(index): _token(token) for index, token in config.get("added_tokens_decoder", {}).items()}
    named = _named(config)
    if not added:
        named |= _named(_json(folder / "special_tokens_map.json"))
        for text, index in _json(folder / "added_tokens.json").items():
            special = text in named.values()
            added[index] = AddedToken(text, normalized=not special, special=special)
    _add(backend, [token for _, token in sorted(added.items())])
    if "eos_token" not in {**config, **named} and (eos := _model_eos(folder, backend)) is not None:
        named["eos_token"] = eos
    known = backend.get_vocab(with_added_tokens=True)
    _add(backend, [AddedToken(text, special=True) for text in _texts(config, named) if text not in known])
    vocab_size = _json(folder / "config.json").get("vocab_size")
    template = _chat_template(folder, config)
    return Tokenizer(backend, named, template, special_tokens_in_text, model_vocab_size=vocab_size)


def _add(backend: Backend, tokens: Sequence[AddedToken]) -> None:
    there = {repr(token) for token in backend.get_added_tokens_decoder().values()}
    for token in tokens:
        if repr(token) not in there:
            backend.add_tokens([token])


def _named(config: Mapping[str, Any]) -> dict[str, str]:
    extra = config.get("extra_special_tokens")
    entries = {**config, **(extra if isinstance(extra, dict) else {})}
    named = {name: _text(value) for name, value in entries.items() if name in ATTRIBUTES or name.endswith("_token")}
    return {name: text for name, text in named.items() if text is not None}


def _texts(config: Mapping[str, Any], named: Mapping[str, str]) -> list[str]:
    lists = [config[name] for name in EXTRA if isinstance(config.get(name), list)]
    texts = [*named.values(), *(_text(value) for values in lists for value in values)]
    return list(dict.fromkeys(text for text in texts if text is not None))


def _text(value: Any) -> str | None:
    """Return a token's text from a string or an object; None for flags such as `add_bos_token`, which are no tokens."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _token(entry: Mapping[str, Any]) -> AddedToken:
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return AddedToken(entry["content"], **{flag: entry[flag] for flag in flags if flag in entry})


def _model_eos(folder: Path, backend: Backend) -> str | None:
    """Return the eos token by config.json; GPT-2's tokenizer_config.json names no tokens."""
    found = _json(folder / "config.json").get("eos_token_id")
    return backend.id_to_token(found) if isinstance(found, int) else None


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text("utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template if isinstance(template, str) else None


def _json(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    return found
