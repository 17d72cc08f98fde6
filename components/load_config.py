"""YAML files and `a.b=c` overrides → one checked `Recipe`; all mistakes are reported at once."""

import difflib
import math
import os
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from components.config import Files, Recipe
from components.errors import ConfigError
from components.urls import without_secrets

S = TypeVar("S", bound=BaseModel)


def load_recipe(
    files: Sequence[str | Path], overrides: Sequence[str] = (), suites: Sequence[str | Path] = ()
) -> Recipe:
    """Merge `files` left to right, then `suites`, then `overrides`, and validate.

    Of a suite over a recipe, only what is measured counts; by itself it is a recipe of its own.

    Raises:
        ConfigError: naming every unknown file, malformed override and wrong setting.
    """
    if not files and not suites:
        raise ConfigError("No recipe given. Expected a YAML file, such as pipelines/recipes/demo.yaml.")
    raw: dict[str, Any] = {}
    for file in files:
        raw = merge(raw, read_yaml(Path(file)))
    for suite in suites:
        content = read_yaml(Path(suite))
        measured = {key: value for key, value in content.items() if key in ("evaluation", "attacks")}
        raw = merge(raw, measured if files else content)
    changes: dict[str, Any] = {}
    for override in overrides:
        changes = merge(changes, parse_override(override))
        raw = _with_defaults(raw, override.partition("=")[0].split("."), [Recipe])
    return checked(Recipe, _with_requests(_with_folder(merge(raw, changes))), "recipe")


def checked(schema: type[S], raw: dict[str, Any], what: str) -> S:
    """`raw` as a `schema`.

    Raises:
        ConfigError: naming every wrong setting of the `what`.
    """
    try:
        return schema.model_validate(raw)
    except ValidationError as error:
        lines = sorted({_explain(item, schema) for item in error.errors(include_url=False)})
        raise ConfigError(f"{len(lines)} mistake(s) in the {what}:\n" + "\n".join(f"  {x}" for x in lines)) from None


