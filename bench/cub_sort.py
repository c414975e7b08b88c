"""GPU instructions per element of torch.sort(x, dim=-1, stable=True): 32 rows of 4,096 or 65,536 keys of 16 or 32 bits.

    pip install --no-deps --target cuda nvidia-cuda-{nvrtc==13.0.88,cccl==13.0.85,runtime==13.0.96,crt==13.0.88}
    python bench/cub_sort.py cuda

Compiles for sm_90, without a GPU, the routines of CUB that torch 2.13 calls (aten/src/ATen/native/cuda/Sort.cpp, Sort.cu,
SortStable.cu), with its types, and counts lanes x machine instructions issued. One CTA sorts a row of 4,096; rows of 65,536 are
sorted as one, by key, and then as 64-bit (row, position) by row. The audit counts ours: `_bucket_sort_*`, slots_per_unit.
Assumed: full tiles, one look back per tile that finds its value at once, keys below 2^15, so that passes over the upper 16 bits
copy. Left out: kernels that scan or clear counters, and at 4,096 the copies before the sort.
"""

import argparse
import csv
import ctypes
import importlib.util
import re
import subprocess
import tempfile
from pathlib import Path

SOURCE = r""" // torch counts elements in int64_t and hides the type of values
#include <cub/device/dispatch/kernels/radix_sort.cuh>
#include <cub/device/dispatch/tuning/tuning_radix_sort.cuh>
using namespace cub; using Long = long long; using Offset = unsigned long long; struct alignas(8) Value { Offset data; };
template <class K, class V> using Policy = typename detail::radix::policy_hub<K, V, Offset>::MaxPolicy::ActivePolicy;
template <class T> struct Strided { T* data; unsigned stride; using iterator_category = ::cuda::std::random_access_iterator_tag;
  using value_type = T; using reference = T&; using pointer = T*; using difference_type = unsigned;
  __device__ T& operator[](unsigned i) const { return data[i * stride]; }
  __device__ Strided operator+(unsigned i) const { return {data + i * stride, stride}; } };
#define EACH(N) _Pragma("unroll 1") for (Long p = blockIdx.x * Long(blockDim.x) + threadIdx.x; p < N; p += blockDim.x * gridDim.x)
#define KERNEL(NAME, THREADS) extern "C" __global__ void __launch_bounds__(THREADS) NAME
#define SORT(BITS, K, THREADS, ITEMS) DEVICE_SORT(keys_##BITS, K, Value, THREADS, ITEMS, BITS) \
KERNEL(row_##BITS, 128)(K* keys, Long* values, unsigned size, unsigned row, unsigned stride) { \
  using LoadK = BlockLoad<K, 128, 32, BLOCK_LOAD_TRANSPOSE>; using StoreK = BlockStore<K, 128, 32, BLOCK_STORE_TRANSPOSE>; \
  using LoadV = BlockLoad<Long, 128, 32, BLOCK_LOAD_TRANSPOSE>; using StoreV = BlockStore<Long, 128, 32, BLOCK_STORE_TRANSPOSE>; \
  using Sort = BlockRadixSort<K, 128, 32, Long>; __shared__ union { typename Sort::TempStorage s; typename LoadK::TempStorage a; \
    typename LoadV::TempStorage b; typename StoreK::TempStorage c; typename StoreV::TempStorage d; } shared; \
  Strided<K> k{keys + blockIdx.x * row, stride}; Strided<Long> v{values + blockIdx.x * row, stride}; K ks[32]; Long vs[32]; \
  LoadK(shared.a).Load(k, ks, size, K(~(1u << (BITS - 1)))); __syncthreads(); LoadV(shared.b).Load(v, vs, size, 0); \
  __syncthreads(); Sort(shared.s).Sort(ks, vs); __syncthreads(); \
  StoreK(shared.c).Store(k, ks, size); __syncthreads(); StoreV(shared.d).Store(v, vs, size); } \
KERNEL(finish_##BITS, 512)(const K* keys, K* keys_out, Long* order, const int2* sorted, int rows, int length) { \
  EACH(rows * length) { int i = p, first = i / length * length, j = i % length, from = sorted[first + j].y; \
    order[first + j] = from; keys_out[first + j] = keys[first + from]; } }
#define DEVICE_SORT(NAME, K, V, THREADS, ITEMS, BITS) \
KERNEL(NAME##_onesweep, THREADS)(int* look, int* ticket, Offset* bins, K* ko, K* k, V* vo, V* v, int n, int bit, int bits) { \
  using Agent = detail::radix_sort::AgentRadixSortOnesweep<typename Policy<K, V>::OnesweepPolicy, false, K, V, Offset, int>; \
  static_assert(Agent::BLOCK_THREADS == THREADS && Agent::ITEMS_PER_THREAD == ITEMS && Agent::RADIX_BITS == 8, "policy"); \
  __shared__ typename Agent::TempStorage shared; Agent agent(shared, look, ticket, nullptr, bins, ko, k, vo, v, n, bit, bits); \
  agent.full_block = true; agent.Process(); } \
KERNEL(NAME##_histogram, 128)(Offset* bins, const K* keys, Offset size) { \
  using Agent = detail::radix_sort::AgentRadixSortHistogram<typename Policy<K, V>::HistogramPolicy, false, K, Offset>; \
  __shared__ typename Agent::TempStorage shared; typename Agent::bit_ordered_type ks[16]; \
  Agent agent(shared, bins, keys, size, 0, BITS); unsigned* counters = &agent.s.bins[0][threadIdx.x][0]; \
  for (int i = 0; i < (BITS + 7) / 8 * 256; i += 128) counters[i] = 0; \
  __syncthreads(); LoadDirectStriped<128>(threadIdx.x, agent.d_keys_in + Offset(blockIdx.x) * 2048, ks); \
  for (int i = 0; i < 16; ++i) ks[i] = Agent::Twiddle::In(ks[i], {}); agent.AccumulateSharedHistograms(0, ks); __syncthreads(); \
  for (int i = 0; i < (BITS + 7) / 8 * 256; i += 128) if (Offset c = counters[i]) atomicAdd(bins + threadIdx.x + i, c); }
KERNEL(number, 1024)(int2* out, int size, unsigned divisor, unsigned magic, unsigned shift) {
  EACH(size) { unsigned i = p, row = (__umulhi(i, magic) + i) >> shift; out[i] = int2{int(row), int(i - row * divisor)}; } }
SORT(16, short, 512, 11) SORT(32, int, 384, 14) DEVICE_SORT(rows, Long, NullType, 384, 15, 5)
"""
# a kernel with its elements per thread, its warps and its launches (of row_*: its digits); copying: tiles have one digit
CASES = {
    "4,096 int16": "row_16 32 4 4",
    "4,096 int32": "row_32 32 4 8",
    "65,536 int16": "number 1 1 1, keys_16_histogram 16 4 1, keys_16_onesweep 11 16 2, rows_histogram 16 4 1, "
    "rows_onesweep 15 12 1, finish_16 1 1 1",
    "65,536 int32": "number 1 1 1, keys_32_histogram 16 4 1, keys_32_onesweep 14 12 2, keys_32_onesweep 14 12 2 copying, "
    "rows_histogram 16 4 1, rows_onesweep 15 12 1, finish_32 1 1 1",
}


