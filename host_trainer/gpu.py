"""What NVML tells about the GPU of this process."""

from __future__ import annotations

import torch


class Gpu:
    """A GPU's memory and load; nothing where there is no GPU or no NVML."""

    def __init__(self, device: torch.device) -> None:
        self._handle = None
        if device.type != "cuda":
            return
        import pynvml

        self._nvml = pynvml
        try:
            pynvml.nvmlInit()
            # Of several GPUs, NVML's order is not CUDA's.
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(
                f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            )
        except pynvml.NVMLError:
            self._handle = None

    def read(self) -> dict[str, float]:
        """Memory in use in bytes, and the share of the last moments in which a kernel ran."""
        if self._handle is None:
            return {}
        try:
            memory = self._nvml.nvmlDeviceGetMemoryInfo(self._handle)
            load = self._nvml.nvmlDeviceGetUtilizationRates(self._handle)
        except self._nvml.NVMLError:
            return {}
        return {"gpu/memory_used_bytes": float(memory.used), "gpu/utilization_fraction": load.gpu / 100}
