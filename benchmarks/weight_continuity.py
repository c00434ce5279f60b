"""How smoothly do channel weights change on the way from one scan to another?

    python benchmarks/weight_continuity.py --net resnet18q --seeds 3

Relevance-CAM claims that its weights change smoothly where gradients jump (every ReLU that switches makes a gradient
jump, while relevance is continuous in the activations). Here: 50 steps of a straight line between two test scans that
show the same finding, on networks trained on the phantom. Figure: length of the path of the weights over the mean
length of the weights themselves; lower is smoother. Printed as a Markdown table, mean and range over seeds and pairs.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import pytorch_lightning as pl
import torch
from monai.networks.nets import ResNet
from torch import Tensor, nn

import camtrain as ct
from camtrain.data import PhantomDataModule
from camtrain.models import FlattenNet, LitClassifier, PoolNet


def resnet18q(labels: int, size: Sequence[int]) -> nn.Module:
    """MONAI ResNet-18 at a quarter of its width."""
    return ResNet("basic", [2, 2, 2, 2], [16, 32, 64, 128], n_input_channels=1, conv1_t_stride=2, num_classes=labels)


KINDS: dict[str, dict[str, str]] = {
    "Grad-CAM": {"method": "gradcam"},
    "Respond-CAM": {"method": "respondcam"},
    "Relevance-CAM": {"method": "relevancecam"},
    "Relevance-CAM, no contrast": {"method": "relevancecam", "contrast": "none"},
    "Relevance-CAM, official code": {"method": "relevancecam", "contrast": "official-code"},
}
NETS: dict[str, tuple[Callable[[int, Sequence[int]], nn.Module], list[str]]] = {
    "resnet18q": (resnet18q, ["layer1", "layer2", "layer3", "layer4"]),
    "flatten": (lambda labels, size: FlattenNet(labels, size=tuple(size)), ["features.3", "features.5", "relu"]),
    "pool": (lambda labels, size: PoolNet(labels, size=tuple(size)), ["features.3", "features.5", "relu"]),
}


def roughness(weights: Tensor) -> float:
    """Length of the path of the weights (T, K) over their mean length."""
    steps = torch.linalg.vector_norm(weights.diff(dim=0), dim=1).sum()
    return float(steps / torch.linalg.vector_norm(weights, dim=1).mean())


def measure(
    model: nn.Module, first: Tensor, last: Tensor, layers: list[str], label: int, steps: int
) -> dict[str, dict[str, float]]:
    """{layer: {kind of weight: roughness}} on the line from one image (1, C, *S) to the other."""
    model.eval()
    images = torch.cat([first + t * (last - first) for t in torch.linspace(0, 1, steps)])
    return {
        layer: {
            title: roughness(
                torch.cat([ct.channel_weights(model, i[None], layer=layer, labels=[label], **kind) for i in images])[
                    :, 0
                ]
            )
            for title, kind in KINDS.items()
        }
        for layer in layers
    }


def trained(net: str, seed: int, args: argparse.Namespace) -> tuple[LitClassifier, PhantomDataModule]:
    """A network after a few epochs on the phantom without shortcuts."""
    pl.seed_everything(seed, verbose=False)
    data = PhantomDataModule(cases=args.cases, test_cases=40, shortcut=None, test_splits=["test"], seed=seed)
    model = LitClassifier(
        NETS[net][0](len(data.labels), data.phantom.size), labels=data.labels, lr=2e-3, schedule="one_cycle"
    )
    pl.Trainer(
        max_epochs=args.epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    ).fit(model, data)
    return model, data


def pairs(data: PhantomDataModule, wanted: int) -> list[tuple[int, Tensor, Tensor]]:
    """(label, image, image) of two test cases that both show the finding; as many as wanted, labels in turn."""
    dataset = data.test_dataloader()[0].dataset
    cases = [dataset[i] for i in range(len(dataset))]
    found = []
    for label in range(len(data.labels)):
        positives = [c["image"][None] for c in cases if c["label"][label] == 1]
        if len(positives) >= 2:
            found.append((label, positives[0], positives[1]))
    return found[:wanted]


def main() -> None:
    """Train, walk, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", choices=sorted(NETS), default="resnet18q")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cases", type=int, default=400)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--out", type=Path, default=Path("runs/continuity"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rows: dict[tuple[str, str], list[float]] = {}
    for seed in range(args.seeds):
        model, data = trained(args.net, seed, args)
        for label, first, last in pairs(data, args.pairs):
            found = measure(model.net, first, last, NETS[args.net][1], label, args.steps)
            with (args.out / f"{args.net}.jsonl").open("a") as file:
                file.write(json.dumps({"seed": seed, "label": label, "roughness": found}) + "\n")
            for layer, kinds in found.items():
                for kind, value in kinds.items():
                    rows.setdefault((layer, kind), []).append(value)
    titles = list(dict.fromkeys(kind for _, kind in rows))
    print("| layer | " + " | ".join(titles) + " |")
    print("|---" * (len(titles) + 1) + "|")
    for layer in NETS[args.net][1]:
        cells = [rows[layer, kind] for kind in titles]
        print(
            f"| {layer} | " + " | ".join(f"{statistics.mean(c):.2f} ({min(c):.2f}-{max(c):.2f})" for c in cells) + " |"
        )


if __name__ == "__main__":
    main()
