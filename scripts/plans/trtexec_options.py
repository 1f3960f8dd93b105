"""Check further options for trtexec of TensorRT 10.1: python -m scripts.plans.trtexec_options 'OPTIONS'

Exit status 1 and a sentence if an option is unknown, given twice, lacks its value, is of an older release, or makes a
plan that cannot be served.  Source of the lists: samples/common/sampleOptions.cpp of TensorRT, release/10.1.
"""

import os
import shlex
import sys
from collections.abc import Sequence

from scripts.serve.releases import find_release, list_releases, read_table

TENSORRT = "10.1"  # these lists are of its trtexec; options for another release are left to that trtexec


def split_words(text: str) -> frozenset[str]:
    """Return the words of a text."""
    return frozenset(text.split())


FLAGS = split_words("""
    --allowGPUFallback --allowWeightStreaming --best --bf16 --buildDLAStandalone --consistency --directIO
    --dumpLayerInfo --dumpOptimizationProfile --dumpOutput --dumpProfile --dumpRawBindingsToFile --dumpRefit
    --errorOnTimingCacheMiss --excludeLeanRuntime --exposeDMA --fp16 --fp8 --getPlanVersionOnly --help
    --ignoreParsedPluginLibs --int4 --int8 --noBuilderCache --noCompilationCache --noDataTransfers --noTF32
    --pluginInstanceNorm --pi --refit --restricted --safe --separateProfileRun --skipInference --std
    --stripAllWeights --stripWeights --stronglyTyped --threads --timeDeserialize --timeRefit --useCudaGraph
    --useManagedMemory --useSpinWait --vc --verbose --versionCompatible --weightless""")
VALUED = split_words("""
    --allocationStrategy --avgRuns --avgTiming --builderOptimizationLevel --calib --calibProfile --device --duration
    --dynamicPlugins --exportLayerInfo --exportOutput --exportProfile --exportTimes --hardwareCompatibilityLevel
    --idleTime --infStreams --inputIOFormats --iterations --layerDeviceTypes --layerOutputTypes --layerPrecisions
    --leanDLLPath --loadEngine --loadInputs --markDebug --maxAuxStreams --maxShapes --maxShapesCalib --memPoolSize
    --minShapes --minShapesCalib --onnx --optShapes --optShapesCalib --outputIOFormats --percentile
    --persistentCacheRatio --plugins --precisionConstraints --preview --profile --profilingVerbosity
    --saveDebugTensors --saveEngine --serialized --setPluginsToSerialize --shapes --sleepTime --staticPlugins --streams
    --tacticSources --tempdir --tempfileControls --timingCacheFile --useDLACore --useProfile --useRuntime --warmUp
    --weightStreamingBudget""")
EITHER = frozenset({"--sparsity"})  # without a value it means enable
REPEATED = frozenset({"--plugins", "--staticPlugins", "--dynamicPlugins", "--setPluginsToSerialize"})
# OURS are given by this project; PRECISIONS change the precision, which comes from the types in the ONNX file
OURS = split_words("""
    --onnx --saveEngine --loadEngine --minShapes --optShapes --maxShapes --shapes --timingCacheFile --device
    --exportOutput --loadInputs --skipInference""")
PRECISIONS = split_words("""
    --fp16 --bf16 --fp8 --int8 --int4 --best --stronglyTyped --calib --layerPrecisions --layerOutputTypes
    --precisionConstraints --inputIOFormats --outputIOFormats --noTF32""")
OLD = {
    "--workspace": "--memPoolSize=workspace:N",
    "--maxBatch": "convertation/models.yaml, batch",
    "--batch": "convertation/models.yaml, batch",
    "--explicitBatch": "nothing: it is always on",
    "--explicitPrecision": "nothing",
    "--buildOnly": "nothing",
    "--nvtxMode": "--profilingVerbosity=…",
    "--minTiming": "--avgTiming=N",
    "--heuristic": "--builderOptimizationLevel=N",
    "--preferTrtBuilderCache": "nothing",
    "--deploy": "an ONNX file",
    "--model": "an ONNX file",
    "--uff": "an ONNX file",
    "--uffInput": "an ONNX file",
    "--output": "an ONNX file",
    "--fallbackToDefaultTactic": "nothing",
    "--cudaGraph": "--useCudaGraph",
    "--loadProfile": "--timingCacheFile=F",
}
UNSERVABLE = {
    "--stripWeights": "its plan has no weights",
    "--stripAllWeights": "its plan has no weights",
    "--weightless": "its plan has no weights",
    "--buildDLAStandalone": "it makes a DLA loadable, which is no plan",
    "--safe": "Triton does not load plans of the safety runtime",
    "--excludeLeanRuntime": "Triton has no lean runtime, which would have to load the plan",
    "--versionCompatible": "Triton loads it only with --backend-config=tensorrt,version-compatible=true",
    "--vc": "Triton loads it only with --backend-config=tensorrt,version-compatible=true",
    "--useDLACore": "its plan is for a DLA, not for a GPU",
    "--getPlanVersionOnly": "it builds nothing",
    "--help": "it builds nothing",
}


def split_options(flags: str) -> list[str]:
    """Split a text into options as a shell does; SystemExit if its quotes do not match."""
    try:
        return shlex.split(flags)
    except ValueError as error:
        raise SystemExit(f"TRTEXEC_FLAGS={flags}: {error}") from None


def check_options(more: Sequence[str], given: Sequence[str] = ("--verbose",), name: str | None = None) -> None:
    """SystemExit with a sentence on the first option that trtexec refuses or that makes a plan Triton cannot serve.

    `given`: the options that trtexec gets besides; `name`: NVIDIA's release of the images (None: NGC_RELEASE).
    """
    asked = name or os.environ.get("NGC_RELEASE", "")
    known = not asked or asked in list_releases(read_table())
    tensorrt = find_release(asked).tensorrt if known else ""  # an unknown release: its trtexec checks
    seen = {word.partition("=")[0] for word in given}
    for word in more:
        name, equals, value = word.partition("=")
        if reason := explain_refusal(name, bool(equals), value, seen, tensorrt):
            raise SystemExit(f"TRTEXEC_FLAGS: {word}; {reason}")
        seen.add(name)


def explain_refusal(name: str, equals: bool, value: str, seen: set[str], tensorrt: str) -> str:
    """Return why an option is not passed on, "" if it is."""
    if name in PRECISIONS:
        return "another knob sets the precision: PRECISION=fp32, tf32 or fp16"
    if name in OURS or not name.startswith("--"):
        return "expected further options such as --builderOptimizationLevel=4"
    if name in seen and name not in REPEATED:
        return "it is already given; leave it out"
    if not f"{tensorrt}.".startswith(f"{TENSORRT}."):
        return ""
    if name in UNSERVABLE:
        return f"{UNSERVABLE[name]}; leave it out"
    if name in OLD:
        return f"TensorRT 10.1 no longer has it; use instead: {OLD[name]}"
    if name not in FLAGS | VALUED | EITHER:
        return f"trtexec of TensorRT 10.1 has no such option; it knows those in {__name__.replace('.', '/')}.py"
    if name in VALUED and not value:
        return f"expected a value: {name}=…"
    if name in FLAGS and equals:
        return f"it takes no value: {name}"
    return "" if not equals or value else f"expected a value: {name}=…"


def main() -> None:
    check_options(split_options(" ".join(sys.argv[1:])))


if __name__ == "__main__":
    main()
