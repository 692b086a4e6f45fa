"""export/safetensors.py: a checkpoint's weights come out as a folder that plain transformers loads."""

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tundish.base.files import new_folder
from tundish.checkpoints.folder import read_tensors
from tundish.checkpoints.format.archive import find_bytes
from tundish.checkpoints.format.tensors import StoredTensor
from tundish.data.templates import CHATML
from tundish.errors import CheckpointError, SpecError
from tundish.export import safetensors
from tundish.export.plan import plan
from tundish.export.safetensors import export
from tundish.plan.spec import TaskType

# Of PyTorch's own, on saving: it saves from a single process, which is wanted here, and uses its own old storage class.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning"),
]

PROMPT = [[5, 17, 300, 42, 9, 8, 77]]
SaveCheckpoint = Callable[..., Path]


def _base(folder: Path, family: str, **changes: Any) -> Path:
    """Writes the config of a tiny model beside its tokenizer."""
    from transformers import DbrxConfig, LlamaConfig, MixtralConfig

    common: dict[str, Any] = {"vocab_size": 384, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    common |= {"initializer_range": 0.2}
    if family == "dbrx":
        experts: Any = {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2}
        sizes = {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128}
        heads: Any = {"kv_n_heads": 2}
        config: Any = DbrxConfig(attn_config=heads, ffn_config=experts, **sizes, **common)
    else:
        common |= {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        common |= {"intermediate_size": 48, "max_position_embeddings": 128, **changes}
        config = LlamaConfig(**common) if family == "llama" else MixtralConfig(num_local_experts=4, **common)
    config.save_pretrained(folder)
    return folder


@pytest.fixture
def base(tmp_path: Path, bare_model: Path) -> Callable[..., Path]:
    """`base(family)`: a base model's folder, with a tokenizer that has no chat template."""
    import shutil

    def make(family: str = "llama", **changes: Any) -> Path:
        folder = tmp_path / "base"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(bare_model, folder)
        return _base(folder, family, **changes)

    return make


def _trained(model: Path) -> Any:
    """The model with the weights that training is to have left."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(23)
    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model)).eval()


@pytest.fixture
def save_checkpoint(tmp_path: Path) -> SaveCheckpoint:
    """Saves weights as Composer does: its names, the optimizer's moments beside them, PyTorch's distributed format."""
    import torch
    import torch.distributed.checkpoint as dcp

    def save(weights: dict[str, Any], name: str = "ep1-ba10") -> Path:
        state: dict[str, Any] = {f"state.model.model.{key}": tensor for key, tensor in weights.items()}
        state |= {f"state.optimizers.DecoupledLionW.state.model.{key}.exp_avg": -t for key, t in weights.items()}
        state |= {"state.timestamp": {"batch": 10}, "state.rng.torch": torch.get_rng_state()}
        dcp.save(state, checkpoint_id=tmp_path / "checkpoints" / name, no_dist=True)
        return tmp_path / "checkpoints" / name

    return save


def _logits(model: Any) -> Any:
    import torch

    with torch.no_grad():
        return model(torch.tensor(PROMPT)).logits


def _close(one: Any, other: Any) -> bool:
    """Equal but for the order of sums: memory that lies elsewhere is multiplied in other blocks."""
    import torch

    return torch.allclose(one, other, rtol=0, atol=1e-5) and float(other.abs().max()) > 0.5


def _load(folder: Path, dtype: Any = "auto") -> Any:
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=dtype, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


def _rounded(model: Any) -> Any:
    """The model with its weights rounded as in an export, computing in float32."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    return model


def _state(model: Any) -> dict[str, Any]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("family", ["llama", "mixtral", "dbrx"])
def test_the_export_is_the_trained_model(
    base: Callable[..., Path], save_checkpoint: SaveCheckpoint, tmp_path: Path, family: str
) -> None:
    """Somebody would serve other weights than were trained."""
    import torch

    folder, out = base(family), tmp_path / "export"
    trained = _trained(folder)
    export(save_checkpoint(_state(trained)), str(folder), "INSTRUCTION_FINETUNE", out)
    loaded = _load(out)
    assert loaded.dtype == torch.bfloat16 and loaded.config.torch_dtype == torch.bfloat16
    weights = loaded.state_dict()
    assert weights.keys() == trained.state_dict().keys() and len(weights) > 10
    # Each weight is the trained one, rounded once.
    assert all(torch.equal(weights[name], tensor.bfloat16()) for name, tensor in trained.state_dict().items())
    expected = _logits(_rounded(trained))
    assert _close(_logits(_load(out, torch.float32)), expected)


@pytest.mark.parametrize("family", ["llama", "mixtral", "dbrx"])
def test_float32_is_exact(
    base: Callable[..., Path], save_checkpoint: SaveCheckpoint, tmp_path: Path, family: str
) -> None:
    """An export that was asked to keep all bits would have lost some."""
    import torch

    folder, out = base(family), tmp_path / "export"
    trained = _trained(folder)
    export(save_checkpoint(_state(trained)), str(folder), "INSTRUCTION_FINETUNE", out, dtype="float32")
    loaded = _load(out)
    assert loaded.dtype == torch.float32
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in trained.state_dict().items())
    assert _close(_logits(loaded), _logits(trained))


def test_weights_stored_in_parts_are_put_together(
    base: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run on several devices leaves each of them a part of every weight."""
    import torch.distributed.checkpoint as dcp

    folder, out = base(), tmp_path / "export"
    trained = _trained(folder)
    # One process cannot write the parts of two: each half of the rows is saved by itself, and both are joined here.
    stored: list[dict[str, StoredTensor]] = []
    for number in (0, 1):
        halves = {
            f"state.model.model.{name}": tensor.chunk(2)[number].clone() for name, tensor in _state(trained).items()
        }
        dcp.save(halves, checkpoint_id=tmp_path / f"half{number}", no_dist=True)
        stored.append(read_tensors(tmp_path / f"half{number}"))
    joined = {name: _joined(first, stored[1][name]) for name, first in stored[0].items()}
    assert len(joined) > 10 and all(len(tensor.parts) == 2 for tensor in joined.values())
    monkeypatch.setattr("tundish.model.weights.read_tensors", lambda _: joined)
    export(tmp_path, str(folder), "INSTRUCTION_FINETUNE", out, dtype="float32")
    assert _close(_logits(_load(out)), _logits(trained))


def _joined(first: StoredTensor, second: StoredTensor) -> StoredTensor:
    """One tensor of both, the rows of `second` after those of `first`."""
    rows = first.shape[0]
    moved = [replace(part, offsets=(part.offsets[0] + rows, *part.offsets[1:])) for part in second.parts]
    shape = (rows + second.shape[0], *first.shape[1:])
    return replace(first, shape=shape, parts=(*moved, *first.parts))


def test_the_index_lists_every_tensor_in_its_shard(
    base: Callable[..., Path], save_checkpoint: SaveCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would leave the weights that the index forgets at random values."""
    import torch
    from safetensors import safe_open

    monkeypatch.setattr(safetensors, "SHARD_BYTES", 30_000)
    folder, out = base(), tmp_path / "export"
    trained = _trained(folder)
    export(save_checkpoint(_state(trained)), str(folder), "INSTRUCTION_FINETUNE", out)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(files) > 2
    assert files == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    stored: dict[str, str] = {}
    size = 0
    for file in files:
        with safe_open(out / file, framework="pt") as content:
            assert content.metadata() == {"format": "pt"}
            for name in content.keys():
                stored[name] = file
                size += content.get_tensor(name).nbytes
        assert (out / file).stat().st_size < 30_000 + 2_000
    assert index == {"metadata": {"total_size": size}, "weight_map": stored}
    assert stored.keys() == trained.state_dict().keys()
    assert _close(_logits(_load(out, torch.float32)), _logits(_rounded(trained)))


@pytest.mark.parametrize("stored", [True, False], ids=["both stored", "one stored"])
def test_tied_embeddings_are_written_once(
    base: Callable[..., Path], save_checkpoint: SaveCheckpoint, tmp_path: Path, stored: bool
) -> None:
    """The output layer would be written twice, or asked for where the checkpoint has it once."""
    import torch

    folder, out = base(tie_word_embeddings=True), tmp_path / "export"
    trained = _trained(folder)
    weights = _state(trained)
    assert "lm_head.weight" in weights
    if not stored:
        del weights["lm_head.weight"]
    export(save_checkpoint(weights), str(folder), "INSTRUCTION_FINETUNE", out)
    names = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert names.keys() == trained.state_dict().keys() - {"lm_head.weight"}
    loaded = _load(out, torch.float32)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert _close(_logits(loaded), _logits(_rounded(trained)))


def test_names_of_activation_checkpointing_are_undone(
    base: Callable[..., Path], save_checkpoint: SaveCheckpoint, tmp_path: Path
) -> None:
    """A run that saved memory by recomputing could not be exported."""

    folder, out = base(), tmp_path / "export"
    trained = _trained(folder)
    wrapped = {
        name.replace("layers.1.", "layers.1._checkpoint_wrapped_module."): tensor
        for name, tensor in _state(trained).items()
    }
    assert wrapped.keys() != _state(trained).keys()
    export(save_checkpoint(wrapped), str(folder), "INSTRUCTION_FINETUNE", out, dtype="float32")
    assert _close(_logits(_load(out)), _logits(trained))


def test_a_missing_weight_is_named_and_nothing_is_left(
    base: Callable[..., Path], save_checkpoint: SaveCheckpoint, tmp_path: Path
) -> None:
    """A model with a random layer would be registered."""
    folder, out = base(), tmp_path / "exports" / "one"
    weights = _state(_trained(folder))
    del weights["model.layers.1.mlp.up_proj.weight"], weights["model.norm.weight"]
    with pytest.raises(CheckpointError) as error:
        export(save_checkpoint(weights), str(folder), "INSTRUCTION_FINETUNE", out)
    assert "not a checkpoint of this model" in error.value.message
    missing = "Missing: model.layers.1.mlp.up_proj.weight, model.norm.weight. Of another shape: none."
    assert missing in error.value.message
    assert not list(tmp_path.glob("exports/*"))


def test_a_weight_of_another_shape_is_named_and_nothing_is_left(
    base: Callable[..., Path], save_checkpoint: SaveCheckpoint, tmp_path: Path
) -> None:
    """A checkpoint of another model would be exported under this one's name."""
    folder, out = base(), tmp_path / "exports" / "one"
    weights = _state(_trained(folder))
    weights["lm_head.weight"] = weights["lm_head.weight"][:300].clone()
    with pytest.raises(CheckpointError, match=r"Missing: none. Of another shape: lm_head\.weight \[300, 32\] instead"):
        export(save_checkpoint(weights), str(folder), "INSTRUCTION_FINETUNE", out)
    assert not list(tmp_path.glob("exports/*"))


def test_a_checkpoint_of_nothing_of_ours_is_refused(base: Callable[..., Path], tmp_path: Path) -> None:
    """A checkpoint of another program would fail with a traceback, or give an empty export."""
    import torch
    import torch.distributed.checkpoint as dcp

    dcp.save({"weight": torch.zeros(3)}, checkpoint_id=tmp_path / "other", no_dist=True)
    with pytest.raises(CheckpointError, match=r"Missing: model\.embed_tokens\.weight, .* and \d+ more\."):
        export(tmp_path / "other", str(base()), "INSTRUCTION_FINETUNE", tmp_path / "exports" / "one")
    assert not list(tmp_path.glob("exports/*"))


@pytest.mark.parametrize("damage", ["zeros", "one bit"])
def test_an_export_that_fails_half_way_leaves_nothing(
    base: Callable[..., Path],
    save_checkpoint: SaveCheckpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: str,
) -> None:
    """Half of an export, or one with other weights than were trained, would be served."""
    folder, out = base(), tmp_path / "exports" / "one"
    checkpoint = save_checkpoint(_state(_trained(folder)))
    (file,) = checkpoint.glob("*.distcp")
    if damage == "zeros":
        file.write_bytes(bytes(file.stat().st_size))
    else:
        bytes_ = find_bytes(read_tensors(checkpoint)["state.model.model.model.norm.weight"].parts[0], "float32")
        content = bytearray(file.read_bytes())
        content[bytes_.start + 5] ^= 1
        file.write_bytes(content)
    monkeypatch.setattr(safetensors, "SHARD_BYTES", 30_000)
    with pytest.raises(CheckpointError, match=r"not a readable tensor|not what was written \(CRC-32 differs\)"):
        export(checkpoint, str(folder), "INSTRUCTION_FINETUNE", out)
    assert not list(out.parent.iterdir())


def test_an_export_overwrites_nothing(
    base: Callable[..., Path], save_checkpoint: SaveCheckpoint, tmp_path: Path
) -> None:
    """`--out .` would empty the folder that somebody works in."""
    folder, out = base(), tmp_path / "exports"
    out.mkdir()
    (out / "letter.txt").write_text("mine")
    with pytest.raises(SpecError, match="exists already, and an export overwrites nothing"):
        export(save_checkpoint(_state(_trained(folder))), str(folder), "INSTRUCTION_FINETUNE", out)
    assert (out / "letter.txt").read_text() == "mine"


def test_what_a_killed_export_left_is_removed_and_a_living_one_s_is_not(
    base: Callable[..., Path], save_checkpoint: SaveCheckpoint, tmp_path: Path
) -> None:
    """Each attempt would leave gigabytes; or remove what another machine writes on the same disk."""
    folder, out = base(), tmp_path / "exports" / "one"
    checkpoint = save_checkpoint(_state(_trained(folder)))
    with new_folder(out) as beside:
        with pytest.raises(SpecError, match="one: another process is making it"):
            export(checkpoint, str(folder), "INSTRUCTION_FINETUNE", out)
        assert beside.is_dir()
    out.rmdir()
    (tmp_path / "exports" / ".one.tmp").mkdir()
    export(checkpoint, str(folder), "INSTRUCTION_FINETUNE", out)
    assert [path.name for path in out.parent.iterdir()] == ["one"]


def test_what_was_written_is_read_again(
    base: Callable[..., Path], save_checkpoint: SaveCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that loses bytes would give a model that nobody has trained."""
    original = safetensors.write

    def lossy(shards: Any, folder: Path, progress: Any = None) -> None:
        original(shards, folder, progress)
        path = folder / shards[0].name
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    monkeypatch.setattr(safetensors, "write", lossy)
    monkeypatch.setattr(safetensors, "SAMPLED_TENSORS", 1000)
    folder, out = base(), tmp_path / "exports" / "one"
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from the checkpoint"):
        export(save_checkpoint(_state(_trained(folder))), str(folder), "INSTRUCTION_FINETUNE", out)
    assert not list(out.parent.iterdir())


def test_progress_adds_up(base: Callable[..., Path], save_checkpoint: SaveCheckpoint, tmp_path: Path) -> None:
    """Somebody who waits for hundreds of gigabytes would not see that they come."""
    told: list[tuple[int, int]] = []
    folder, out = base(), tmp_path / "export"
    checkpoint = save_checkpoint(_state(_trained(folder)))
    export(checkpoint, str(folder), "INSTRUCTION_FINETUNE", out, progress=lambda *facts: told.append(facts))
    total = json.loads((out / safetensors.INDEX).read_text())["metadata"]["total_size"]
    assert sum(count for count, _ in told) == total and {whole for _, whole in told} == {total}


def test_added_tokens_are_part_of_the_vocabulary(
    base: Callable[..., Path], save_checkpoint: SaveCheckpoint, tmp_path: Path
) -> None:
    """A model whose embedding was resized before training would be refused, or get a config of another size."""
    folder, out = base(), tmp_path / "export"
    trained = _trained(folder)
    trained.resize_token_embeddings(400)
    checkpoint = save_checkpoint(_state(trained))
    export(checkpoint, str(folder), "INSTRUCTION_FINETUNE", out, dtype="float32")
    loaded = _load(out)
    assert loaded.config.vocab_size == 400 and _close(_logits(loaded), _logits(trained))
    trained.resize_token_embeddings(100)
    small = save_checkpoint(_state(trained), "ep1-ba11")
    with pytest.raises(CheckpointError, match="its vocabulary has 100 tokens, the model's tokenizer"):
        export(small, str(folder), "INSTRUCTION_FINETUNE", tmp_path / "other")


def test_whole_numbers_stay_whole(base: Callable[..., Path], save_checkpoint: SaveCheckpoint, tmp_path: Path) -> None:
    """A buffer of counts or positions, rounded to bfloat16, would hold others."""
    import torch

    checkpoint = save_checkpoint({"steps": torch.tensor([70_001, 3]), "weight": torch.ones(2, 2)})
    weights = {name: read_tensors(checkpoint)[f"state.model.model.{name}"] for name in ("steps", "weight")}
    shards = plan(weights, "bfloat16", 1_000)
    safetensors.write(shards, tmp_path)
    safetensors.verify(tmp_path, shards)
    from safetensors.torch import load_file

    found = load_file(tmp_path / shards[0].name)
    assert found["steps"].tolist() == [70_001, 3] and found["weight"].dtype == torch.bfloat16


def test_a_chat_model_gets_its_chat_template(
    base: Callable[..., Path], save_checkpoint: SaveCheckpoint, tmp_path: Path
) -> None:
    """A chat model that was trained in ChatML would be served in another form, or refuse chats."""
    from transformers import AutoTokenizer

    folder = base()
    checkpoint = save_checkpoint(_state(_trained(folder)))
    tasks: dict[TaskType, str | None] = {"CHAT_COMPLETION": CHATML, "INSTRUCTION_FINETUNE": None}
    for task, template in tasks.items():
        export(checkpoint, str(folder), task, tmp_path / task)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / task)
        assert tokenizer.chat_template == template
        assert tokenizer("two and two").input_ids == AutoTokenizer.from_pretrained(folder)("two and two").input_ids


def test_a_models_own_chat_template_is_kept(tiny_model: Path, save_checkpoint: SaveCheckpoint, tmp_path: Path) -> None:
    """The model would be served in another form than it was trained in."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    checkpoint = save_checkpoint(_state(AutoModelForCausalLM.from_pretrained(tiny_model)))
    export(checkpoint, str(tiny_model), "CHAT_COMPLETION", tmp_path / "export")
    template = AutoTokenizer.from_pretrained(tmp_path / "export").chat_template
    assert template == AutoTokenizer.from_pretrained(tiny_model).chat_template != CHATML


def test_the_export_generates_as_the_base_model_does(
    base: Callable[..., Path], save_checkpoint: SaveCheckpoint, tmp_path: Path
) -> None:
    """The served model would not stop where it has learnt to: the end tokens stand in generation_config.json."""
    from transformers import GenerationConfig

    folder = base()
    checkpoint = save_checkpoint(_state(_trained(folder)))
    export(checkpoint, str(folder), "INSTRUCTION_FINETUNE", tmp_path / "none")
    made = GenerationConfig.from_pretrained(tmp_path / "none")
    assert (made.eos_token_id, made.pad_token_id) == (1, 0), "from the model's config where there is none"
    GenerationConfig(eos_token_id=[1, 7], do_sample=True, temperature=0.6, top_p=0.9).save_pretrained(folder)
    export(checkpoint, str(folder), "INSTRUCTION_FINETUNE", tmp_path / "own")
    kept = GenerationConfig.from_pretrained(tmp_path / "own")
    assert (kept.eos_token_id, kept.do_sample, kept.temperature, kept.top_p) == ([1, 7], True, 0.6, 0.9)


def test_a_base_models_faulty_generation_settings_do_not_stop_the_export(
    base: Callable[..., Path], save_checkpoint: SaveCheckpoint, tmp_path: Path
) -> None:
    """A run of days would end in an error that has nothing to do with it."""
    folder = base()
    settings = {"eos_token_id": [1, 7], "do_sample": False, "temperature": 0.6, "top_p": 0.9}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    checkpoint = save_checkpoint(_state(_trained(folder)))
    # Outside tests the warning is no error; and were it ignored, transformers would not see it itself.
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        export(checkpoint, str(folder), "INSTRUCTION_FINETUNE", tmp_path / "export")
    assert json.loads((tmp_path / "export" / "generation_config.json").read_text())["eos_token_id"] == [1, 7]


def test_the_license_goes_with_the_weights_and_no_other_file_does(
    base: Callable[..., Path], save_checkpoint: SaveCheckpoint, tmp_path: Path
) -> None:
    """Whoever passes the export on would break the license of the base model; or publish a private file."""
    folder = base()
    checkpoint = save_checkpoint(_state(_trained(folder)))
    (folder / "LICENSE.txt").write_text("the license")
    (folder / "USE_POLICY.md").write_text("the policy")
    (folder / "NOTICES").mkdir()
    export(checkpoint, str(folder), "INSTRUCTION_FINETUNE", tmp_path / "out")
    assert (tmp_path / "out" / "LICENSE.txt").read_text() == "the license"
    assert (tmp_path / "out" / "USE_POLICY.md").read_text() == "the policy"
    (tmp_path / "key").write_text("secret")
    (folder / "NOTICE-key").symlink_to(tmp_path / "key")
    with pytest.raises(SpecError, match="NOTICE-key: is outside the model's folder"):
        export(checkpoint, str(folder), "INSTRUCTION_FINETUNE", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_file_that_a_tokenizer_s_config_names_is_not_copied_out(
    base: Callable[..., Path], save_checkpoint: SaveCheckpoint, tmp_path: Path
) -> None:
    """Any file of the caller's would go into the export and the registry, as the tokenizer's vocabulary."""
    folder = base()
    checkpoint = save_checkpoint(_state(_trained(folder)))
    (tmp_path / "key").write_text("secret")
    _change(folder / "tokenizer_config.json", vocab_file=str(tmp_path / "key"), tokenizer_class="LlamaTokenizerFast")
    with pytest.raises(SpecError, match=r"vocab_file names the file '/.*/key'"):
        export(checkpoint, str(folder), "INSTRUCTION_FINETUNE", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_export_names_no_code_and_no_place_that_is_not_there(
    base: Callable[..., Path], save_checkpoint: SaveCheckpoint, tmp_path: Path
) -> None:
    """Readers would ask whether to trust code, and not find it; or for the kernels of the base."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = base()
    code = {"auto_map": {"AutoModelForCausalLM": "modeling.Foreign", "AutoTokenizer": ["tokens.Foreign", None]}}
    private = {"custom_pipelines": {"text-generation": {"impl": "pipe.Foreign"}}, "_name_or_path": "/home/foreign"}
    private |= {"_attn_implementation_autoset": True, "processor_class": "Foreign"}
    _change(folder / "config.json", architectures=["Foreign"], transformers_weights="foreign.bin", **code, **private)
    _change(folder / "tokenizer_config.json", **code, **private)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, **code, **private}))
    out = tmp_path / "out"
    export(save_checkpoint(_state(_trained(folder))), str(folder), "INSTRUCTION_FINETUNE", out)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        content = json.loads((out / name).read_text())
        assert not [key for key in content if key in code | private or key.startswith("_")]
        assert not any(word in (out / name).read_text() for word in ("oreign", str(tmp_path)))
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["model_type"] == "llama"
    assert "eos_token_id" in (out / "generation_config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(out).config.hidden_size == 32
    assert len(AutoTokenizer.from_pretrained(out)) == len(AutoTokenizer.from_pretrained(folder))


def _change(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
