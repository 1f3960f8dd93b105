"""Stand-in for TensorRT 10.1's trtexec, for machines without a GPU: it computes by ONNX Runtime and builds no engine.

It takes exactly trtexec's options, and checks the profile against the ONNX inputs. In place of a plan it writes a file
that begins with MARKER and holds the ONNX file. STAND_IN in the environment names a fault to imitate: error=0.01 (share
of the output's scale that is added to it), same, nan, fail, hang, half, killed, silent, memory, driver, mismatch (of
the timing cache) or fp32 (no tensor is fp16, whatever the options say).
"""

import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

MARKER = b"ftrt\0stand-in for a TensorRT engine\n"
CACHE = b"stand-in for a timing cache\n"
OPTIONS = """
    allocationStrategy allowGPUFallback allowWeightStreaming avgRuns avgTiming best bf16 buildDLAStandalone
    builderOptimizationLevel calib calibProfile consistency device directIO dumpLayerInfo dumpOptimizationProfile
    dumpOutput dumpProfile dumpRawBindingsToFile dumpRefit duration dynamicPlugins errorOnTimingCacheMiss
    excludeLeanRuntime exportLayerInfo exportOutput exportProfile exportTimes exposeDMA fp16 fp8 getPlanVersionOnly
    hardwareCompatibilityLevel help idleTime ignoreParsedPluginLibs infStreams inputIOFormats int4 int8 iterations
    layerDeviceTypes layerOutputTypes layerPrecisions leanDLLPath loadEngine loadInputs markDebug maxAuxStreams
    maxShapes maxShapesCalib memPoolSize minShapes minShapesCalib noBuilderCache noCompilationCache noDataTransfers
    noTF32 onnx optShapes optShapesCalib outputIOFormats percentile persistentCacheRatio pi pluginInstanceNorm
    plugins precisionConstraints preview profile profilingVerbosity refit restricted safe saveDebugTensors
    saveEngine separateProfileRun serialized setPluginsToSerialize shapes skipInference sleepTime sparsity
    staticPlugins std streams stripAllWeights stripWeights stronglyTyped tacticSources tempdir tempfileControls
    threads timeDeserialize timeRefit timingCacheFile useCudaGraph useDLACore useManagedMemory useProfile useRuntime
    useSpinWait vc verbose versionCompatible warmUp weightStreamingBudget weightless
"""

Shapes = dict[str, list[int]]


class Engine:
    """The content of a stand-in's plan: the profile, the fault to imitate, and an ONNX file."""

    def __init__(self, plan: bytes) -> None:
        if not plan.startswith(MARKER):
            fail("Serialization assertion stdVersionRead == kSERIALIZATION_VERSION failed")
        header, _, onnx = plan[len(MARKER) :].partition(b"\n")
        told = json.loads(header)
        if len(onnx) != told["size"]:
            fail("Error Code 1: Serialization (the file ends too early)")
        self.profile, self.fault = told["profile"], told["fault"]
        self.session = onnxruntime.InferenceSession(onnx, providers=["CPUExecutionProvider"])

    def run(self, request: np.ndarray) -> np.ndarray:
        least, most = (self.profile[end]["input"] for end in ("min", "max"))
        if not all(low <= size <= high for low, size, high in zip(least, request.shape, most, strict=True)):
            fail(f"input {list(request.shape)} is outside the profile {least} to {most}")
        output = self.session.run(["output"], {"input": request})[0]
        kind, _, size = self.fault.partition("=")
        if kind == "error":
            wave = np.cos(np.arange(output.size)).reshape(output.shape)
            output = (output + float(size) * np.abs(output).max() * wave).astype(np.float32)
        if kind == "same":
            output = np.repeat(output[:1], len(output), axis=0)
        if kind == "nan":
            output[-1, -1] = np.nan
        return output


def main(arguments: list[str]) -> None:
    said = f"TensorRT.trtexec [TensorRT v100100] # trtexec {' '.join(arguments)}"
    print(f"&&&& RUNNING {said}", flush=True)
    given = {}
    for word in arguments:
        name, _, value = word.partition("=")
        if name.removeprefix("--") not in OPTIONS.split() or not name.startswith("--"):
            fail(f"Unknown option: {name} {value}", said)
        given[name] = value
    fault = os.environ.get("STAND_IN", "")
    if fault == "driver":
        fail("CUDA initialization failure with error: 35: CUDA driver version is insufficient for CUDA runtime", said)
    if "--onnx" in given:
        build(given, fault, said)
    else:
        infer(given)
    if fault == "silent":
        return
    print(f"&&&& PASSED {said}", flush=True)


