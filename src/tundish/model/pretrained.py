"""The weights of a model's folder, compared with what its config needs, before a run is accepted.

transformers fills missing weights with random numbers and drops those that it does not know. Only headers are read
here, no weights; pickles are read as data.
"""

import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from tundish.base.model_files import VOCABULARIES, VOCABULARY_BYTES, is_model_folder, open_file, read_json
from tundish.checkpoints.format.archive import Archive
from tundish.checkpoints.format.contents import describe_all
from tundish.checkpoints.format.metadata import LARGEST_NUMBER, Part
from tundish.errors import CheckpointError, SpecError
from tundish.model.architecture import Architecture, architecture_of
from tundish.plan.models import find_card

FORMS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Files of weights; transformers uses the first of these that exists."""
OTHER_FORMS = ("*.safetensors", "*.gguf", "*.pth", "*.pt", "*.bin", "*.h5", "*.msgpack", "*.onnx")
INDEX_BYTES = HEADER_BYTES = 16 << 20
"""Bytes. The largest known index, of 91,000 tensors, has nine million."""
PICKLE_BYTES = 64 << 20
LFS = b"version https://git-lfs"
FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
"""Bytes of an element, in the words of safetensors and of torch. Weights in other types are quantized."""
SHOWN = 5


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of a file."""

    shape: tuple[int, ...]
    dtype: str


def check_pretrained(model: str) -> None:
    """Check that a run can start from the weights of a model; for a model of the hub, those in this machine's cache.

    Raises:
        SpecError: with everything that is wrong with them.
    """
    folder = Path(model) if is_model_folder(model) else _snapshot(model)
    if folder is None:
        return
    problems = list[str]()
    if reason := _no_base_model(folder):
        raise SpecError(f"model: {folder}: {reason}")
    stored = _read_stored(folder, problems)
    if not problems:
        problems.extend(_quantized(folder, stored))
    if not problems:
        problems.extend(_differences(folder, stored, architecture_of(str(folder))))
    problems.extend(_tokens_problems(folder))
    if problems:
        raise SpecError(problems)


