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
from reftserve.server.base.tokenizer import Tokenizer, load_tokenizer
from reftserve.server.errors import NotFound

if TYPE_CHECKING:
    from reftserve.server.settings import Settings

HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
CONTEXT_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")


def model_name(settings: Settings) -> str:
    """Return the base model's id in the API: the configured one, the hub id, or the folder's name."""
    if settings.served_model_name:
        return settings.served_model_name
    folder = Path(settings.model)
    return folder.resolve().name if folder.is_dir() else settings.model


def resolve_model_folder(settings: Settings) -> Path:
    """Return the folder of the base model. Raises NotFound, with the searched places and the remedy."""
    as_folder = Path(settings.model)
    kept = settings.data / "models" / settings.model.replace("/", "--")
    for folder in (as_folder, kept):
        if (folder / "config.json").is_file():
            return folder.resolve()
    if as_folder.is_dir():
        raise NotFound(f"{as_folder} has no config.json: not a Hugging Face model folder", code="model_not_found")
    if not HUB_ID.fullmatch(settings.model):
        raise NotFound(f"{as_folder} is neither a folder with a model nor a valid hub id", code="model_not_found")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.jinja", "*.safetensors", "*.model", "*.txt"]
    try:
        return Path(snapshot_download(settings.model, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as cause:
        raise NotFound(
            f"model {settings.model!r} is not a folder or in {kept}, and cannot be fetched from the hub ({cause}). "
            "Give --model a folder with config.json, *.safetensors and a tokenizer, or a hub id while online.",
            code="model_not_found",
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
    """Find the base, load its tokenizer and compute its fingerprint, hashing changed weights only. Raises NotFound."""
    folder = resolve_model_folder(settings)
    try:
        return _open_folder(folder, settings)
    except (InterventionError, KeyError, ValueError) as cause:  # no weights, no config, or a config that is not JSON
        raise NotFound(f"{folder} is no complete base model: {cause!s}", code="model_not_found") from cause


def _open_folder(folder: Path, settings: Settings) -> Base:
    tokenizer = load_tokenizer(folder, special_tokens_in_text=settings.special_tokens_in_text)
    return Base(
        name=model_name(settings),
        folder=folder,
        tokenizer=tokenizer,
        fingerprint=_kept_fingerprint(folder, settings.data / "fingerprints.json"),
        eos_token_ids=eos_token_ids(folder, tokenizer),
        max_context=_max_context(folder),
        created_at=int((folder / "config.json").stat().st_mtime),
    )


def _kept_fingerprint(folder: Path, cache: Path) -> BaseFingerprint:
    files = sorted(file for file in folder.iterdir() if file.is_file())
    key = f"{folder} {[(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]}"
    known: dict[str, Any] = json.loads(cache.read_text()) if cache.is_file() else {}
    if key not in known:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{cache}.lock"):
            known = json.loads(cache.read_text()) if cache.is_file() else {}
            if key in known:  # another process has hashed the weights meanwhile
                return BaseFingerprint(**known[key])
            # Keep the current base only, so that the file stays small.
            known = {key: fingerprint(folder).model_dump()}
            scratch = cache.with_suffix(".partial")
            scratch.write_text(json.dumps(known))
            scratch.replace(cache)
    return BaseFingerprint(**known[key])


def _max_context(folder: Path) -> int:
    """Read the context length from config.json. Raises NotFound; only transformers knows the architecture's default."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config |= config.get("text_config") or {}
    for name in CONTEXT_FIELDS:
        if isinstance(config.get(name), int):
            return int(config[name])
    raise NotFound(
        f"{folder / 'config.json'} has none of {', '.join(CONTEXT_FIELDS)}: add max_position_embeddings, the number of "
        "tokens that the model can read",
        code="model_not_found",
    )


def eos_token_ids(folder: Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the tokens that end an answer, from the tokenizer and the generation config."""
    ids: set[int] = set()
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    generation = folder / "generation_config.json"
    if generation.is_file():
        configured = json.loads(generation.read_text()).get("eos_token_id")
        ids.update([configured] if isinstance(configured, int) else configured or [])
    return tuple(sorted(ids))
