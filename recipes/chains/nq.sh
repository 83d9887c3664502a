#!/usr/bin/env bash
# MASTER on Natural Questions: retriever1 and retriever2, judged by answer match (Table 3). "Paper" marks what the paper says; what
# is not marked is ours. DATA has DPR's files: psgs_w100.tsv (21,015,324 passages), biencoder-nq-train.json, nq-dev.csv, nq-test.csv.
#   DATA=nq ENCODER=runs/master_nq/export/encoder LAUNCH="deepspeed --num_gpus 8" recipes/chains/nq.sh
# Expected results: nq.md.
set -euo pipefail
. "$(dirname "$0")/stage.sh"
data=${DATA:-nq} out=${OUTPUT:-nq_run} encoder=${ENCODER:-runs/master_nq/export/encoder}   # paper: pre-trained on these passages
corpus=$data/psgs_w100.tsv
training=(--corpus "$corpus" --queries "$out/train/queries.jsonl")
mining=(--answers "$out/train/answers.jsonl" --random_fill 16)       # passages that contain an answer are no negatives
encoding=() searching=(--depth 100)
retriever=(--max_query_tokens 32 --max_passage_tokens 192 --learning_rate 1e-5 --epochs None --steps 20000)    # paper
judge() {   # answer match at 20 and 100 (paper)
    stage evaluate --run "$out/$1.$2.trec" --answers "$out/$2/answers.jsonl" --corpus "$corpus" --answer_depths 20 100 \
        --output "$out/$1.$2.json" --per_query "$out/$1.$2.jsonl"
}

stage split --queries "$data/biencoder-nq-train.json" --output "$out/train"
stage split --queries "$data/nq-dev.csv" --output "$out/dev"
stage split --queries "$data/nq-test.csv" --output "$out/test"

stage search --method bm25 --k1 0.9 --b 0.4 "${training[@]}" --depth 200 --output "$out/bm25.train.trec"
stage mine --run "$out/bm25.train.trec" "${training[@]}" --qrels "$out/train/qrels.tsv" --depth 200 "${mining[@]}" \
    --output "$out/bm25.negatives.jsonl"
for split in dev test; do
    stage search --method bm25 --k1 0.9 --b 0.4 --corpus "$corpus" --queries "$out/$split/queries.jsonl" --depth 100 --output "$out/bm25.$split.trec"
    judge bm25 "$split"
done

train finetune --recipe retriever1 --encoder "$encoder" "${training[@]}" --candidates "$out/bm25.negatives.jsonl" \
    "${retriever[@]}" --output "$out/retriever1"
find_with retriever1 dev test
mine_with retriever1 200 "${mining[@]}"

train finetune --recipe retriever2 --encoder "$encoder" "${training[@]}" --candidates "$out/retriever1.negatives.jsonl" \
    "${retriever[@]}" --output "$out/retriever2"
find_with retriever2 dev test
stage report --chain "$out"
