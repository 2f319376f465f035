"""Packages for phones: an ExecuTorch program that holds every network, and a Core ML package for each.

Both converters take what torch.export gives. What they lack is refused by the name of the block that needs it.
"""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from slimstep.engine.quiet import one_line, preview
from slimstep.eval.packaging.package import Package

aten = torch.ops.aten
# Operations that the converters do not have, and what in a block's architecture asks for them.
LACKING = {aten._int_mm.default: "dtype: int8", aten.argsort.stable: "merge", aten.sort.stable: "merge"}


def write_executorch(package: Package, programs: Mapping[str, ExportedProgram], folder: Path) -> dict[str, Any]:
    """model.pte, with a method for each network. XNNPACK's kernels compute what they can, ExecuTorch's own the rest."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    check_operations(programs, "executorch")
    try:
        lowered = to_edge_transform_and_lower(dict(programs), partitioner=[XnnpackPartitioner()])
        written = lowered.to_executorch()
    except Exception as error:  # the converter's have no common kind
        raise ValueError(f"executorch does not take {type(package.pipeline).__name__}: {one_line(error)}") from error
    with (folder / "model.pte").open("wb") as file:
        written.write_to_file(file)
    return {"graphs": dict.fromkeys(programs, "model.pte"), "executorch": version("executorch")}


def write_coreml(package: Package, programs: Mapping[str, ExportedProgram], folder: Path) -> dict[str, Any]:
    """A .mlpackage for each network, whose inputs and outputs are called as those of its graph. It computes in float16
    where the denoiser's weights are float16, else in float32."""
    import coremltools

    check_operations(programs, "coreml")
    half = next(package.sampler.network.parameters()).dtype == torch.float16
    precision = coremltools.precision.FLOAT16 if half else coremltools.precision.FLOAT32
    for name, program in programs.items():
        graph, plain = package.graphs[name], program.run_decompositions({})
        remove_aliases(plain)
        try:
            converted = coremltools.convert(
                plain, convert_to="mlprogram", compute_precision=precision, skip_model_load=True,
                inputs=[coremltools.TensorType(name=key, shape=tuple(x.shape)) for key, x in graph.inputs.items()],
                outputs=[coremltools.TensorType(name=key) for key in graph.outputs],
                minimum_deployment_target=coremltools.target.iOS17,
            )  # fmt: skip
        except Exception as error:  # the converter's have no common kind
            raise ValueError(f"coreml does not take {name}'s graph: {one_line(error)}") from error
        converted.save(str(folder / f"{name}.mlpackage"))
    check_interfaces(package, folder)
    outputs = {name: list(graph.outputs) for name, graph in package.graphs.items()}
    return {"graphs": {name: f"{name}.mlpackage" for name in programs}, "outputs": outputs}


def check_operations(programs: Mapping[str, ExportedProgram], format: str) -> None:
    """ValueError for operations that the converter lacks, with the blocks that need them."""
    nodes = [node for program in programs.values() for node in program.graph.nodes if node.target in LACKING]
    if nodes:
        blocks = dict.fromkeys(f"{block_of(node)} ({LACKING[node.target]})" for node in nodes)
        raise ValueError(f"{format} has no operation for {preview(blocks)}: leave {format} out of package.formats")


def block_of(node: Node) -> str:
    """The path, in its network, of the module whose forward made the node."""
    path = [*node.meta["nn_module_stack"].values()][-1][0]
    return path.removeprefix("network.")


def remove_aliases(program: ExportedProgram) -> None:
    """Takes out the nodes that give their input as it is, which coremltools has no operation for."""
    for module in program.graph_module.modules():
        for node in [*module.graph.nodes] if isinstance(module, GraphModule) else []:
            if node.target is aten.alias.default:
                node.replace_all_uses_with(node.args[0])
                module.graph.erase_node(node)


def check_interfaces(package: Package, folder: Path) -> None:
    """ValueError where a Core ML package, read again, takes or gives something else than its graph."""
    import coremltools

    for name, graph in package.graphs.items():
        model = coremltools.models.MLModel(str(folder / f"{name}.mlpackage"), skip_model_load=True)
        description = model.get_spec().description
        with torch.no_grad():
            answer = graph.module(*graph.inputs.values())
        answers = answer if isinstance(answer, tuple) else (answer,)
        expected = [*shapes_of(graph.inputs), *shapes_of(dict(zip(graph.outputs, answers, strict=True)))]
        found = [(one.name, list(one.type.multiArrayType.shape)) for one in (*description.input, *description.output)]
        if sorted(found) != sorted(expected):
            raise ValueError(f"coreml's {name} takes and gives {found}, and its graph {expected}")


def shapes_of(tensors: Mapping[str, torch.Tensor]) -> Sequence[tuple[str, list[int]]]:
    return [(name, list(tensor.shape)) for name, tensor in tensors.items()]
