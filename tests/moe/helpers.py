"""Small models and episodes for the tests of the mathematics."""

import torch

from moe.aggregator import Aggregator
from moe.backbones import build_student
from moe.meta_step import Episode, EpisodeModule
from moe.specs import BackboneSpec, MetaStepSpec, StudentMoESpec

TINY = BackboneSpec(name="tiny_cnn", channels=1, width=2)  # 32 features


def student(moe=None, outputs=3, dtype=torch.float32, seed=0):
    """A tiny student with BatchNorm statistics and MoE outputs that are not trivial."""
    torch.manual_seed(seed)
    model = build_student(TINY, outputs, moe).to(dtype).eval()
    for name, tensor in model.state_dict().items():
        if name.endswith("running_mean"):
            tensor.normal_(std=0.3)
        elif name.endswith("running_var"):
            tensor.uniform_(0.5, 2.0)
    return model


def wake(model):
    """Give the zero output projections of an MoE block something to say."""
    for name, parameter in model.named_parameters():
        if ".w2." in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def episode(support=5, query=4, experts=3, outputs=3, dtype=torch.float32, seed=1, dim=32):
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, max(outputs, 2), (query,), generator=g)
    return Episode(
        torch.randn(support, 1, 12, 12, generator=g, dtype=dtype),
        torch.randn(query, 1, 12, 12, generator=g, dtype=dtype),
        labels,
        torch.randn(support, experts, dim, generator=g, dtype=dtype),
        torch.arange(support) % experts,
    )


def module(order="second", moe=None, outputs=3, dtype=torch.float64, task="multiclass", **options):
    """Student and aggregator ready for a meta step."""
    model = student(moe, outputs, dtype)
    if moe is not None:
        wake(model)
    torch.manual_seed(2)
    aggregator = Aggregator(model.feature_dim, outputs, heads=4).to(dtype)
    config = MetaStepSpec(**{"inner_lr": 0.3, "order": order, **options})
    return EpisodeModule(model, aggregator, config, task).to(dtype)


def gradients(network, batch):
    network.zero_grad()
    losses = network(batch)
    losses.total.backward()
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


MOE = StudentMoESpec(num_experts=4, top_k=2, hidden_ratio=0.5)