def state_of(model: str) -> str | None:
    """A digest of the names, sizes and times of a model's files: another one, and they must be checked once more.

    None where the model is not complete on this machine.
    """
    folder = Path(model) if is_model_folder(model) else _snapshot(model)
    try:
        files = sorted(folder.iterdir()) if folder is not None else []
        # Of what links lead to: in the hub's cache, all files are links.
        stats = {file.name: file.stat() for file in files}
    except OSError:
        return None
    # No copy or archive can set the time of the last change (ctime), as it can that of the content.
    states = [(name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for name, s in stats.items()]
    return hashlib.sha256(json.dumps(states).encode()).hexdigest() if states else None


def _snapshot(model: str) -> Path | None:
    """The cached folder of a hub model; None unless it is complete, as transformers downloads what is missing."""
    from huggingface_hub import try_to_load_from_cache

    try:
        config = try_to_load_from_cache(model, "config.json")
    except (OSError, ValueError):  # not a name of the hub
        return None
    folder = Path(config).parent if isinstance(config, str) else None
    if folder is None or not _has_tokenizer(folder) or (form := _form(folder)) is None:
        return None
    if form.endswith(".index.json"):
        with suppress(SpecError):  # a damaged index is reported later, if no file is missing
            named = read_json(folder, form, INDEX_BYTES).get("weight_map")
            files = cast(dict[str, Any], named).values() if isinstance(named, dict) else ()
            return folder if all((folder / str(file)).exists() for file in files) else None
    return folder


def _no_base_model(folder: Path) -> str | None:
    """Why the weights of a folder cannot be trained; None if they can."""
    config = read_json(folder, "config.json")
    if quantization := config.get("quantization_config"):
        method = cast(dict[str, Any], quantization).get("quant_method") if isinstance(quantization, dict) else None
        return (
            f"its weights are quantized ({method or 'quantization_config in config.json'}), which cannot be trained. "
            "Use the model that they were made from."
        )
    if (folder / "adapter_config.json").exists():
        return "holds an adapter (adapter_config.json). Merge it into its base model, and use the merged model."
    return None


def _read_stored(folder: Path, problems: list[str]) -> dict[str, Stored]:
    """Every tensor that transformers would load, by name."""
    if (form := _form(folder)) is None:
        others = sorted({path.name for pattern in OTHER_FORMS for path in folder.glob(pattern)})
        ignored = f" transformers does not load {_some(others)}." if others else ""
        names = f"{', '.join(FORMS[:-1])} or {FORMS[-1]}"
        problems.append(f"model: {folder}: has no weights.{ignored} It must contain {names}. Complete the folder.")
        return {}
    read = _read_safetensors if "safetensors" in form else _read_pickle
    try:
        if not form.endswith(".index.json"):
            return read(folder, form)
        weight_map = _weight_map(folder, form)
    except SpecError as error:
        problems.extend(error.problems)
        return {}
    files = dict[str, dict[str, Stored]]()
    for name in sorted(set(weight_map.values())):
        try:
            files[name] = read(folder, name)
        except SpecError as error:
            problems.extend(error.problems)
    return {name: files[file][name] for name, file in weight_map.items() if name in files.get(file, ())}


def _form(folder: Path) -> str | None:
    """The file from which transformers would load the weights."""
    return next((name for name in FORMS if (folder / name).is_symlink() or (folder / name).exists()), None)


def _weight_map(folder: Path, index: str) -> dict[str, str]:
    """The file of each tensor; all files exist."""
    where = f"model: {folder / index}"
    content = read_json(folder, index, INDEX_BYTES).get("weight_map")
    if not isinstance(content, dict) or not all(
        isinstance(file, str) for file in cast(dict[str, Any], content).values()
    ):
        raise SpecError(f"{where}: weight_map must name the file of each weight. Use the model's original file.")
    weight_map = cast(dict[str, str], content)
    files = sorted(set(weight_map.values()))
    missing = [file for file in files if not ((folder / file).is_symlink() or (folder / file).exists())]
    if missing:
        raise SpecError(
            f"{where}: {len(missing)} of the {len(files)} files that it names are missing: {_some(missing)}. "
            "Complete the folder."
        )
    return weight_map


def _read_safetensors(folder: Path, name: str) -> dict[str, Stored]:
    """The tensors in the header of a safetensors file, checked against the file's size.

    The format: https://huggingface.co/docs/safetensors.
    """
    where = f"model: {folder / name}"
    with open_file(folder, name) as file:
        begin, size = _begin(where, file)
        length = int.from_bytes(begin[:8], "little")
        if length > HEADER_BYTES or begin[8:9] != b"{":
            raise SpecError(f"{where}: not a safetensors file. Copy the model's original file again.")
        file.seek(8)
        header = file.read(length)
    if len(header) < length:
        raise SpecError(f"{where}: is truncated in its header. Copy the file again.")
    stored, places = dict[str, Stored](), [(0, 0)]
    try:
        for tensor, entry in json.loads(header).items():
            if tensor != "__metadata__":
                stored[tensor] = Stored(_shape(entry["shape"]), str(entry["dtype"]))
                places.append(_place(tensor, stored[tensor], entry["data_offsets"]))
        places.sort()
        if any(end != start for (_, end), (start, _) in itertools.pairwise(places)):
            raise ValueError("a byte belongs to two tensors, or to none")
    except (RecursionError, ValueError, KeyError, TypeError, AttributeError) as error:
        text = f"its header is damaged ({' '.join(str(error).split())[:100]})"
        raise SpecError(f"{where}: {text}. Copy the model's original file again.") from error
    if (wanted := 8 + length + places[-1][1]) != size:
        what = "is truncated" if size < wanted else "is damaged"
        raise SpecError(f"{where}: {what}: it has {size:,} bytes instead of {wanted:,}. Copy the file again.")
    return stored


def _place(name: str, tensor: Stored, offsets: Any) -> tuple[int, int]:
    start, end = _shape(offsets)
    wanted = math.prod(tensor.shape) * FLOATS.get(tensor.dtype, 0)
    if end < start or (end - start != wanted and tensor.dtype in FLOATS):
        raise ValueError(f"{name} has {end - start:,} bytes instead of {wanted:,}")
    return start, end


def _shape(given: Any) -> tuple[int, ...]:
    if type(given) is not list or not all(
        type(number) is int and 0 <= number < LARGEST_NUMBER for number in cast(list[Any], given)
    ):
        raise ValueError("sizes are no numbers")
    return tuple(cast(list[int], given))


def _read_pickle(folder: Path, name: str) -> dict[str, Stored]:
    """The tensors of a `torch.save` archive; its pickle is read as data."""
    where, path = f"model: {folder / name}", folder / name
    with open_file(folder, name) as file:
        _, size = _begin(where, file)
    try:
        with Archive(Part((), (), path, 0, size)) as archive:
            sizes = {key.removeprefix("data/"): entry.file_size for key, entry in archive.names.items()}
            tensors = describe_all(archive.content(archive.names.get("data.pkl"), PICKLE_BYTES), sizes)
    except CheckpointError as error:
        text = error.message.removeprefix(f"{path}, byte 0: ").partition(". ")[0]
        raise SpecError(f"{where}: {text}. Copy it again, or save the model as safetensors.") from error
    return {tensor: Stored(facts.size, facts.dtype) for tensor, facts in tensors.items()}


def _begin(where: str, file: BinaryIO) -> tuple[bytes, int]:
    """The first bytes and the size of a file of weights."""
    size = file.seek(0, 2)
    file.seek(0)
    begin = file.read(len(LFS))
    if begin == LFS:
        raise SpecError(
            f"{where}: is a Git LFS pointer, not the file itself. Run `git lfs pull` in the model's folder."
        )
    if size < len(LFS):
        raise SpecError(f"{where}: is {'truncated' if size else 'empty'}. Copy the model's original file again.")
    return begin, size


def _quantized(folder: Path, stored: Mapping[str, Stored]) -> Iterator[str]:
    names = [name for name, tensor in stored.items() if tensor.dtype not in FLOATS and "rotary_emb" not in name]
    if names:
        types = ", ".join(sorted({stored[name].dtype for name in names}))
        yield (
            f"model: {folder}: its weights are quantized, which cannot be trained: {_some(names)} in {types}. "
            "Use the model that they were made from."
        )


def _differences(folder: Path, stored: Mapping[str, Stored], asked: Architecture) -> Iterator[str]:
    """Weights that transformers would fill with random numbers, fail on, or drop."""
    where = f"model: {folder}"
    if wrapper := _wrapper(stored, asked):
        yield (
            f"{where}: the names of its weights start with {wrapper!r}, which another program added; "
            "transformers does not know them. Save the model without the prefix."
        )
        return
    # The model may have been saved without its head.
    begin = "" if any(name.startswith(asked.prefix) for name in stored) else f"{asked.prefix}."
    names = {begin + name: name for name in stored}
    shapes_stored = {name: stored[original].shape for name, original in names.items()}
    missing = [name for name in asked.shapes if name not in shapes_stored and not _matches(name, asked.optional)]
    if missing:
        tied = " If it is tied to the embeddings, config.json must say so." if missing == ["lm_head.weight"] else ""
        yield (
            f"{where}: lacks {len(missing)} of the {len(asked.shapes)} weights that its config.json needs: "
            f"{_some(missing)}. They would be random numbers.{tied} Complete the weights, or correct config.json."
        )
    shapes = {**asked.tied, **asked.shapes}
    other = [
        f"{name} {list(shapes_stored[name])} instead of {list(shape)}"
        for name, shape in shapes.items()
        if shapes_stored.get(name, shape) != shape
    ]
    if other:
        text = f"{len(other)} of its {len(shapes_stored)} weights: {_some(other)}"
        yield f"{where}: its config.json needs other shapes of {text}. Use weights and config of the same model."
    surplus = [original for name, original in names.items() if name not in shapes and not _matches(name, asked.surplus)]
    if surplus:
        text = f"{len(surplus)} of its {len(shapes_stored)} weights: {_some(surplus)}"
        yield (
            f"{where}: its config.json does not need {text}. They would be dropped. Use weights and config of the same "
            "model."
        )


def _wrapper(stored: Mapping[str, Stored], asked: Architecture) -> str | None:
    """The prefix that another program added to all names; None: no prefix."""
    name = next(iter(asked.shapes))
    wrappers = {full.removesuffix(name) for full in stored if full.endswith(name)}
    return None if "" in wrappers or len(wrappers) != 1 else wrappers.pop()


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


def _tokens_problems(folder: Path) -> Iterator[str]:
    """A missing tokenizer, or token ids without a row in the embedding."""
    if not _has_tokenizer(folder):
        yield f"model: {folder}: has no tokenizer. It must contain tokenizer.json. Complete the folder."
    rows = find_card(str(folder)).vocabulary_size
    tokens = _tokens(folder)
    if tokens > rows:
        yield (
            f"model: {folder}: its tokenizer has ids up to {tokens - 1:,}, but its embedding has {rows:,} rows "
            "(vocab_size in config.json). Resize the model's embedding, or use its own tokenizer."
        )


def _has_tokenizer(folder: Path) -> bool:
    return any(Path(path.name).match(pattern) for path in folder.iterdir() for pattern in VOCABULARIES)


def _tokens(folder: Path) -> int:
    """One more than the highest id in the tokenizer's files; 0 without a tokenizer.json."""
    if not (folder / "tokenizer.json").exists():
        return 0
    content = read_json(folder, "tokenizer.json", VOCABULARY_BYTES)
    try:
        vocabulary: Any = content["model"]["vocab"]
        ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else list(range(len(vocabulary)))
        ids += [token["id"] for token in content.get("added_tokens") or ()]
        if (folder / "tokenizer_config.json").exists():
            ids += map(int, read_json(folder, "tokenizer_config.json").get("added_tokens_decoder") or ())
        return 1 + max(number for number in cast(list[Any], ids) if type(number) is int)
    except (KeyError, TypeError, ValueError):
        return 0  # loading it reports what is wrong


def _some(names: Sequence[str]) -> str:
    shown = [name if len(name) <= 120 and name.isprintable() else ascii(name)[:120] for name in names[:SHOWN]]
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(shown) + more
