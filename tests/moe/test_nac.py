"""Neural attentive circuit: layers, switches, the whole circuit."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import functional_call

from moe.errors import CheckpointError, RunFailed, SpecError
from moe.models.nac.checkpoints import load_circuit
from moe.models.nac.circuit import Circuit, build_circuit, count_parameters
from moe.models.nac.draws import Draws
from moe.models.nac.presets import PRIORS, circuit_preset, regularizer_preset, student_preset
from moe.models.nac.specs import CircuitSpec
from moe.models.nac.students import build_student

MOD = {"add_one_to_scale": True, "learnable_scale_gain": True, "scale_gain": 0.1}
KERNEL = {"truncation": 0.9, "stochastic_kernel": True, "stochastic_sampling_temperature": 0.5}
GRAPH = {
    "code_dim": 6,
    "signature_dim": 5,
    "num_input_latents": 4,
    "num_mediator_latents": 6,
    "num_output_latents": 2,
    "num_iterations": 2,
    "num_heads": 2,
    "head_dim": 3,
    "code_noise_scale": 0.05,
    "path_drop_prob": 0.1,
    "mod_fc_kwargs": MOD,
    "propagator_kwargs": {"latent_attention_kwargs": {"kernel_kwargs": KERNEL, "share_layernorm": True}},
    "read_out_kwargs": {"use_head": False},
}


def spec_of(top=None, **graph):
    tokenizer = {
        "capacity_preset": "atto",
        "num_stages": 2,
        "positional_grid_kwargs": {"dim": 3, "grid_size": [2, 2]},
    }
    base = {"output_dim": 4, "state_dim": 8, "input_tokenizer_kwargs": tokenizer}
    return CircuitSpec.from_official({**base, **(top or {}), "latent_graph_kwargs": {**GRAPH, **graph}})


def images(batch=2, side=16, seed=0):
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(seed))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def circuit():
    return build_circuit(spec_of(), seed=3)


def test_circuit_follows_from_its_seed_and_leaves_torchs_generator_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    spec = spec_of(
        mediator_latent_kwargs={"graph_preset": "erdos-renyi", "graph_generator_kwargs": {"p": 0.3, "num_iters": 5}}
    )
    one, same, other = (build_circuit(spec, seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(value, same[name]) for name, value in one.items())
    name = "latent_graphs.0.mediator_latents.signatures_"
    assert not torch.equal(one[name], other[name])
    assert not torch.equal(one[name], build_circuit(spec, 0, fit_priors=False).state_dict()[name])


def test_forward_is_reproducible_from_a_generator(circuit):
    circuit.train()
    one, same, other = (circuit(images(), Draws(generator=generator(seed))) for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)


def given_noise(batch, mediators=6):
    g = generator(7)
    noise = {f"seed_{role}.state": torch.randn(batch, n, 8, generator=g) for role, n in (("input", 4), ("output", 2))}
    noise["seed_mediator.state"] = torch.randn(batch, mediators, 8, generator=g)
    noise["pool.exponential"] = torch.rand(batch, 2, generator=g) + 0.1
    return noise


def test_images_of_a_batch_do_not_influence_each_other(circuit):
    circuit.eval()
    noise = given_noise(3)
    whole = circuit(images(3), Draws(noise))
    for row in range(3):
        alone = circuit(images(3)[row : row + 1], Draws({name: x[row : row + 1] for name, x in noise.items()}))
        torch.testing.assert_close(alone[0], whole[row], rtol=1e-4, atol=1e-5)


@settings(max_examples=10, deadline=None)
@given(order=st.permutations(range(6)))
def test_order_of_mediators_does_not_matter(circuit, order):
    circuit.eval()
    noise = given_noise(2)
    record = circuit.forward_with_record(images(), Draws(noise))
    state = circuit.state_dict()
    latents = {n: state[n][list(order)] for n in state if ".mediator_latents." in n}
    noise["seed_mediator.state"] = noise["seed_mediator.state"][:, list(order)]
    changed = copy.deepcopy(circuit)
    changed.load_state_dict({**state, **latents})
    other = changed.forward_with_record(images(), Draws(noise))
    torch.testing.assert_close(other.mediator_states, record.mediator_states[:, list(order)], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(other.logits, record.logits, rtol=1e-4, atol=1e-5)


def test_published_sizes():
    tiny = Circuit(circuit_preset("tiny_imagenet"))
    assert len(tiny.state_dict()) == 362 and round(count_parameters(tiny) / 1e6, 1) == 26.7
    mediator = build_student(student_preset("tiny_imagenet", "mediator"))
    assert round(count_parameters(mediator) / 1e6, 2) == 3.50
    for dataset in ("tiny_imagenet", "imagenet", "few_shot"):
        for prior in PRIORS:
            own = circuit_preset(dataset, prior).latent_graph_kwargs.mediator_latent_kwargs
            assert own.graph_preset == PRIORS[prior][0]
    assert regularizer_preset("planted").type.startswith("stochastic") and regularizer_preset("ring").weight == 0.1
    with pytest.raises(SpecError, match="Did you mean 'scale_free'"):
        circuit_preset("imagenet", "scalefree")


def test_bad_numbers_are_named_where_they_begin():
    circuit = build_circuit(spec_of(), seed=1).eval()
    bad = images()
    bad[1, 0, 0, 0] = torch.nan
    with pytest.raises(RunFailed, match=r"images \(2, 3, 16, 16\), torch.float32, are not finite for 1 of 2 images"):
        circuit(bad)
    with torch.no_grad():
        circuit.graph.propagators[1].ffn.layer_scale.gamma.fill_(torch.inf)
    with pytest.raises(RunFailed, match=r"mediator_states \(2, 6, 8\)"):
        circuit(images())
    circuit.check_finite = False
    assert not torch.isfinite(circuit(images())).all()


SWITCHES = [
    {"enable_persistent_input_mediator_communication": False},
    {"disable_input_mediator_communication": True},
    {"enable_input_output_communication": False},
    {"use_input_states_as_mediator_states": True, "num_input_latents": 6},
    {"share_propagator_weights": True},
    {"share_ffn_between_propagators": True},
    {"share_codes_between_iterations": False},
    {"use_latent_seeder": False},
    {"latent_seeder_kwargs": {"use_state_noise": False}},
    {"latent_seeder_kwargs": {"use_code_as_mean_state": True}, "code_dim": 8},
    {"use_code_noise_in_latent_seeder": False},
    {"code_noise_scale": None},
    {"layer_scale_initial_value": None},
    {"qkv_bias_in_attention": True},
    {"use_geglu": False},
    {"mod_fc_cls": "FC"},
    {"mod_fc_cls": "WModFC"},
    {"read_in_type": "ProjectionReadIn"},
    {"read_in_kwargs": {"path_drop_prob": 0.5, "num_heads": 1, "read_in_layer_scale_initial_value": None}},
    {"stitch_dim": 5},
    {"num_iterations": 0},
    {"propagator_layerwise_kwargs": [None, {"num_heads": 1, "ffn_kwargs": {"use_geglu": False}}]},
    {"read_out_kwargs": {"use_head": True, "pre_output_layernorm": True, "include_residual_in_latent_attention": True}},
    {"input_latent_kwargs": {"learnable_signatures": False, "learnable_codes": False}},
]


@pytest.mark.parametrize("switch", SWITCHES, ids=lambda s: ",".join(f"{k}={v}" for k, v in s.items())[:60])
def test_every_switch_trains_and_evaluates(switch):
    circuit = build_circuit(spec_of(**switch), seed=1)
    logits = circuit(images())
    logits.square().sum().backward()
    assert logits.shape == (2, 4)
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in circuit.parameters())
    assert torch.isfinite(circuit.eval()(images())).all()
    copied = Circuit(circuit.spec)
    copied.load_state_dict(circuit.state_dict())


def names(circuit):
    return set(circuit.state_dict())


def test_switches_do_what_they_say():
    def deaf_to_inputs(**switch):
        circuit = build_circuit(spec_of(**switch), seed=1).eval()
        noise = given_noise(2)
        a, b = (circuit.forward_with_record(images(seed=s), Draws(noise)) for s in (0, 1))
        return torch.equal(a.mediator_states, b.mediator_states), torch.equal(a.logits, b.logits)

    assert deaf_to_inputs() == (False, False)
    assert deaf_to_inputs(disable_input_mediator_communication=True) == (True, False)
    assert deaf_to_inputs(disable_input_mediator_communication=True, enable_input_output_communication=False) == (
        True,
        True,
    )
    shared = build_circuit(spec_of(share_propagator_weights=True))
    assert shared.graph.propagators[0] is shared.graph.propagators[1] and len(shared.bandwidths()) == 1
    assert copy.deepcopy(shared).graph.propagators[0] is not shared.graph.propagators[1]
    own = build_circuit(spec_of(share_codes_between_iterations=False)).graph
    assert own.mediator_latents.codes_.shape == (2, 6, 6) and own.output_latents.codes_.shape == (2, 6)
    learned = "latent_graphs.0.input_latents.initial_states_"
    assert learned in names(Circuit(spec_of(use_latent_seeder=False))) and learned not in names(Circuit(spec_of()))
    fixed = Circuit(spec_of(output_latent_kwargs={"graph_preset": "complete", "learnable_signatures": False}))
    assert "latent_graphs.0.output_latents.signatures_" not in dict(fixed.named_parameters())


def test_first_slot_as_logits():
    top = {"output_tokenizer_type": "FirstSlotAsLogits", "output_tokenizer_kwargs": None}
    circuit = build_circuit(spec_of(top, num_output_latents=1, read_out_kwargs={}))
    assert circuit(images()).shape == (2, 4)
    with pytest.raises(SpecError, match="use_head"):
        spec_of(top)


def test_evaluation_noise_can_be_turned_off():
    noisy = build_circuit(spec_of()).eval()
    assert not torch.equal(noisy(images()), noisy(images()))
    quiet = build_circuit(spec_of({"eval_noise": "off"})).eval()
    assert torch.equal(quiet(images()), quiet(images()))
    assert not torch.equal(quiet.train()(images()), quiet(images()))


def test_circuit_is_functional_twice_differentiable_and_copies(circuit):
    circuit.train()
    parameters = {name: p.detach().clone().requires_grad_() for name, p in circuit.named_parameters()}

    def loss(values):
        return functional_call(circuit, values, (images(), Draws(generator=generator()))).square().mean()

    grads = torch.autograd.grad(loss(parameters), list(parameters.values()), create_graph=True, allow_unused=True)
    stepped = {name: p if g is None else p - 0.1 * g for (name, p), g in zip(parameters.items(), grads, strict=True)}
    meta = torch.autograd.grad(loss(stepped), list(parameters.values()), allow_unused=True)
    assert all(g is None or torch.isfinite(g).all() for g in meta) and sum(g is not None for g in meta) > 50
    for twin in (copy.deepcopy(circuit), pickle.loads(pickle.dumps(circuit))):
        assert torch.equal(
            twin(images(), Draws(generator=generator())), circuit(images(), Draws(generator=generator()))
        )


def test_official_files_load_strictly(circuit):
    state = circuit.state_dict()
    twin = build_circuit(spec_of(), seed=8)
    load_circuit(
        twin, {"model": {f"module.{name}": value for name, value in state.items()}, "epoch": 3, "best_acc1": 1.0}
    )
    assert all(torch.equal(value, state[name]) for name, value in twin.state_dict().items())
    key = "latent_graphs.0.read_out.ffn.ffn.2.native_weight"
    for change, message in (
        ({key: state[key][:, :3]}, r"native_weight \(8, 3\) instead of \(8, 8\)"),
        ({"extra": torch.zeros(1)}, "1 unexpected: extra"),
        ({key: torch.full_like(state[key], torch.nan)}, "not finite.*native_weight"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_circuit(twin, {**state, **change})
    with pytest.raises(CheckpointError, match=f"1 missing: {key}"):
        load_circuit(twin, {name: value for name, value in state.items() if name != key})
    with pytest.raises(CheckpointError, match="first foreign entry: optimizer"):
        load_circuit(twin, {"optimizer": {}})
    assert all(torch.equal(value, state[name]) for name, value in twin.state_dict().items())


def test_bf16_autocast_stays_near_float32(circuit):
    circuit.eval()
    noise = given_noise(2)
    exact = circuit(images(), Draws(noise))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = circuit(images(), Draws(noise))
    torch.testing.assert_close(rough.float(), exact, rtol=0.1, atol=0.05)
    circuit.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        circuit(images()).float().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in circuit.parameters() if p.grad is not None)
    circuit.zero_grad()


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
def test_circuit_compiles_without_graph_breaks(circuit, training):
    circuit.train(training)
    compiled = torch.compile(circuit, backend="eager", fullgraph=True)
    torch.manual_seed(0)
    ours = compiled(images())
    torch.manual_seed(0)
    torch.testing.assert_close(ours, circuit(images()))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"unheard_of": 1}, "unheard_of"),
        ({"mediator_latent_kwargs": {"graph_preset": "barabasi"}}, "barabasi-albert"),
        ({"use_input_states_as_mediator_states": True}, "4 and 6"),
        ({"propagator_layerwise_kwargs": [None]}, "1 entries for 2"),
        ({"propagator_layerwise_kwargs": [None, None], "share_propagator_weights": True}, "contradicts"),
        ({"latent_seeder_kwargs": {"use_code_as_mean_state": True}}, "6 and 8"),
        ({"path_drop_prob": 1.0}, "path_drop_prob"),
    ],
)
def test_contradictions_are_refused(change, message):
    with pytest.raises(SpecError, match=message):
        spec_of(**change)
