"""models.py: cards that say what is true of each model."""

import json
from pathlib import Path
from typing import Any

import pytest

from tundish.errors import SpecError
from tundish.plan.models import check_config, find_card, foundry_layers, license_of, model_cards

PUBLISHED_PARAMETERS = {
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B-Instruct": 3_212_749_824,
    "meta-llama/Meta-Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Meta-Llama-3-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.3-70B-Instruct": 70_553_706_496,
    "meta-llama/Meta-Llama-3.1-70B": 70_553_706_496,
    "meta-llama/Meta-Llama-3.1-405B-Instruct": 405_853_388_800,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-2-13b-chat-hf": 13_015_864_320,
    "meta-llama/Llama-2-70b-hf": 68_976_648_192,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "mistralai/Mixtral-8x7B-v0.1": 46_702_792_704,
    "databricks/dbrx-base": 131_596_523_520,
}

SUPPORTED = {
    **dict.fromkeys(
        ["meta-llama/Llama-3.3-70B-Instruct"]
        + [f"meta-llama/Llama-3.2-{size}{suffix}" for size in ("1B", "3B") for suffix in ("", "-Instruct")]
        + [
            f"meta-llama/Meta-Llama-3.1-{size}{suffix}"
            for size in ("8B", "70B", "405B")
            for suffix in ("", "-Instruct")
        ],
        131072,
    ),
    **{f"meta-llama/Meta-Llama-3-{size}{suffix}": 8192 for size in ("8B", "70B") for suffix in ("", "-Instruct")},
    **{f"meta-llama/Llama-2-{size}{suffix}-hf": 4096 for size in ("7b", "13b", "70b") for suffix in ("", "-chat")},
    **{
        f"codellama/CodeLlama-{size}{suffix}-hf": 16384
        for size in ("7b", "13b", "34b")
        for suffix in ("", "-Instruct", "-Python")
    },
    **{f"mistralai/{name}": 32768 for name in ("Mistral-7B-v0.1", "Mistral-7B-Instruct-v0.2", "Mixtral-8x7B-v0.1")},
    **{f"databricks/dbrx-{name}": 32768 for name in ("base", "instruct")},
}


@pytest.mark.parametrize(("name", "parameters"), PUBLISHED_PARAMETERS.items())
def test_parameter_counts_are_the_published_ones(name: str, parameters: int) -> None:
    """Planning would use the wrong sizes: a number of the card is wrong, or the formula is."""
    assert model_cards()[name].parameters == parameters


def test_every_model_of_the_reference_table_has_a_card_with_its_context() -> None:
    """A model of the managed service would be missing, or accept rows that it cannot read."""
    assert len(SUPPORTED) == 35
    assert {name: card.max_context_length for name, card in model_cards().items()} == SUPPORTED


def test_cards_are_consistent() -> None:
    """Two models would look the same in `get_models()`, or a card would hold impossible numbers."""
    cards = model_cards()
    assert len({card.display_name for card in cards.values()}) == len(cards) > 0
    for name, card in cards.items():
        assert card.name == name
        assert card.heads % card.key_value_heads == 0 and card.hidden_size % card.heads == 0, name


def test_only_the_405b_models_have_a_learning_rate_of_their_own() -> None:
    """A model would be trained with another default than the managed service's."""
    special = {name for name, card in model_cards().items() if card.learning_rate != 5e-7}
    assert special == {"meta-llama/Meta-Llama-3.1-405B", "meta-llama/Meta-Llama-3.1-405B-Instruct"}
    assert all(model_cards()[name].learning_rate == 1e-5 for name in special)


def test_only_mistral_s_templates_take_no_system_message() -> None:
    """A system message would be refused for the wrong models, or fail in the template mid-run."""
    assert {name for name, card in model_cards().items() if not card.system_message} == {
        name for name in SUPPORTED if name.startswith("mistralai/")
    }


