"""What several processes may be: copies of the whole model, by DDP."""

from __future__ import annotations

from accelerate import Accelerator
from accelerate.utils import DistributedType

from vislora.errors import InputError

_SERVED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


def require_served(accelerator: Accelerator) -> None:
    """Raise InputError under a configuration of accelerate's whose processes do not hold the whole model each."""
    if accelerator.distributed_type not in _SERVED:
        wrong = f"{accelerator.distributed_type.value} is not served: adapters read their base's weights whole"
        raise InputError("accelerate launch", wrong, "take DDP, as in configs/accelerate/ddp.yaml, or a 4-bit base")
