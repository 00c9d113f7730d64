"""Reads `labkit serve`'s command line, its YAML file and its environment into options. Runs nothing."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from labkit.core.options import closest
from labkit.engine import lora_names
from labkit.engine.speculation import speculation
from labkit.server.flags import BY_NAME, ENGINE, FLAGS, HARMLESS, PROCESS, REFUSED, SERVER, SHORT, Flag

KEY_VARIABLE = "VLLM_API_KEY"
ADMIN_VARIABLE = "VLLM_SERVER_DEV_MODE"
LORA_VARIABLE = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"
_SIZES = {"k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}


@dataclass
class Arguments:
    """What was asked for: options of the engine, of the server and of the process, and remarks for the log."""

    engine: dict[str, Any] = field(default_factory=dict)
    server: dict[str, Any] = field(default_factory=dict)
    process: dict[str, Any] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    wants_help: bool = False


def read(words: Sequence[str], environment: Mapping[str, str] | None = None, folder: str = ".") -> Arguments:
    """The options of a command line. A ValueError names the flag, and the closest one of an unknown flag.

    >>> read(["org/model", "--max-model-len", "4k"]).engine
    {'max_model_len': 4000}
    """
    given: dict[str, list[str]] = {}
    for name, values in _from_words(words):
        given[name] = [*given.get(name, []), *values] if name == "model" else values
    if "config" in given:
        given = {**_from_file(Path(given["config"][0])), **given}
    found = Arguments(wants_help="help" in given)
    given.pop("help", None)
    for name, values in given.items():
        _set(found, named(name)[0], values)
    if "api_key" not in found.server and (key := _key(environment, Path(folder))):
        found.server["api_key"] = [key]
    _split_models(found.process)
    _adapters(found)
    _drafts(found)
    _images(found.engine)
    if (os.environ if environment is None else environment).get(ADMIN_VARIABLE) == "1":
        found.server.setdefault("enable_admin", True)
    if _is_on((os.environ if environment is None else environment).get(LORA_VARIABLE)):
        found.server.setdefault("lora_root", "/")
    if found.process.pop("enforce_eager", False):
        found.engine["graphs"] = False
    if found.process.pop("disable_log_requests", False):
        found.server["log_requests"] = False
    if (template := found.server.get("chat_template")) is not None:
        found.server["chat_template"] = _template(template)
    if "model_settings" in found.process:
        found.process["model_settings"] = _of_models(found.process)
    return found


def _adapters(found: Arguments) -> None:
    given = {name: found.process.pop(name) for name in lora_names.NAMES if name in found.process}
    try:
        found.engine |= lora_names.lora_options(given)
    except ValueError as error:
        raise ValueError(re.sub(r"\b(lora_modules|enable_lora)\b", _as_flag, str(error))) from None
    if "adapters" in found.engine and "models" in found.process:
        raise ValueError("--lora-modules is served for one model; load those of several over HTTP (--lora-root)")


def _drafts(found: Arguments) -> None:
    """Say what is wrong with --speculative-config before a model is loaded."""
    given, name = found.engine.get("speculative_config"), "--speculative-config"
    if given is None:
        return
    if not isinstance(given, dict):
        raise ValueError(f'{name} takes a JSON object, such as {{"method": "ngram"}}, got {json.dumps(given)}')
    try:
        speculation(given, None)
    except ValueError as error:
        told = str(error).replace("speculative_config", name)
        raise ValueError(told if name in told else f"{name}: {told}") from None


def _images(engine: dict[str, Any]) -> None:
    """Say what is wrong with the flags of images before a model is loaded. A count may be in an object, as in vLLM."""
    name, limits = "--limit-mm-per-prompt", engine.get("limit_mm_per_prompt")
    if limits is not None:
        if not isinstance(limits, dict) or set(limits) - {"image", "video", "audio"}:
            raise ValueError(f'{name} takes a JSON object, such as {{"image": 4}}, got {json.dumps(limits)}')
        counts = {kind: one.get("count") if isinstance(one, dict) else one for kind, one in limits.items()}
        for kind, count in counts.items():
            if isinstance(count, bool) or not isinstance(count, int) or count < 0:
                raise ValueError(f"{name}: {kind} must be a whole number from 0, got {json.dumps(limits[kind])}")
        engine["limit_mm_per_prompt"] = counts
    name, kwargs = "--mm-processor-kwargs", engine.get("mm_processor_kwargs")
    if kwargs is not None and not isinstance(kwargs, dict):
        raise ValueError(f'{name} takes a JSON object, such as {{"max_pixels": 1003520}}, got {json.dumps(kwargs)}')


def _is_on(given: str | None) -> bool:
    return given is not None and given.strip().lower() in ("1", "true")


def _as_flag(name: re.Match[str]) -> str:
    return "--" + name[0].replace("_", "-")


def _split_models(process: dict[str, Any]) -> None:
    """One model is `model`; several, or one with a name, are `models`."""
    models = process.pop("model", [])
    if len(models) == 1 and "=" not in models[0]:
        process["model"] = models[0]
    elif models:
        names = [name_and_path(model)[0] for model in models]
        if len(set(names)) < len(names):
            raise ValueError(f"two models have the same name: {', '.join(names)}; NAME=PATH gives each its own")
        process["models"] = models


def _of_models(process: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """--model-settings, with flags' names as those of settings, and templates read."""
    from labkit.server.manager import OWN_SETTINGS

    given, name = process["model_settings"], "--model-settings"
    models = [name_and_path(model)[0] for model in process.get("models", [])]
    if not models:
        raise ValueError(f"{name} is for several models, or for one that has a name (NAME=PATH)")
    if not isinstance(given, dict) or not all(isinstance(own, dict) for own in given.values()):
        raise ValueError(
            f'{name} maps names of models to settings, such as {{"NAME": {{"tool-call-parser": "hermes"}}}}'
        )
    found: dict[str, dict[str, Any]] = {}
    for model, own in given.items():
        if model not in models:
            raise ValueError(f"{name}: there is no model {model!r} here; there is {', '.join(models)}")
        found[model] = {key.replace("-", "_"): value for key, value in own.items()}
        for key in found[model]:
            if key not in OWN_SETTINGS:
                raise ValueError(f"{name}: {model} has no setting {key!r} of its own; {closest(key, OWN_SETTINGS)}")
        if isinstance(template := found[model].get("chat_template"), str):
            found[model]["chat_template"] = _template(template)
    return found


