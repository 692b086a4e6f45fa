"""foundry_text.py: comments travel with their keys, values do not change."""

import yaml

from tundish.plan.commented_yaml import comments_of, dump

LAYER = """\
# Head of the file.
seed: 17

# Above a section.
# In two lines.
optimizer:
  # Above a nested key.
  lr: 0.5
  betas:
  - 0.9
plain: 1
"""


def test_comments_are_found_by_the_path_of_their_key() -> None:
    """A comment would be lost, or explain another key of the same name."""
    assert comments_of(LAYER) == {
        ("seed",): ["# Head of the file."],
        ("optimizer",): ["# Above a section.", "# In two lines."],
        ("optimizer", "lr"): ["# Above a nested key."],
    }


def test_comments_below_a_key_are_found_in_a_list() -> None:
    """The comments of `scale.yaml`, whose layers stand in a list, would be lost or have wrong paths."""
    text = "# file\n- above: 1\n  foundry:\n    fsdp_config:\n      # Why.\n      activation_checkpointing: true\n"
    assert comments_of(text, below="foundry") == {("fsdp_config", "activation_checkpointing"): ["# Why."]}


def test_a_dump_reads_back_as_the_same_values_with_comments_above_their_keys() -> None:
    """A comment would stand above the wrong key, or break the file."""
    content = {"seed": 17, "optimizer": {"lr": 0.5, "betas": [0.9]}, "text": "a: 'b' # no comment\nline", "empty": {}}
    text = dump(content, comments_of(LAYER))
    assert yaml.safe_load(text) == content
    assert comments_of(text) == comments_of(LAYER)
    assert "  # Above a nested key.\n  lr: 0.5\n" in text


def test_sections_are_set_apart() -> None:
    """The file would be one block that nobody reads."""
    text = dump({"a": 1, "b": 2, "section": {"c": 3}, "d": 4}, {("d",): ["# Why d."]})
    assert text == "a: 1\nb: 2\n\nsection:\n  c: 3\n\n# Why d.\nd: 4\n"


def test_a_comment_without_its_key_is_left_out() -> None:
    """A layer's comment on a key that the run does not have would stand somewhere else."""
    assert dump({"a": 1}, {("b",): ["# Why b."], ("a", "c"): ["# Why c."]}) == "a: 1\n"