def disassemble(folder):
    """nvdisasm's text of SOURCE."""
    library, include = next(folder.rglob("libnvrtc.so.*")), next(folder.rglob("cuda_runtime.h")).parent
    ctypes.CDLL(next(library.parent.glob("libnvrtc-builtins.so.*")), ctypes.RTLD_GLOBAL)
    nvrtc, program, size = ctypes.CDLL(library), ctypes.c_void_p(), ctypes.c_size_t()
    options = ["--gpu-architecture=sm_90", "--std=c++17", f"-I{include}/cccl", f"-I{include}"]
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), SOURCE.encode(), b"sort.cu", 0, None, None)
    if failed := nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * 4)(*map(str.encode, options))):
        raise RuntimeError(f"NVRTC: error {failed}")
    nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
    nvrtc.nvrtcGetCUBIN(program, cubin := ctypes.create_string_buffer(size.value))
    nvdisasm = Path(importlib.util.find_spec("triton").origin).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(cubin.raw)
        return subprocess.run([nvdisasm, "-c", file.name], check=True, capture_output=True, text=True).stdout


def issued(text, warps, digits, bins, copying):
    """Instructions that a warp issues in the kernel of this disassembly, on average over its warps."""
    text = re.match(r"(?s).*?\sEXIT ;" if copying else r"(?s).*\sEXIT ;", text)[0]
    lines = re.findall(r"(?m)^(?:(\.L_\w+):|\s+/\*\w{4,}\*/\s+(?:@\S+\s+)?(?!NOP)([A-Z].*);)", text)
    at = {label: i for i, (label, _) in enumerate(lines) if label}
    counts, trips = [float(bool(code)) for _, code in lines], [1] * len(lines)
    for i, (_, code) in enumerate(lines):
        if (target := at.get("".join(re.findall(r"^BRA.*`\((\S+)\)", code)))) is None:
            continue
        part = slice(*sorted((i + 1, target)))
        inside = "\n".join(other for _, other in lines[part])
        # a warp clears its 256 counters, 8 per lane, in a loop over four; before it is one for those that four leave
        cleared = 0 if re.search("LDS|BAR", inside) else len(re.findall(r"(?m)^STS.* RZ", inside))
        if target <= i:  # a loop: over digits (the compiler may put the first before it), over counters, or a wait
            peeled = sum("SHFL" in other for _, other in lines[:target]) // (inside.count("SHFL") or 1)
            n = digits - peeled if "SHFL" in inside else 2 * (cleared == 4) if cleared else 1
            trips[part] = [n * trip for trip in trips[part]]
        else:  # what a branch may skip: the copy of a tile with one digit, work of one warp, of all warps, of 256 threads
            one_warp, all_warps = re.search("ATOMG|SHFL", inside), "ATOMS" in inside or cleared or not bins
            share = 0 if "EXIT" in inside or cleared == 1 else 1 / warps if one_warp else 1 if all_warps else 8 / warps
            counts[part] = [min(share, count) for count in counts[part]]
    return sum(count * n for count, n in zip(counts, trips))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="the wheels, unpacked")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cub_sort.csv")
    options = parser.parse_args()
    kernels = dict(re.findall(r"(?ms)^\.text\.(\w+):\n(.*?)(?=^\.text|\Z)", disassemble(options.folder)))
    rows = []
    for case, steps in CASES.items():
        for step in steps.split(", "):
            name, (items, warps, times) = step.split()[0], map(int, step.split()[1:4])
            slots = issued(kernels[name], warps, times, "onesweep" in name, "copying" in step) / items
            # the one CTA of a row makes its passes in one launch
            rows.append([case, step, slots if "row_" in name else slots * times])
        rows.append([case, "total", sum(slots for other, _, slots in rows if other == case)])
    with options.out.open("w", newline="") as file:
        csv.writer(file).writerows([["case", "kernel", "slots_per_element"]] + [[*row, f"{slots:.1f}"] for *row, slots in rows])
    for case, step, slots in rows:
        print(f"{case:<13} {step:<32} {slots:7.1f}")


if __name__ == "__main__":
    main()
