"""The commands of this package: `python -m dn_detr_jax COMMAND ...`."""

from dn_detr_jax.commands.dispatch import main

if __name__ == "__main__":
    main()
