"""Adapters of m2mKD's neural attentive circuit: layers, circuit, graph priors, regularisers, students, assembly."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from moe.errors import MoepipeError
from moe.models.nac.assembly import assemble_circuit, student_files
from moe.models.nac.attention import LatentAttention, Nodes
from moe.models.nac.circuit import ROLES, Circuit, count_parameters
from moe.models.nac.draws import Draws
from moe.models.nac.ffn import ModFFN
from moe.models.nac.graph_specs import AttentionOptions, KernelSpec, ModFCSpec
from moe.models.nac.kernel import DotProductKernel, cosine_distance
from moe.models.nac.latents import LatentSeeder
from moe.models.nac.modfc import ModLinear
from moe.models.nac.pooling import OutputLatentPooling
from moe.models.nac.priors import graph_adjacency
from moe.models.nac.read_in import AttentiveReadIn, ReadInAttention
from moe.models.nac.regularizers import block_model, block_model_loss, mixture_loss, signature_hinge
from moe.models.nac.signatures import fit_signatures
from moe.models.nac.specs import CircuitSpec, GridSpec, PoolingSpec, StudentSpec, TokenizerSpec
from moe.models.nac.students import build_student
from moe.models.nac.tokenizer import Tokenizer
from tests.golden.registry import ADAPTERS, check, op
from tests.golden.replay import compare

Case = dict[str, Any]
Tensors = dict[str, torch.Tensor]

NOISE = "in.noise."


def below(tensors: Tensors, prefix: str) -> Tensors:
    """The tensors whose names begin with ``prefix``, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def loaded(module: nn.Module, tensors: Tensors, training: bool = False) -> nn.Module:
    """The module with the weights of the case."""
    module.load_state_dict(below(tensors, "w."))
    return module.train(training)


def inputs(tensors: Tensors, *names: str) -> Tensors:
    """Inputs that take a gradient."""
    return {name: tensors[f"in.{name}"].clone().requires_grad_() for name in names}


def results(y: torch.Tensor, scalar: torch.Tensor, module: nn.Module | None, given: Tensors) -> Tensors:
    """The output and every gradient of ``scalar``; zeros where it does not depend on a tensor."""
    weights = dict(module.named_parameters()) if module is not None else {}
    return {"out.y": y, **gradients(scalar, {**weights, **given})}


def gradients(scalar: torch.Tensor, wanted: Tensors) -> Tensors:
    """``out.grad.*``, zeros where the scalar does not depend on a tensor or the tensor is a constant."""
    learned = [x for x in wanted.values() if x.requires_grad]
    values = torch.autograd.grad(scalar, learned, allow_unused=True) if scalar.requires_grad and learned else ()
    known = {id(x): value for x, value in zip(learned, values, strict=False) if value is not None}
    return {f"out.grad.{name}": known.get(id(x), torch.zeros_like(x)) for name, x in wanted.items()}


def mod(params: Case) -> ModFCSpec:
    return ModFCSpec.model_validate(params.get("mod_fc_kwargs") or {})


@op("m2mkd.modfc")
def modfc(case: Case, tensors: Tensors) -> Tensors:
    params = dict(case["params"])
    sizes = [params.pop(name) for name in ("in_features", "out_features", "context_features")]
    bias = params.pop("bias")
    module = loaded(ModLinear(*sizes, ModFCSpec.model_validate(params), bias), tensors)
    given = inputs(tensors, "x", "code")
    y = module(given["x"], given["code"])
    return results(y, (y * tensors["in.cotangent"]).sum(), module, given)


def layer_scale(tensors: Tensors, name: str = "w.layer_scale.gamma") -> float | None:
    """Any start value, since weights are loaded; None where the case has no layer scale."""
    return 1.0 if name in tensors else None


@op("m2mkd.modffn")
def modffn(case: Case, tensors: Tensors) -> Tensors:
    params = case["params"]
    module = ModFFN(
        params["state_dim"],
        params["code_dim"],
        params["capacity_factor"],
        use_geglu=params["use_geglu"],
        layer_scale=layer_scale(tensors),
        mod=mod(params),
        path_drop_prob=params["path_drop_prob"],
        include_residual=params["include_residual"],
    )
    loaded(module, tensors, params["training"])
    given = inputs(tensors, "states", "codes")
    y = module(given["states"], given["codes"], Draws(below(tensors, NOISE)))
    return results(y, (y * tensors["in.cotangent"]).sum(), module, given)


@op("m2mkd.dot_product_kernel")
def dot_product_kernel(case: Case, tensors: Tensors) -> Tensors:
    params = case["params"]
    spec = KernelSpec(
        truncation=params["truncation"],
        stochastic_kernel=params["stochastic_kernel"],
        stochastic_sampling_temperature=params["temperature"],
        learnable_bandwidth=params["learnable_bandwidth"],
        straight_through=params["straight_through"],
        truncation_implementation=params["truncation_implementation"],
    )
    module = loaded(DotProductKernel(spec, params["normalize_along_senders"]), tensors, params["training"])
    given = inputs(tensors, "receiver_sig", "sender_sig")
    pair = (given["receiver_sig"], given["sender_sig"])
    if params["output"] == "distance":
        y = cosine_distance(*pair)
    elif params["output"] == "plain":
        y = module.plain(*pair)
    else:
        y = module.log(*pair, params["batch_size"] or 1, Draws(below(tensors, NOISE)))
    scalar = (tensors["in.cotangent"] * (y.exp() if params["output"] == "log" else y)).sum()
    finite = torch.isfinite(y)
    stored = torch.where(finite, y, -1e30)
    return {"out.y": stored, "out.finite": finite, **gradients(scalar, {**given, "bandwidth": module.bandwidth})}


