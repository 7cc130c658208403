"""`modules` is usable without Transformers: a method's mathematics is not tied to a model
library."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize("package", ["ops", "modules"])
def test_a_package_of_mathematics_needs_no_transformers(package):
    code = f"""
import sys
sys.modules["transformers"] = None  # an import of it raises
import importlib, pkgutil
import memretrofit.{package} as package
for module in pkgutil.iter_modules(package.__path__):
    importlib.import_module(package.__name__ + "." + module.name)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
