"""export/plan.py: every tensor has one place, and no file is larger than it should be."""

from tundish.checkpoints.format.tensors import StoredTensor
from tundish.export.plan import plan


def _stored(*shapes: tuple[int, ...]) -> dict[str, StoredTensor]:
    return {f"t{number}": StoredTensor(f"t{number}", shape, "float32", ()) for number, shape in enumerate(shapes)}


def test_no_shard_is_larger_than_the_limit() -> None:
    """Files would be larger than what users can store or send at once."""
    weights = _stored((10,), (5, 2), (3,), (2,), (4, 5), (1,))
    shards = plan(weights, "bfloat16", 26)
    names = [[target.name for target in shard.targets] for shard in shards]
    assert names == [["t0"], ["t1", "t2"], ["t3"], ["t4"], ["t5"]]
    assert [shard.name for shard in shards] == [f"model-0000{n}-of-00005.safetensors" for n in range(1, 6)]
    assert plan(weights, "float32", 26) != shards, "the bytes written count, not those stored"


def test_a_tensor_as_large_as_the_limit_fills_a_shard() -> None:
    """One tensor more or less in a shard: the border is the limit itself."""
    assert [len(shard.targets) for shard in plan(_stored((5,), (5,), (1,)), "bfloat16", 20)] == [2, 1]
    assert [len(shard.targets) for shard in plan(_stored((50,), (1,), (1,)), "bfloat16", 20)] == [1, 2]


def test_every_tensor_is_in_one_shard_in_order() -> None:
    """Weights would be lost, written twice, or over each other."""
    weights = _stored(*((n % 7 + 1, 3) for n in range(50)))
    shards = plan(weights, "bfloat16", 100)
    targets = [target for shard in shards for target in shard.targets]
    assert [(target.name, target.source) for target in targets] == [*weights.items()] and len(shards) > 5
    for shard in shards:
        ends = [0, *(target.start + target.size for target in shard.targets)]
        assert [target.start for target in shard.targets] == ends[:-1]
    assert plan({}, "bfloat16", 100) == []