@pytest.mark.parametrize("name", ["8B", "8B-Instruct", "70B", "405B-Instruct"])
def test_both_spellings_of_the_3_1_names_are_one_model(name: str) -> None:
    """A notebook that spells the name without `Meta-` would be refused."""
    assert find_card(f"meta-llama/Llama-3.1-{name}") is find_card(f"meta-llama/Meta-Llama-3.1-{name}")


@pytest.mark.parametrize(
    ("given", "near"),
    [
        ("meta-llama/Llama-3.2-3B-Instuct", "meta-llama/Llama-3.2-3B-Instruct"),
        ("meta-llama/meta-llama-3.1-8b-instruct", "meta-llama/Meta-Llama-3.1-8B-Instruct"),
        ("mistral-7b", "mistralai/Mistral-7B-v0.1"),
    ],
)
def test_an_unknown_name_is_answered_with_near_ones(given: str, near: str) -> None:
    """The caller would have to guess what the name should be."""
    with pytest.raises(SpecError) as error:
        find_card(given)
    assert f"model: {given!r} is neither a supported model nor a folder" in error.value.message
    assert near in error.value.message and "`tundish models` lists" in error.value.message


def test_a_name_like_no_other_gets_no_suggestion() -> None:
    """Nonsense would be proposed."""
    with pytest.raises(SpecError, match="neither a supported model") as error:
        find_card("zzzz")
    assert "Did you mean" not in error.value.message


def test_a_name_too_long_for_a_path_is_an_error_like_any_other() -> None:
    """A text pasted into the wrong argument would end in a traceback of the operating system's error."""
    with pytest.raises(SpecError, match="neither a supported model"):
        find_card("x" * 5000)


def test_a_folder_gets_a_card_from_its_config(config_folder: Path) -> None:
    """A local model would be planned with other numbers than its own."""
    card = find_card(str(config_folder))
    assert (card.name, card.display_name, card.family) == (str(config_folder.resolve()), "tiny", "llama")
    assert (card.max_context_length, card.layers, card.hidden_size, card.gated) == (512, 2, 64, False)
    # Embedding and head 2 · 384 · 64; a layer 12,288 + 24,576 + 128; final norm 64.
    assert card.parameters == 2 * 384 * 64 + 2 * (12_288 + 24_576 + 128) + 64


LICENSES = {
    "meta-llama/Llama-3.3-": "llama3.3",
    "meta-llama/Llama-3.2-": "llama3.2",
    "meta-llama/Meta-Llama-3.1-": "llama3.1",
    "meta-llama/Meta-Llama-3-": "llama3",
    "meta-llama/Llama-2-": "llama2",
    "codellama/": "llama2",
    "mistralai/": "apache-2.0",
    "databricks/": "databricks-open-model-license",
}


def test_every_model_has_its_license() -> None:
    """A registered model would carry no license, or that of its neighbour in the file."""
    for name, card in model_cards().items():
        (found,) = (license for start, license in LICENSES.items() if name.startswith(start))
        assert card.license == license_of(name) == found, name
    assert license_of("meta-llama/Llama-3.1-8B") == "llama3.1"


@pytest.mark.parametrize(
    ("readme", "license", "found"),
    [
        ("---\nlanguage: en\nlicense: apache-2.0\n---\n# A model\n", "MIT", "apache-2.0"),
        ("---\nlicense: other\nlicense_name: our-own\n---\n", None, "our-own"),
        ("---\nlicense: other\n---\n", None, "other"),
        ("# A model\n\n---\nlicense: mit\n---\n", "\n  LLAMA 3.1 COMMUNITY LICENSE AGREEMENT\nText", "LLAMA 3.1"),
        (None, "\x1b[31mMIT\x07\n", "[31mMIT"),
        ("---\nlicense: [a\n---\n", None, "unknown"),
        ("---\n- license\n---\n", None, "unknown"),
        (None, None, "unknown"),
    ],
    ids=["declared", "named", "other", "only a file", "control characters", "damaged", "a list", "nothing"],
)
def test_a_folder_s_license_is_what_it_says_of_itself(
    readme: str | None, license: str | None, found: str, config_folder: Path
) -> None:
    """The license of a local base model would be lost, or a damaged README stop the run."""
    for name, text in (("README.md", readme), ("LICENSE.txt", license)):
        if text is not None:
            (config_folder / name).write_text(text)
    assert find_card(str(config_folder)).license.startswith(found)
    assert license_of(str(config_folder / "gone")) == "unknown"


