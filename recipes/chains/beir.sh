#!/usr/bin/env bash
# Zero-shot on BEIR (Thakur et al., 2021), as MASTER (Table 4) and RetroMAE (Table 1) report it: fine-tuned on MS MARCO, then judged
# on the collections in BEIR, a folder of BEIR folders (18 in the papers; bioasq, signal1m, trec-news and robust04 are not freely
# handed out; cqadupstack is twelve). What is not marked "paper" is ours.
#   DATA=msmarco BEIR=beir ENCODER=runs/master/export/encoder LAUNCH="deepspeed --num_gpus 8" recipes/chains/beir.sh
# Expected results: beir.md.
set -euo pipefail
. "$(dirname "$0")/stage.sh"
data=${DATA:-msmarco} beir=${BEIR:-beir} out=${OUTPUT:-beir_run} encoder=${ENCODER:-runs/master/export/encoder}
corpus=$data/corpus.tsv
training=(--corpus "$corpus" --queries "$out/train/queries.jsonl")
encoding=() searching=(--depth 1000)
judge() {   # as BEIR evaluates: queries without a relevant passage do not count, nor does a passage with the query's own id
    stage evaluate --run "$out/$1.$2.trec" --qrels "$out/$2/qrels.tsv" --measures nDCG@10 R@100 --no_positives drop --ignore_identical_ids \
        --output "$out/$1.$2.json" --per_query "$out/$1.$2.jsonl"
}

stage split --queries "$data/queries.train.tsv" --qrels "$data/qrels.train.tsv" --output "$out/train"    # paper
stage search --method bm25 "${training[@]}" --depth 200 --output "$out/bm25.train.trec"
stage mine --run "$out/bm25.train.trec" "${training[@]}" --qrels "$out/train/qrels.tsv" --depth 200 --random_fill 16 \
    --output "$out/bm25.negatives.jsonl"
train finetune --recipe retriever1 --encoder "$encoder" "${training[@]}" --candidates "$out/bm25.negatives.jsonl" \
    --max_query_tokens 64 --max_passage_tokens 256 --output "$out/retriever1"   # BEIR's queries are longer than MS MARCO's

for collection in "$beir"/*/ "$beir"/cqadupstack/*/; do
    [ -f "$collection/corpus.jsonl" ] || continue
    name=$(basename "$collection")
    stage split --queries "$collection" --qrels "$collection/qrels/test.tsv" --unknown_ids drop --output "$out/$name"
    stage search --method bm25 --corpus "$collection" --queries "$out/$name/queries.jsonl" --output "$out/bm25.$name.trec"
    judge bm25 "$name"
    train encode --model "$out/retriever1/export/retriever" --corpus "$collection" --output "$out/retriever1.$name.vectors"
    stage search --model "$out/retriever1/export/retriever" --embeddings "$out/retriever1.$name.vectors" \
        --queries "$out/$name/queries.jsonl" "${searching[@]}" --output "$out/retriever1.$name.trec"
    judge retriever1 "$name"
done
stage report --chain "$out"