@op("m2mkd.latent_attention")
def latent_attention(case: Case, tensors: Tensors) -> Tensors:
    params = case["params"]
    options = AttentionOptions(
        kernel_kwargs=KernelSpec(
            truncation=params["truncation"],
            stochastic_kernel=params["stochastic_kernel"],
            stochastic_sampling_temperature=params["temperature"],
            learnable_bandwidth=params.get("learnable_bandwidth", True),
        ),
        share_layernorm=params["share_layernorm"],
        mask_attn_scores_with_affinities=params["mask_scores"],
        scale_attn_with_affinities=params["scale_after_softmax"],
        normalize_kernel_along_keys=params["normalize_kernel_along_keys"],
    )
    module = LatentAttention(
        params["state_dim"],
        params["code_dim"],
        params["num_heads"],
        params["head_dim"],
        options,
        mod=mod(params),
        layer_scale=layer_scale(tensors),
        qkv_bias=params["qkv_bias"],
        path_drop_prob=params["path_drop_prob"],
        include_residual=params["include_residual"],
    )
    loaded(module, tensors, params["training"])
    sides = ("receiver", "sender")
    given = inputs(tensors, *(f"{side}_{part}" for side in sides for part in ("states", "codes", "sig")))
    nodes = [Nodes(*(given[f"{side}_{part}"] for part in ("states", "codes", "sig"))) for side in sides]
    y = module(*nodes, Draws(below(tensors, NOISE)))
    return results(y, (y * tensors["in.cotangent"]).sum(), module, given)


@op("m2mkd.read_in")
def read_in(case: Case, tensors: Tensors) -> Tensors:
    params = case["params"]
    attention = ReadInAttention(
        params["input_dim"],
        params["state_dim"],
        params["code_dim"],
        params["num_heads"],
        params["head_dim"],
        mod=mod(params),
        qkv_bias=params["qkv_bias"],
        layer_scale=layer_scale(tensors, "w.read_in_attention.layer_scale.gamma"),
        include_residual=params["include_residual_in_read_in_attention"],
    )
    ffn = ModFFN(
        params["state_dim"],
        params["code_dim"],
        params["ffn_capacity_factor"],
        use_geglu=params["use_geglu"],
        layer_scale=layer_scale(tensors, "w.ffn.layer_scale.gamma"),
        mod=mod(params),
    )
    module = loaded(AttentiveReadIn(attention, ffn), tensors)
    given = inputs(tensors, "receiver_states", "receiver_codes", "inputs")
    y = module(*given.values())
    return results(y, (y * tensors["in.cotangent"]).sum(), module, given)


@op("m2mkd.latent_seeder")
def latent_seeder(case: Case, tensors: Tensors) -> Tensors:
    params = case["params"]
    module = LatentSeeder(params["code_dim"], params["state_dim"], params["code_noise_scale"])
    loaded(module, tensors, params["training"])
    given = inputs(tensors, "codes")
    y = module(given["codes"], params["batch_size"], Draws(below(tensors, NOISE)))
    return results(y, (y * tensors["in.cotangent"]).sum(), module, given)


@op("m2mkd.convnext_tokenizer")
def convnext_tokenizer(case: Case, tensors: Tensors) -> Tensors:
    params = case["params"]
    grid = params["grid"] and GridSpec(dim=params["grid"][0], grid_size=params["grid"][1:])
    spec = TokenizerSpec(
        capacity_preset=params["capacity_preset"],
        num_stages=params["num_stages"],
        positional_grid_kwargs=grid,
        depths=params["depths"],
    )
    module = loaded(Tokenizer(params["in_chans"], params["repr_dim"], spec), tensors)
    given = inputs(tensors, "images")
    y = module(given["images"])
    return results(y, (y * tensors["in.cotangent"]).sum(), module, given)


@op("m2mkd.output_pooling")
def output_pooling(case: Case, tensors: Tensors) -> Tensors:
    params = case["params"]
    spec = PoolingSpec(softmax_type=params["softmax_type"], temperature=params["temperature"])
    module = loaded(OutputLatentPooling(params["state_dim"], params["output_dim"], spec), tensors)
    given = inputs(tensors, "states")
    y = module(given["states"], Draws(below(tensors, NOISE)))
    return results(y, (y * tensors["in.cotangent"]).sum(), module, given)


