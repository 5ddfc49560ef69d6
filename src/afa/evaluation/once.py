"""A network whose encoder runs once where successive passes see the same view."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from afa.model.backbone import Encoded
from afa.model.network import AfaNetwork
from afa.types import NetworkOutput


def once_per_view(network: AfaNetwork) -> AfaNetwork | OncePerView:
    """The network, whose encoder runs once where successive passes see the same view, if its output can be kept."""
    return network if network.text is None else OncePerView(network)


class OncePerView:
    """A network with class scores from words, whose encoder runs once where successive passes see the same view.

    Comparing the views synchronizes a GPU.
    """

    def __init__(self, network: AfaNetwork) -> None:
        self._network = network
        self._view = torch.empty(0)
        self._kept: Encoded | None = None

    def __call__(self, view: Tensor, **what: bool) -> NetworkOutput:
        """`AfaNetwork.forward` of a (B, 3, H, W) normalized image."""
        output: NetworkOutput = self._network(self._encode(view), **what)
        return output

    def score(self, view: Tensor, affinity: bool = False) -> NetworkOutput:
        """`AfaNetwork.score` of a (B, 3, H, W) normalized image."""
        return self._network.score(self._encode(view), affinity)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Those of the network."""
        return self._network.parameters()

    def _encode(self, view: Tensor) -> Encoded:
        # Images that are normalized before or after they are scaled differ by rounding.
        if self._kept is None or self._view.shape != view.shape or not torch.allclose(self._view, view, atol=1e-4):
            self._view, self._kept = view, self._network.encode(view)
        return self._kept
