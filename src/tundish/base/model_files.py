"""Files of a model's folder: they are foreign input, so each is checked before anything reads it.

Only regular files of a sane size are read that lie in the folder, also if links lead to them. A snapshot in the hub's
cache is a folder of links to files beside it, which lie in the cache folder of their model.
"""

import json
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

from tundish.base.files import content_root
from tundish.errors import SpecError

TEXT_BYTES = 16 << 20
"""Of settings, templates, licenses: the largest known ones have three million."""
VOCABULARY_BYTES = 128 << 20
"""Of tokenizer files: the largest known ones have 35 million."""
DEEPEST = 32
"""Levels of brackets: known files have five."""
SETTINGS = (
    *("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template.json"),
)
VOCABULARIES = ("tokenizer.json", "tokenizer.*.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken")
LICENSES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
"""How names of license files start, in capital letters."""
REPLACING = {
    "configuration_files": "would be read instead of this file",
    "_attn_implementation_internal": "would replace the attention that keeps packed samples apart",
}
"""Keys of config.json, and what is wrong with their values."""
NOT_READ = ("special_tokens_map_file", "added_tokens_file")
"""Keys of tokenizer_config.json that name files which nothing opens."""


def is_model_folder(model: str) -> bool:
    """Whether a model is a folder of this machine, not a name on the hub."""
    try:
        return Path(model).is_dir()
    except PermissionError:
        return True  # reading it reports the error
    except OSError:
        return False  # a text too long for a path


def open_file(folder: Path, name: str, most: int | None = None) -> BinaryIO:
    """Open a file of a model's folder.

    Args:
        folder: of the model.
        name: of the file in it.
        most: maximum of bytes; None for any number.

    Raises:
        SpecError: it is missing, not readable, too large, not a regular file, or outside of the folder.
    """
    where = f"model: {folder / name}"
    try:
        real, root = (folder / name).resolve(strict=True), content_root(folder)
        # Without O_NONBLOCK, opening a named pipe waits forever.
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(real, flags) if real.is_relative_to(root) else None
    except FileNotFoundError as error:
        what = "is a link to a missing file" if (folder / name).is_symlink() else "no such file"
        raise SpecError(f"{where}: {what}. Use the complete folder of a Hugging Face model.") from error
    except PermissionError as error:
        raise SpecError(f"{where}: permission denied. Make it readable for {_user()}, who starts the run.") from error
    except (OSError, RuntimeError, ValueError) as error:  # a socket, a link to itself, an impossible name
        raise SpecError(f"{where}: cannot be opened ({error}). It must be a regular file.") from error
    if descriptor is None:
        text = f"is outside the model's folder: it leads to {real}. Put the file itself into the folder."
        raise SpecError(f"{where}: {text}")
    try:
        _check_kind(where, os.fstat(descriptor), most)
    except SpecError:
        os.close(descriptor)
        raise
    return open(descriptor, "rb")


