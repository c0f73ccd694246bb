"""Which networks each technique works on, tried out: ``python -m compat``. Not part of the package."""
