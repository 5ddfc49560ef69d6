"""AdamW's groups: rates, decay, and norm layers that stay as they are."""

import pytest
import torch
from torch import Tensor, nn

from afa.config import ModelConfig, ScheduleConfig
from afa.model.network import AfaNetwork
from afa.runs.network import build_network
from afa.training.optimizer import build_optimizer, set_learning_rate, trained_parameters


@pytest.fixture
def network() -> AfaNetwork:
    torch.manual_seed(0)
    return build_network(ModelConfig(backbone="mit_tiny", weights="", decoder_width=8), 3)


def names(network: nn.Module, parameters: list[nn.Parameter]) -> set[str]:
    by_id = {id(parameter): name for name, parameter in network.named_parameters()}
    return {by_id[id(parameter)] for parameter in parameters}


def encoder_norms(network: nn.Module) -> set[str]:
    """Names of the encoder's norm parameters, found by the type of their layer."""
    return {
        f"{name}.{key}"
        for name, module in network.named_modules()
        if name.startswith("backbone.") and isinstance(module, (nn.LayerNorm, nn.BatchNorm2d))
        for key, _ in module.named_parameters()
    }


def one_step(network: AfaNetwork, optimizer: torch.optim.Optimizer) -> None:
    output = network(torch.randn(2, 3, 32, 32))
    assert output.seg_logits is not None
    assert output.affinity is not None
    loss: Tensor = output.image_logits.sum() + output.seg_logits.sum() + output.affinity.sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def test_groups_have_the_methods_rates_and_decay(network: AfaNetwork) -> None:
    optimizer = build_optimizer(network, ScheduleConfig())
    encoder, heads = optimizer.param_groups
    assert (encoder["base_lr"], encoder["weight_decay"]) == (6e-5, 0.01)
    assert (heads["base_lr"], heads["weight_decay"]) == (pytest.approx(6e-4), 0.01)
    assert encoder["betas"] == heads["betas"] == (0.9, 0.999)
    everything = {name for name, _ in network.named_parameters()}
    in_encoder = {name for name in everything if name.startswith("backbone.")}
    assert names(network, encoder["params"]) == in_encoder - encoder_norms(network)
    assert names(network, heads["params"]) == everything - in_encoder
    assert {"classifier.weight", "decoder.norm.weight"} <= names(network, heads["params"])


def test_learning_rates_keep_their_ratio_along_the_schedule(network: AfaNetwork) -> None:
    schedule = ScheduleConfig()
    optimizer = build_optimizer(network, schedule)
    for step, rate in ((0, 6e-11), (10_000, 3e-5), (19_999, 3e-9)):
        set_learning_rate(optimizer, step, schedule)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([rate, 10 * rate])


def test_frozen_norms_have_no_gradient_and_do_not_move(network: AfaNetwork) -> None:
    optimizer = build_optimizer(network, ScheduleConfig(learning_rate=0.1, weight_decay=0.5))
    parameters = dict(network.named_parameters())
    norms = encoder_norms(network)
    assert norms
    assert names(network, trained_parameters(optimizer)) == parameters.keys() - norms
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    one_step(network, optimizer)
    for name, parameter in parameters.items():
        if name in norms:
            assert parameter.grad is None, name
            assert torch.equal(parameter, before[name]), name
        else:
            assert parameter.grad is not None, name
    assert not torch.equal(parameters["decoder.norm.weight"], before["decoder.norm.weight"])


def test_free_norms_learn_without_decay(network: AfaNetwork) -> None:
    schedule = ScheduleConfig(learning_rate=0.1, weight_decay=0.5, freeze_norms=False)
    optimizer = build_optimizer(network, schedule)
    norms = optimizer.param_groups[2]
    assert names(network, norms["params"]) == encoder_norms(network)
    assert (norms["base_lr"], norms["weight_decay"]) == (0.1, 0.0)
    assert len(trained_parameters(optimizer)) == len(list(network.parameters()))
    # With gradients of exactly 0, decay is all that could move a parameter.
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    optimizer.step()
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter, before[name]) == (name in encoder_norms(network) or not before[name].any()), name
    one_step(network, optimizer)
    parameters = dict(network.named_parameters())
    assert all(not torch.equal(parameters[name], before[name]) for name in encoder_norms(network))


def test_norms_can_be_set_free_again(network: AfaNetwork) -> None:
    build_optimizer(network, ScheduleConfig())
    build_optimizer(network, ScheduleConfig(freeze_norms=False))
    assert all(parameter.requires_grad for parameter in network.parameters())