def test_parameters_of_a_folder_are_those_that_transformers_makes(tiny_model: Path) -> None:
    """The formula would count other weights than the model has."""
    from safetensors import safe_open

    with safe_open(tiny_model / "model.safetensors", "pt") as weights:
        counted = sum(weights.get_tensor(name).numel() for name in list(weights.keys()))
    assert find_card(str(tiny_model)).parameters == counted > 0


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"tie_word_embeddings": True}, 123_200 - 24_576),
        ({"head_dim": 32}, 123_200 + 2 * 12_288),
        ({"num_key_value_heads": None}, 123_200 + 2 * 4_096),
    ],
    ids=["tied", "head size", "no grouped heads"],
)
def test_what_changes_the_architecture_changes_the_count(
    config_folder: Path, change: dict[str, Any], found: int
) -> None:
    """Tied embeddings, wide heads or absent key/value heads would be counted like the common case."""
    _change_config(config_folder, **change)
    assert find_card(str(config_folder)).parameters == found


def test_a_folder_without_config_says_so(tmp_path: Path) -> None:
    """The caller would see a traceback of a missing file."""
    with pytest.raises(
        SpecError,
        match=r"model: .*config\.json: no such file\. Use the complete folder of a Hugging Face model",
    ):
        find_card(str(tmp_path))


@pytest.mark.parametrize("content", ["{", "[1, 2]", '"llama"'])
def test_a_config_that_is_no_mapping_is_an_error_of_the_model(config_folder: Path, content: str) -> None:
    """A damaged config.json would end in a traceback."""
    (config_folder / "config.json").write_text(content)
    with pytest.raises(SpecError, match=r"model: .*config\.json"):
        find_card(str(config_folder))


def test_a_number_is_wrong_in_any_architecture(config_folder: Path) -> None:
    """An export would build a billion layers before it says anything."""
    for family in ("llama", "gpt_neox"):
        _change_config(config_folder, model_type=family, num_hidden_layers=10**9)
        with pytest.raises(
            SpecError, match=r"num_hidden_layers: must be (at most|an integer from 1 to) 1,000, not 1000000000"
        ):
            check_config(str(config_folder))
    _change_config(config_folder, num_hidden_layers=2, num_key_value_heads=[2, 4])
    check_config(str(config_folder))


def test_another_architecture_is_refused_with_those_that_work(config_folder: Path) -> None:
    """A model that nothing here was tested with would be trained."""
    _change_config(config_folder, model_type="gpt2")
    with pytest.raises(
        SpecError, match=r"model_type 'gpt2' is not supported; tundish trains dbrx, llama, mistral, mixtral\."
    ):
        find_card(str(config_folder))


def test_a_config_that_lacks_a_number_says_which(config_folder: Path) -> None:
    """The message would send the caller after keys that need not be there."""
    _change_config(config_folder, vocab_size=None)
    with pytest.raises(SpecError, match="lacks") as error:
        find_card(str(config_folder))
    assert "vocab_size" in error.value.message
    assert "head_dim" not in error.value.message and "tie_word_embeddings" not in error.value.message


@pytest.mark.parametrize(
    ("name", "init_device"),
    [
        ("meta-llama/Llama-3.2-1B", None),
        ("meta-llama/Meta-Llama-3.1-8B", "mixed"),
        ("meta-llama/Meta-Llama-3.1-405B", "mixed"),
    ],
)
def test_what_must_change_at_scale_comes_with_the_size(name: str, init_device: str | None) -> None:
    """Every rank would load all of a large model's weights."""
    layers = foundry_layers(find_card(name))
    assert next((layer["model"]["init_device"] for layer in layers if "model" in layer), None) == init_device


