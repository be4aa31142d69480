"""Answers a replica's questions in vLLM's workers (`worker_extension_cls`, through `collective_rpc`)."""

from typing import Any

from serve.vllm_plugin import cpu_slots, upstream


class WorkerExtension:
    """Extends vLLM's worker class. Names start with `bespoke_`, so they collide with none of its own."""

    model_runner: Any

    def bespoke_layout(self) -> dict[str, Any] | None:
        """Returns the layout that adapters are packed for, as plain values, or None: do not pack."""
        layout = cpu_slots.layout(upstream.adapter_manager(self))
        if layout is None:
            return None
        layers = [(layer.parts, layer.width_in, layer.widths_out) for layer in layout.layers]
        return {"layers": layers, "dtype": layout.dtype}

    def bespoke_residency(self) -> dict[str, Any]:
        """Returns `cpu_slots.residency` of this worker."""
        return cpu_slots.residency(upstream.adapter_manager(self))
