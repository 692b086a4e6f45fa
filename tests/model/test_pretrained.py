"""pretrained.py: a base model whose weights are not those of its config is refused before anything waits for it."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tundish.errors import SpecError
from tundish.model.pretrained import check_pretrained, state_of

# Of PyTorch's own, in `torch.save` of a parameter's storage.
pytestmark = pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")

Weights = dict[str, Any]
FILE = "model.safetensors"
LAYER = "model.layers.1."


@pytest.fixture
def base(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of a good base model."""
    return shutil.copytree(tiny_model, tmp_path / "base")


def _change(folder: Path, change: Callable[[Weights], object]) -> None:
    weights = load_file(folder / FILE)
    change(weights)
    save_file(weights, folder / FILE, {"format": "pt"})


def _configure(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _shards(folder: Path) -> None:
    """The weights in three files with an index."""
    weights = load_file(folder / FILE)
    (folder / FILE).unlink()
    files = {name: f"model-{1 + number % 3:05}-of-00003.safetensors" for number, name in enumerate(weights)}
    for file in set(files.values()):
        save_file({name: weights[name] for name in weights if files[name] == file}, folder / file, {"format": "pt"})
    (folder / f"{FILE}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def _pickle(folder: Path) -> None:
    """The weights as PyTorch saves them."""
    import torch

    torch.save({name: torch.from_numpy(value) for name, value in load_file(folder / FILE).items()}, _bin(folder))
    (folder / FILE).unlink()


def _pickled_shards(folder: Path) -> None:
    import torch

    weights = {name: torch.from_numpy(value) for name, value in load_file(folder / FILE).items()}
    (folder / FILE).unlink()
    files = {name: f"pytorch_model-{1 + number % 2:05}-of-00002.bin" for number, name in enumerate(weights)}
    for file in set(files.values()):
        torch.save({name: weights[name] for name in weights if files[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def _bin(folder: Path) -> Path:
    return folder / "pytorch_model.bin"


def _rename(weights: Weights, old: str, new: str) -> None:
    for name in list(weights):
        weights[new + name.removeprefix(old) if name.startswith(old) else name] = weights.pop(name)


def _untied(folder: Path) -> None:
    _change(folder, lambda weights: weights.pop("lm_head.weight"))


def _tied(folder: Path) -> None:
    _untied(folder)
    _configure(folder, tie_word_embeddings=True)


def _embeddings_lost(folder: Path) -> None:
    _change(folder, lambda weights: weights.pop("model.embed_tokens.weight"))
    _configure(folder, tie_word_embeddings=True)


def _old_buffers(folder: Path) -> None:
    buffers = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": np.zeros(8, np.float32) for n in (0, 1)}
    _change(folder, lambda weights: weights.update(buffers))


def _without_head(folder: Path) -> None:
    _tied(folder)
    _change(folder, lambda weights: _rename(weights, "model.", ""))


CHANGES: dict[str, Callable[[Path], object]] = {
    "as it is": lambda folder: None,
    "shards": _shards,
    "pickle": _pickle,
    "pickled shards": _pickled_shards,
    "tied, head not stored": _tied,
    "tied, head stored": lambda folder: _configure(folder, tie_word_embeddings=True),
    "tied, embeddings not stored": _embeddings_lost,
    "tied, saved without its head": _without_head,
    "buffers of old checkpoints": _old_buffers,
    "half precision": lambda folder: _change(
        folder, lambda weights: weights.update({name: value.astype(np.float16) for name, value in weights.items()})
    ),
    "no head": _untied,
    "a weight is missing": lambda folder: _change(folder, lambda weights: weights.pop(f"{LAYER}mlp.up_proj.weight")),
    "names of PEFT": lambda folder: _change(folder, lambda weights: _rename(weights, "", "base_model.model.")),
    "names of a compiled model": lambda folder: _change(folder, lambda weights: _rename(weights, "", "_orig_mod.")),
    "names of another library": lambda folder: _change(folder, lambda weights: _rename(weights, "model.", "encoder.")),
    "another shape": lambda folder: _change(
        folder, lambda weights: weights.update({"model.norm.weight": np.zeros(63, np.float32)})
    ),
    "more layers than asked for": lambda folder: _configure(folder, num_hidden_layers=1),
    "fewer layers than asked for": lambda folder: _configure(folder, num_hidden_layers=3),
    "biases that the config does not know": lambda folder: _change(
        folder, lambda weights: weights.update({f"{LAYER}self_attn.q_proj.bias": np.zeros(64, np.float32)})
    ),
    "biases that are not there": lambda folder: _configure(folder, attention_bias=True),
    "a larger vocabulary": lambda folder: _configure(folder, vocab_size=400),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_what_is_refused_is_what_transformers_does_not_load_whole(change: Callable[[Path], object], base: Path) -> None:
    """A model would be trained from random numbers, or without some of its weights; or a good one be refused."""
    from transformers import AutoModelForCausalLM

    change(base)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(base, output_loading_info=True)
        loads = not any(report.values()) and not any(weight.is_meta for weight in model.parameters())
    except (RuntimeError, ValueError):
        loads = False
    try:
        check_pretrained(str(base))
        is_taken = True
    except SpecError:
        is_taken = False
    assert is_taken == loads


def test_a_snapshot_of_the_hub_s_cache_is_taken(base: Path, tmp_path: Path) -> None:
    """What was downloaded by name could not be given as a folder."""
    cache = tmp_path / "hub" / "models--lab--tiny"
    (cache / "snapshots").mkdir(parents=True)
    base.rename(cache / "blobs")
    snapshot = cache / "snapshots" / "0123abcd"
    snapshot.mkdir()
    for path in (cache / "blobs").iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    check_pretrained(str(snapshot))
    os.truncate(cache / "blobs" / FILE, 1000)
    with pytest.raises(SpecError, match=r"0123abcd/model\.safetensors: is truncated in its header"):
        check_pretrained(str(snapshot))


def test_a_model_s_name_is_looked_up_in_the_hub_s_cache(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A download that was cut off would be told after the wait for a device; one that is not done is fetched."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    check_pretrained("lab/tiny")
    cache = tmp_path / "hub" / "models--lab--tiny"
    (cache / "snapshots").mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0123abcd")
    base.rename(snapshot := cache / "snapshots" / "0123abcd")
    check_pretrained("lab/tiny")
    weights = (snapshot / FILE).read_bytes()
    (snapshot / FILE).unlink()
    check_pretrained("lab/tiny")
    (snapshot / FILE).write_bytes(weights[:1000])
    with pytest.raises(SpecError, match=r"0123abcd/model\.safetensors: is truncated in its header"):
        check_pretrained("lab/tiny")
    (snapshot / FILE).write_bytes(weights)
    _shards(snapshot)
    check_pretrained("lab/tiny")
    (snapshot / "model-00002-of-00003.safetensors").unlink()
    check_pretrained("lab/tiny")


@pytest.mark.parametrize("family", ["Mistral", "Mixtral", "Dbrx"])
def test_a_good_model_of_every_family_is_taken(family: str, bare_model: Path, tmp_path: Path) -> None:
    """Nobody could train it."""
    import transformers

    sizes: dict[str, Any] = {"vocab_size": 384, "pad_token_id": 0}
    if family == "Dbrx":
        sizes |= {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128, "attn_config": {"kv_n_heads": 2}}
        sizes |= {"ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2}}
    else:
        sizes |= {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        sizes |= {"intermediate_size": 48, "max_position_embeddings": 128}
    config = getattr(transformers, f"{family}Config")(**sizes)
    folder = shutil.copytree(bare_model, tmp_path / "base")
    getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(folder)
    check_pretrained(str(folder))
    _change(folder, lambda weights: weights.popitem())
    with pytest.raises(SpecError, match="lacks 1 of the"):
        check_pretrained(str(folder))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "no head",
            "lacks 1 of the 21 weights that its config.json needs: lm_head.weight. They would be random numbers. "
            "If it is tied to the embeddings, config.json must say so. Complete the weights, or correct config.json.",
        ),
        (
            "names of PEFT",
            "the names of its weights start with 'base_model.model.', which another program added; "
            "transformers does not know them. Save the model without the prefix.",
        ),
        ("names of another library", "its config.json does not need 21 of its 21 weights: encoder."),
        (
            "another shape",
            "its config.json needs other shapes of 1 of its 21 weights: model.norm.weight [63] instead of [64].",
        ),
        ("more layers than asked for", "its config.json does not need 9 of its 21 weights: model.layers.1.input_"),
        ("fewer layers than asked for", "lacks 9 of the 30 weights that its config.json needs: model.layers.2."),
    ],
)
def test_what_differs_is_named(name: str, said: str, base: Path) -> None:
    """The caller could not tell what to correct."""
    CHANGES[name](base)
    with pytest.raises(SpecError) as error:
        check_pretrained(str(base))
    assert f"model: {base}: {said}" in error.value.message
    assert len(error.value.message) < 900


def _cut(folder: Path) -> None:
    os.truncate(folder / FILE, (folder / FILE).stat().st_size - 1000)


def _cut_header(folder: Path) -> None:
    os.truncate(folder / FILE, 500)


def _append(folder: Path) -> None:
    with open(folder / FILE, "ab") as file:
        file.write(b"x")


def _header(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Changes the header of the weights, which stay as they are."""

    def damage(folder: Path) -> None:
        content = (folder / FILE).read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        (folder / FILE).write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])

    return damage


def _write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def _drop_shards(folder: Path) -> None:
    _shards(folder)
    for number in (1, 3):
        (folder / f"model-{number:05}-of-00003.safetensors").unlink()


def _index(content: object) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / FILE).unlink()
        (folder / f"{FILE}.index.json").write_text(json.dumps(content))

    return write


def _link_out(folder: Path) -> None:
    (folder / FILE).rename(folder.parent / "private")
    (folder / FILE).symlink_to("../private")


def _cut_pickle(folder: Path) -> None:
    _pickle(folder)
    os.truncate(_bin(folder), _bin(folder).stat().st_size - 1000)


def _pickle_with_code(folder: Path) -> None:
    import torch

    (folder / FILE).unlink()
    torch.save({"x": _Code()}, _bin(folder))


def _old_pickle(folder: Path) -> None:
    import torch

    (folder / FILE).unlink()
    torch.save({"x": torch.zeros(3)}, _bin(folder), _use_new_zipfile_serialization=False)


class _Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("/tmp/a-pickle-was-run",)


def _other_files(folder: Path) -> None:
    (folder / FILE).rename(folder / "weights.safetensors")
    (folder / "consolidated.00.pth").touch()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 16060617592\n"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "Git LFS": (
        _write(FILE, LFS),
        r"/model.safetensors: is a Git LFS pointer, not the file itself. Run `git lfs pull`",
    ),
    "empty": (_write(FILE, b""), r"/model.safetensors: is empty."),
    "a web page": (_write(FILE, b"<!DOCTYPE html><html>Login</html>"), "not a safetensors file."),
    "cut": (_cut, r"/model.safetensors: is truncated: it has 493,944 bytes instead of 494,944."),
    "cut in its header": (_cut_header, "is truncated in its header."),
    "longer": (_append, "is damaged: it has 494,945 bytes instead of 494,944."),
    "nested": (_write(FILE, (200_000).to_bytes(8, "little") + b'{"a":' + b"[" * 199_995), "its header is damaged"),
    "overlap": (
        _header(lambda header: header["lm_head.weight"].update(data_offsets=[8, 98_312])),
        r"its header is damaged \(a byte belongs to two tensors",
    ),
    "a false shape": (
        _header(lambda header: header["model.norm.weight"].update(shape=[640])),
        r"its header is damaged \(model.norm.weight has 256 bytes instead of 2,560\)",
    ),
    "a negative shape": (_header(lambda header: header["model.norm.weight"].update(shape=[-64])), "header is damaged"),
    "missing shards": (
        _drop_shards,
        r"index.json: 2 of the 3 files that it names are missing: model-00001-of-00003.safetensors, model-00003-of-",
    ),
    "an index of nothing": (_index({"weight_map": ["a"]}), "weight_map must name the file of each weight"),
    "an index to elsewhere": (
        _index({"weight_map": {"model.norm.weight": "../../secret"}}),
        r"index.json: 1 of the 1 files that it names are missing: ../../secret",
    ),
    "no weights": (lambda folder: (folder / FILE).unlink(), "base: has no weights. It must contain model.safetensors"),
    "other files": (
        _other_files,
        r"has no weights. transformers does not load consolidated.00.pth, weights.safetensors",
    ),
    "a link to elsewhere": (_link_out, r"/model.safetensors: is outside the model's folder: it leads to .*/private"),
    "a pipe": (
        lambda folder: ((folder / FILE).unlink(), os.mkfifo(folder / FILE)),
        r"/model.safetensors: is a named pipe",
    ),
    "quantized, in the config": (
        lambda folder: _configure(folder, quantization_config={"quant_method": "gptq", "bits": 4}),
        r"its weights are quantized \(gptq\), which cannot be trained",
    ),
    "quantized, in the file": (
        lambda folder: _change(
            folder, lambda weights: weights.update({f"{LAYER}mlp.up_proj.weight": np.zeros((128, 64), np.int8)})
        ),
        r"its weights are quantized, which cannot be trained: model.layers.1.mlp.up_proj.weight in I8.",
    ),
    "8-bit floats": (
        _header(lambda header: header["model.norm.weight"].update(dtype="F8_E4M3", shape=[256])),
        "its weights are quantized, which cannot be trained: model.norm.weight in F8_E4M3.",
    ),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "base: has no tokenizer."),
    "an adapter": (_write("adapter_config.json", b"{}"), "holds an adapter"),
    "too few rows": (
        lambda folder: (
            _configure(folder, vocab_size=304),
            _change(
                folder,
                lambda weights: weights.update(
                    {name: weights[name][:304].copy() for name in ("lm_head.weight", "model.embed_tokens.weight")}
                ),
            ),
        ),
        r"its tokenizer has ids up to 304, but its embedding has 304 rows \(vocab_size in config.json\)",
    ),
    "a pickle that is cut": (_cut_pickle, r"/pytorch_model.bin: not a readable tensor"),
    "a pickle with code": (_pickle_with_code, r"/pytorch_model.bin: .*mkdir"),
    "an old pickle": (_old_pickle, r"/pytorch_model.bin: .*save the model as safetensors"),
    "a pickle in Git LFS": (
        lambda folder: ((folder / FILE).unlink(), _bin(folder).write_bytes(LFS)),
        r"/pytorch_model.bin: is a Git LFS pointer",
    ),
}


@pytest.mark.parametrize(("damage", "said"), DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_weights_are_told_with_the_file(damage: Callable[[Path], object], said: str, base: Path) -> None:
    """The run would wait for a device, and fail with a traceback of the library that reads them."""
    damage(base)
    with pytest.raises(SpecError, match=said) as error:
        check_pretrained(str(base))
    assert error.value.message.startswith(f"model: {base}")
    assert len(error.value.message) < 600 and len(error.value.problems) == 1
    assert not Path("/tmp/a-pickle-was-run").exists()


def test_all_that_is_wrong_is_told_at_once(base: Path) -> None:
    """The caller would copy hundreds of gigabytes again, once for each file."""
    _shards(base)
    for number in (1, 2):
        (base / f"model-{number:05}-of-00003.safetensors").write_bytes(LFS)
    with pytest.raises(SpecError) as error:
        check_pretrained(str(base))
    assert [problem.split(":")[1].rpartition("/")[2] for problem in error.value.problems] == [
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
    ]


def test_a_file_that_is_replaced_by_one_of_its_size_and_time_changes_the_state(base: Path) -> None:
    """Weights or a tokenizer that nobody has checked would be taken for those that `create()` has seen."""
    config, before = base / "config.json", state_of(str(base))
    assert before is not None and before == state_of(str(base))
    stat = config.stat()
    with open(config, "r+b") as file:  # in place, as rsync and cp do it
        file.write(b"[")
    os.utime(config, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    now = config.stat()
    assert (now.st_size, now.st_mtime_ns, now.st_ino) == (stat.st_size, stat.st_mtime_ns, stat.st_ino)
    assert state_of(str(base)) != before
