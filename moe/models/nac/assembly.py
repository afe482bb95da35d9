"""Circuit from distilled students: which tensor of which student file goes where.

``ReadInStudent`` gives tokenizer and read-in, ``MediatorStudent_<j>`` propagator j-1, ``ReadOutStudent`` the read-out
and, for ImageNet, the classifier. Stitches are dropped unless the circuit keeps them; latents, seeder and kernels keep
their initial values.

``Differs:`` the published comments say ``tinyimnet`` where only ``tinynet`` works; both do here. Tensors that don't fit
are errors, not crashes or silence; ``resize_grid=True`` loads a position grid of another size by bicubic resizing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moe.errors import CheckpointError, SpecError, nearest
from moe.models.nac.circuit import Circuit
from moe.models.nac.students import OWN_TENSORS
from moe.models.nac.tokenizer import resized_grid

GRAPH = "latent_graphs.0."
GRID = "input_tokenizer.positional_grid.grid"
STUDENT_TYPES = {"tinynet": "tinynet", "tinyimnet": "tinynet", "imagenet": "imagenet"}


@dataclass(frozen=True)
class AssemblyReport:
    """What became of every tensor.

    Attributes:
        loaded_from: tensor of the circuit -> ``File.key`` it came from.
        not_loaded: tensors of the circuit that keep their initial values, sorted.
        unused: ``File.key`` that went nowhere, sorted.
        resized: tensors that were resized on the way.
    """

    loaded_from: dict[str, str]
    not_loaded: list[str]
    unused: list[str]
    resized: list[str]


def student_files(num_propagators: int) -> list[str]:
    """Names of the student files of a circuit, in order of position, without suffix."""
    return ["ReadInStudent", *(f"MediatorStudent_{j + 1}" for j in range(num_propagators)), "ReadOutStudent"]


def target_of(file: str, key: str, student_type: str = "imagenet", keep_stitches: bool = False) -> str | None:
    """Name in the circuit of a student's tensor; None where it is dropped.

    Raises:
        SpecError: unknown file or student type.
    """
    if student_type not in STUDENT_TYPES:
        raise SpecError(f"There is no student type {student_type!r}.", nearest(student_type, STUDENT_TYPES))
    tiny = STUDENT_TYPES[student_type] == "tinynet"
    mediator = re.fullmatch(r"MediatorStudent_([1-9]\d*)", file)
    if file not in ("ReadInStudent", "ReadOutStudent") and mediator is None:
        raise SpecError(
            f"{file!r} is not a student file.", "Expected ReadInStudent, MediatorStudent_<j>, ReadOutStudent."
        )
    if key in OWN_TENSORS:
        return None
    head, _, rest = key.partition(".")
    position = 0 if file == "ReadInStudent" else int(mediator[1]) if mediator else None
    if head in ("pre_stitch", "post_stitch"):
        if not keep_stitches or (position is None and head == "post_stitch"):
            return None
        index = position if head == "post_stitch" else "last" if position is None else position - 1
        return f"{GRAPH}stitches.{index}.{key}"
    if file == "ReadInStudent":
        if head != "tokenizer":
            return GRAPH + key
        return None if tiny and rest.startswith("positional_grid.") else f"input_tokenizer.{rest}"
    if mediator:
        return f"{GRAPH}propagators.{int(mediator[1]) - 1}.{key}"
    if head != "tokenizer":
        return f"{GRAPH}read_out.{key}"
    return None if tiny else f"output_tokenizer.{rest}"


def assemble_circuit(
    circuit: Circuit,
    students: Mapping[str, Mapping[str, Tensor]],
    student_type: str = "imagenet",
    resize_grid: bool = False,
    partial: bool = False,
) -> AssemblyReport:
    """Load distilled students into a circuit, in place.

    Args:
        circuit: the target. If it keeps stitches (``stitch_dim``), theirs are loaded too.
        students: state dicts by file name without suffix (:func:`student_files`).
        student_type: ``imagenet`` loads position grid and classifier, ``tinynet`` (``tinyimnet``) neither.
        resize_grid: resize a position grid of another size; with ``tinynet`` this loads it after all.
        partial: accept that some students are not there.

    Raises:
        CheckpointError: missing or surplus student files, tensors without a place or of another shape, and modules
            that got only part of their tensors; nothing is loaded then.
        SpecError: unknown student type.
    """
    layers = circuit.graph.spec.num_iterations
    files = student_files(layers)
    absent, surplus = [f for f in files if f not in students], sorted(students.keys() - set(files))
    if surplus or (absent and not partial):
        raise CheckpointError(
            f"A circuit of {layers} propagators is made of {len(files)} students; missing {absent}, unknown {surplus}."
        )
    state, keep = circuit.state_dict(), circuit.graph.stitches is not None
    loaded: dict[str, str] = {}
    chosen: dict[str, Tensor] = {}
    unused, resized, problems = [], [], []
    for file in (f for f in files if f in students):
        for key, value in students[file].items():
            grid = resize_grid and key == "tokenizer.positional_grid.grid"
            target = GRID if grid else target_of(file, key, student_type, keep)
            source = f"{file}.{key}"
            if target is None:
                unused.append(source)
                continue
            target = target.replace("stitches.last.", f"stitches.{layers}.")
            if target not in state:
                problems.append(f"{source} has no place in the circuit ({target})")
                continue
            if grid and value.shape[0] == state[target].shape[0] and value.shape != state[target].shape:
                value = resized_grid(value, (state[target].shape[1], state[target].shape[2]))
                resized.append(target)
            if value.shape != state[target].shape:
                problems.append(f"{source} {tuple(value.shape)} does not fit {target} {tuple(state[target].shape)}")
            chosen[target], loaded[target] = value, source
    problems += _gaps(circuit, chosen, [f for f in files if f in students], STUDENT_TYPES[student_type])
    if problems:
        raise CheckpointError("The students don't fit this circuit: " + "; ".join(problems) + ".")
    with torch.no_grad():
        for name, value in chosen.items():
            state[name].copy_(value)
    return AssemblyReport(loaded, sorted(state.keys() - chosen.keys()), sorted(unused), resized)


def _gaps(circuit: Circuit, chosen: Mapping[str, Tensor], files: list[str], student_type: str) -> list[str]:
    """Tensors of a module whose student was given, which that student lacks (kernels come from nowhere)."""
    prefixes = []
    for file in files:
        if file == "ReadInStudent":
            prefixes += [f"{GRAPH}read_in.", "input_tokenizer.backbone."]
            prefixes += [GRID] if student_type == "imagenet" else []
        elif file == "ReadOutStudent":
            prefixes += [f"{GRAPH}read_out."] + (["output_tokenizer."] if student_type == "imagenet" else [])
        else:
            prefixes.append(f"{GRAPH}propagators.{int(file.rpartition('_')[2]) - 1}.")
    return [
        f"no student has {name}"
        for name in circuit.state_dict()
        if any(name.startswith(prefix) for prefix in prefixes) and ".kernel." not in name and name not in chosen
    ]