@op("m2mkd.nac_forward")
def nac_forward(case: Case, tensors: Tensors) -> Tensors:
    params = case["params"]
    circuit = Circuit(CircuitSpec.from_official(params["model_kwargs"]))
    if count_parameters(circuit) != params["num_params"]:
        raise MoepipeError(f"{count_parameters(circuit)} parameters instead of {params['num_params']}.")
    loaded(circuit, tensors, params["training"])
    record = circuit.forward_with_record(tensors["in.images"], Draws(below(tensors, NOISE)))
    classification = torch.nn.functional.cross_entropy(record.logits, tensors["in.target"])
    sparsity = signature_hinge(torch.cat(list(circuit.signatures().values())), params["hinge"])
    loss = classification + params["hinge_weight"] * sparsity
    computed = {f"out.{name}": value for name, value in record._asdict().items()}
    computed |= {"out.loss.classification": classification, "out.loss.graph_sparsity": sparsity, "out.loss.loss": loss}
    return computed | gradients(loss, dict(circuit.named_parameters()))


def signature_sets(tensors: Tensors) -> Tensors:
    return inputs(tensors, *(f"{role}_sig" for role in ROLES))


@op("m2mkd.signature_hinge")
def hinge(case: Case, tensors: Tensors) -> Tensors:
    given = signature_sets(tensors)
    loss = signature_hinge(torch.cat(list(given.values())), case["params"]["hinge"], case["params"]["reduction"])
    return {"out.loss": loss, **gradients(loss, given)}


@op("m2mkd.sbm_regularization")
def sbm_regularization(case: Case, tensors: Tensors) -> Tensors:
    params, given = case["params"], signature_sets(tensors)
    bandwidths = tensors["in.bandwidths"].clone().requires_grad_(params["learnable_bandwidth"])
    chosen = torch.cat([given[f"{role}_sig"] for role in ROLES if role in params["regularize"]])
    model = {name: params[name] for name in ("num_clusters", "p_in", "p_out")}
    loss = block_model_loss(chosen, list(bandwidths), **model, clip=params["clip"], truncation=params["truncation"])
    graphon = block_model(len(chosen), **model)
    return {"out.loss": loss, "out.graphon": graphon, **gradients(loss, {**given, "bandwidths": bandwidths})}


@op("m2mkd.signature_distribution")
def signature_distribution(case: Case, tensors: Tensors) -> Tensors:
    given = signature_sets(tensors)
    mixture = [tensors[f"in.{name}"] for name in ("weights", "means", "sigmas")]
    loss = mixture_loss(torch.cat(list(given.values())), *mixture, case["params"]["reduction"])
    return {"out.loss": loss, **gradients(loss, given)}


@op("m2mkd.graph_prior")
def graph_prior(case: Case, tensors: Tensors) -> Tensors:
    params = case["params"]
    return {"out.adjacency": graph_adjacency(params["graph_type"], params["num_latents"], params["generator_kwargs"])}


@op("m2mkd.graph_signatures")
def graph_signatures(case: Case, tensors: Tensors) -> Tensors:
    params = {name: value for name, value in case["params"].items() if name != "signature_dim"}
    fit = fit_signatures(tensors["in.adjacency"], tensors["in.initial_signatures"], **params)
    return {"out.signatures": fit.signatures, "out.score": torch.tensor(fit.score)}


@op("m2mkd.nac_student")
def nac_student(case: Case, tensors: Tensors) -> Tensors:
    cfg = {**case["params"]["cfg"], "student": case["params"]["student"]}
    student = build_student(StudentSpec.model_validate(cfg))
    student.load_official(below(tensors, "w."))
    student.train(case["params"].get("training", False))
    given = inputs(tensors, *(name for name in ("hidden", "images", "states", "codes") if f"in.{name}" in tensors))
    first = given.get("hidden", given.get("images"))
    y = student(first, given["codes"], given.get("states"), Draws(below(tensors, NOISE)))
    return results(y, (y * tensors["in.cotangent"]).sum(), student, given)


@op("m2mkd.nac_assembly")
def nac_assembly(case: Case, tensors: Tensors) -> Tensors:
    params = case["params"]
    circuit = Circuit(CircuitSpec.from_official(params["model_kwargs"]))
    files = student_files(circuit.graph.spec.num_iterations)
    students = {file: below(tensors, f"in.{file}.") for file in files}
    report = assemble_circuit(circuit, students, params["student_type"])
    if report.loaded_from != params["loaded_from"] or report.not_loaded != sorted(params["not_loaded"]):
        raise MoepipeError("The map of loaded tensors, or the list of those not loaded, differs from the case's.")
    state = circuit.state_dict()
    return {f"out.{name}": state[name] for name in report.loaded_from}


def compare_stored_gradients(case: Case, tensors: Tensors, outputs: Tensors) -> Iterator[str]:
    """As usual, but a case stores a choice of the gradients: further ones are not compared (OPS.md, replay rule)."""
    yield from compare(
        case, tensors, {name: y for name, y in outputs.items() if name in tensors or not name.startswith("out.grad.")}
    )


for _name, _adapter in ADAPTERS.items():
    if _adapter.__module__ == __name__:
        check(_name)(compare_stored_gradients)
