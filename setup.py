"""What pyproject.toml can't say: the folder configs/ is installed as dn_detr_jax/configs/."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["dn_detr_jax*"]), "dn_detr_jax.configs"],
    package_dir={"dn_detr_jax.configs": "configs"},
)
