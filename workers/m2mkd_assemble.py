"""Student modules into one modular model, with a report of every tensor that was loaded, kept or left out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch

from moe.algorithms.m2mkd import Config
from moe.errors import SpecError
from workers.context import Context, run_seed
from workers.data import open_data
from workers.loop import mix
from workers.m2mkd_files import write_network
from workers.m2mkd_import import take_modules
from workers.m2mkd_settings import image_side, in_order, phase_method
from workers.m2mkd_train import check_data
from workers.modelfile import MODEL_FILE, load_tensors

REPORT = "assembly.json"


def assemble_member(config: Config, files: Sequence[str], context: Context) -> dict[str, Any]:
    """Write the assembled model and ``assembly.json``; ports ``data`` and perhaps ``modules``.

    Args:
        config: the method.
        files: student checkpoints in order of position, in place of the input.
        context: of the member.

    Raises:
        SpecError: modules that are missing, double or of another number; stitches of another width.
        CheckpointError: tensors that do not fit, by name and student.
    """
    data = open_data(context.inputs["data"][0], context.data_root)
    method = phase_method(config, "e2e", run_seed(context.member), None, data.info.num_outputs)
    check_data(method.config, "assemble", data)
    count = len(config.meta.depths)
    inputs = context.inputs.get("modules", ())
    if bool(files) == bool(inputs):
        raise SpecError("Give either files or student modules.", "Wire a m2mkd_teach stage, or set `files`.")
    images = 0
    if files:
        students = take_modules(files)
    else:
        ordered = in_order(inputs, count, "The assembly")
        wrong = {a.meta["position"]: a.meta["stitch_dim"] for a in ordered if a.meta["stitch_dim"] != config.meta.dim}
        if wrong:
            raise SpecError(
                f"Stitches have widths {wrong} by position; the meta model's width is {config.meta.dim}.",
                "Use one `method` in all stages.",
            )
        students = [load_tensors(artifact.path / MODEL_FILE) for artifact in ordered]
        images = max(int(artifact.meta["images"]) for artifact in ordered)
    torch.manual_seed(mix(context.seed, 11))
    model = method.build(data.info.num_outputs)
    report = method.assemble(model, students)
    # The state itself is in the weights' file; the report keeps names alone.
    names = {name: value for name, value in vars(report).items() if name != "state"}
    (context.output / REPORT).write_text(json.dumps(names, indent=1, sort_keys=True))
    fresh = [name for name in model.state_dict() if name not in report.loaded_from]
    context.log(f"{len(report.loaded_from)} tensors from {count} students, {len(fresh)} fresh")
    return {
        **write_network(model, context.output),
        "phase": "assemble",
        "position": -1,
        "label": "assembled",
        "loaded": len(report.loaded_from),
        "fresh": len(fresh),
        "images": images,
        "steps": 0,
        "scores": {},
        "history": [],
        "dataset": data.info.name,
        "image_size": image_side(method.config, "assemble"),
    }
