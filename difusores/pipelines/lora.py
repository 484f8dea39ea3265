"""LoRA for pipelines: reading, mixing, fusing and writing adapters of the UNet and the text encoders."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from difusores.files import find_file
from difusores.models.lora import Adapters, adapters_of, make_adapters
from difusores.models.lora_keys import read_layers
from difusores.models.modeling import read_tensors, write_safetensors
from difusores.pipelines.latent import LatentPipeline

WEIGHT_NAME = "pytorch_lora_weights"
COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
HUB = ("cache_dir", "force_download", "local_files_only", "revision", "token")


class LoraPipeline(LatentPipeline):
    """Base of pipelines whose models take LoRA adapters; see `difusores.models.lora`."""

    def _lora_models(self) -> dict[str, nn.Module]:
        found = {name: self.components.get(name) for name in COMPONENTS}
        return {name: model for name, model in found.items() if model is not None}

    def _adapters(self, components: Sequence[str] | None = None) -> dict[str, Adapters]:
        """Of the components that have some.

        Raises:
            ValueError: there is no such component.
        """
        models = self._lora_models()
        unknown = [name for name in components or () if name not in models]
        if unknown:
            raise ValueError(f"there is no component {', '.join(unknown)}; allowed are {', '.join(models)}")
        every = {name: adapters_of(models[name]) for name in components or models}
        return {name: adapters for name, adapters in every.items() if adapters is not None}

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike[str] | Mapping[str, Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        *,
        weight_name: str | None = None,
        subfolder: str | None = None,
        use_safetensors: bool | None = None,
        low_cpu_mem_usage: bool = True,
        **hub: Any,
    ) -> None:
        """Load an adapter, which alone is active then.

        Args:
            pretrained_model_name_or_path_or_dict: a file, a folder, a Hub id, or tensors by name, in the
                layout of diffusers or of kohya.
            adapter_name: "default_0", "default_1" and so on if None.
            hotswap: put it in the place of the loaded adapter of this name, which is active or not as before.
            weight_name: of the file in the folder; None for "pytorch_lora_weights.safetensors" or ".bin".
            use_safetensors: True refuses ".bin", False reads only that.
            low_cpu_mem_usage: taken for compatibility; nothing is ever initialised first.
            hub: `cache_dir`, `force_download`, `local_files_only`, `revision`, `token` of a Hub repository.

        Raises:
            OSError: there is no such file.
            TypeError: an argument that is not one of these.
            ValueError: the adapter's name is in use, or with `hotswap` is not; or tensors do not fit, which
                are all named.
        """
        unknown = hub.keys() - set(HUB)
        if unknown:
            raise TypeError(f"load_lora_weights takes no {', '.join(sorted(unknown))}")
        header: dict[str, Any] = {}
        if isinstance(pretrained_model_name_or_path_or_dict, Mapping):
            tensors = dict(pretrained_model_name_or_path_or_dict)
        else:
            endings = {None: ("safetensors", "bin"), True: ("safetensors",), False: ("bin",)}[use_safetensors]
            names = [weight_name] if weight_name else [f"{WEIGHT_NAME}.{ending}" for ending in endings]
            path = find_file(pretrained_model_name_or_path_or_dict, names, subfolder, **hub)
            tensors, header = read_tensors([path]), _header(path)
        if not tensors:
            raise ValueError("there are no LoRA weights in what is given")
        models = self._lora_models()
        if adapter_name is None:
            adapter_name = f"default_{len({n for a in self._adapters().values() for n in a.loaded})}"
        there = {name: dict(adapters.weights) for name, adapters in self._adapters().items()}
        if hotswap and not any(adapter_name in adapters.loaded for adapters in self._adapters().values()):
            raise ValueError(
                f"hotswap is True, and there is no adapter {adapter_name!r} to take the place of"
            )
        for adapters in self._adapters().values():
            if adapters.fused or (adapter_name in adapters.loaded and not hotswap):
                adapters.load(adapter_name, {})  # raises, before anything is changed
        layers = read_layers(tensors, models, header)
        if hotswap:
            self.delete_adapters(adapter_name)
        for name, changes in layers.items():
            make_adapters(models[name]).load(adapter_name, changes)
        for name, adapters in self._adapters().items():
            if hotswap:
                adapters.activate(there.get(name, {}))
            elif adapter_name not in adapters.loaded:
                adapters.activate({})

    def set_adapters(
        self,
        adapter_names: str | Sequence[str],
        adapter_weights: float
        | Mapping[str, float]
        | Sequence[float | Mapping[str, float] | None]
        | None = None,
    ) -> None:
        """Choose the active adapters.

        Args:
            adapter_weights: a factor for all or for each; None for 1, and {component: factor} for factors
                of their own.

        Raises:
            ValueError: there is no such adapter, or not one factor for each.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        given = adapter_weights
        weights = list(given) if isinstance(given, Sequence) else [given] * len(names)
        if len(weights) != len(names):
            raise ValueError(f"there are {len(weights)} adapter_weights for {len(names)} adapters")
        known = {name for every in self.get_list_adapters().values() for name in every}
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ValueError(
                f"there is no adapter {', '.join(unknown)}; loaded are {', '.join(sorted(known))}"
            )
        for weight in weights:
            if isinstance(weight, Mapping) and not all(
                name in COMPONENTS and isinstance(value, (int, float)) for name, value in weight.items()
            ):
                raise ValueError(f"adapter_weights has {weight}; needed is a number, or one by component")
        for component, adapters in self._adapters().items():
            chosen = {}
            for name, weight in zip(names, weights, strict=True):
                number = weight.get(component) if isinstance(weight, Mapping) else weight
                chosen[name] = 1.0 if number is None else float(number)
            adapters.activate(chosen)

    def get_active_adapters(self) -> list[str]:
        """Names of the active adapters."""
        return list(dict.fromkeys(name for a in self._adapters().values() for name in a.weights))

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Component -> names of its adapters."""
        return {component: list(adapters.loaded) for component, adapters in self._adapters().items()}

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Forget adapters."""
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            for adapters in self._adapters().values():
                adapters.delete(name)

    def enable_lora(self) -> None:
        """Let adapters act again."""
        for adapters in self._adapters().values():
            adapters.enabled = True

    def disable_lora(self) -> None:
        """Keep adapters without letting them act."""
        for adapters in self._adapters().values():
            adapters.enabled = False

    @property
    def fused_loras(self) -> set[str]:
        """Names of the adapters that are in the weights."""
        return {name for adapters in self._adapters().values() for name in adapters.fused}

    @property
    def num_fused_loras(self) -> int:
        """How many adapters are in the weights."""
        return len(self.fused_loras)

    def fuse_lora(
        self,
        components: Sequence[str] | None = None,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: list[str] | None = None,
    ) -> None:
        """Write the active adapters into the weights: nothing is added at run time then.

        The weights from before are kept beside them, for `unfuse_lora`.

        Args:
            components: of "unet", "text_encoder", "text_encoder_2"; None for all.
            lora_scale: factor on all changes.
            safe_fusing: raise ValueError where a weight is not finite then.
            adapter_names: of the active adapters, which; None for all.
        """
        for adapters in self._adapters(components).values():
            adapters.fuse(lora_scale, adapter_names, safe_fusing)

    def unfuse_lora(self, components: Sequence[str] | None = None) -> None:
        """Put the weights from before `fuse_lora` back, bit for bit."""
        for adapters in self._adapters(components).values():
            adapters.unfuse()

    def unload_lora_weights(self) -> None:
        """Forget all adapters. What is fused stays in the weights, as in diffusers: `unfuse_lora` first."""
        for adapters in self._adapters().values():
            adapters.remove()

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: str | os.PathLike[str],
        unet_lora_layers: Mapping[str, Tensor] | None = None,
        text_encoder_lora_layers: Mapping[str, Tensor] | None = None,
        text_encoder_2_lora_layers: Mapping[str, Tensor] | None = None,
        is_main_process: bool = True,
        weight_name: str | None = None,
        safe_serialization: bool = True,
    ) -> None:
        """Write an adapter as one safetensors file, in diffusers' layout.

        Args:
            unet_lora_layers, text_encoder_lora_layers, text_encoder_2_lora_layers: tensors by name, as
                `difusores.models.lora.lora_state_dict` gives them.
            is_main_process: False writes nothing.
            weight_name: "pytorch_lora_weights.safetensors" if None.
            safe_serialization: False is refused.

        Raises:
            ValueError: no tensors are given, or pickled files are asked for.
        """
        if not safe_serialization:
            raise ValueError("safe_serialization=False is not supported: weights are written as safetensors")
        given = (unet_lora_layers, text_encoder_lora_layers, text_encoder_2_lora_layers)
        parts = zip(COMPONENTS, given, strict=True)
        tensors = {f"{part}.{key}": value for part, layers in parts for key, value in (layers or {}).items()}
        if not tensors:
            raise ValueError("one of the three LoRA layers has to be given, and there are no tensors")
        if is_main_process:
            os.makedirs(save_directory, exist_ok=True)
            path = os.path.join(save_directory, weight_name or f"{WEIGHT_NAME}.safetensors")
            write_safetensors(path, tensors)


def _header(path: str) -> dict[str, Any]:
    """What diffusers writes about an adapter into the file's header."""
    if not path.endswith(".safetensors"):
        return {}
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        stored = (file.metadata() or {}).get("lora_adapter_metadata")
    found: dict[str, Any] = json.loads(stored) if stored else {}
    return found
