"""What --dry_run prints: the run as it would be, without a step of it."""

from __future__ import annotations

from vislora.handle import Handle
from vislora.training.memory import Estimate


def describe(adapter: Handle, data: str, memory: Estimate | None = None) -> str:
    """The adapted layers, the parameters that would train, and the memory. `data`: a line on the data.

    memory: None, of quantized bases, whose kernels cannot be counted: what is certain, 16 bytes a trained parameter for
    its float32 value, gradient and AdamW's two moments.
    """
    trained = sum(p.numel() for p in adapter.parameters())
    held = sum(p.numel() * p.element_size() for root in adapter.roots.values() for p in root.parameters())
    copy = f", {adapter.base_copy / 2**20:.1f} MiB of the base's values" if adapter.base_copy else ""
    certain = (
        f"memory: {(held - 4 * trained) / 2**20:.1f} MiB of frozen models that are adapted, {16 * trained / 2**20:.1f} "
        f"MiB of adapter, gradients and AdamW moments{copy}; activations come on top"
    )
    lines = [
        adapter.summary(),
        data,
        f"{adapter.method_name} {adapter.method.options()}: {len(adapter.sites)} layers, {trained:,} parameters",
        certain if memory is None else str(memory),
        "dry run: nothing was trained or written",
    ]
    return "\n".join(lines)
