"""Describes each setting for people: `commands.py` makes the flags, `docs/generate_settings.py` docs/settings.md."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from reftserve.server.settings import GROUPS, Settings, Unset
from reftserve.server.settings_sources import ENV_PREFIX

UNITS = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))
ENDINGS = {"_bytes": "size", "_s": "seconds"}
WORDS = {int: "integer", float: "number", str: "text", Path: "path", bool: "true or false"}


@dataclass(frozen=True)
class Setting:
    """One setting in words. default: with its unit, as a person would write it."""

    name: str
    group: str
    type: str
    default: str
    meaning: str
    choices: tuple[str, ...]

    @property
    def is_switch(self) -> bool:
        """Whether the setting is true or false."""
        return self.type == WORDS[bool]

    @property
    def variable(self) -> str:
        """The name of the environment variable."""
        return ENV_PREFIX + self.name.upper()

    @property
    def flag(self) -> str:
        """The command line's flag, in typer's notation."""
        dashed = self.name.replace("_", "-")
        return f"--{dashed}/--no-{dashed}" if self.is_switch else f"--{dashed}"


def settings_reference() -> dict[str, Setting]:
    """Return all settings by name, in the order of groups and fields."""
    return {
        name: _describe(name, group, field)
        for group, section in GROUPS.items()
        for name, field in section.model_fields.items()
    }


def takes_settings(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate a command with a flag for each named setting; typer passes text, which pydantic parses and checks.

    The command's parameters behind the settings stay options of its own.
    """
    reference = settings_reference()

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        options = list(inspect.signature(command, eval_str=True).parameters.values())[1:]

        @wraps(command)
        def run(**flags: Any) -> None:
            given = {option.name: flags.pop(option.name) for option in options}
            command(Settings.from_flags(**flags), **given)

        parameters = [*options, *(_flag(reference[name]) for name in names)]
        del run.__wrapped__  # typer would follow it to the parameter `settings`
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def _flag(setting: Setting) -> inspect.Parameter:
    choices = f"One of {', '.join(setting.choices)}. " if setting.choices else ""
    option = typer.Option(
        setting.flag,
        help=f"{setting.meaning}. {choices}Default: {setting.default}",
        metavar=None if setting.is_switch else setting.type.upper(),
        rich_help_panel=setting.group,
        show_default=False,
    )
    kind = bool if setting.is_switch else str
    return inspect.Parameter(
        setting.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def _describe(name: str, group: str, field: FieldInfo) -> Setting:
    kind, choices = _unwrap(field.annotation)
    unset = next((item.meaning for item in field.metadata if isinstance(item, Unset)), None)
    unit = next((word for ending, word in ENDINGS.items() if name.endswith(ending)), None)
    return Setting(
        name=name,
        group=group,
        type="choice" if choices else unit or WORDS[kind],
        default=unset or _default(name, field.default),
        meaning=field.description or "",
        choices=choices,
    )


def _unwrap(annotation: Any) -> tuple[Any, tuple[str, ...]]:
    if get_origin(annotation) in (Union, types.UnionType):
        annotation = next(part for part in get_args(annotation) if part is not type(None))
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    return annotation, get_args(annotation) if get_origin(annotation) is Literal else ()


def _default(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if name.endswith("_bytes"):
        size, unit = next((size, unit) for size, unit in (*UNITS, (1, "bytes")) if value % size == 0)
        return f"{value // size} {unit}"
    if name.endswith("_s"):
        days, rest = divmod(value, 86400)
        return f"{days:g} days" if days and not rest else f"{value:g} s"
    return str(value)
