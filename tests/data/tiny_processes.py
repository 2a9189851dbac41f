"""`tiny.processes` as a config file."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import tiny

get_config = tiny.processes
