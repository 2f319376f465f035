"""Blocks in int8 and fp8: the arithmetic is that of a hand-written reference, in place is surgery, exports travel."""

import copy
import json

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

from scripts.random_transformers import small_flux, small_sd3_pipeline
from slimstep.eval.timing.inference import CannotRunError, fuse_qkv, is_float_linear
from slimstep.models.architecture import as_json
from slimstep.models.families.quantized import (
    QuantizedLinear,
    check_computes,
    low_precision,
    low_precision_product,
    quantize,
    quantizing,
    token_linears,
)
from slimstep.models.families.transformer.networks.flux import PrunableFluxTransformer2DModel
from slimstep.models.families.transformer.networks.sd3 import PrunableSD3Transformer2DModel
from slimstep.models.families.transformer.stock import obstacles_of
from slimstep.models.families.unet2d.network import PrunableUNet2DConditionModel
from slimstep.models.families.unet2d.stock import stock_config
from slimstep.models.pipeline import export_pipeline, load_pipeline
from tests.models.conftest import make_small_pipeline, paint, small_inputs, small_stock_unet
from tests.models.families.small import run
from tests.models.test_widths import difference, network, output, output_with_gradient  # noqa: F401

ATTENTION = "down_blocks.0.attentions.0"


def layer(inputs=24, outputs=40, bias=True, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(inputs, outputs, bias=bias).requires_grad_(False).eval()


def by_hand(x_RI, weight_OI, bias_O):
    """Row by row and channel by channel, in Python's integers."""
    weight_O = [(w.abs().max().item() / 127, w) for w in weight_OI]
    integers_OI = [[round(v / b) for v in w.tolist()] for b, w in weight_O]
    rows = []
    for x in x_RI:
        a = x.abs().max().item() / 127
        q = [round(v / a) for v in x.tolist()]
        rows.append([a * b * sum(map(int.__mul__, q, v)) for (b, _), v in zip(weight_O, integers_OI, strict=True)])
    return torch.tensor(rows) + (0 if bias_O is None else bias_O)


# ---- layers ----


SHAPES = [(33, 24, 40, True), (3, 17, 5, False), (17, 16, 16, True)]


@pytest.mark.parametrize(("rows", "inputs", "outputs", "bias"), SHAPES)
def test_int8_is_the_quantization_written_by_hand(rows, inputs, outputs, bias):
    linear = layer(inputs, outputs, bias)
    x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(1))
    plain, expected = linear(x), by_hand(x, linear.weight, linear.bias)
    with quantizing([linear], "int8"):
        found = linear(x[None])[0]
    assert difference(found, expected) < 1e-5 < difference(plain, expected) < 0.03


def test_fp8_is_the_product_of_rounded_rows():
    """By torch's own product, which a CPU has too; a layer asks for a GPU that is faster by it."""
    draw = torch.Generator().manual_seed(2)
    x, weight = torch.randn(9, 20, generator=draw), torch.randn(32, 32, generator=draw)
    weight[:, 20:] = 0
    values, scale_O1 = low_precision(weight, "fp8")
    found = low_precision_product(x, values, scale_O1[:, 0], "fp8").float()
    rounded = [tensor.float() * scale for tensor, scale in (low_precision(x, "fp8"), (values, scale_O1))]
    expected = rounded[0] @ rounded[1][:, :20].mT
    assert difference(found, expected) < 0.01  # it is given in bfloat16
    assert 0.01 < difference(expected, x @ weight[:, :20].mT) < 0.1


def test_rows_of_zeros_and_single_rows_are_numbers():
    linear = layer()
    quantize([linear], "int8")
    assert torch.equal(linear(torch.zeros(2, 3, 24)), linear.bias.expand(2, 3, -1))
    x = torch.randn(40, 24)
    assert torch.equal(linear(x)[7:8], linear(x[7:8])) and torch.equal(linear(x)[:20], linear(x[:20]))


