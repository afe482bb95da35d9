"""Vision transformers with layers of slots (MoE Jetpack's V-JetMoE, Soft MoE), on timm's modules.

:func:`build_sphero_vit` makes one from a :class:`moe.jetpack_specs.JetViTSpec`; :func:`insert_slots` puts layers into
any timm transformer that has ``blocks`` with an ``mlp``. The result still is timm's class: ``model(images)`` are
logits.

Source: MoE Jetpack (arXiv 2406.04801) and its released code; ViT (2010.11929) through timm.

- Parity: LayerNorm epsilon 1e-6 (``slot_norm`` 1e-5), fused qkv, key names and, with slots, the released key order, in
  which ``mlp`` precedes ``norm2``. The released model's rotary table is never applied, and not built.
- Differs: shared layers keep all options unless ``shared_options`` is ``official``.

Shapes: B batch, N tokens, D width, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from moe.errors import SpecError
from moe.jetpack_specs import JetViTSpec, SoftMoESpec, SpheroSpec
from moe.layers.slot_record import SlotRecord
from moe.layers.slots import SlotLayer
from moe.layers.soft_moe import SoftMoE
from moe.layers.sphero import SpheroMoE

SlotSpecs = SpheroSpec | SoftMoESpec


def make_slots(dim: int, spec: SlotSpecs, phi: nn.Parameter | None = None) -> SlotLayer:
    """A layer of slots of width ``dim``."""
    return SpheroMoE(dim, spec, phi) if isinstance(spec, SpheroSpec) else SoftMoE(dim, spec, phi)


def build_sphero_vit(spec: JetViTSpec, num_classes: int) -> VisionTransformer:
    """A randomly initialised network.

    Args:
        spec: geometry, pooling and slots.
        num_classes: K.
    """
    vit = VisionTransformer(
        img_size=spec.image_size,
        patch_size=spec.patch_size,
        in_chans=spec.channels,
        num_classes=num_classes,
        global_pool=spec.global_pool,
        embed_dim=spec.dim,
        depth=spec.depth,
        num_heads=spec.num_heads,
        mlp_ratio=spec.mlp_ratio,
        qkv_bias=spec.qkv_bias,
        qk_norm=spec.qk_norm,
        init_values=spec.init_values,
        class_token=spec.class_token,
        no_embed_class=spec.no_embed_class,
        reg_tokens=spec.reg_tokens,
        pre_norm=spec.pre_norm,
        fc_norm=spec.fc_norm,
        drop_path_rate=spec.drop_path,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        # Parity: attention pooling reads all tokens, class token and registers included; timm now leaves them out.
        pool_include_prefix=spec.global_pool == "map",
    )
    if spec.moe is None:
        return vit
    own = {i: spec.moe.model_copy(update={"drop_path": spec.layer_drop_path(i)}) for i in spec.moe_layers}
    insert_slots(vit, own)
    if spec.shared_layers:
        _share(vit, spec, spec.moe)
    for block in vit.blocks:
        # The released key order; a child that is set anew moves to the end.
        for name in ("norm2", "ls2", "drop_path2"):
            setattr(block, name, block._modules.pop(name))
    return vit


def insert_slots(model: nn.Module, layers: Mapping[int, SlotSpecs]) -> None:
    """Replace the feed-forward networks of a transformer's blocks by layers of slots, in place.

    Args:
        model: has ``blocks``, each with a ``mlp`` that follows a ``norm2`` (timm's ViT, DeiT, EVA, ...).
        layers: block number, from 0 -> what it carries.

    Raises:
        SpecError: not such a transformer, a block that does not exist or carries slots already.
    """
    blocks = _blocks(model)
    for index, spec in layers.items():
        if not 0 <= index < len(blocks):
            raise SpecError(f"There is no block {index}.", f"Blocks run from 0 to {len(blocks) - 1}.")
        block = blocks[index]
        norm, old = getattr(block, "norm2", None), getattr(block, "mlp", None)
        if isinstance(old, SlotLayer):
            raise SpecError(f"Block {index} carries slots already.", "Insert them once.")
        if old is None or norm is None or getattr(norm, "weight", None) is None:
            raise SpecError(
                f"Block {index} is a {type(block).__name__} without norm2 and mlp.", "Choose a pre-norm transformer."
            )
        layer = make_slots(norm.weight.shape[0], spec)
        block.mlp = layer.to(norm.weight).train(block.training)


def slot_layers(model: nn.Module) -> dict[str, SlotLayer]:
    """Layers of slots inside ``model``, by the name of the block that runs them (shared ones under each name)."""
    named = {n: m for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, SlotLayer)}
    return {name: layer for name, layer in named.items() if not name.startswith("moe_layers_dict.")}


def run_with_records(model: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, SlotRecord]]:
    """``model(images)`` and what every layer of slots did, by name; a shared layer counts once per block.

    Layers run twice, once unseen: use it now and then, best in evaluation mode, where nothing is drawn.
    """
    found: dict[str, SlotRecord] = {}
    handles = []
    names = _names_by_layer(slot_layers(model))
    for layer, own in names:
        todo: Iterator[str] = iter(own)

        def note(module: SlotLayer, args: tuple[Tensor, ...], output: Tensor, todo: Iterator[str] = todo) -> Tensor:
            y, found[next(todo)] = module.forward_with_record(args[0])
            return y

        handles.append(layer.register_forward_hook(note))  # type: ignore[arg-type]
    try:
        logits: Tensor = model(images)
    finally:
        for handle in handles:
            handle.remove()
    return logits, found


def _names_by_layer(layers: Mapping[str, SlotLayer]) -> list[tuple[SlotLayer, list[str]]]:
    grouped: dict[int, tuple[SlotLayer, list[str]]] = {}
    for name, layer in layers.items():
        grouped.setdefault(id(layer), (layer, []))[1].append(name)
    return list(grouped.values())


def _blocks(model: nn.Module) -> nn.ModuleList | nn.Sequential:
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, (nn.ModuleList, nn.Sequential)):
        raise SpecError(f"A {type(model).__name__} has no transformer blocks.", "Choose a vision transformer.")
    return blocks


def _share(vit: VisionTransformer, spec: JetViTSpec, slots: SlotSpecs) -> None:
    """Layers used by several blocks, and queries used by several layers."""
    if spec.shared_options == "official":
        off = {"slot_layernorm": False, "drop_path": 0.0, "logit_dropout": 0.0}
        shared = {name: slots.model_copy(update=off) for name in spec.shared_layers}
    else:
        shared = {
            name: slots.model_copy(update={"drop_path": spec.layer_drop_path(max(group))})
            for name, group in spec.shared_layers.items()
        }
    layers = {name: make_slots(spec.dim, own) for name, own in shared.items()}
    queries: dict[str, nn.Parameter] = {}
    for name, users in spec.shared_queries.items():
        phis = [getattr(layers[user], "phi", None) for user in users]
        if any(phi is None for phi in phis):
            raise SpecError(f"The layers of shared_queries {name!r} take their queries from the tokens.")
        for user, phi in zip(users, phis, strict=True):
            layers[user].phi = queries.setdefault(name, phi)  # type: ignore[arg-type]
    # Shared parts come first, so that named_parameters() lists each tensor under its shared name.
    children = {name: vit._modules.pop(name) for name in list(vit._modules)}
    vit.phi_dict = nn.ParameterDict(queries)
    vit.moe_layers_dict = nn.ModuleDict(layers)
    for name, child in children.items():
        vit.add_module(name, child)
    for name, group in spec.shared_layers.items():
        for index in group:
            vit.blocks[index].mlp = layers[name]
