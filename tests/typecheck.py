"""The checker of the shapes in signatures, for jaxtyping's pytest plugin (see `pyproject.toml`)."""

from beartype import BeartypeConf, beartype

# An int is accepted where a float is asked for, as in Python itself.
check = beartype(conf=BeartypeConf(is_pep484_tower=True))
