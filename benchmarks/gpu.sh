#!/usr/bin/env bash
# Training at the published sizes, measured on one GPU without a network; the head of gpu.py lists what is measured.
#
#   bash benchmarks/gpu.sh                       all sections, at most 4 minutes; the most important come first
#   bash benchmarks/gpu.sh step agree            some of them
#   bash benchmarks/gpu.sh --tiny                tiny shapes, also on a CPU: only checks that everything runs
#   OUT=FILE bash benchmarks/gpu.sh              where the rows go, one JSON object a line (benchmarks/gpu.jsonl)
set -euo pipefail
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
exec python benchmarks/gpu.py "$@" --out "${OUT:-benchmarks/gpu.jsonl}"
