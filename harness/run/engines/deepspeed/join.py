"""How a rank that `deepspeed` started meets the others."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import logging
import os
from collections.abc import Collection
from pathlib import Path

import torch

from harness.machine import detect_machine
from harness.secrets import hide

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
"""Of mallopt(3)."""


def initialize_distributed() -> None:
    """Join the other ranks, over NCCL on GPUs and on CPU over memory that they share, or gloo."""
    kind = detect_machine().device_kind
    if kind == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        _keep_freed_memory()
    else:
        # The launcher shows every rank all GPUs, and DeepSpeed picks the rank's own as late as in its engine. NCCL
        # takes tensors of that one only.
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    import deepspeed

    from harness.run.shared_memory import BACKEND, register_backend

    # DeepSpeed would compile its shared-memory collectives here, half a minute at the first start. They reduce
    # over all ranks whatever group is named, so nothing in the harness calls them.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    _import_muon()
    register_backend()
    backend = "nccl" if kind == "cuda" else BACKEND
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        deepspeed.init_distributed(dist_backend=backend, verbose=False)
    gc.freeze()  # DeepSpeed collects garbage while it builds an engine: each time 0.3 s over all that was imported


def _keep_freed_memory() -> None:
    """Keep glibc from giving memory back after each pass: every page of it costs microseconds when it is used again."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        for option, value in ((M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 64 << 20), (M_MMAP_THRESHOLD, 32 << 20)):
            libc.mallopt(option, value)


def _import_muon() -> None:
    """Import an optimizer that ZeRO and bf16 look for, without its compilation, which imports torch's compiler."""
    from deepspeed.runtime import compiler

    compile = compiler.compile
    compiler.compile = lambda *_, **__: lambda function: function
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = compile


def keep_secrets(names: Collection[str]) -> None:
    """Keep DeepSpeed, which may print its configuration, from printing the values of environment variables."""

    def hide_them(record: logging.LogRecord) -> bool:
        record.msg, record.args = hide(record.getMessage(), names), ()
        return True

    if names:
        logging.getLogger("DeepSpeed").addFilter(hide_them)
