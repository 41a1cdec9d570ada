"""The zoo: published per-layer transcoders, read from their files alone.

    format          files                                                     axes there        norm gain
    sae_lens        cfg.json, sae_weights.safetensors                         W_enc "d_in f"    by metadata.hook_name
    sparsify        cfg.json, sae.safetensors (TopK, W_skip)                  W_enc "f d_in"    in
    circuit-tracer  config.yaml, layer_N.safetensors                          W_enc "f d_in"    by feature_input_hook
    Gemma Scope     .../layer_N/.../params.npz or params.safetensors          W_enc "d_in f"    by the given hook

Every dictionary becomes feature-first. Its orientation is checked against the length of its encoder bias, its widths and its
layer against the model. What it reads is a hook name: a norm's output with the gain in (`mlp.hook_in`) is what our sites read;
a norm's output without it (`ln2.hook_normalized`) is the same after dividing the encoder by the gain and moving the norm's offset
into the encoder's bias; the residual stream itself (`hook_resid_mid`) is refused, since the norm would have to be inside. A pickle
is refused before anything opens it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import torch
from jaxtyping import Float
from torch import Tensor

from graphs.architectures import Site, norm
from graphs.artifact import read_json, whole, write_json
from graphs.dictionary import Dictionary, Gate, Identity, JumpReLU, Part, ReLU, TopK, skip
from graphs.host import Host, check_safetensors

GAIN_IN = ("mlp.hook_in", "mlp")
"""Inputs that are the norm's output as the model computes it."""
GAIN_OUT = ("ln2.hook_normalized",)
"""Inputs that are the norm's output before its gain."""


def load(folder: Path, host: Host, hook: str | None = None) -> dict[str, Dictionary]:
    """Every transcoder in `folder`, by site name. hook: what they read, where their files do not say.

    Raises ValueError (one sentence): nothing there, a pickle, a shape or a hook that does not fit the model.
    """
    return dict(each(folder, host, hook))


def each(folder: Path, host: Host, hook: str | None = None) -> Iterator[tuple[str, Dictionary]]:
    """The same one after another: published ones may be larger than memory together."""
    if not folder.is_dir():
        raise ValueError(f"--dictionaries {folder}: no such folder; give a folder of transcoders or a hub id")
    sites = {site.layer: site for site in host.sites if site.kind == "mlp"}
    for file, layer, kind in _files(folder):
        if layer not in sites:
            raise ValueError(f"{file}: it is for layer {layer}, and the model has layers 0 to {len(sites) - 1}; give the model it was made for")
        weights, reads, gate = _READERS[kind](file)
        yield sites[layer].name, _dictionary(file, host, sites[layer], weights, hook or reads, gate)


def _files(folder: Path) -> list[tuple[Path, int, str]]:
    """(weights, layer, format) of every transcoder under `folder`."""
    found = []
    for file in sorted(folder.rglob("*.safetensors")) + sorted(folder.rglob("params.npz")):
        name = file.relative_to(folder.parent).as_posix()
        match file.name:
            case "sae_weights.safetensors":
                found.append((file, _layer(read_json(file.parent / "cfg.json").get("metadata") or {}, name), "sae_lens"))
            case "sae.safetensors":
                found.append((file, _layer({}, name), "sparsify"))
            case "params.npz" | "params.safetensors":
                found.append((file, _layer({}, name), "gemma_scope"))
            case _ if re.fullmatch(r"layer_\d+\.safetensors", file.name):
                found.append((file, _layer({}, name), "circuit_tracer"))
    if not found:
        pickles = [file.name for pattern in ("*.pt", "*.pth", "*.pkl", "*.bin", "*.ckpt") for file in sorted(folder.rglob(pattern))]
        raise ValueError(f"{folder}: its dictionaries are pickles ({pickles[0]}), which can run code; convert them to safetensors" if pickles else
                         f"{folder}: it holds no transcoders; give some in a format we read (sae_lens, sparsify, circuit-tracer, Gemma Scope)")
    layers = [layer for _, layer, _ in found]
    if len(set(layers)) != len(layers):
        twice = next(layer for layer in layers if layers.count(layer) > 1)
        raise ValueError(f"{folder}: two dictionaries are for layer {twice}; give a folder with one a layer")
    return found


