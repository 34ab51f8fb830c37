"""What plans know about this machine: the memory that a decode may take, and rates that are measured once."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence

import torch

from halovae.distributed.mesh import Mesh
from halovae.kernels.native import EAGER, Kernels
from halovae.planning.calibrate import calibrated, key_of, stored
from halovae.planning.calibration import Calibration, read, shipped

# The share of free memory that a decode may take.
USABLE = 0.9

# By ranks: groups may share some ranks, and all ranks of one ask together. None is dropped: ranks would drop others.
_calibrations: dict[tuple[tuple[int, ...], str], Calibration] = {}


def usable(offers: Sequence[tuple[int, str]], device: str) -> int:
    """Return the bytes that a decode may take on each rank.

    Args:
        offers: every rank's free bytes and host.
        device: the kind of the ranks' devices. Processes on the CPU share their host's memory.
    """
    hosts = [host for _, host in offers]
    sharing = max(map(hosts.count, hosts)) if device == "cpu" else 1
    return int(USABLE * min(free for free, _ in offers) / sharing)


def calibration_of(everyone: Mesh, dtype: torch.dtype, kernels: Kernels) -> Calibration:
    """Return this machine's calibration, asked for once per set of ranks. Collective: every rank must call it.

    Args:
        everyone: the mesh of all ranks that share calls, along its rows.
        dtype: the dtype of computation.
        kernels: the kernels of the decodes.
    """
    key = tuple(everyone.transport.ranks), _name(everyone, dtype, kernels)
    if key not in _calibrations:
        _calibrations[key] = _calibration(everyone, dtype, kernels)
    return _calibrations[key]


def is_unmeasured(everyone: Mesh, dtype: torch.dtype) -> bool:
    """Whether `calibration_of` would measure this machine with compiled kernels, as far as this rank knows."""
    if everyone.transport.world == 1 or everyone.device.kind != "cpu" or os.environ.get("HALOVAE_CALIBRATION"):
        return False
    path = key_of(everyone, dtype, eager=False).path
    return (tuple(everyone.transport.ranks), str(path)) not in _calibrations and stored(path) is None


def _name(everyone: Mesh, dtype: torch.dtype, kernels: Kernels) -> str:
    return os.environ.get("HALOVAE_CALIBRATION") or str(key_of(everyone, dtype, kernels is EAGER).path)


def _calibration(everyone: Mesh, dtype: torch.dtype, kernels: Kernels) -> Calibration:
    if source := os.environ.get("HALOVAE_CALIBRATION"):  # a file, or the name of one that ships
        return read(source)
    if everyone.transport.world == 1:
        # One rank has little to decide. A shipped calibration is good enough, and saves the wait for a measurement.
        return stored(key_of(everyone, dtype, kernels is EAGER).path) or read(_similar(everyone.device.kind))
    return calibrated(everyone, dtype, kernels, describe=_warn)


def _similar(device: str) -> str:
    """The first shipped calibration for this kind of device."""
    return next(name for name in shipped() if name.startswith(device if device != "xpu" else "cuda"))


def _warn(text: str) -> None:
    warnings.warn(text, UserWarning, stacklevel=2)
