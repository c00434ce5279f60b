"""With many labels and large images nothing is made at the image's size but what is shown."""

from __future__ import annotations

import tracemalloc

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import camtrain as ct

SIZE, LABELS, BATCH = (64, 64, 64), 80, 2
VOXELS = 64**3
SHOWN = 8  # labels of one case that the report keeps; pictures show two of them


class Largest(TorchDispatchMode):
    """The most elements that any operation gave."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for each in tree_leaves(found):
            # A view takes no memory of its own.
            if isinstance(each, torch.Tensor):
                self.elements = max(self.elements, each.untyped_storage().nbytes() // each.element_size())
        return found


def many_cases(count=6):
    rng = torch.Generator().manual_seed(0)
    organs = torch.zeros(1, *SIZE, dtype=torch.int16)
    for index in range(4):
        organs[:, 16 * index : 16 * index + 12, 8:56, 8:56] = index + 1
    label = (torch.rand(count, LABELS, generator=rng) < 0.2).float()
    return [
        {"image": torch.rand(1, *SIZE, generator=rng), "label": row, "organs": organs, "id": f"case {i}"}
        for i, row in enumerate(label)
    ]


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.slow
def test_eighty_labels_of_large_images(kit, tmp_path, affine):
    torch.manual_seed(0)
    head = [nn.Linear(4, LABELS)] if affine else [nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, LABELS)]
    net = nn.Sequential(nn.Conv3d(1, 4, 16, 16), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), *head)
    names = [f"finding {i}" for i in range(LABELS)]
    organs = {f"organ {i}": i + 1 for i in range(4)}
    table = {"organs": organs, "labels": {name: [f"organ {i % 4}"] for i, name in enumerate(names)}}
    added = ct.AttentionMonitor("net.1", table, methods=["hirescam", "layercam"], names=names)
    trainer = kit.make_trainer(tmp_path, added)
    data, module = kit.loader(many_cases(), BATCH), kit.make_lit(net)
    with Largest() as largest:
        tracemalloc.start()
        trainer.validate(module, data, verbose=False)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert added.publisher.run_dir.report_path.exists()
    assert len(added.panels["val"].choice.pairs) >= 4
    # All labels of a batch, and even of one case, at the image's size would be ten times as much.
    assert largest.elements <= SHOWN * VOXELS
    # NumPy, over the whole pass: images, regions and pages of what is shown; the maps of one case would be more.
    assert peak < LABELS * VOXELS * 4
    assert largest.elements >= VOXELS