def _layer(metadata: Mapping[str, Any], name: str) -> int:
    """The layer: from metadata (hook_layer, hook_name, site), else the last `layer_N`, `layers.N`, `h.N` or `LN.` of the path."""
    if isinstance(metadata.get("hook_layer"), int):
        return metadata["hook_layer"]
    text = str(metadata.get("hook_name") or metadata.get("site") or name)
    numbers = re.findall(r"(?:layers?[._/]|\bh\.|blocks\.|\bL)(\d+)", text)
    if not numbers:
        raise ValueError(f"{name}: neither its config nor its path names a layer (layer_3, layers.3, h.3, blocks.3); rename its folder")
    return int(numbers[-1])


Read = tuple[dict[str, Tensor], str | None, Callable[[dict[str, Tensor]], Gate]]


def _tensors(file: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    check_safetensors(file)
    return {name: value.float() for name, value in load_file(file).items()}


def _sae_lens(file: Path) -> Read:
    config = read_json(file.parent / "cfg.json")
    kind, metadata = config.get("architecture"), config.get("metadata") or {}
    if kind not in ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"):
        raise ValueError(f"{file.parent}: a sae_lens {kind!r} is no transcoder; give one that reads an MLP's input and writes its output")
    if config.get("normalize_activations", "none") != "none" or config.get("apply_b_dec_to_input"):
        raise ValueError(f"{file.parent}: it normalises its inputs; fold that into its weights with sae_lens first")
    reads = "mlp" if "site" in metadata else metadata.get("hook_name")
    return _tensors(file), reads, lambda w: JumpReLU(w["threshold"]) if "threshold" in w else ReLU()


def _sparsify(file: Path) -> Read:
    config = read_json(file.parent / "cfg.json")
    if not (config.get("transcode") or config.get("skip_connection")):  # older files have the second alone
        raise ValueError(f"{file.parent}: a sparsify autoencoder is no transcoder; give one trained with --transcode")
    if config.get("activation", "topk") != "topk" or config.get("multi_topk"):
        raise ValueError(f"{file.parent}: activation {config.get('activation')!r} is not read; give one trained with topk")
    weights = _tensors(file)
    if not isinstance(config.get("k"), int) or "encoder.weight" not in weights:
        raise ValueError(f"{file.parent}: its cfg.json has no k, or its weights no encoder; give a whole sparsify folder")
    named = {"W_enc": weights["encoder.weight"], "b_enc": weights["encoder.bias"]} | {k: v for k, v in weights.items() if not k.startswith("encoder")}
    return named, "mlp", lambda _: TopK(int(config["k"]))


def _circuit_tracer(file: Path) -> Read:
    import yaml

    where, weights = file.parent / "config.yaml", _tensors(file)
    try:
        reads = (yaml.safe_load(where.read_text()) or {}).get("feature_input_hook") if where.is_file() else None
    except (yaml.YAMLError, AttributeError):
        raise ValueError(f"{where}: not a YAML mapping; restore the file") from None

    def gate(w: dict[str, Tensor]) -> Gate:
        return TopK(int(w["k"])) if "k" in w else JumpReLU(w["threshold"]) if "threshold" in w else ReLU()
    return {name.removeprefix("activation_function."): value for name, value in weights.items()}, reads, gate


def _gemma_scope(file: Path) -> Read:
    import numpy

    if file.suffix == ".npz":
        try:
            with numpy.load(file, allow_pickle=False) as found:
                weights = {name: torch.from_numpy(found[name]).float() for name in found.files}
        except ValueError as error:
            raise ValueError(f"{file}: it holds pickled objects, which can run code; save plain arrays") from error
        except (BadZipFile, EOFError):
            raise ValueError(f"{file} is truncated or damaged: copy it again") from None
    else:
        weights = _tensors(file)
    names = {"w_enc": "W_enc", "w_dec": "W_dec", "affine_skip_connection": "W_skip"}
    return {names.get(name, name): value for name, value in weights.items()}, None, lambda w: JumpReLU(w["threshold"].flatten())


_READERS: dict[str, Callable[[Path], Read]] = {
    "sae_lens": _sae_lens, "sparsify": _sparsify, "circuit_tracer": _circuit_tracer, "gemma_scope": _gemma_scope}


def _dictionary(
    file: Path, host: Host, site: Site, weights: dict[str, Tensor], hook: str | None, gate: Callable[[dict[str, Tensor]], Gate]
) -> Dictionary:
    """Feature-first, against the model."""
    needed = ("W_enc", "b_enc", "W_dec", "b_dec", *(("threshold",) if file.name.startswith("params.") else ()))
    missing = [name for name in needed if name not in weights]
    if missing:
        raise ValueError(f"{file}: it has no {missing[0]}, so it is no transcoder; give one in a format that docs/graph.md names")
    bias = weights["b_enc"].flatten()
    read, write = _oriented(file, "W_enc", weights["W_enc"], len(bias), site.d_in), _oriented(file, "W_dec", weights["W_dec"], len(bias), site.d_out)
    through = weights.get("W_skip")
    if through is not None and through.shape != (site.d_out, site.d_in):
        raise ValueError(f"{file}: W_skip is {tuple(through.shape)} and the site needs {(site.d_out, site.d_in)}; give the model it was made for")
    gain, offset = torch.ones(site.d_in), torch.zeros(site.d_in)
    ending = (hook or "").split(".", 2)[-1] if (hook or "").startswith("blocks.") else hook
    if ending in GAIN_OUT:
        own = norm(host.model, site.norm)
        gain, offset = own.gain, own.offset
    elif ending not in GAIN_IN:
        raise ValueError(f"{file}: it reads {hook or 'a place that its files do not name'}; we need an MLP's normalised input "
                         f"({', '.join((*GAIN_IN[:1], *GAIN_OUT))}): give --hook if you know it is one, or refit")
    for name, length in (("b_dec", site.d_out), ("threshold", len(bias))):
        if name in weights and weights[name].numel() != length:
            raise ValueError(f"{file}: {name} has {weights[name].numel()} numbers and {length} were expected; give the model it was made for")
    read = read / gain
    parts, constant = [Part(read, bias - read @ offset, write, gate(weights))], weights["b_dec"].flatten()
    if through is not None:
        through = through / gain
        parts.append(skip(through))
        constant = constant - through @ offset
    return Dictionary(tuple(parts), constant)


def _oriented(file: Path, name: str, weight: Tensor, features: int, width: int) -> Float[Tensor, "feature d"]:
    """Feature first, by the length of the encoder's bias and the model's width."""
    shapes = {(features, width): weight, (width, features): weight.T}
    found = next((one for shape, one in shapes.items() if weight.shape == shape), None)
    if found is None:
        raise ValueError(f"{file}: {name} is {tuple(weight.shape)}; {features} features of this model's width {width} were expected; give the "
                         "model it was made for")
    if features == width and name == "W_enc" and not _rows_first(file):
        found = weight.T
    return found.contiguous()


def _rows_first(file: Path) -> bool:
    """Whether the format keeps encoders feature-first: needed only where a square matrix cannot tell."""
    return file.name == "sae.safetensors" or file.name.startswith("layer_")


def save_sae_lens(dictionary: Dictionary, folder: Path, site: Site, hook: str) -> None:
    """Write one dictionary as a folder that `sae_lens.SAE.load_from_disk` opens, W_skip included.

    Raises ValueError where sae_lens has no class for its gates.
    """
    from safetensors.torch import save_file

    main = dictionary.parts[0]
    rest = dictionary.parts[1:]
    if not isinstance(main.gate, ReLU | JumpReLU) or any(not isinstance(part.gate, Identity) for part in rest):
        raise ValueError(f"sae_lens has no transcoder with gate {type(main.gate).__name__}: refit with ReLU")
    tensors = {"W_enc": main.read.T, "b_enc": main.bias, "W_dec": main.write, "b_dec": dictionary.constant}
    if rest:
        tensors["W_skip"] = sum((part.write.T @ part.read for part in rest), torch.zeros(site.d_out, site.d_in))
    if isinstance(main.gate, JumpReLU):
        tensors["threshold"] = main.gate.threshold
    kind = "jumprelu_" * isinstance(main.gate, JumpReLU) + "skip_" * bool(rest) + "transcoder"
    with whole(folder) as out:
        save_file({name: value.detach().contiguous() for name, value in tensors.items()}, out / "sae_weights.safetensors")
        write_json(out / "cfg.json", {
            "architecture": kind, "d_in": site.d_in, "d_sae": len(main.read), "d_out": site.d_out, "dtype": "float32", "device": "cpu",
            "apply_b_dec_to_input": False, "normalize_activations": "none", "reshape_activations": "none",
            "metadata": {"hook_name": f"blocks.{site.layer}.{hook}", "hook_layer": site.layer}})
