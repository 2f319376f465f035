"""Packages: folders that draw a pipeline's images or videos without diffusers and without us (run_package.py).

    package.json            what run_package.py has to know: samplers, tokenizers, scaling, the machine it was made for
    run_package.py          draws an image or a video
    tokenizer*/             as diffusers' folders have them
    unconditional.npz       what guidance steers away from, where it does, but for what is of a picture
    model.pt2               AOTInductor: encode, denoise and decode, compiled, with their weights
    weights.safetensors     or these on their own (weights.py)
    text_encoder/, unet/ or transformer/, vae_decoder/      ONNX: a model.onnx each, in optimum's folder layout, and
                            with weights on their own, or of more than 2 GB, a model.onnx.data
    model.pte               ExecuTorch: encode, denoise and decode, with their weights (mobile.py)
    encode.mlpackage, …     Core ML: a package for each (mobile.py)
"""

import importlib.util
import platform
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule
from transformers import CLIPTokenizer

from slimstep.engine.files import load_json, write_json, write_text
from slimstep.engine.quiet import quiet
from slimstep.eval.packaging import run_package
from slimstep.eval.packaging.graphs import INPUT_NAMES
from slimstep.eval.packaging.mobile import write_coreml, write_executorch
from slimstep.eval.packaging.package import BESIDE, INSIDE, Package
from slimstep.eval.packaging.weights import write_weights
from slimstep.models.networks import forget_last_captions, part_of

# and the libraries that each needs
FORMATS = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"), "aoti": (), "executorch": ("executorch",),
    "coreml": ("coremltools",),
}  # fmt: skip
RUNNER, MANIFEST = "run_package.py", "package.json"
LARGEST_FILE = 1_800_000_000  # bytes of weights: an ONNX file of more than 2 GB keeps them beside it
MOST_DIFFERENCE = {torch.float32: 1e-3}  # of a graph's outputs from its network's, in units of the largest
MOST_OF_HALVES = 0.05


def missing_libraries(format: str) -> list[str]:
    return [name for name in FORMATS[format] if importlib.util.find_spec(name) is None]


def write_package(package: Package, format: str, folder: Path) -> None:
    """Fills an empty folder. ValueError where a network is no single graph, or its graph gives something else."""
    programs = {name: graph.exported() for name, graph in package.graphs.items()}
    with quiet(), torch.no_grad():
        added = WRITERS[format](package, programs, folder)
    forget_last_captions(package.pipeline)
    for tokenization in package.tokenizations:
        tokenizer = getattr(package.pipeline, tokenization.part)
        tokenizer.save_pretrained(folder / tokenization.part)
        if isinstance(tokenizer, CLIPTokenizer):  # transformers before 5, which optimum wants, reads these instead
            tokenizer.backend_tokenizer.model.save(str(folder / tokenization.part))
    if package.manifest["guides"]:
        uncond = package.sampler.unconditional.tensors
        row = {INPUT_NAMES.get(name, name): tensor.float().numpy() for name, tensor in uncond.items()}
        np.savez(folder / "unconditional.npz", allow_pickle=False, **row)
    shutil.copy(run_package.__file__, folder / RUNNER)
    write_json(folder / MANIFEST, {"format": format, **package.manifest, **added})
    if run_package.runs_here(format):
        check_graphs(package, folder)


def check_graphs(package: Package, folder: Path) -> None:
    """ValueError where a graph, run as run_package.py runs it, is not its network."""
    manifest = load_json(folder / MANIFEST)
    call = run_package.Package(folder, manifest).call
    limit = MOST_DIFFERENCE.get(next(package.sampler.network.parameters()).dtype, MOST_OF_HALVES)
    for name, graph in package.graphs.items():
        for inputs in [graph.at(*sides) for sides in package.latent_sides] if graph.spans else [graph.inputs]:
            with torch.no_grad():
                answer = graph.module(*inputs.values())
            expected = [tensor.cpu().numpy() for tensor in (answer if isinstance(answer, tuple) else (answer,))]
            found = call(name, {key: tensor.cpu().numpy() for key, tensor in inputs.items()})
            for one, other in zip(expected, found, strict=True):
                worst = float(np.abs(one - other).max() / (np.abs(one).max() or 1))
                if not worst <= limit:
                    which = f"{manifest['format']}'s {name}"
                    raise ValueError(f"{which} is not the network: it differs by {worst:.2g} of its size")


# ---- AOTInductor ----


