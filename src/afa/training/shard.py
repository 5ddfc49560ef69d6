"""Training of encoders too large for one device: each process keeps a part of weights, gradients and optimizer.

During a step the weights are whole everywhere; between steps a process holds its part of each alone (FSDP).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.export import register_dataclass

from afa.model.backbone import BackboneOutput
from afa.model.network import AfaNetwork
from afa.runtime import Processes
from afa.types import NetworkOutput, RawAttention

for _kind in (RawAttention, BackboneOutput, NetworkOutput):  # FSDP looks for tensors in what modules return
    register_dataclass(_kind)


class Shards:
    """A network whose weights are spread over processes, and the parts that are this process's.

    Args:
        network: The whole network; copied.
        device: Where to train.
        processes: Two or more.

    Attributes:
        network: The copy.
        parameters: By name, this process's part of each weight, rows along the first axis; optimizers work on these.
            A weight that is a single number is there whole.
    """

    def __init__(self, network: AfaNetwork, device: torch.device, processes: Processes) -> None:
        self.network: AfaNetwork = copy.deepcopy(network).to(device)
        self._processes = processes
        self._mesh = init_device_mesh(device.type, (processes.count,))
        # FSDP leaves single numbers alone.
        self._whole = {name for name, weight in self.network.named_parameters() if weight.ndim == 0}
        ignored = {weight for weight in self.network.parameters() if weight.ndim == 0}
        for block in (*_blocks(self.network.backbone), self.network):
            fully_shard(block, mesh=self._mesh, reshard_after_forward=False, ignored_params=ignored)
        self._weights = dict(self.network.named_parameters())
        self.parameters = {
            name: weight if name in self._whole else nn.Parameter(_local(weight), requires_grad=weight.requires_grad)
            for name, weight in self._weights.items()
        }

    def gather(self) -> None:
        """Make the weights whole for a step, however its passes reach them."""
        for module in self.network.modules():
            if isinstance(module, FSDPModule):
                module.unshard()

    def take_gradients(self) -> None:
        """After the backward pass, give each part its gradient, averaged over processes."""
        for module in self.network.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        for name, weight in self._weights.items():
            if weight.grad is not None and name in self._whole:
                weight.grad = self._processes.total(weight.grad) / self._processes.count
            elif name not in self._whole:
                self.parameters[name].grad = None if weight.grad is None else _local(weight.grad)
                weight.grad = None

    def norm(self) -> Tensor:
        """Norm of all gradients, over all processes; a scalar."""
        counted = [n for n in self.parameters if n not in self._whole or self._processes.is_main]
        gradients = [grad for name in counted if (grad := self.parameters[name].grad) is not None]
        return self._processes.total(torch.nn.utils.get_total_norm(gradients).square()).sqrt()

    def copy_to(self, network: AfaNetwork) -> None:
        """Write the whole weights and buffers into a network; every process calls this at the same time."""
        state = network.state_dict()
        for name, value in self.network.state_dict().items():
            state[name].copy_(value.full_tensor() if isinstance(value, DTensor) else value)

    @torch.no_grad()
    def copy_from(self, network: AfaNetwork) -> None:
        """Take this process's part of the weights of a network, and its buffers."""
        for name, weight in network.named_parameters():
            self.parameters[name].copy_(self._part(name, weight.detach()))
        for name, buffer in self.network.named_buffers():
            buffer.copy_(network.get_buffer(name))

    def whole_state(self, state: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
        """An optimizer's state with whole tensors, as without shards; every process calls this at the same time."""
        return self._mapped(state, names, self._joined)

    def own_state(self, state: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
        """This process's part of a `whole_state`."""
        return self._mapped(state, names, self._part)

    def _mapped(
        self, state: Mapping[str, Any], names: list[str], change: Callable[[str, Tensor], Tensor]
    ) -> dict[str, Any]:
        entries = {
            index: {
                key: change(names[index], value) if isinstance(value, Tensor) and value.ndim else value
                for key, value in entry.items()
            }
            for index, entry in state["state"].items()
        }
        return {**state, "state": entries}

    def _joined(self, name: str, part: Tensor) -> Tensor:
        weight = self._weights[name]
        joined = DTensor.from_local(part, self._mesh, [Shard(0)], shape=weight.shape, stride=weight.stride())
        return joined.full_tensor()

    def _part(self, name: str, whole: Tensor) -> Tensor:
        if name in self._whole:
            return whole
        whole = whole.to(self.parameters[name].device)
        return _local(distribute_tensor(whole, self._mesh, [Shard(0)], src_data_rank=None))


def _blocks(backbone: nn.Module) -> Iterator[nn.Module]:
    """The parts of an encoder that come in lists, such as its blocks, inner ones first."""
    for module in reversed(list(backbone.modules())):
        if isinstance(module, nn.ModuleList):
            for part in module:
                if not isinstance(part, nn.ModuleList) and next(part.parameters(), None) is not None:
                    yield part


def _local(tensor: Tensor) -> Tensor:
    assert isinstance(tensor, DTensor)
    return tensor.to_local().detach()
