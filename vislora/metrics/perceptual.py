"""LPIPS (Zhang et al. 2018) as a distance between vectors: every image passes the network once, pairs subtract.

The papers' is `lpips` 0.1 with AlexNet at 512 x 512. The world's is a SqueezeNet trained on its scenes, without heads,
whose column is called lpips_world: no published number compares with it.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from pathlib import Path

import lpips
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models import AlexNet_Weights

from vislora.diffusion.hub import brief
from vislora.errors import InputError
from vislora.metrics.backbones import PAPERS, WORLD, _world, weights_digest
from vislora.metrics.transforms import Transform

TRUNK = AlexNet_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[-1]  # alexnet-owt-….pth, as torchvision's cache has it


class Perceptual:
    """`network`: an lpips.LPIPS. `embed` and `distances` together give what calling it on pairs gives."""

    def __init__(self, network: nn.Module, identifier: str, transform: Transform, device: torch.device | str = "cpu"):
        self.network = network.requires_grad_(False).eval().float().to(device)
        self.identifier, self.transform = identifier, transform
        self.view = f"lpips {identifier} {weights_digest(self.network)} {transform.name}"

    @torch.no_grad()
    def embed(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """((n, d) unit-normalised activations of all layers, (d,) weights of their squared differences), of transformed
        images (n, 3, h, w) in [-1, 1]."""
        layers = self.network.net.forward(self.network.scaling_layer(batch))
        flat, weights = [], []
        for k, layer in enumerate(layers):
            area = layer.shape[2] * layer.shape[3]
            own = layer.new_ones(layer.shape[1])
            if self.network.lpips:
                own = self.network.lins[k].model[-1].weight.flatten()
            flat.append(lpips.normalize_tensor(layer).flatten(1))
            weights.append((own / area).repeat_interleave(area))
        return torch.cat(flat, 1), torch.cat(weights)


def distances(one: Tensor, others: Tensor, weights: Tensor) -> Tensor:
    """(m,) LPIPS, float32, of an image (d,) to others (m, d)."""
    return (others - one).square_() @ weights


def perceptual(source: str = WORLD, device: torch.device | str = "cpu") -> Perceptual:
    """The world's LPIPS, or the papers' with its trunk from torchvision's cache or the hub (PAPERS), or from
    `source`/alexnet.safetensors. InputError where the trunk is not there, saying what belongs where."""
    if source == WORLD:
        file = _world("lpips", "squeezenet.safetensors") / "squeezenet.safetensors"
        network = _lpips(net="squeeze", lpips=False, pretrained=False, pnet_rand=True)
        transform = Transform(64, "bilinear")
        return Perceptual(_with_trunk(network, file), "world/squeezenet without heads", transform, device)
    transform = Transform(512, "bilinear")
    if source == PAPERS:
        try:
            return Perceptual(_lpips(net="alex", version="0.1"), "lpips 0.1 alex", transform, device)
        except OSError as error:
            wrong = f"torchvision's file cannot be fetched ({brief(error)})"
            remedy = f"put it into {torch.hub.get_dir()}/checkpoints, or its state as alexnet.safetensors into DIR and "
            raise InputError(TRUNK, wrong, f"{remedy}give --backbones DIR") from error
    file = Path(source) / "alexnet.safetensors"
    if not file.is_file():
        remedy = f"save the state in torchvision's {TRUNK} there as safetensors, under its own names"
        raise InputError(str(file), "no such file", remedy)
    network = _lpips(net="alex", version="0.1", pnet_rand=True)
    return Perceptual(_with_trunk(network, file), "lpips 0.1 alex", transform, device)


def _lpips(**options) -> nn.Module:
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # of torchvision, on lpips' way to call it
        return lpips.LPIPS(verbose=False, **options)


def _with_trunk(network: nn.Module, file: Path) -> nn.Module:
    """`network` with the trunk of a file in torchvision's names (features.N...)."""
    try:
        held = load_file(file)
        own = {name: held["features." + name.split(".", 1)[1]].float() for name in network.net.state_dict()}
        network.net.load_state_dict(own)
    except Exception as error:  # safetensors' own errors, missing keys, other shapes
        raise InputError(str(file), f"is no trunk for LPIPS ({brief(error)})", "copy or build it again") from error
    return network
