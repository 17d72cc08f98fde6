"""The process group of Ray Train's workers: NCCL where torch sees a GPU, gloo elsewhere."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from ray.train.torch import TorchConfig

_RaysBackend: Any = TorchConfig().backend_cls


class _Backend(_RaysBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        reserved = worker_group.get_resources_per_worker().get("GPU", 0)
        if reserved and not worker_group.execute_single(0, torch.cuda.is_available):
            backend_config = replace(backend_config, backend="gloo")
        super().on_start(worker_group, backend_config)


@dataclass
class ProcessGroup(TorchConfig):
    """Ray's own configuration, which takes NCCL wherever GPUs are reserved, and fails where there are none.

    Ray counts the GPUs that it was told of. A cluster started with `num_gpus` on a machine without any has *logical*
    GPUs: workers are placed by them, and train on the CPU.
    """

    @property
    def backend_cls(self) -> Any:
        """Called by Ray."""
        return _Backend