def test_training_computes_with_the_rounded_numbers_and_gradients_pass_them():
    linear = layer()
    x = torch.randn(2, 19, 24, requires_grad=True)
    quantize([linear], "int8")
    exported = linear(x.detach())
    linear.requires_grad_().train()
    y = linear(x)
    assert difference(y.detach(), exported) < 1e-5
    y.square().sum().backward()
    rounded = [v.float() * s for v, s in (low_precision(t.detach(), "int8") for t in (x, linear.weight))]
    inputs, weight = (tensor.requires_grad_() for tensor in rounded)
    nn.functional.linear(inputs, weight, linear.bias.detach()).square().sum().backward()
    torch.testing.assert_close(x.grad, inputs.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(linear.weight.grad, weight.grad, rtol=1e-4, atol=1e-4)


def test_the_copy_is_that_of_the_weights_as_they_are():
    linear, other, x = layer(), layer(seed=5), torch.randn(30, 24)
    quantize([linear, other], "int8")
    expected = other(x)
    linear.load_state_dict(other.state_dict())
    assert torch.equal(linear(x), expected) and list(linear.state_dict()) == ["weight", "bias"]
    with torch.no_grad():
        linear.weight.mul_(2)
        assert not torch.equal(linear(x), expected)
        linear.weight.div_(2)
    assert torch.equal(linear(x), expected)
    linear.weight.data.mul_(2)  # which nobody can see
    assert torch.equal(linear(x), expected) and not torch.equal(linear.eval()(x), expected)
    half = copy.deepcopy(other).half()
    assert half.low_scale.dtype == torch.float32 and difference(half(x.half()).float(), expected) < 0.01
    assert copy.deepcopy(other).train().low_weight is None


def test_what_takes_the_time_stays_in_floats():
    linears = token_linears(PrunableFluxTransformer2DModel.from_unet(small_flux()))
    assert linears and not any(".norm" in path for path in linears)
    unet = small_stock_unet()
    assert not token_linears(unet.mid_block.resnets[0])


# ---- networks ----


def quantized(network, dtype="int8"):  # noqa: F811
    return {block: {"dtype": dtype} for block in network.quantizable_blocks}


def test_in_place_is_surgery_and_leaves_nothing_behind(network):  # noqa: F811
    before, state = output(network), {key: weight.clone() for key, weight in network.state_dict().items()}
    vars_before = {name: set(vars(module)) | set(module._buffers) for name, module in network.named_modules()}
    for block in network.quantizable_blocks[::2]:
        surgery = network.with_architecture({block: {"dtype": "int8"}})
        with network.with_dtype(block, "int8"):
            inside = output(network)
        assert torch.equal(inside, output(surgery)) and 0 < difference(inside, before) < 0.1
        with pytest.raises(KeyboardInterrupt), network.with_dtype(block, "int8"):
            raise KeyboardInterrupt
    assert torch.equal(output(network), before)
    assert all(torch.equal(state[key], weight) for key, weight in network.state_dict().items())
    assert not any(isinstance(module, QuantizedLinear) for module in network.modules())
    assert vars_before == {name: set(vars(module)) | set(module._buffers) for name, module in network.named_modules()}


def test_quantized_networks_are_cut_copied_masked_and_taken_back(network):  # noqa: F811
    table = quantized(network)
    whole = network.with_architecture(table)
    assert whole.state_dict().keys() == network.state_dict().keys()
    again = whole.with_architecture({})
    assert as_json(again.architecture) == table and torch.equal(output(again), output(whole))
    back = whole.with_architecture(dict.fromkeys(table, 1))
    assert torch.equal(output(back), output(network)) and back.architecture == {}
    block = next(iter(table))
    cut = whole.with_architecture({block: 0})
    assert cut.architecture[block].dtype is None
    if block in whole.copyable_blocks:
        entry = {block: {"repeats": 2, "dtype": "int8"}}
        assert torch.equal(output(whole.with_architecture(entry)), output(whole))
        assert not torch.equal(output(whole.with_architecture(entry, copy_init="same")), output(whole))
    with whole.with_dtype(block, "int8"):
        assert torch.equal(output(whole), output(again))
    assert torch.equal(output(whole), output(again))


def test_a_narrowed_block_in_int8_computes_with_what_is_left(network):  # noqa: F811
    block = next(block for block in network.quantizable_blocks if network.width_units.get(block))
    part = next(iter(network.width_units[block]))
    entry = {block: {"widths": {part: 0.5}, "dtype": "int8"}}
    both, narrowed = network.with_architecture(entry), network.with_architecture({block: {"widths": {part: 0.5}}})
    assert torch.equal(output(narrowed.with_architecture(entry)), output(both))
    assert 0 < difference(output(both), output(narrowed)) < 0.1


def test_a_quantized_network_learns(network):  # noqa: F811
    student = network.with_architecture(quantized(network)).requires_grad_().train()
    floats = network.with_architecture({}).requires_grad_().train()
    for trained in (student, floats):
        output_with_gradient(trained).square().mean().backward()
    learnt = [{name for name, weight in of.named_parameters() if weight.grad is not None} for of in (student, floats)]
    layers = [module for module in student.modules() if isinstance(module, QuantizedLinear)]
    assert layers and learnt[0] == learnt[1] and all(layer.low_weight is None for layer in layers)
    exported = output(student.eval())
    assert all(layer.low_weight is not None for layer in layers)
    # What is trained is what is exported, but for numbers on the edge between two integers.
    assert difference(output(student.train()), exported) < 0.02


@pytest.mark.parametrize("backend", ["aot_eager", "eager"])
def test_a_quantized_unet_is_one_graph(backend):
    unet = PrunableUNet2DConditionModel.from_unet(small_stock_unet())
    student = unet.with_architecture({ATTENTION: {"dtype": "int8"}})
    expected = output(student)
    torch.compiler.reset()
    with torch.no_grad():
        found = torch.compile(student, fullgraph=True, backend=backend)(**small_inputs(unet)).sample
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_sublayers_are_quantized_alone():
    network = PrunableFluxTransformer2DModel.from_unet(small_flux())  # noqa: F811
    network.register_to_config(sample_size=8)  # which pipelines say
    network.divide_blocks()
    block = "single_transformer_blocks.0.proj_mlp"
    assert block in network.quantizable_blocks
    surgery = network.with_architecture({block: {"dtype": "int8"}})
    with network.with_dtype(block, "int8"):
        assert torch.equal(run(network), run(surgery))
    assert not torch.equal(run(network), run(surgery))
    mask_BN = torch.ones(3, len(network.kept_blocks), dtype=torch.bool)
    mask_BN[:, network.kept_blocks.index(block)] = False
    with network.with_dtype(block, "int8"):
        assert torch.equal(run(network, block_mask_BN=mask_BN), run(network.with_architecture({block: 0})))


# ---- exports ----

ELSEWHERE = """
import json, torch
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained("export", trust_remote_code=True)
pipeline.set_progress_bar_config(disable=True)
images = pipeline("a b", num_inference_steps=2, height=16, width=16, generator=torch.Generator().manual_seed(0),
                  output_type="np").images
torch.save(torch.from_numpy(images).permute(0, 3, 1, 2), "images.pt")
kinds = {name: type(module).__name__ for name, module in pipeline.unet.named_modules()}
json.dump(kinds, open("kinds.json", "w"))
"""


def test_a_student_in_int8_that_merges_tokens_draws_the_same_in_a_new_process(tmp_path, elsewhere):
    pipeline = make_small_pipeline()
    unet = PrunableUNet2DConditionModel.from_unet(pipeline.unet)
    other, both = unet.mergeable_blocks[1], unet.mergeable_blocks[-1]
    pipeline.unet = unet.with_architecture(
        {ATTENTION: {"dtype": "int8"}, other: {"merge": 0.5}, both: {"dtype": "int8", "merge": 0.25, "repeats": 2}}
    )
    obstacles = str(stock_config(pipeline.unet).obstacles)
    assert "is quantized to int8" in obstacles and "is merging tokens" in obstacles
    export_pipeline(pipeline, tmp_path / "export")
    config = json.loads((tmp_path / "export/unet/config.json").read_text())
    assert config["depths"] == as_json(pipeline.unet.architecture)
    elsewhere(tmp_path, ELSEWHERE)
    drawn = torch.load(tmp_path / "images.pt")
    assert torch.equal(drawn, paint(pipeline)) and torch.equal(drawn, paint(load_pipeline(tmp_path / "export")))
    kinds = json.loads((tmp_path / "kinds.json").read_text())
    assert kinds[f"{ATTENTION}.transformer_blocks.0.ff.net.2"] == "QuantizedLinear"
    assert kinds[f"{both}.copies.0.transformer_blocks.0.attn1"] == "MergedAttention"
    pipeline.unet = unet
    assert not torch.equal(drawn, paint(pipeline))


def test_a_quantized_transformer_travels_with_its_class(tmp_path):
    pipeline = small_sd3_pipeline()
    network = PrunableSD3Transformer2DModel.from_unet(pipeline.transformer)  # noqa: F811
    pipeline.transformer = network.with_architecture({"transformer_blocks.1": {"dtype": "int8"}})
    assert "transformer_blocks.1 is quantized to int8" in str(obstacles_of(pipeline.transformer))
    export_pipeline(pipeline, tmp_path / "export")
    again = load_pipeline(tmp_path / "export").transformer
    assert torch.equal(run(again), run(pipeline.transformer)) and type(again) is PrunableSD3Transformer2DModel
    absent = {"text_encoder_3": None, "tokenizer_3": None, "trust_remote_code": True}
    stock = DiffusionPipeline.from_pretrained(tmp_path / "export", dtype=torch.float16, **absent)
    assert stock.transformer.transformer_blocks[1].attn.to_q.low_scale.dtype == torch.float32


# ---- what is refused ----


def test_wrong_dtypes_are_named_in_one_line():
    unet = PrunableUNet2DConditionModel.from_unet(small_stock_unet())
    with pytest.raises(ValueError, match=r"gives .* dtype='int4'; .*dtype is one of \('int8', 'fp8'\)"):
        unet.with_architecture({ATTENTION: {"dtype": "int4"}})
    with pytest.raises(ValueError, match=r"gives mid_block.resnets.0 dtype='int8', and it has no linear layers"):
        unet.with_architecture({"mid_block.resnets.0": {"dtype": "int8"}})
    for build in (lambda: unet.with_architecture({ATTENTION: {"dtype": "fp8"}}),
                  lambda: check_computes("fp8", torch.device("cpu"))):  # fmt: skip
        with pytest.raises(ValueError, match="fp8 needs a CUDA device of compute capability 8.9 .* this is cpu"):
            build()
    with pytest.raises(ValueError, match="fp8 needs a CUDA device"), unet.with_dtype(ATTENTION, "fp8"):
        pass
    assert not any(isinstance(module, QuantizedLinear) for module in unet.modules())


def test_benchmarks_do_not_quantize_or_fuse_what_is_quantized():
    unet = PrunableUNet2DConditionModel.from_unet(small_stock_unet()).with_architecture({ATTENTION: {"dtype": "int8"}})
    attention = unet.get_submodule(ATTENTION).transformer_blocks[0]
    assert not is_float_linear(attention.ff.net[2]) and is_float_linear(unet.time_embedding.linear_1)
    with pytest.raises(CannotRunError, match="fused QKV would be products of floats"):
        fuse_qkv(unet, "sdpa")