def _check_kind(where: str, status: os.stat_result, most: int | None) -> None:
    if not stat.S_ISREG(status.st_mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe"}
        kind = kinds.get(stat.S_IFMT(status.st_mode), "a device")
        raise SpecError(f"{where}: is {kind}; it must be a regular file. Replace or remove it.")
    if most is not None and status.st_size > most:
        raise SpecError(
            f"{where}: has {status.st_size:,} bytes; files like this may have at most {most:,}. Replace or remove it."
        )


def _user() -> str:
    import getpass

    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"user {os.geteuid()}"


def read_bytes(folder: Path, name: str, most: int = TEXT_BYTES) -> bytes:
    """The content of a file of a model's folder.

    Raises:
        SpecError: as of `open_file`.
    """
    with open_file(folder, name, most) as file:
        return file.read(most)


def read_json(folder: Path, name: str, most: int = TEXT_BYTES) -> dict[str, Any]:
    """The JSON object in a file of a model's folder.

    Raises:
        SpecError: as of `open_file`, or the file holds something else.
    """
    where = f"model: {folder / name}"
    content = read_bytes(folder, name, most)
    if content.startswith(b"version https://git-lfs"):
        raise SpecError(
            f"{where}: is a Git LFS pointer, not the file itself. Run `git lfs pull` in the model's folder."
        )
    try:
        value = json.loads(content)
        if _nests_deeply(value):
            raise RecursionError
    except RecursionError as error:
        raise SpecError(f"{where}: is nested too deeply. Use the model's original file.") from error
    except ValueError as error:
        raise SpecError(f"{where}: not valid JSON ({error}). Use the model's original file.") from error
    if not isinstance(value, dict):
        raise SpecError(f"{where}: must be a JSON object. Use the model's original file.")
    return cast(dict[str, Any], value)


def _nests_deeply(content: Any) -> bool:
    level: list[Any] = [content]
    for _ in range(DEEPEST):
        values = (value for parent in level for value in (parent.values() if isinstance(parent, dict) else parent))
        level = [value for value in values if isinstance(value, dict | list)]
    return bool(level)


def license_files(folder: Path) -> list[str]:
    """Names of the files that must accompany every copy of the model, in alphabetical order."""
    files = (path for path in folder.iterdir() if path.name.upper().startswith(LICENSES) and not path.is_dir())
    return sorted(path.name for path in files)


def check_files(model: str) -> None:
    """Check that transformers may read settings and tokenizer of a model's folder; models of the hub are not checked.

    Raises:
        SpecError: with all problems of the folder's files except weights.
    """
    if not is_model_folder(model):
        return
    folder, problems = Path(model), list[str]()
    for name, most in _read_by_transformers(folder):
        try:
            if name in SETTINGS:
                content = read_json(folder, name)
                problems.extend(_named_files(folder, content) if name == "tokenizer_config.json" else ())
                problems.extend(_config_problems(folder, content) if name == "config.json" else ())
            else:
                open_file(folder, name, most).close()
        except SpecError as error:
            problems.extend(error.problems)
    if problems:
        raise SpecError(problems)


def _read_by_transformers(folder: Path) -> Iterator[tuple[str, int]]:
    """Names of files, also of broken links, and how many bytes each may have."""
    try:
        names = sorted(path.name for path in folder.iterdir())
    except PermissionError as error:
        raise SpecError(f"model: {folder}: permission denied. Make it readable for {_user()}.") from error
    for name in names:
        if any(Path(name).match(pattern) for pattern in VOCABULARIES):
            yield name, VOCABULARY_BYTES
        elif name in SETTINGS or name.endswith(".jinja") or name == "README.md":
            yield name, TEXT_BYTES
    yield from ((name, TEXT_BYTES) for name in license_files(folder))


def _config_problems(folder: Path, content: Mapping[str, Any]) -> Iterator[str]:
    """Keys that would make transformers use something else than the run asks for."""
    for key, what in REPLACING.items():
        if content.get(key):
            yield f"model: {folder / 'config.json'}: {key} is {repr(content[key])[:80]}, which {what}. Remove the key."


def _named_files(folder: Path, content: Mapping[str, Any]) -> Iterator[str]:
    """Files that tokenizer_config.json names, which transformers would open wherever they are."""
    where = f"model: {folder / 'tokenizer_config.json'}"
    advice = "Remove the key: a folder's own files are found without it."
    for key, value in content.items():
        if key.endswith("_file") and key not in NOT_READ and value is not None:
            yield f"{where}: {key} names the file {value!r}. {advice}"
    if content.get("init_inputs"):
        yield f"{where}: init_inputs has {content['init_inputs']!r}, which may be files. {advice}"
    names = content.get("fast_tokenizer_files") or []
    listed = cast(list[Any], names) if isinstance(names, list) else [names]
    for name in listed:
        if not isinstance(name, str) or name != Path(name).name or not Path(name).match("tokenizer.*"):
            yield f"{where}: fast_tokenizer_files names {name!r}; it must name files of the folder. {advice}"
