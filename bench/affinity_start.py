"""Measure how the affinity starts: the share of pairs of tokens where its sigmoid is not flat, seed by seed.

    python bench/affinity_start.py configs/voc_mit_b0_small.toml --data VOC2012 [--weights FOLDER] [--seeds 5]
                                   [--checkpoint RUN/checkpoints/step_00000400/model.safetensors]

Both starts see the encoder as it is before the first step, or that of a checkpoint, and the same crops of the training
list: the calibrated start is set by the first batch, and both are measured on the second. Pairs count that the
affinity loss could count: both tokens in the photograph, and within the radius. A line has the mean and the standard
deviation of their logits, and the share of pairs whose affinity lies between 0.01 and 0.99.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from afa.config import load_config
from afa.data.loader import train_batches
from afa.data.open import open_data
from afa.runs.network import build_network
from afa.training.engine import TrainingEngine


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--data", required=True, help="folder of the data set")
    parser.add_argument("--weights", help="model.weights")
    parser.add_argument("--checkpoint", type=Path, help="weights of a run, whose encoder is measured")
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    keys = {"data.root": arguments.data, "data.workers": 0}
    keys |= {"model.weights": arguments.weights} if arguments.weights else {}
    config = load_config(arguments.config, keys)
    data = open_data(config.data)
    batches = train_batches(data.train(), config)
    first, second = next(batches), next(batches)
    for seed in range(arguments.seeds):
        for init in ("published", "calibrated"):
            torch.manual_seed(seed)
            network = build_network(replace(config.model, affinity_init=init), len(data.classes))
            if arguments.checkpoint:
                state = load_file(arguments.checkpoint)
                network.load_state_dict({k: v for k, v in state.items() if "affinity_head" not in k}, strict=False)
            engine = TrainingEngine(network, config, device=torch.device("cpu"))
            engine.start_affinity(first)
            output, pairs = engine.attend(second)
            assert output.attention_logits is not None
            mixed = network.affinity_head.mix(output.attention_logits.float() * network.attention_factor)[:, 0]
            logits = (mixed + mixed.transpose(1, 2) - network.affinity_head.mix.bias)[pairs]
            alive = ((logits.sigmoid() > 0.01) & (logits.sigmoid() < 0.99)).float().mean()
            print(
                f"seed {seed} {init:10} logits {logits.mean():6.1f} +- {logits.std():5.1f}  alive {100 * alive:5.1f} %"
            )


if __name__ == "__main__":
    main()
