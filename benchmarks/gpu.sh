#!/usr/bin/env bash
# Figures of published sizes on one GPU, without a network: see the head of gpu.py.
#
#   bash benchmarks/gpu.sh                       all sections, at most 4 minutes; the most important come first
#   bash benchmarks/gpu.sh step agree            some of them
#   bash benchmarks/gpu.sh --tiny                tiny shapes, on a CPU too: only checks that everything runs
#   OUT=FILE bash benchmarks/gpu.sh              the rows, one JSON object a line (benchmarks/gpu.jsonl)
set -euo pipefail
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
exec python benchmarks/gpu.py "$@" --out "${OUT:-benchmarks/gpu.jsonl}"