def test_a_small_model_changes_nothing(config_folder: Path) -> None:
    """Small models would pay for what only large ones need."""
    assert not any(foundry_layers(find_card(str(config_folder))))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads: must be an integer from 1 to 4,096, not 0."),
        ({"num_hidden_layers": -2}, "num_hidden_layers: must be an integer from 1 to 1,000, not -2."),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: must be an integer from 1 to 1,000, not 1000000000"),
        ({"vocab_size": True}, "vocab_size: must be an integer from 1 to "),
        ({"hidden_size": 64.0}, "hidden_size: must be an integer from 1 to "),
        ({"intermediate_size": "128"}, "intermediate_size: must be an integer from 1 to "),
        ({"hidden_size": 66}, "hidden_size: must be a multiple of num_attention_heads (4), not 66."),
        ({"num_key_value_heads": 3}, "num_attention_heads: must be a multiple of num_key_value_heads (3), not 4."),
        ({"head_dim": 0}, "head_dim: must be an integer from 1 to"),
        ({"head_dim": 15}, "head_dim: must give each head an even number of channels, but is 15."),
        ({"hidden_size": 60}, "hidden_size: must give each head an even number of channels, but is 60."),
        ({"rms_norm_eps": "small"}, "rms_norm_eps: must be a number of at least 0, not 'small'."),
        ({"rope_theta": float("nan")}, "rope_theta: must be a number of at least 0, not nan."),
        ({"attention_dropout": False}, "attention_dropout: must be a number of at least 0, not False."),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings: must be true or false, not 'no'."),
        ({"max_position_embeddings": 10**400}, "max_position_embeddings: must be an integer from 1 to"),
    ],
)
def test_a_number_that_no_model_can_have_is_named(config_folder: Path, change: dict[str, Any], said: str) -> None:
    """Planning would divide by zero, or transformers fail after the data was prepared."""
    _change_config(config_folder, **change)
    with pytest.raises(SpecError) as error:
        find_card(str(config_folder))
    assert f"model: {config_folder / 'config.json'}: {said}" in error.value.message
    assert "Correct the model's config." in error.value.message and len(error.value.message) < 400


def test_all_numbers_that_are_wrong_are_told_at_once(config_folder: Path) -> None:
    """The caller would correct one, and be told of the next."""
    _change_config(config_folder, num_hidden_layers=0, vocab_size=-1, num_attention_heads=None)
    with pytest.raises(SpecError, match="num_attention_heads is missing"):
        find_card(str(config_folder))
    _change_config(config_folder, num_attention_heads=4)
    with pytest.raises(SpecError) as error:
        find_card(str(config_folder))
    assert [problem.split(": ")[2] for problem in error.value.problems] == ["num_hidden_layers", "vocab_size"]


def test_a_token_goes_to_no_more_experts_than_there_are(config_folder: Path) -> None:
    """Training would fail in its first step."""
    _change_config(config_folder, model_type="mixtral", num_local_experts=4, num_experts_per_tok=5)
    with pytest.raises(SpecError, match=r"num_experts_per_tok: must be at most num_local_experts \(4\), not 5"):
        find_card(str(config_folder))
    _change_config(config_folder, num_hidden_layers=1_000, num_local_experts=1_000)
    with pytest.raises(
        SpecError, match=r"num_local_experts: must come to at most 32,768 in all layers, not 1,000 in each of 1,000"
    ):
        find_card(str(config_folder))


def test_a_readme_that_expands_without_measure_costs_nothing(config_folder: Path) -> None:
    """As YAML, these lines are gigabytes, or a traceback."""
    anchors = "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 40))
    for front in (f"a0: &a0 x\n{anchors}\nlicense: mit", "license: mit\nx: " + "[" * 100_000):
        (config_folder / "README.md").write_text(f"---\n{front}\n---\n")
        assert find_card(str(config_folder)).license == "mit"


def _change_config(folder: Path, **changes: Any) -> None:
    """Change keys of a folder's config.json; None removes the key."""
    path = folder / "config.json"
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))
