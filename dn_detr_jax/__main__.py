"""The commands of this package: `python -m dn_detr_jax COMMAND ...`."""

import runpy
import sys

_COMMANDS = {
    "predict": "dn_detr_jax.commands.predict",
    "export": "dn_detr_jax.commands.export",
    "check": "dn_detr_jax.data.check",
    "canvases": "dn_detr_jax.data.canvases",
    "import": "dn_detr_jax.commands.import_torch",
    "export-torch": "dn_detr_jax.commands.export_torch",
    "check-reference": "dn_detr_jax.commands.check_reference",
    "preflight": "dn_detr_jax.preflight.preflight",
    "visualize": "dn_detr_jax.visualize.visualize",
}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in _COMMANDS:
        sys.exit(f"usage: python -m dn_detr_jax COMMAND ...; commands: {', '.join(_COMMANDS)}")
    module = _COMMANDS[sys.argv.pop(1)]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
