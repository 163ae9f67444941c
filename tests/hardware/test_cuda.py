"""The calls of the CUDA driver on a real GPU."""

from __future__ import annotations

import numpy as np
import pytest

from device_agent.engines import cuda
from device_agent.engines.cuda import CudaError, Device


@pytest.fixture
def gpu() -> Device:
    """The machine's GPU; without one there is nothing to test."""
    try:
        device = cuda.device()
    except CudaError as error:
        pytest.skip(f"this machine has no GPU: {error}")
    device.use()
    return device


def test_the_device_says_what_it_is(gpu: Device) -> None:
    """Architecture, CUDA and driver are the values that engines are told apart by."""
    assert gpu.sm.isdigit()
    assert 50 <= int(gpu.sm) < 200
    assert all(part.isdigit() for part in gpu.cuda.split("."))
    assert gpu.driver
    assert gpu.name
    assert gpu.free_bytes() > 0


def test_what_is_copied_in_comes_out(gpu: Device) -> None:
    """Pinned memory to the GPU and back to other pinned memory, in order on one stream."""
    stream, size = gpu.create_stream(), 1 << 20
    source, _ = gpu.allocate_pinned(size)
    target, _ = gpu.allocate_pinned(size)
    there = gpu.allocate(size)
    source[:] = np.arange(size) % 251
    gpu.copy_in(there, source.ctypes.data, size, stream)
    gpu.copy_out(target.ctypes.data, there, size, stream)
    gpu.synchronize(stream)
    assert (target == source).all()
    gpu.free(there)
    gpu.free_pinned(source)
    gpu.free_pinned(target)
    gpu.destroy_stream(stream)


def test_pinned_memory_has_an_address_for_the_gpu(gpu: Device) -> None:
    """The GPU writes into the host's memory itself, which a Jetson's engines rest on."""
    stream = gpu.create_stream()
    source, _ = gpu.allocate_pinned(4096)
    target, mapped = gpu.allocate_pinned(4096)
    source[:] = 7
    gpu.copy_in(mapped, source.ctypes.data, 4096, stream)
    gpu.synchronize(stream)
    assert (target == 7).all()
    gpu.free_pinned(source)
    gpu.free_pinned(target)
    gpu.destroy_stream(stream)


def test_a_recorded_graph_reads_what_is_there_when_it_is_launched(gpu: Device) -> None:
    """Recording runs nothing; each launch takes the input as it is then."""
    stream = gpu.create_stream()
    source, _ = gpu.allocate_pinned(4096)
    target, _ = gpu.allocate_pinned(4096)
    there = gpu.allocate(4096)

    def work() -> None:
        gpu.copy_in(there, source.ctypes.data, 4096, stream)
        gpu.copy_out(target.ctypes.data, there, 4096, stream)

    target[:] = 0
    source[:] = 1
    graph = gpu.capture(stream, work)
    gpu.synchronize(stream)
    assert (target == 0).all()
    for value in (2, 3):
        source[:] = value
        gpu.launch(graph, stream)
        gpu.synchronize(stream)
        assert (target == value).all()
    gpu.destroy_graph(graph)
    gpu.free(there)
    gpu.free_pinned(source)
    gpu.free_pinned(target)
    gpu.destroy_stream(stream)


def test_what_cannot_be_recorded_is_an_error_and_the_stream_works_on(gpu: Device) -> None:
    """An engine that does not let itself be recorded runs without a graph afterwards."""
    stream = gpu.create_stream()
    memory, _ = gpu.allocate_pinned(64)
    there = gpu.allocate(64)
    with pytest.raises(CudaError):
        gpu.capture(stream, lambda: gpu.synchronize(stream))
    gpu.copy_in(there, memory.ctypes.data, 64, stream)
    gpu.synchronize(stream)
    gpu.free(there)
    gpu.free_pinned(memory)
    gpu.destroy_stream(stream)


def test_too_little_memory_is_told_apart(gpu: Device) -> None:
    """The error says that memory is short, and a smaller allocation works after it."""
    with pytest.raises(CudaError, match="out of memory") as caught:
        gpu.allocate(gpu.free_bytes() + (1 << 34))
    assert caught.value.out_of_memory
    gpu.free(gpu.allocate(1 << 20))