def merge(base: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """`new` over `base`, section by section; a changed `type` drops the old section, whose keys are another class's."""
    if "type" in new and new["type"] != base.get("type", new["type"]):
        return dict(new)
    out = dict(base)
    for key, value in new.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = merge(out[key], value) if both else value
    return out


def parse_override(text: str) -> dict[str, Any]:
    """`"train.steps=3"` → `{"train": {"steps": 3}}`; the value is YAML."""
    path, equals, raw = text.partition("=")
    if not equals or not path:
        raise ConfigError(f"Override {without_secrets(repr(text))} is not of the form section.field=value.")
    try:
        value = yaml_value(raw) if raw else ""
    except ConfigError as error:
        told = without_secrets(repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"))
        raise ConfigError(f"Override {told} has a value that is not YAML: {error}. Put quotes around it.") from None
    if path.count(".") > _DEEPEST:
        raise ConfigError(f"Override {path[:_SHOWN]!r}… names no setting: none lies deeper than {_DEEPEST} sections.")
    return nested(path, value)


def _with_defaults(raw: dict[str, Any], path: Sequence[str], schemas: Sequence[type[BaseModel]]) -> dict[str, Any]:
    """`raw` with the default of each section on the `path` of an override that no file names.

    Without its default a section is only what the override says of it, which may lack the `type` or mean less.
    """
    key, rest = path[0], path[1:]
    tagged = [s for s in schemas if "type" in s.model_fields and raw.get("type") in _tags(s)]
    field = next((s.model_fields[key] for s in tagged or schemas if key in s.model_fields), None)
    if not rest or field is None:
        return raw
    default = field.get_default(call_default_factory=True, validated_data={})
    inner = raw.get(key, default.model_dump(mode="json", exclude_unset=True) if isinstance(default, BaseModel) else {})
    if not isinstance(inner, dict):
        return raw
    return {**raw, key: _with_defaults(inner, rest, _models_in(field.annotation))}


def _tags(schema: type[BaseModel]) -> tuple[Any, ...]:
    return typing.get_args(schema.model_fields["type"].annotation)


def nested(path: str, value: Any) -> dict[str, Any]:
    """`a.b` and 1 → {a: {b: 1}}."""
    for key in reversed(path.split(".")):
        value = {key: value}
    return value


def _with_folder(raw: dict[str, Any]) -> dict[str, Any]:
    """Relative paths of file sources under `data.folder`; the result needs no `data.folder` any more."""
    data = raw.get("data")
    if not isinstance(data, dict) or not isinstance(data.get("folder"), str):
        return raw
    folder = data["folder"]

    def placed(node: Any) -> Any:
        if isinstance(node, list):
            return [placed(item) for item in node]
        if not isinstance(node, dict):
            return node
        if node.get("type") == "huggingface" and isinstance(node.get("local"), str):
            return _local_copy(node, _inside(folder, node["local"]))
        if node.get("type") in ("files", "text") and isinstance(node.get("path"), str | list):
            path = node["path"]
            many = [_inside(folder, str(item)) for item in (path if isinstance(path, list) else [path])]
            return {**node, "path": many if isinstance(path, list) else many[0]}
        return {key: placed(value) for key, value in node.items()}

    return {**raw, "data": {**placed(data), "folder": None}, "evaluation": placed(raw.get("evaluation", {}))}


def _with_requests(raw: dict[str, Any]) -> dict[str, Any]:
    """What `data.requests` names is chosen among the sources of forget, and left out elsewhere."""
    data = raw.get("data")
    if not isinstance(data, dict) or not isinstance(data.get("requests"), str):
        return raw
    path = data["requests"]
    path = path if "://" in path else str(Path(path).expanduser().resolve())  # workers are elsewhere

    taken = ("forget", "random") if data.get("responses") == "by_row" else ("forget",)

    def chosen(node: Any, key: str) -> Any:
        if isinstance(node, list):
            return [chosen(item, key) for item in node]
        if not isinstance(node, dict):
            return node
        if node.get("type") == "text" and key == "requested":
            raise ConfigError("data.requests choose records by columns, which type: text has none of. Give files.")
        if node.get("type") in ("files", "huggingface", "people"):
            return {**node, key: path}
        return {name: chosen(value, "requested" if name in taken else key) for name, value in node.items()}

    evaluation = chosen(raw.get("evaluation", {}), "not_requested")
    return {**raw, "data": {**chosen(data, "not_requested"), "requests": path}, "evaluation": evaluation}


def _inside(folder: str, path: str) -> str:
    if "://" in path:
        return path
    return f"{folder.rstrip('/')}/{path}" if "://" in folder else str(Path(folder) / path)


def _local_copy(node: dict[str, Any], path: str) -> dict[str, Any]:
    """A hub data set's records taken from `path`: files, or a folder written by `datasets.save_to_disk`."""
    if os.path.isdir(path):  # which a path that cannot be is not
        return {
            **{key: node[key] for key in node if key not in ("local", "subset", "data_dir", "revision")},
            "path": path,
        }
    rest = {key: node[key] for key in node if key in Files.model_fields}
    return {**rest, "type": "files", "path": path}


def read_yaml(path: Path, what: str = "recipe") -> dict[str, Any]:
    """The sections of a YAML file.

    Raises:
        ConfigError: when there is none.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        nearest = difflib.get_close_matches(path.name, [p.name for p in _recipes_near(path)], n=1, cutoff=0.4)
        hint = f" Did you mean {path.parent / nearest[0]}?" if nearest else ""
        raise ConfigError(f"{what.capitalize()} {path} does not exist.{hint}") from None
    except OSError as error:
        raise ConfigError(f"{what.capitalize()} {path} cannot be read: {error.strerror}. Expected a file.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{what.capitalize()} {path} is not YAML in UTF-8: {error}") from None
    try:
        content = yaml_value(text)
    except ConfigError as error:
        raise ConfigError(f"{what.capitalize()} {path} is not YAML: {error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(
            f"{what.capitalize()} {path} holds a {type(content).__name__}. Expected sections such as data: and train:."
        )
    return content


_LARGEST = 200_000
"""Characters of a YAML text, and of what it becomes when its aliases are replaced by what they stand for."""
_DEEPEST = 50
_SHOWN = 100  # characters of a value in a message


def yaml_value(text: str) -> Any:
    """The value of a YAML text, which is small however often its aliases repeat each other.

    Raises:
        ConfigError: saying why it is none, or too large.
    """
    try:
        if len(text) > _LARGEST:
            raise ConfigError(f"it has {len(text):,} characters; expected at most {_LARGEST:,}")
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is not None and _expanded(node, {}) > _LARGEST:
            raise ConfigError(f"its aliases (*name) make more than {_LARGEST:,} characters of it; repeat less")
        if node is not None:
            _check_named_once(node)
        return None if node is None else loader.construct_document(node)
    except RecursionError:
        raise ConfigError("it is nested too deeply") from None
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2026-13-01, a number of 5,000 digits
        raise ConfigError(" ".join(str(error).split())) from None


def _check_named_once(node: yaml.Node) -> None:
    """Raise ConfigError for a section that names a key twice, of which YAML would silently take the last."""
    waiting, known = [node], set()
    while waiting:
        node = waiting.pop()
        if id(node) in known or isinstance(node, yaml.ScalarNode):
            continue
        known.add(id(node))
        if isinstance(node, yaml.MappingNode):
            keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            names = [key.value for key in keys]
            if twice := [key for i, key in enumerate(keys) if key.value in names[:i]]:
                line = twice[0].start_mark.line + 1
                raise ConfigError(f"key {twice[0].value!r} is named twice in one section (line {line})")
            waiting += [part for pair in node.value for part in pair]
        else:
            waiting += node.value


def _expanded(node: yaml.Node, known: dict[int, float]) -> float:
    """Characters of a node and all that it holds, what is repeated counted each time; infinite if it holds itself."""
    if id(node) not in known:
        known[id(node)] = math.inf  # as long as it is being counted
        if isinstance(node, yaml.MappingNode):
            inner = [part for pair in node.value for part in pair]
        else:
            inner = node.value if isinstance(node, yaml.SequenceNode) else []
        known[id(node)] = (0 if inner else len(node.value)) + 1 + sum(_expanded(part, known) for part in inner)
    return known[id(node)]


def _recipes_near(path: Path) -> list[Path]:
    return sorted(path.parent.glob("*.yaml")) if path.parent.is_dir() else []


def _explain(item: Any, schema: type[BaseModel]) -> str:
    """One line for one pydantic error: dotted path, what is wrong, nearest key."""
    path = ".".join(str(part) for part in item["loc"]) or schema.__name__.lower()
    if item["type"] == "extra_forbidden":
        known = _fields_at(item["loc"][:-1], schema)
        nearest = difflib.get_close_matches(str(item["loc"][-1]), known, n=1, cutoff=0.5)
        return f"{path}: unknown key." + (f" Did you mean {nearest[0]}?" if nearest else f" Known: {', '.join(known)}.")
    if item["type"] in ("union_tag_not_found", "union_tag_invalid"):
        tags = item["ctx"].get("expected_tags") or ", ".join(map(repr, _types_at(item["loc"], schema)))
        return f"{path}: needs a type" + (f", one of {tags}." if tags else f": {item['msg']}.")
    message = item["msg"].removeprefix("Value error, ")
    shown = "" if isinstance(item["input"], dict | BaseModel) else without_secrets(repr(item["input"]))
    got = f" (got {shown if len(shown) <= _SHOWN else f'{shown[:_SHOWN]}…'})" if shown else ""
    return f"{path}: {message}{got}."


def _fields_at(loc: Sequence[Any], schema: type[BaseModel]) -> list[str]:
    """Field names of the sections that may stand at `loc`."""
    return sorted({name for model in _sections_at(loc, schema) for name in model.model_fields})


def _types_at(loc: Sequence[Any], schema: type[BaseModel]) -> list[str]:
    """The types of the sections that may stand at `loc`."""
    return [tag for model in _sections_at(loc, schema) if "type" in model.model_fields for tag in _tags(model)]


def _sections_at(loc: Sequence[Any], schema: type[BaseModel]) -> list[Any]:
    """The sections that may stand at `loc`, in which pydantic mixes keys, list indices and union tags."""
    candidates: list[Any] = [schema]
    for part in loc:
        following: list[Any] = []
        for model in candidates:
            if part in model.model_fields:
                following += _models_in(model.model_fields[part].annotation)
            elif "type" in model.model_fields and part in _tags(model):
                following.append(model)  # a union tag: stay in the class that it names
        candidates = following or candidates  # a list index or dict key: stay
    return candidates


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated, list, dict):
        return [model for inner in typing.get_args(annotation) for model in _models_in(inner)]
    return []
