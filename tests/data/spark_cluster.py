"""pyspark's daemon for test_spark.py: the Python processes that it forks have loaded already what they need.

Each would take ten seconds for it, and tests that end processes need many. Spark starts it by the name of this module.
"""

if __name__ == "__main__":
    import streaming  # noqa: F401
    import transformers.models.auto  # noqa: F401
    from pyspark.daemon import manager
    from transformers import AutoTokenizer  # noqa: F401

    manager()
