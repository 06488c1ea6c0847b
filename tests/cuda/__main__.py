"""`python -m tests.cuda training|serving|benchmarking FOLDER`: run a program on the pretended device."""

import importlib
import sys
from pathlib import Path

importlib.import_module("tests.cuda.pretend")  # before torch
importlib.import_module(f"tests.cuda.{sys.argv[1]}").main(Path(sys.argv[2]))
