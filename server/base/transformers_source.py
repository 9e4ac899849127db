"""What the installed transformers can compute, read from its source: importing it takes three seconds and loads torch.

The source is the one place that fits the installed version. `load_model` and the engine judge the loaded model again.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

MODELS = "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"
CONFIGS = "CONFIG_MAPPING_NAMES"
MODULES = "SPECIAL_MODEL_TYPE_TO_MODULE_NAME"


@dataclass(frozen=True)
class Architecture:
    """A model class. uses_attention_interface: its attention can be replaced. is_stateful: it keeps more than keys
    and values. is_encoder: it is causal only with `is_decoder`.
    """

    name: str
    uses_attention_interface: bool
    is_stateful: bool
    is_encoder: bool


def transformers_version() -> str:
    """Return the installed version."""
    return version("transformers")


@cache
def model_types() -> frozenset[str]:
    """Return every `model_type` that config.json may name."""
    return frozenset(_mapping("auto_mappings", CONFIGS))


@cache
def causal_classes() -> dict[str, str]:
    """Return the class of a causal language model by `model_type`."""
    return _mapping("modeling_auto", MODELS)


def architecture(model_type: str) -> Architecture | None:
    """Return the causal language model of a type; None if there is none, or its source is in an unusual place."""
    name = causal_classes().get(model_type)
    if name is None:
        return None
    file = _module(model_type, "modeling")
    source = file.read_text("utf-8") if file.is_file() else ""
    if f"class {name}(" not in source:
        return None
    return Architecture(
        name=name,
        uses_attention_interface="_supports_attention_backend = True" in source,
        is_stateful="_is_stateful = True" in source,
        is_encoder="add `is_decoder=True" in source,  # the warning of models that can be both
    )


def default_value(model_type: str, names: Iterable[str]) -> int | None:
    """Return the number that transformers takes for the first of `names` that a config has; None if it is not plain."""
    file = _module(model_type, "configuration")
    config = _mapping("auto_mappings", CONFIGS).get(model_type)
    if config is None or not file.is_file():
        return None
    for statement in ast.parse(file.read_text("utf-8")).body:
        if isinstance(statement, ast.ClassDef) and statement.name == config:
            defaults = {
                field.target.id: _number(field.value)
                for field in statement.body
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
            }
            return next((defaults[name] for name in names if defaults.get(name) is not None), None)
    return None


def _number(expression: ast.expr | None) -> int | None:
    match expression:
        case ast.Constant(value=int(number)):
            return number
        case ast.BinOp(left=ast.Constant(value=int(left)), op=ast.Mult(), right=ast.Constant(value=int(right))):
            return left * right
        case _:
            return None


@cache
def _mapping(module: str, name: str) -> dict[str, str]:
    tree = ast.parse((_folder() / "auto" / f"{module}.py").read_text("utf-8"))
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Call) and statement.value.args:
            target = statement.targets[0]
            if isinstance(target, ast.Name) and target.id == name:
                pairs: list[tuple[str, Any]] = ast.literal_eval(statement.value.args[0])
                return {key: value if isinstance(value, str) else value[0] for key, value in pairs}
    raise LookupError(f"transformers {transformers_version()} has no {name} in models/auto/{module}.py")


def _module(model_type: str, kind: str) -> Path:
    module = _mapping("auto_mappings", MODULES).get(model_type, model_type.replace("-", "_"))
    return _folder() / module / f"{kind}_{module}.py"


@cache
def _folder() -> Path:
    found = find_spec("transformers")  # of a top-level package, this imports nothing
    if found is None or found.origin is None:
        raise ModuleNotFoundError("No module named 'transformers'", name="transformers")
    return Path(found.origin).parent / "models"
