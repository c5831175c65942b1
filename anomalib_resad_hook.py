# SPDX-License-Identifier: Apache-2.0

"""Make ``ResAD`` known to anomalib whenever anomalib is imported, so that ``--model ResAD`` works by itself.

PyTorch calls :func:`install` at the end of ``import torch`` (entry point group ``torch.backends``). It puts one finder
on ``sys.meta_path``, which waits for ``anomalib.models`` and imports ``anomalib_resad.plugin`` right after it. Programs
that do not use anomalib never get further than that. ``TORCH_DEVICE_BACKEND_AUTOLOAD=0`` switches it off.

An exception here would break ``import torch`` in every program of the environment, and one at the import of anomalib
would silently take all verbs from its command line: so nothing may be raised, and nothing heavy is imported.
"""

import sys
from importlib.abc import Loader, MetaPathFinder
from types import ModuleType

WATCHED = "anomalib.models"


class _Finder(MetaPathFinder):
    """Wrap the loader of ``anomalib.models``, once."""

    def find_spec(self, fullname, path=None, target=None):  # noqa: ANN001, ANN202
        if fullname != WATCHED:
            return None
        sys.meta_path.remove(self)
        for finder in sys.meta_path:
            spec = finder.find_spec(fullname, path, target) if hasattr(finder, "find_spec") else None
            if spec is not None:
                _wrap(spec.loader)
                return spec
        return None


def _wrap(loader: Loader | None) -> None:
    """Let a loader import ``anomalib_resad.plugin`` after it has executed its module."""
    if loader is None:
        return
    execute = loader.exec_module

    def exec_module(module):  # noqa: ANN001, ANN202
        execute(module)
        _import_plugin()

    loader.exec_module = exec_module  # type: ignore[method-assign]


def _import_plugin() -> None:
    # Part of this package may be what imports anomalib at this moment: then wait until the outermost part is complete.
    busy = [
        name
        for name, module in list(sys.modules.items())
        if name.startswith("anomalib_resad.") and getattr(getattr(module, "__spec__", None), "_initializing", False)
    ]
    if "anomalib_resad.plugin" in busy:
        return  # it registers when it is done
    if busy:
        parent, _, name = busy[0].rpartition(".")
        _wait_for_attribute(sys.modules[parent], name)
        return
    try:
        import anomalib_resad.plugin  # noqa: F401, PLC0415
    except Exception as error:  # noqa: BLE001
        import logging  # noqa: PLC0415

        logging.getLogger(__name__).warning("ResAD is not available by its short name: %s", error)


def _wait_for_attribute(parent: ModuleType, name: str) -> None:
    """Import the plugin when ``parent`` gets the attribute ``name``: what Python does once a submodule is complete.

    For programs that import anomalib before PyTorch, or a part of ``anomalib_resad`` before either: then that module
    is being executed at this moment.
    """
    original = parent.__class__

    class Waiting(original):  # type: ignore[misc, valid-type]
        def __setattr__(self, key: str, value: object) -> None:
            super().__setattr__(key, value)
            if key == name:
                self.__class__ = original  # type: ignore[assignment]
                _import_plugin()

    parent.__class__ = Waiting


def install() -> None:
    """Start waiting for anomalib; called by PyTorch."""
    try:
        package, _, name = WATCHED.partition(".")
        if WATCHED not in sys.modules:
            sys.meta_path.insert(0, _Finder())
        elif hasattr(sys.modules[package], name):
            _import_plugin()
        else:
            _wait_for_attribute(sys.modules[package], name)
    except Exception:  # noqa: BLE001, S110
        pass
