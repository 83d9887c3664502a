#!/usr/bin/env bash
# MASTER (Zhou et al., 2022) on MS MARCO passages: the three retrievers and the reranker of its section 4.3 and appendix B, which
# follow SimLM. "Paper" marks what the papers say, "code" what only released code does; what is not marked is ours. Each training
# starts from recipes/finetune/STAGE.yaml, which has the rest of the papers' values.
#   DATA=msmarco ENCODER=runs/master/export/encoder LAUNCH="deepspeed --num_gpus 8" recipes/chains/msmarco_master.sh
# DATA has corpus.tsv (pid, title, text: the published numbers all use this title-augmented corpus), queries.*.tsv and qrels.*.tsv.
# Expected results: msmarco_master.md.
set -euo pipefail
. "$(dirname "$0")/stage.sh"
data=${DATA:-msmarco} out=${OUTPUT:-msmarco_master}
encoder=${ENCODER:-runs/master/export/encoder}                   # paper: pretrain.py --recipe master
teacher=${TEACHER:-google/electra-base-discriminator}            # paper
corpus=$data/corpus.tsv
training=(--corpus "$corpus" --queries "$out/train/queries.jsonl")
encoding=() searching=(--depth 1000) measures=(--measures MRR@10 R@50 R@1000 nDCG@10)
mining=(--random_fill 16)                                          # the fill is for queries that find fewer
retriever=(--max_query_tokens 32 --max_passage_tokens 144)       # paper

stage split --queries "$data/queries.train.tsv" --qrels "$data/qrels.train.tsv" --output "$out/train"
stage split --queries "$data/queries.dev.small.tsv" --qrels "$data/qrels.dev.small.tsv" --output "$out/dev"
for year in 19 20; do
    stage split --queries "$data/msmarco-test20$year-queries.tsv" --qrels "$data/20${year}qrels-pass.txt" --output "$out/trec$year"
done
trec() { # SYSTEM: TREC DL's grades count from 2
    local year
    for year in 19 20; do
        stage evaluate --run "$out/$1.trec$year.trec" --qrels "$out/trec$year/qrels.tsv" --relevant_from 2 "${measures[@]}" \
            --output "$out/$1.trec$year.json" --per_query "$out/$1.trec$year.jsonl"
    done
}

stage search --method bm25 --k1 0.9 --b 0.4 "${training[@]}" --depth 200 --output "$out/bm25.train.trec"
stage mine --run "$out/bm25.train.trec" "${training[@]}" --qrels "$out/train/qrels.tsv" --depth 200 "${mining[@]}" \
    --random_extra 10 --output "$out/bm25.negatives.jsonl"       # code: random passages among BM25's
stage search --method bm25 --k1 0.9 --b 0.4 --corpus "$corpus" --queries "$out/dev/queries.jsonl" --output "$out/bm25.dev.trec"
judge bm25 dev

train finetune --recipe retriever1 --encoder "$encoder" "${training[@]}" --candidates "$out/bm25.negatives.jsonl" \
    "${retriever[@]}" --output "$out/retriever1"
find_with retriever1 dev
mine_with retriever1 200 "${mining[@]}"      # paper: top 200

train finetune --recipe retriever2 --encoder "$encoder" "${training[@]}" --candidates "$out/retriever1.negatives.jsonl" \
    "${retriever[@]}" --output "$out/retriever2"
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
for year in 19 20; do
    stage search --model "$out/distil/export/retriever" --embeddings "$out/distil.vectors" --queries "$out/trec$year/queries.jsonl" \
        "${searching[@]}" --output "$out/distil.trec$year.trec"
done
trec distil
stage report --chain "$out"
