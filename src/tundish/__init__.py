"""tundish: `foundation_model.create()` for your own machines.

Importing this package loads neither torch nor transformers, mlflow or composer: they are imported by the
functions that use them.
"""

__version__ = "0.1.0"
__all__ = ["__version__"]
