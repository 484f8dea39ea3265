"""Reading the height-map model of the PyPI package adaptive-terrain-diffusion (MIT).

A consistency model (Song et al. 2023) with the UNet of ADM, for grey height maps of 128x128: one step makes
an image of [-1, 1] from noise, for a difficulty from 0 (easy) to 1 (the package's 1 to 100, scaled). Its
heights are h = 0.1 * sinh(u * asinh(h_max / 0.1)) with u = (image + 1) / 2 and h_max = 22.16864.
"""

from __future__ import annotations

import io
import os
import zipfile
from typing import Any

import torch

MEMBER = "terrain_diffusion/weights/terrain_consistency_unet_difficulty100.onnx"
PREFIX = "network."
CONFIG: dict[str, Any] = {
    "image_size": 128,
    "num_channels": 32,
    "num_res_blocks": 4,
    "num_head_channels": 32,
    "attention_resolutions": [32, 16, 8],
    "channel_mult": [1, 1, 2, 3, 4],
    "class_cond": True,
    "label_type": "number",
    "resblock_updown": True,
    "use_new_attention_order": True,
    "in_channels": 1,
}
"""Of the `ADMUNet`, read off the graph."""
NORMS = {"in_layers.2": "in_layers.0", "out_layers.3": "out_layers.0", "qkv": "norm", "out.2": "out.0"}
"""Convolution -> the normalisation in front of it, whose parameters the exporter has left without a name."""


def read_terrain(file: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The `ADMUNet`'s options, and its tensors by name, out of the wheel or the .onnx file.

    Raises:
        ImportError: onnx is missing.
        OSError: there is no such file.
        ValueError: it is neither, or another graph.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError
        from onnx import numpy_helper
    except ImportError as error:
        raise ImportError("reading an .onnx file needs onnx: install difusores[convert]") from error
    content = _content(file)
    try:
        graph = onnx.load(io.BytesIO(content)).graph
    except DecodeError as error:
        raise ValueError(f"{os.fspath(file)} is no .onnx file: {error}") from error
    stored = {array.name: array for array in graph.initializer}
    tensors = {}
    for name, array in stored.items():
        if name.startswith(PREFIX):
            tensor = torch.from_numpy(numpy_helper.to_array(array).copy())
            # the projections of attention are written as 1x1 convolutions over pixels in two dimensions
            of_attention = name.endswith(("qkv.weight", "proj_out.weight")) and tensor.ndim == 4
            tensors[name.removeprefix(PREFIX)] = tensor.squeeze(-1) if of_attention else tensor
    for kind, values in _norms(graph, stored).items():
        tensors[kind] = torch.from_numpy(numpy_helper.to_array(values).copy()).flatten()
    return CONFIG, tensors


def _content(file: str | os.PathLike[str]) -> bytes:
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as wheel:
            if MEMBER not in wheel.namelist():
                raise ValueError(f"{os.fspath(file)} holds no {MEMBER}")
            return wheel.read(MEMBER)
    with open(file, "rb") as opened:
        return opened.read()


def _norms(graph: Any, stored: dict[str, Any]) -> dict[str, Any]:
    """Scales and biases of the group normalisations, by the convolution that follows each of them.

    In the graph they are Reshape, InstanceNormalization, Reshape, Mul by [C, 1, 1], Add of [C, 1, 1].
    """
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)

    def follow(name: str, kind: str) -> Any:
        return next((node for node in readers.get(name, []) if node.op_type == kind), None)

    found = {}
    for node in graph.node:
        if node.op_type != "InstanceNormalization":
            continue
        reshape = follow(node.output[0], "Reshape")
        scale = reshape and follow(reshape.output[0], "Mul")
        bias = scale and follow(scale.output[0], "Add")
        convolution = bias and _next_convolution(bias.output[0], readers)
        if not convolution:
            raise ValueError(
                f"the normalisation {node.name} is not followed by a scale, a bias and a convolution"
            )
        layer = convolution.removeprefix(PREFIX).removesuffix(".weight")
        end = next((end for end in NORMS if layer == end or layer.endswith("." + end)), None)
        if end is None:
            raise ValueError(f"the normalisation {node.name} stands before {layer}, where this UNet has none")
        norm = layer.removesuffix(end) + NORMS[end]
        for kind, user in (("weight", scale), ("bias", bias)):
            found[f"{norm}.{kind}"] = next(stored[name] for name in user.input if name in stored)
    return found


def _next_convolution(name: str, readers: dict[str, list[Any]]) -> str | None:
    """The weight of the first convolution downstream, through activation, scale and shift, resampling."""
    waiting = [name]
    while waiting:
        for node in readers.get(waiting.pop(0), []):
            if node.op_type == "Conv":
                return str(node.input[1])
            if node.op_type in ("Mul", "Add", "Sigmoid", "AveragePool", "Resize"):
                waiting += node.output
    return None
