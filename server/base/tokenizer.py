"""The base's tokenizer and chat template, without transformers: importing that costs seconds and half a gigabyte.

Token ids come from `tokenizers`, by the folder's tokenizer.json. What transformers reads beside that file is read here
by the same rules (`PreTrainedTokenizerBase._from_pretrained`, `TokenizersBackend.__init__`, transformers 5):

    tokenizer_config.json      names of special tokens; `added_tokens_decoder`, which can hold more than tokenizer.json;
                               `chat_template`: one, or a list whose "default" counts
    special_tokens_map.json    names of special tokens, where there is no `added_tokens_decoder`: older folders
    added_tokens.json          tokens, in the same folders
    chat_template.jinja        the chat template, before any other
    add_bos_token, add_eos_token are not read: tokenizer.json's post-processor says what is put around a text
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
from reftserve.server.errors import NotFound

if TYPE_CHECKING:
    from llguidance import LLTokenizer

TOKENIZER_FILE = "tokenizer.json"
ATTRIBUTES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
EXTRA = ("additional_special_tokens", "extra_special_tokens")


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer as the server uses it. special_tokens: by the name that templates call them, `eos_token` and others.

    The backend is this tokenizer's own: it neither pads nor cuts.
    """

    backend: Backend
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    chat_template: str | None = None

    def __post_init__(self) -> None:
        self.backend.no_padding()
        self.backend.no_truncation()

    def __len__(self) -> int:
        """Tokens in all, added ones included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def eos_token(self) -> str | None:
        """The token that ends a text, if the folder says so."""
        return self.special_tokens.get("eos_token")

    @cached_property
    def eos_token_id(self) -> int | None:
        """Its id."""
        return None if self.eos_token is None else self.backend.token_to_id(self.eos_token)

    @cached_property
    def special_texts(self) -> tuple[str, ...]:
        """The texts of all special tokens, by rising id."""
        added = sorted(self.backend.get_added_tokens_decoder().items())
        return tuple(token.content for _, token in added if token.special)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids; with those that the tokenizer puts around a text, unless `add_special_tokens` is false."""
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, special ones included; bytes that are no UTF-8 become U+FFFD."""
        return self.backend.decode(list(token_ids), skip_special_tokens=False)

    def render(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool) -> str:
        """Render a conversation by the chat template, which must be there.

        Raises jinja2.TemplateError when the template refuses the messages.
        """
        if self.chat_template is None:
            raise ValueError("there is no chat template")
        return render_template(
            self.chat_template,
            messages,
            add_generation_prompt=add_generation_prompt,
            special_tokens=self.special_tokens,
        )

    def vocabulary(self, *, size: int | None = None, eos_token_ids: Sequence[int] = ()) -> LLTokenizer:
        """The tokens as llguidance has them: half a second for a large vocabulary. size: at least so many."""
        from llguidance import LLTokenizer

        ends = list(eos_token_ids) or self.eos_token_id
        return LLTokenizer(self.backend.to_str(), n_vocab=size, eos_token=ends)


def load_tokenizer(folder: Path) -> Tokenizer:
    """Read the tokenizer in a base model's folder; runs no code from it.

    Raises NotFound, saying how one is made, when there is no tokenizer.json.
    """
    file = folder / TOKENIZER_FILE
    if not file.is_file():
        raise NotFound(
            f"{folder} holds no {TOKENIZER_FILE}; make one of its older form with transformers: "
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
    return Tokenizer(backend, named, _chat_template(folder, config))


def _add(backend: Backend, tokens: Sequence[AddedToken]) -> None:
    """Add what is not there already, as it is."""
    there = {repr(token) for token in backend.get_added_tokens_decoder().values()}
    for token in tokens:
        if repr(token) not in there:
            backend.add_tokens([token])


def _named(config: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by name: the usual ones, and those that a model has beside them (`image_token`)."""
    extra = config.get("extra_special_tokens")
    entries = {**config, **(extra if isinstance(extra, dict) else {})}
    named = {name: _text(value) for name, value in entries.items() if name in ATTRIBUTES or name.endswith("_token")}
    return {name: text for name, text in named.items() if text is not None}


def _texts(config: Mapping[str, Any], named: Mapping[str, str]) -> list[str]:
    """The texts of all special tokens that the configuration speaks of, each once."""
    lists = [config[name] for name in EXTRA if isinstance(config.get(name), list)]
    texts = [*named.values(), *(_text(value) for values in lists for value in values)]
    return list(dict.fromkeys(text for text in texts if text is not None))


def _text(value: Any) -> str | None:
    """A token's text: configurations hold it as it is, or in an object; `add_bos_token` and its like are no tokens."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _token(entry: Mapping[str, Any]) -> AddedToken:
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return AddedToken(entry["content"], **{flag: entry[flag] for flag in flags if flag in entry})


def _model_eos(folder: Path, backend: Backend) -> str | None:
    """The end of a text by the model's configuration: GPT-2's tokenizer_config.json names no token at all."""
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
