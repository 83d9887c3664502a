#!/usr/bin/env bash
# RetroMAE (Xiao et al., EMNLP 2022) on MS MARCO passages: its DPR (Table 2), ANCE (Tables 3 and 4) and distilled (Table 5) models
# are retriever1, retriever2 and distil here. "Code" marks what only its released code does; what is not marked is ours.
#   DATA=msmarco ENCODER=runs/retromae/export/encoder LAUNCH="deepspeed --num_gpus 8" recipes/chains/msmarco_retromae.sh
# DATA is that of msmarco_master.sh. Expected results: msmarco_retromae.md.
set -euo pipefail
. "$(dirname "$0")/stage.sh"
data=${DATA:-msmarco} out=${OUTPUT:-msmarco_retromae}
encoder=${ENCODER:-runs/retromae/export/encoder}                 # paper: pretrain.py --recipe retromae
teacher=${TEACHER:-google/electra-base-discriminator}
corpus=$data/corpus.tsv
training=(--corpus "$corpus" --queries "$out/train/queries.jsonl")
encoding=() searching=(--depth 1000) measures=(--measures MRR@10 MRR@100 R@10 R@100 R@1000)
mining=(--random_fill 16)
retriever=(--max_query_tokens 32 --max_passage_tokens 144 --no_normalise --temperature 1)    # code: plain dot product
dpr=(--global_batch 128 --num_negatives 15 --learning_rate 2e-5 --epochs 4 --warmup_share 0.1 --no_all_pairs)   # code

stage split --queries "$data/queries.train.tsv" --qrels "$data/qrels.train.tsv" --output "$out/train"
stage split --queries "$data/queries.dev.small.tsv" --qrels "$data/qrels.dev.small.tsv" --output "$out/dev"

stage search --method bm25 --k1 0.9 --b 0.4 "${training[@]}" --depth 200 --output "$out/bm25.train.trec"
stage mine --run "$out/bm25.train.trec" "${training[@]}" --qrels "$out/train/qrels.tsv" --depth 200 "${mining[@]}" \
    --output "$out/bm25.negatives.jsonl"
stage search --method bm25 --k1 0.9 --b 0.4 --corpus "$corpus" --queries "$out/dev/queries.jsonl" --output "$out/bm25.dev.trec"
judge bm25 dev

train finetune --recipe retriever1 --encoder "$encoder" "${training[@]}" --candidates "$out/bm25.negatives.jsonl" \
    "${retriever[@]}" "${dpr[@]}" --output "$out/retriever1"
find_with retriever1 dev
mine_with retriever1 200 "${mining[@]}"      # code: ANCE's negatives from the top 200

train finetune --recipe retriever2 --encoder "$encoder" "${training[@]}" --candidates "$out/retriever1.negatives.jsonl" \
    "${retriever[@]}" "${dpr[@]}" --output "$out/retriever2"
find_with retriever2 dev
mine_with retriever2 200 "${mining[@]}"

train finetune --recipe reranker --encoder "$teacher" "${training[@]}" --candidates "$out/retriever2.negatives.jsonl" \
    --max_pair_tokens 192 --output "$out/reranker"
train score --model "$out/reranker/export/reranker" "${training[@]}" --candidates "$out/retriever2.negatives.jsonl" --output "$out/scored.jsonl"
train score --model "$out/reranker/export/reranker" --corpus "$corpus" --queries "$out/dev/queries.jsonl" --run "$out/retriever2.dev.trec" \
    --depth 200 --output "$out/reranker.dev.trec"
judge reranker dev

train finetune --recipe distil --encoder "$encoder" "${training[@]}" --candidates "$out/scored.jsonl" "${retriever[@]}" --output "$out/distil"
find_with distil dev
stage report --chain "$out"
