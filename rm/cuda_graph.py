"""A function captured once as a CUDA graph: one launch instead of a thousand."""

from __future__ import annotations

from collections.abc import Callable

import torch


class CapturedFunction:
    """Runs a function of no arguments, which works in place on tensors that stay where they are.

    The first call runs it as it is, because kernels and libraries set themselves up on their
    first use. The second captures it, and this and every later call replay the graph. It may
    not wait for the device, nor depend on numbers of the host that change between calls.

    `reset` is due when one of its tensors has moved. The memory of the graphs is shared.
    """

    def __init__(self, function: Callable[[], None]) -> None:
        self.function = function
        self.stream = torch.cuda.Stream()
        self.pool = torch.cuda.graph_pool_handle()
        self.is_warm = False
        self.graph: torch.cuda.CUDAGraph | None = None

    def reset(self) -> None:
        """Capture again at the next call."""
        self.graph = None

    def __call__(self) -> None:
        if not self.is_warm:
            self._run_plainly()
            return
        if self.graph is None:
            self.graph = self._capture()
        self.graph.replay()

    def _run_plainly(self) -> None:
        """Run it on the stream that will capture: libraries keep workspaces by stream."""
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            self.function()
        current.wait_stream(self.stream)
        self.is_warm = True

    def _capture(self) -> torch.cuda.CUDAGraph:
        """Record the function without running it.

        Thread-local: another thread, such as the rollout's, may allocate meanwhile.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            graph,
            pool=self.pool,
            stream=self.stream,
            capture_error_mode="thread_local",
        ):
            self.function()
        return graph