def name_and_path(word: str) -> tuple[str, str]:
    """NAME=PATH, or a path that is its own name."""
    name, equals, path = word.partition("=")
    return (name, path) if equals and name and path and "/" not in name else (word, word)


# -- words -----------------------------------------------------------------------------------------------------------


def _from_words(words: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Each flag with its values; the model is one without a name."""
    left = list(words)
    while left:
        word = left.pop(0)
        if word in ("-h", "--help"):
            yield "help", []
        elif not word.startswith("-"):
            yield "model", [word]
        else:
            name, equals, value = word.lstrip("-").partition("=")
            flag, negated = named(name, word.startswith("--"))
            if flag.kind == "bool":
                if equals and value.lower() not in ("true", "false"):
                    raise ValueError(f"--{flag.name} is on or off: it takes no value")
                yield flag.name, ["false" if negated or value.lower() == "false" else "true"]
            elif equals:
                yield flag.name, [value]
            else:
                yield flag.name, _values(flag, left)


def _values(flag: Flag, left: list[str]) -> list[str]:
    """Takes a flag's values from what is left of the line."""
    values: list[str] = []
    while left and (not left[0].startswith("-") or re.fullmatch(r"-\d+(\.\d+)?", left[0])):
        values.append(left.pop(0))
        if flag.kind != "list":
            break
    if not values and flag.where != REFUSED:  # what is refused is refused also without one
        raise ValueError(f"--{flag.name} needs a value")
    return values


def named(name: str, is_long: bool = True) -> tuple[Flag, bool]:
    """The flag of this name, and whether it is turned off."""
    full = (name if is_long else SHORT.get(name, name)).replace("_", "-")
    if full in SHORT and is_long:
        full = SHORT[full]
    if full in BY_NAME:
        return BY_NAME[full], False
    owner, dot, _ = full.partition(".")
    if dot and owner in BY_NAME and BY_NAME[owner].where in (REFUSED, HARMLESS):
        return BY_NAME[owner]._replace(name=full, kind="str"), False  # one field of a JSON object
    positive = full.removeprefix("no-")
    if positive != full and positive in BY_NAME and BY_NAME[positive].kind == "bool":
        return BY_NAME[positive], True
    close = difflib.get_close_matches(full, BY_NAME, n=1, cutoff=0.5)
    hint = f"; did you mean --{close[0]}?" if close else ""
    raise ValueError(f"there is no flag --{full}{hint} (labkit serve --help lists all)")


# -- values ----------------------------------------------------------------------------------------------------------


def _set(found: Arguments, flag: Flag, values: list[str]) -> None:
    name = f"--{flag.name}"
    if flag.where == REFUSED:
        off = flag.kind == "bool" and values == ["false"]
        if not off and not (values and set(values) <= set(flag.fits)):
            also = f"; {name} {flag.fits[0]} is accepted" if flag.fits else ""
            raise ValueError(f"{name} {flag.help}{also}")
        return
    if flag.fits and not set(values) <= set(flag.fits):
        raise ValueError(f"{name} takes {' or '.join(flag.fits)} here, got {' '.join(values)}")
    value = _converted(flag, values)
    if flag.where == HARMLESS:
        found.remarks.append(f"{name} has no effect here: {flag.help}")
        return
    {ENGINE: found.engine, SERVER: found.server, PROCESS: found.process}[flag.where][flag.target] = value


def _converted(flag: Flag, values: list[str]) -> Any:
    if flag.kind == "list":
        return values
    if len(values) != 1:
        raise ValueError(f"--{flag.name} takes one value, got {len(values)}")
    (text,) = values
    if flag.kind == "bool":
        return text == "true"
    try:
        if flag.kind == "int":
            return whole(text)
        if flag.kind == "float":
            return float(text)
        if flag.kind == "json":
            return json.loads(text)
    except ValueError:
        raise ValueError(f"--{flag.name} takes {_KINDS[flag.kind]}, got {text!r}") from None
    return text


_KINDS = {"int": "a whole number, such as 4096, 4k or 4K", "float": "a number", "json": "JSON"}


def whole(text: str) -> int:
    """4096, 4k (4000) or 4K (4096)."""
    sized = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmMgG])", text)
    return int(float(sized[1]) * _SIZES[sized[2]]) if sized else int(text)


