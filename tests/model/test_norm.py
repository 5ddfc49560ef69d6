"""Batch normalization over processes: alone it is PyTorch's own, two processes equal one with the whole batch."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, multiprocessing, nn

from afa.model.decoder import DistributedBatchNorm2d

CHANNELS = 3
STEPS = 2
# Images of the batch that each of the two processes has: not halves, so that the counts matter.
SHARES = (slice(0, 3), slice(3, 4))


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, CHANNELS, 5, 6, generator=generator) * 2 + 3 for _ in range(STEPS)]


def run_steps(layer: nn.BatchNorm2d, share: slice = slice(None)) -> dict[str, Any]:
    """Two training steps and an evaluation on a share of the batches: outputs, gradients, statistics."""
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([0.5, 1.0, 2.0]))
        layer.bias.copy_(torch.tensor([-1.0, 0.0, 1.0]))
    outputs, gradients = [], []
    for batch in batches():
        x = batch[share].clone().requires_grad_()
        output = layer.train()(x)
        # A loss whose gradient differs from image to image, summed over processes.
        (output.pow(3) * torch.arange(4.0)[share].view(-1, 1, 1, 1)).sum().backward()
        assert x.grad is not None
        outputs.append(output.detach())
        gradients.append(x.grad)
    return {
        "outputs": torch.stack(outputs),
        "gradients": torch.stack(gradients),
        "evaluated": layer.eval()(batches()[0][share]).detach(),
        "weight_gradient": layer.weight.grad,
        "bias_gradient": layer.bias.grad,
        "buffers": {name: tensor.clone() for name, tensor in layer.named_buffers()},
    }


def test_without_a_group_it_is_batch_norm() -> None:
    ours, expected = run_steps(DistributedBatchNorm2d(CHANNELS)), run_steps(nn.BatchNorm2d(CHANNELS))
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)
    assert ours["buffers"]["num_batches_tracked"] == STEPS


def test_its_weights_are_interchangeable_with_batch_norm() -> None:
    assert DistributedBatchNorm2d(CHANNELS).state_dict().keys() == nn.BatchNorm2d(CHANNELS).state_dict().keys()


def _normalize_share(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    distributed.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    layer = DistributedBatchNorm2d(CHANNELS)
    results = run_steps(layer, SHARES[rank])
    half = layer.train()(batches()[0][SHARES[rank]].bfloat16())
    torch.save(results | {"half": half.detach()}, Path(folder, f"rank{rank}.pt"))
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    alone = run_steps(nn.BatchNorm2d(CHANNELS))
    multiprocessing.spawn(_normalize_share, args=(str(tmp_path),), nprocs=2)  # type: ignore[no-untyped-call]
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    for result, share in zip(ranks, SHARES, strict=True):
        for key in ("outputs", "gradients"):
            torch.testing.assert_close(result[key], alone[key][:, share], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(result["evaluated"], alone["evaluated"][share], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(result["buffers"], alone["buffers"], rtol=1e-5, atol=1e-5)
        assert result["half"].dtype == torch.bfloat16
    for key in ("weight_gradient", "bias_gradient"):
        torch.testing.assert_close(ranks[0][key] + ranks[1][key], alone[key], rtol=1e-4, atol=1e-4)
    # The layer has to talk for this: the statistics of a share alone are others.
    apart = run_steps(nn.BatchNorm2d(CHANNELS), SHARES[0])
    assert (apart["outputs"] - ranks[0]["outputs"]).abs().max() > 0.05
