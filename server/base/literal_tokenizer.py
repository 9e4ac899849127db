"""Encodes rendered chats in which a user's text may spell special tokens: there they are plain characters.

    content   "say <|im_end|>"     escape   "say [U+E000]3[U+E001]"     the template then adds its own special tokens
    encode    the template's <|im_end|> becomes a name that nobody can guess, the escaped text its characters again
A second `tokenizers` backend knows special tokens only by these names. It shares model, normalizer and pre-tokenizer
with the first one, so all other text has the same token ids, across the borders between template and content too.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable
from functools import cached_property
from itertools import groupby

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from reftserve.server.errors import InvalidRequest

ESCAPE, END = "\ue000", "\ue001"  # private-use characters, which templates neither trim nor interpret


class LiteralTokenizer:
    """Tells special tokens in contents from those of a template. unk_token: may also stand for unknown characters."""

    def __init__(self, backend: Backend, unk_token: str | None) -> None:
        self._backend = backend
        self._added = dict(sorted(backend.get_added_tokens_decoder().items()))
        self._specials = {token.content: index for index, token in self._added.items() if token.special}
        self._unk_id = self._specials.get(unk_token or "")
        self._texts = [ESCAPE, *self._specials]
        self._place = {text: place for place, text in enumerate(self._texts)}
        self._in_content = re.compile(_any_of(self._texts))
        self._in_rendered = re.compile(f"{ESCAPE}([0-9]+){END}|{self._in_content.pattern}")

    def escape(self, content: str) -> str:
        """Return a content whose special tokens a template and `encode` will take for text; others stay the same."""
        return self._in_content.sub(lambda found: f"{ESCAPE}{self._place[found[0]]}{END}", content)

    def encode(self, rendered: str) -> list[int]:
        """Return the token ids of a text with escaped contents. Raises InvalidRequest if the vocabulary forbids it."""
        num_control = 0

        def rename(found: re.Match[str]) -> str:
            nonlocal num_control
            if found[1] is not None:
                return self._texts[int(found[1])]
            num_control += 1
            return self._names[self._specials[found[0]]]

        text = self._in_rendered.sub(rename, rendered)
        [encoding] = self._renamed.encode_batch_fast([text], add_special_tokens=False)
        ids = [self._id_of.get(token, token) for token in encoding.ids]
        control = set(self._specials.values()) - {self._unk_id}
        # A unigram model knows its special tokens as pieces of text.
        if sum(token in control for token in ids) > num_control:
            raise InvalidRequest("the base's tokenizer cannot encode the text of its special tokens as plain text")
        return ids

    @cached_property
    def _names(self) -> dict[int, str]:
        nonce = secrets.token_hex(16)
        return {index: f"<{nonce}-{index}>" for index in self._specials.values()}

    @cached_property
    def _renamed(self) -> Backend:
        renamed = Backend(self._backend.model)
        if self._backend.normalizer is not None:
            renamed.normalizer = self._backend.normalizer
        if self._backend.pre_tokenizer is not None:
            renamed.pre_tokenizer = self._backend.pre_tokenizer
        renamed.add_tokens([_named(token, self._names.get(index)) for index, token in self._added.items()])
        return renamed

    @cached_property
    def _id_of(self) -> dict[int, int]:
        """The original id of each added token by its id in the second backend."""
        texts = {index: self._names.get(index, token.content) for index, token in self._added.items()}
        renamed = ((self._renamed.token_to_id(text), index) for index, text in texts.items())
        return {new: index for new, index in renamed if new is not None}


def _any_of(texts: Iterable[str]) -> str:
    """Return a pattern for texts, of which the longest match wins, as in `tokenizers`.

    Texts are grouped by their beginnings: Python would try each of Llama's 256 tokens at every "<" of a page.
    """
    longest = sorted(texts, key=lambda text: (-len(text[:2]), text[:2], -len(text)))
    groups = groupby(longest, key=lambda text: text[:2])
    return "|".join(
        f"{re.escape(start)}(?:{'|'.join(re.escape(text[len(start) :]) for text in group)})" for start, group in groups
    )


def _named(token: AddedToken, name: str | None) -> AddedToken:
    return AddedToken(
        name or token.content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
        special=token.special,
    )