def _template(given: str) -> str:
    if "{" in given:
        return given
    try:
        return Path(given).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--chat-template {given} cannot be read: {error.strerror}") from None


# -- files and environment -------------------------------------------------------------------------------------------


def _from_file(path: Path) -> dict[str, list[str]]:
    import yaml  # type: ignore[import-untyped]

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--config {path} cannot be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"--config {path} is not YAML: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"--config {path} must map flags to values, such as 'port: 8000'")
    given = {}
    for name, value in found.items():
        flag, negated = named(str(name))
        if flag.kind == "bool" and not isinstance(value, bool):
            raise ValueError(f"--config {path}: {name} is true or false, got {value!r}")
        given[flag.name] = _written(flag, not value if negated else value)
    return given


def _written(flag: Flag, value: Any) -> list[str]:
    """A value of the file as it would be written on the command line."""
    if flag.kind == "json" and not isinstance(value, str):
        return [json.dumps(value)]
    if isinstance(value, bool):
        return [str(value).lower()]
    return [str(one) for one in value] if isinstance(value, list) else [str(value)]


def _key(environment: Mapping[str, str] | None, folder: Path) -> str | None:
    """The key of the environment, or of a file .env."""
    given = (os.environ if environment is None else environment).get(KEY_VARIABLE)
    if given or not (folder / ".env").is_file():
        return given or None
    line = re.search(
        rf"^\s*(?:export\s+)?{KEY_VARIABLE}\s*=\s*(.*?)\s*$",
        (folder / ".env").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    return (line[1].strip("'\"") or None) if line else None


def help_text() -> str:
    lines = ["usage: labkit serve [MODEL] [flags]", "", "Serve a model over HTTP, OpenAI-compatible.", ""]
    for flag in FLAGS:
        if flag.where in (ENGINE, SERVER, PROCESS):
            value = "" if flag.kind == "bool" else " JSON" if flag.kind == "json" else f" {flag.kind.upper()}"
            lines.append(f"  --{flag.name + value:38} {flag.help}")
    for where, told in ((HARMLESS, "Accepted, without effect here"), (REFUSED, "Not served")):
        names = ", ".join(flag.name for flag in FLAGS if flag.where == where)
        lines += ["", f"{told}: {names}."]
    return "\n".join(lines)
