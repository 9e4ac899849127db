"""The base model on disk; a hub id is looked up in `<data>/models/<org>--<name>`, the hub's cache, then the hub."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from reftserve.interventions.base_fingerprint import fingerprint
from reftserve.interventions.intervention_errors import InterventionError
from reftserve.interventions.manifest import BaseFingerprint
from reftserve.server.base.folder_check import check_folder, incomplete, missing_config, read_config, read_json
from reftserve.server.base.tokenizer import TOKENIZER_FILE, Tokenizer, load_tokenizer
from reftserve.server.base.transformers_source import default_value
from reftserve.server.errors import ServerError

if TYPE_CHECKING:
    from reftserve.server.settings import Settings, SpecialTokensInText

HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
CONTEXT_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")


def model_name(settings: Settings) -> str:
    """Return the base model's id in the API: the configured one, the hub id, or the folder's name."""
    if settings.served_model_name:
        return settings.served_model_name
    folder = Path(settings.model)
    return folder.resolve().name if folder.is_dir() else settings.model


def resolve_model_folder(settings: Settings) -> Path:
    """Return the base model's folder, with what its files show checked (`folder_check`).

    Raises NotFound, with the searched places and the remedy, and UnsupportedModel.
    """
    folder = _found_folder(settings)
    check_folder(folder)
    return folder


def check_base(settings: Settings) -> str:
    """Check all of the base but its weights' values, within a second; name it for `reftserve doctor`.

    Raises NotFound and UnsupportedModel.
    """
    folder = resolve_model_folder(settings)
    eos_token_ids(folder, _load_tokenizer(folder, settings.special_tokens_in_text))
    return f"{model_name(settings)} in {folder}, context of {_max_context(folder)} tokens"


def _found_folder(settings: Settings) -> Path:
    as_folder = Path(settings.model)
    kept = settings.data / "models" / settings.model.replace("/", "--")
    for folder in (as_folder, kept):
        if (folder / "config.json").is_file():
            return folder.resolve()
    if as_folder.is_dir():
        raise missing_config(as_folder.resolve())
    if not HUB_ID.fullmatch(settings.model):
        raise incomplete(f"{as_folder} is neither a folder with a model nor a valid hub id")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.jinja", "*.safetensors", "*.model", "*.txt"]
    try:
        return Path(snapshot_download(settings.model, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as cause:
        reason = (str(cause).splitlines() or [type(cause).__name__])[0]
        raise incomplete(
            f"model {settings.model!r} is not a folder or in {kept}, and cannot be fetched from the hub ({reason}). "
            "Give --model a folder with config.json, *.safetensors and a tokenizer, or a hub id while online"
        ) from cause


@dataclass(frozen=True)
class Base:
    """The base model without its weights. eos_token_ids: end an answer. max_context: tokens of prompt and answer."""

    name: str
    folder: Path
    tokenizer: Tokenizer
    fingerprint: BaseFingerprint
    eos_token_ids: tuple[int, ...]
    max_context: int
    created_at: int


def open_base(settings: Settings) -> Base:
    """Find the base, load its tokenizer and compute its fingerprint, hashing changed weights only.

    Raises NotFound and UnsupportedModel, each of which names the file and the remedy.
    """
    folder = resolve_model_folder(settings)
    try:
        return _open_folder(folder, settings)
    except KeyError as cause:
        raise incomplete(
            f"{folder / 'config.json'} has no {cause}; take the config.json of the original model"
        ) from cause
    except (InterventionError, ValueError) as cause:
        raise incomplete(f"{folder} is no complete base model: {cause!s}") from cause


def _open_folder(folder: Path, settings: Settings) -> Base:
    tokenizer = _load_tokenizer(folder, settings.special_tokens_in_text)
    return Base(
        name=model_name(settings),
        folder=folder,
        tokenizer=tokenizer,
        fingerprint=_kept_fingerprint(folder, fingerprint_file(settings)),
        eos_token_ids=eos_token_ids(folder, tokenizer),
        max_context=_max_context(folder),
        created_at=int((folder / "config.json").stat().st_mtime),
    )


def _load_tokenizer(folder: Path, special_tokens_in_text: SpecialTokensInText) -> Tokenizer:
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        if (folder / name).is_file():
            read_json(folder / name)
    try:
        return load_tokenizer(folder, special_tokens_in_text=special_tokens_in_text)
    except ServerError:
        raise
    except Exception as cause:  # `tokenizers` raises this class itself
        raise incomplete(f"{folder / TOKENIZER_FILE} cannot be read: {cause}; download it again") from cause


def fingerprint_file(settings: Settings) -> Path:
    """Return the file that keeps the base's fingerprint, so that unchanged weights are hashed once."""
    return settings.data / "fingerprints.json"


def _kept_fingerprint(folder: Path, cache: Path) -> BaseFingerprint:
    states = [(file.name, file.stat()) for file in sorted(folder.iterdir()) if file.is_file()]
    # The time of the last change of the inode too: whoever rewrites a file can set the other time, but not this one.
    key = f"{folder} {[(name, state.st_size, state.st_mtime_ns, state.st_ctime_ns) for name, state in states]}"
    known: dict[str, Any] = json.loads(cache.read_text("utf-8")) if cache.is_file() else {}
    if key not in known:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{cache}.lock"):
            known = json.loads(cache.read_text("utf-8")) if cache.is_file() else {}
            if key in known:  # another process has hashed the weights meanwhile
                return BaseFingerprint(**known[key])
            # Keep the current base only, so that the file stays small.
            known = {key: fingerprint(folder).model_dump()}
            scratch = cache.with_suffix(".partial")
            scratch.write_text(json.dumps(known), "utf-8")
            scratch.replace(cache)
    return BaseFingerprint(**known[key])


def _max_context(folder: Path) -> int:
    """Read the context length from config.json, or take transformers' default for the architecture. Raises NotFound."""
    config = read_config(folder)
    for name in CONTEXT_FIELDS:
        if isinstance(config.get(name), int):
            return int(config[name])
    kinds = [(config.get("text_config") or {}).get("model_type"), config["model_type"]]
    for kind in filter(None, kinds):
        if (default := default_value(kind, CONTEXT_FIELDS)) is not None:
            return default
    raise incomplete(
        f"{folder / 'config.json'} has none of {', '.join(CONTEXT_FIELDS)}: add max_position_embeddings, the number of "
        "tokens that the model can read"
    )


def eos_token_ids(folder: Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the tokens that end an answer, from the tokenizer and the generation config. Raises NotFound."""
    ids: set[int] = set()
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    generation = folder / "generation_config.json"
    if generation.is_file():
        configured = read_json(generation).get("eos_token_id")
        ids.update([configured] if isinstance(configured, int) else configured or [])
    return tuple(sorted(ids))