def build(given: dict[str, str], fault: str, said: str) -> None:
    profile = {end: shapes(given[f"--{end}Shapes"]) for end in ("min", "opt", "max")}
    onnx = Path(given["--onnx"]).read_bytes()
    check_profile(onnx, profile)
    cache = Path(given.get("--timingCacheFile", "/nonexistent"))
    if cache.exists() and not cache.read_bytes().startswith(CACHE):
        fail("IBuilderConfig::createTimingCache: Error Code 3: API Usage (timing cache magic tag failed)\n"
             "[E] TimingCache creation failed", said)  # fmt: skip
    if cache.exists() and fault == "mismatch":
        print("[W] [TRT] The timing cache will not be used: it is of a different device", flush=True)
    elif cache.exists():
        print(f"[I] Loaded {cache.stat().st_size} bytes of timing cache from {cache}", flush=True)
    header = json.dumps({"profile": profile, "fault": fault, "size": len(onnx)}).encode() + b"\n"
    plan = Path(given["--saveEngine"])
    if fault == "fail":
        fail("Error Code 10: Internal Error (Could not find any implementation for node)", said)
    if fault == "memory":
        fail("[TRT] 1: [defaultAllocator.cpp::allocate] Error Code 1: Cuda Runtime (out of memory)", said)
    if fault == "hang":
        time.sleep(3600)
    if fault in ("half", "killed"):
        plan.write_bytes((MARKER + header + onnx)[: len(onnx) // 2 if fault == "half" else 10])
        if fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
            os._exit(137)  # process 1 of a container ignores its own signals
        return
    plan.write_bytes(MARKER + header + onnx)
    print("[I] Engine built in 0.5 sec.", flush=True)
    if "--exportLayerInfo" in given:
        kind = "Half" if "--stronglyTyped" in given and fault != "fp32" else "Float"
        layer = {"Name": "all", "Outputs": [{"Name": "output", "Format/Datatype": kind}]}
        Path(given["--exportLayerInfo"]).write_text(json.dumps({"Layers": [layer], "Bindings": ["input", "output"]}))
    if "--timingCacheFile" in given:
        cache.write_bytes(CACHE + b"times\n" * (cache.exists() + 1))
    if "--skipInference" not in given:
        request = np.random.default_rng().random(profile["opt"]["input"], dtype=np.float32)
        start = time.perf_counter()
        Engine(plan.read_bytes()).run(request)
        took = f"{1000 * (time.perf_counter() - start):g} ms"
        print(f"[I] Latency: min = {took}, max = {took}, mean = {took}, median = {took}, percentile(90%) = {took}, "
              f"percentile(95%) = {took}, percentile(99%) = {took}", flush=True)  # fmt: skip


def check_profile(onnx: bytes, profile: dict[str, Shapes]) -> None:
    for tensor in onnxruntime.InferenceSession(onnx, providers=["CPUExecutionProvider"]).get_inputs():
        least, usual, most = (profile[end].get(tensor.name) for end in ("min", "opt", "max"))
        if not (least and usual and most) or not len(least) == len(usual) == len(most) == len(tensor.shape):
            fail(f"Static dimension mismatch while setting input shape of {tensor.name}: {profile}")
        for low, middle, high, size in zip(least, usual, most, tensor.shape, strict=True):
            if not low <= middle <= high or (isinstance(size, int) and not low == high == size):
                fail(f"input {tensor.name}: {least}, {usual}, {most} do not fit {tensor.shape}")


def infer(given: dict[str, str]) -> None:
    engine = Engine(Path(given["--loadEngine"]).read_bytes())
    shape = shapes(given["--shapes"])["input"]
    name, _, file = given["--loadInputs"].partition(":")
    stored = np.fromfile(file, np.float32)
    if name != "input" or stored.size != np.prod(shape):
        fail(f"{file} holds {stored.size} numbers, {shape} are expected")
    output = engine.run(stored.reshape(shape))
    # As C++ prints them: six digits
    values = ", ".join(f"{value:.6g}" for value in output.ravel())
    size = "x".join(map(str, output.shape))
    tensor = f'{{ "name" : "output"\n  , "dimensions" : "{size}"\n  , "values" : [ {values} ]\n  }}'
    Path(given["--exportOutput"]).write_text(f"[\n  {tensor}\n]\n")


def shapes(text: str) -> Shapes:
    return {name: [int(size) for size in sizes.split("x")] for name, sizes in re.findall(r"(\w+):([\dx]+)", text)}


def fail(what: str, said: str = "") -> Any:
    print(f"[E] {what}\n&&&& FAILED {said}", flush=True)
    sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