def write_aoti(package: Package, programs: Mapping[str, ExportedProgram], folder: Path) -> dict[str, Any]:
    """model.pt2, and what it asks of the machine it is run on."""
    from torch._inductor import aot_compile
    from torch._inductor.package import package_aoti

    options: dict[str, Any] = {"aot_inductor.package": True}
    if package.weights != INSIDE:
        kept = {"package_constants_in_so": False, "package_constants_on_disk_format": "pickle_weights"}
        options |= {f"aot_inductor.{name}": value for name, value in kept.items()}
    compiled: dict[str, Any] = {
        name: aot_compile(program.module(check_guards=False), program.example_inputs[0], options=options)
        for name, program in programs.items()
    }
    # Beside the names of files inductor gives {name: (tensor, where it lay)}, with that format.
    constants = {name: {key: tensor for part in parts if isinstance(part, dict) for key, (tensor, _) in part.items()}
                 for name, parts in compiled.items()}  # fmt: skip
    files: Any = {name: [part for part in parts if isinstance(part, str)] for name, parts in compiled.items()}
    package_aoti(str(folder / "model.pt2"), files)
    shared = None if package.weights == BESIDE else Path(package.weights)
    beside = {} if package.weights == INSIDE else write_weights(constants, folder, shared)
    return {
        "graphs": dict.fromkeys(programs, "model.pt2"), "device": package.sampler.network.device.type,
        "torch": torch.__version__.partition("+")[0], "machine": platform.machine(),
        "processor": run_package.processor_features(), **beside,
    }  # fmt: skip


# ---- ONNX ----


def write_onnx(package: Package, programs: Mapping[str, ExportedProgram], folder: Path) -> dict[str, Any]:
    """A folder for each network, and the configurations that optimum reads beside them."""
    pipeline, part = package.pipeline, part_of(package.pipeline)
    folders = {"encode": "text_encoder", "denoise": part, "decode": "vae_decoder"}
    for name, program in programs.items():
        graph, file = package.graphs[name], folder / folders[name] / "model.onnx"
        file.parent.mkdir(parents=True)
        as_onnx_means_it(program)
        # Without onnxscript's optimiser, which makes nan of Sana's autoencoder; onnxruntime has one of its own.
        written: Any = torch.onnx.export(
            program, input_names=[*graph.inputs], output_names=[*graph.outputs], dynamo=True, verbose=False,
            optimize=False, custom_translation_table=translations(),
        )  # fmt: skip
        weights = sum(tensor.nbytes for tensor in program.state_dict.values())
        written.save(str(file), external_data=package.weights == BESIDE or weights > LARGEST_FILE)
    pipeline.save_config(folder)
    pipeline.scheduler.save_pretrained(folder / "scheduler")
    for name, place in {part: part, "text_encoder": "text_encoder", "vae": "vae_decoder"}.items():
        if (network := getattr(pipeline, name, None)) is not None:
            config = network.config if name == "text_encoder" else network
            write_text(folder / place / "config.json", config.to_json_string())
    return {"graphs": {name: f"{folders[name]}/model.onnx" for name in programs}}


def translations() -> dict[Any, Callable[..., Any]]:
    """What torch.onnx has no words for: the product of blocks in int8, and the order of tokens by likeness. TopK leaves
    equal ones in their order, as a stable sort does."""
    from onnxscript import opset18

    op: Any = opset18  # whose types know no tensor of a graph

    def ordered(values: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
        length = op.Gather(op.Shape(values), op.Constant(value_ints=[dim]))
        return op.TopK(values, length, axis=dim, largest=int(descending), sorted=1)

    aten = torch.ops.aten
    return {aten._int_mm.default: lambda a, b: op.MatMulInteger(a, b), aten.sort.stable: ordered}


def as_onnx_means_it(program: ExportedProgram) -> None:
    """Rewrites what torch.onnx takes over as it stands and must not.

    torch's squeeze of a dimension that is not 1 does nothing, and ONNX' is an error. Attention's output is laid out
    in memory as one kernel does it, which the reshape behind it builds on, and the kernel that takes a mask does it
    otherwise: its output is copied into its plain layout.
    """
    aten = torch.ops.aten
    for module in program.graph_module.modules():
        for node in [*module.graph.nodes] if isinstance(module, GraphModule) else []:
            if node.target is aten.squeeze.dim and node.args[0].meta["val"].shape[node.args[1]] != 1:
                node.replace_all_uses_with(node.args[0])
                module.graph.erase_node(node)
            elif node.target is aten.scaled_dot_product_attention.default:
                with module.graph.inserting_after(node):
                    plain = module.graph.call_function(
                        aten.clone.default, (node,), {"memory_format": torch.contiguous_format}
                    )
                plain.meta = {**node.meta, "val": node.meta["val"].contiguous()}
                node.replace_all_uses_with(plain, delete_user_cb=lambda user, plain=plain: user is not plain)


WRITERS = {"onnx": write_onnx, "aoti": write_aoti, "executorch": write_executorch, "coreml": write_coreml}
