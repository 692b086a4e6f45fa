"""train/silent_nodes.py: which node was lost is said by its number and host."""

import logging

import pytest

from tundish.supervise.causes import lost_nodes
from tundish.train.silent_nodes import SilentNodes

pytestmark = pytest.mark.slow


def test_a_silent_node_is_named_once_and_when_it_is_back(caplog: pytest.LogCaptureFixture) -> None:
    """Nobody could tell which of many machines to look at, or the log would be full of it."""
    nodes = SilentNodes({0: "10.0.0.1", 1: "", 2: ""})
    with caplog.at_level(logging.ERROR):
        assert nodes.update({0: "a 1", 1: "b 1", 2: "c 1"}, 0.0, 20.0) == {}
        assert nodes.update({0: "a 2", 1: "b 1", 2: "c 2"}, 15.0, 20.0) == {}
        assert nodes.update({0: "a 3", 1: "b 1", 2: "c 3"}, 25.0, 20.0) == {1: 25.0}
        assert nodes.update({0: "a 4", 1: "b 1", 2: "c 4"}, 30.0, 20.0) == {1: 30.0}
    assert [record.message for record in caplog.records] == ["node 1 (b) has not been heard from for 25 s."]
    assert lost_nodes(caplog.text) == ["node 1 (b) has not been heard from for 25 s."], "what the supervisor looks for"
    with caplog.at_level(logging.ERROR):
        assert nodes.update({0: "a 5", 1: "b 2", 2: "c 5"}, 35.0, 20.0) == {}
    assert caplog.records[-1].message == "node 1 (b) is heard from again." and lost_nodes(caplog.text) == []


def test_without_the_first_node_nobody_can_be_heard(caplog: pytest.LogCaptureFixture) -> None:
    """The store is on it: all others would be called lost with it, or nobody."""
    nodes = SilentNodes({0: "10.0.0.1", 2: ""})
    assert nodes.update({0: "", 2: "c 1"}, 0.0, 20.0) == {}
    assert nodes.update(None, 15.0, 20.0) == {}
    assert nodes.update(None, 30.0, 20.0) == {0: 30.0}
    assert nodes.text({0: 30.0}) == "node 0 (10.0.0.1) has not been heard from for 30 s."


def test_a_node_that_is_done_is_not_lost() -> None:
    """Who ends a moment later would call the end of a good run a loss."""
    nodes = SilentNodes({1: ""})
    nodes.update({1: "b 7"}, 0.0, 20.0)
    nodes.update({1: "b done"}, 5.0, 20.0)
    assert nodes.update({1: "b done"}, 500.0, 20.0) == {}
