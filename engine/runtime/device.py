"""The device of a run, checked before anything is built."""

import logging
import os
import platform
import shutil
from pathlib import Path

import torch
from torch import nn

from utils.errors import UserError
from utils.processes import env_world_size, ignore_accelerate_variables, use_cpu_variable

logger = logging.getLogger(__name__)

# Parameters including CLIP's: ViT-B has 150 million, ViT-L 430 million.
LARGE = 250_000_000
CPU_NAMES = Path("/proc/cpuinfo")
NVIDIA_DRIVER = Path("/proc/driver/nvidia")


def check_device(device: str, precision: str = "fp32", tf32: str = "off") -> str:
    """Choose and log the device, and set how a GPU multiplies float32 matrices.

    Args:
        device: auto, cpu, cuda, cuda:N or mps.
        precision: auto, fp32, bf16 or fp16.
        tf32: Whether a GPU may compute float32 products in TF32, on or off; only with fp32.

    Returns:
        The device, with `auto` replaced.

    Raises:
        UserError: The device does not exist, or does not support the precision.
    """
    ignore_accelerate_variables()
    if ":" in device and env_world_size() > 1:
        raise UserError(f"--device {device}: each of the {env_world_size()} processes uses its own GPU; give cuda")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    available = ["cuda", *(f"cuda:{index}" for index in range(gpus))] if gpus else []
    available += ["mps", "cpu"] if torch.backends.mps.is_available() else ["cpu"]
    if device == "auto":
        device = "cpu" if use_cpu_variable() else available[0]
    if device not in available:
        raise UserError(f"--device {device}: not available; choose auto, {', '.join(available)}")
    precision = choose_precision(device, precision)
    if precision == "fp16" and device == "cpu":
        raise UserError("--precision fp16 needs a GPU; use bf16 or fp32 on the CPU")
    if device.startswith("cuda"):
        # With half precision, the remaining float32 operations are float32 on purpose.
        faster = tf32 == "on" and precision == "fp32"
        torch.set_float32_matmul_precision("high" if faster else "highest")
        torch.backends.cudnn.allow_tf32 = False
        precision += f", TF32 {'on' if faster else 'off'}"
    if device != "cpu":
        os.environ.pop("ACCELERATE_USE_CPU", None)
    versions = (torch.__version__, torch.version.cuda or "none")
    logger.info("Device: %s (%s), precision %s, torch %s, CUDA %s", device, device_name(device), precision, *versions)
    return device


def choose_precision(device: torch.device | str, precision: str) -> str:
    """Replace `auto`: bf16 on a GPU that supports it, otherwise fp32."""
    if precision != "auto":
        return precision
    cuda = torch.device(device).type == "cuda"
    return "bf16" if cuda and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


def check_compiler(device: str) -> None:
    """Raise `UserError` if `torch.compile` does not work: it needs a C++ compiler, and Triton on a GPU."""
    try:
        torch.compile(lambda x: x + x, fullgraph=True)(torch.zeros(2, device=device))
    except RuntimeError as error:
        # Earlier versions of torch name the backend on the first line.
        reason = str(error).split("raised:\n")[-1].split("\n")[0]
        raise UserError(
            f"--compile: torch.compile does not work here ({reason}); install a C++ compiler, on a GPU Triton too, or "
            "omit --compile"
        ) from error


def device_name(device: str) -> str:
    """The GPU's name, or the processor's with the number of threads."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    if CPU_NAMES.is_file():
        lines = CPU_NAMES.read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return name if device == "mps" else f"{name}, {torch.get_num_threads()} threads"


def warn_of_unused_gpu(device: torch.device, model: nn.Module) -> None:
    """Warn if a large model is trained on the CPU although the machine has an NVIDIA driver."""
    size = sum(parameter.numel() for parameter in model.parameters())
    driver = shutil.which("nvidia-smi") is not None or NVIDIA_DRIVER.exists()
    if device.type != "cpu" or size < LARGE or not driver or torch.cuda.is_available():
        return
    why = "is built without CUDA" if torch.version.cuda is None else f"with CUDA {torch.version.cuda} cannot use it"
    logger.warning(
        "Training %d million parameters on the CPU takes days. This machine has an NVIDIA driver, but torch %s %s. "
        "Install a build for the driver: pip install --force-reinstall torch torchvision --index-url "
        "https://download.pytorch.org/whl/cu126, or python run.py --torch-index URL demo",
        *(size // 1_000_000, torch.__version__, why),
    )
