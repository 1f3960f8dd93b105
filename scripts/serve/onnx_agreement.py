"""Judge an ONNX graph as ONNX Runtime does: shapes of its outputs, operators without a kernel, forms that it takes."""

from typing import Any

import onnx

Shape = tuple[int, ...]  # -1: any size

# Domains whose operators ONNX Runtime 1.18 has: ONNX's own and Microsoft's
DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "ai.onnx.training", "ai.onnx.preview.training", "com.microsoft",
           "com.microsoft.nchwc")  # fmt: skip
# Operators of com.microsoft, as onnxruntime's get_all_operator_schema() lists them
MICROSOFT_NAMES = """
Attention AttnLSTM BeamSearch BiasAdd BiasDropout BiasGelu BiasSoftmax BiasSplitGelu BifurcationDetector
BitmaskBiasDropout BitmaskDropout CDist ComplexMul ComplexMulConj ConvTransposeWithDynamicPads CropAndResize
DecoderAttention DecoderMaskedMultiHeadAttention DecoderMaskedSelfAttention DequantizeBFP DequantizeLinear
DequantizeWithOrder DynamicQuantizeLSTM DynamicQuantizeMatMul DynamicTimeWarping EPContext EmbedLayerNormalization
ExpandDims FastGelu FusedConv FusedGemm FusedMatMul FusedMatMulActivation GatedRelativePositionBias GatherND Gelu
GemmFastGelu GemmFloat8 GemmaRotaryEmbedding GreedySearch GridSample GroupNorm GroupQueryAttention Inverse Irfft
IsAllFinite LongformerAttention MatMulBnb4 MatMulFpQ4 MatMulInteger16 MatMulIntegerToFloat MatMulNBits
MaxpoolWithMask MoE MulInteger MultiHeadAttention MurmurHash3 NGramRepeatBlock NhwcConv NhwcFusedConv NhwcMaxPool
PackedAttention PackedMultiHeadAttention Pad QAttention QEmbedLayerNormalization QGemm QLinearAdd QLinearAveragePool
QLinearConcat QLinearConv QLinearGlobalAveragePool QLinearLeakyRelu QLinearMul QLinearReduceMean QLinearSigmoid
QLinearSoftmax QLinearWhere QMoE QOrderedAttention QOrderedGelu QOrderedLayerNormalization
QOrderedLongformerAttention QOrderedMatMul QuantizeBFP QuantizeLinear QuantizeWithOrder QuickGelu Range
ReduceSumInteger RelativePositionBias RemovePadding RestorePadding Rfft RotaryEmbedding SampleOp Sampling
SkipGroupNorm SkipLayerNormalization SkipSimplifiedLayerNormalization Snpe SparseAttention SparseToDenseMatMul
Tokenizer TorchEmbedding TransposeMatMul Trilu UnfoldTensor Unique WhisperBeamSearch WordConvEmbedding
"""
MICROSOFT = frozenset(MICROSOFT_NAMES.split())
# The only operators that the CPU provider computes in bfloat16 (docs/OperatorKernels.md of ONNX Runtime 1.18)
BFLOAT16 = {"Cast", "CastLike", "Constant", "Identity", "If", "Loop", "Scan", "Shape", "Size", "Reshape", "Squeeze",
            "Unsqueeze", "Flatten"}  # fmt: skip


def infer_output_shapes(model: onnx.ModelProto) -> tuple[dict[str, Shape | None], list[str]]:
    """Return each output's shape in ONNX Runtime (None: unknown rank), and bfloat16 operators without a CPU kernel.

    Sizes are inferred from the operators, then merged with the sizes that the file declares: a number beats a symbol,
    two different numbers give a variable size.
    """
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    for value in bare.graph.output:
        if value.type.HasField("tensor_type"):
            value.type.tensor_type.ClearField("shape")
    try:
        bare = onnx.shape_inference.infer_shapes(bare, data_prop=True)
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError):
        return {value.name: read_shape(value) for value in model.graph.output}, []
    inferred = {value.name: read_shape(value) for value in bare.graph.output}
    shapes = {value.name: merge_shapes(read_shape(value), inferred.get(value.name)) for value in model.graph.output}
    values = [*bare.graph.input, *bare.graph.value_info, *bare.graph.output]
    rounded = {v.name for v in values if v.type.tensor_type.elem_type == onnx.TensorProto.BFLOAT16}
    lacking = {node.op_type for node in bare.graph.node if rounded & set(node.input) and node.op_type not in BFLOAT16}
    return shapes, sorted(lacking)


def read_shape(value: Any) -> Shape | None:
    """Return a declared shape, None if there is none; a symbolic or absent size is -1."""
    if not value.type.tensor_type.HasField("shape"):
        return None
    return tuple(size.dim_value if size.HasField("dim_value") else -1 for size in value.type.tensor_type.shape.dim)


def merge_shapes(declared: Shape | None, inferred: Shape | None) -> Shape | None:
    """Merge two shapes as ONNX Runtime does (Graph::MergeShapeInfo); None if their ranks differ."""
    if declared is None or inferred is None:
        return inferred if declared is None else declared
    if len(declared) != len(inferred):
        return None
    return tuple(a if a == b or b == -1 else b if a == -1 else -1 for a, b in zip(declared, inferred, strict=True))


def mend_model(model: onnx.ModelProto) -> None:
    """Change in `model` what ONNX Runtime takes and onnx.checker refuses, so that the checker takes it, too.

    These are: nodes in any order, ONNX Runtime's domains that are not imported, a graph without a name. Tried with
    ONNX Runtime 1.19.2.
    """
    model.graph.name = model.graph.name or "graph"
    imported = {opset.domain for opset in model.opset_import}
    for domain in sorted({node.domain for node in model.graph.node} - imported - {"", "ai.onnx"}):
        if domain in DOMAINS:
            model.opset_import.append(onnx.helper.make_opsetid(domain, 3 if domain == "ai.onnx.ml" else 1))
    waiting = list(model.graph.node)
    made_later = {name for node in waiting for name in node.output if name}
    ordered: list[onnx.NodeProto] = []
    while waiting:
        left: list[onnx.NodeProto] = []
        for node in waiting:  # sorted nodes need one pass
            if made_later & list_names_read(node):
                left.append(node)
            else:
                made_later -= set(node.output)
                ordered.append(node)
        if len(left) == len(waiting):  # the graph has a loop; onnx.checker reports it
            return
        waiting = left
    if [id(node) for node in ordered] != [id(node) for node in model.graph.node]:
        copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in ordered]
        del model.graph.node[:]
        model.graph.node.extend(copies)


def list_names_read(node: onnx.NodeProto) -> set[str]:
    """Return the names that a node reads, with those that its subgraphs read."""
    names = set(node.input)
    for attribute in node.attribute:
        for graph in [attribute.g, *attribute.graphs]:
            for inner in graph.node:
                names |= list_names_read(inner)
    return names
