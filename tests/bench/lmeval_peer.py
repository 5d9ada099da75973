#!/usr/bin/env python3
"""lm-evaluation-harness on what `lorafleet eval` is asked, for tests/bench/eval.py; run by its virtual environment.

    lmeval_peer.py model TOKENIZER DIR                       # a Llama of random weights with that tokenizer
    lmeval_peer.py ask MODEL TASK FILE NUM_FEWSHOT BATCH LIMIT     # prints requests a second, and the answers, as JSON
"""

import contextlib
import json
import os
import pathlib
import shutil
import sys
import tempfile
import time

# Everything lies on this machine.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def make(tokenizer, to):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000, hidden_size=384, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=6,
        num_key_value_heads=6, max_position_embeddings=2048, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(to)
    for file in pathlib.Path(tokenizer).iterdir():
        shutil.copy(file, to)


# The harness's own tasks, on a local file in the layout of the hub.
TASKS = {
    "arc_challenge": {
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{choices.label.index(answerKey)}}",
        "doc_to_choice": "{{choices.text}}",
    },
    "hellaswag": {"doc_to_text": "{{query}}", "doc_to_target": "{{label}}", "doc_to_choice": "choices"},
}


def row(task, document):
    if task == "arc_challenge":
        choices = document["question"]["choices"]
        return {
            "question": document["question"]["stem"], "answerKey": document["answerKey"],
            "choices": {"text": [c["text"] for c in choices], "label": [c["label"] for c in choices]},
        }
    from lm_eval.tasks.hellaswag.utils import preprocess

    context = document["ctx_a"] + " " + document["ctx_b"].capitalize()
    return {
        "query": preprocess(document["activity_label"] + ": " + context), "label": int(document["label"]),
        "choices": [preprocess(ending) for ending in document["endings"]],
    }


def ask(model, task, file, shots, batch, limit):
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    with tempfile.TemporaryDirectory() as folder:
        rows = [row(task, json.loads(line)) for line in pathlib.Path(file).read_text().splitlines()]
        local = pathlib.Path(folder, "test.jsonl")
        local.write_text("".join(json.dumps(each) + "\n" for each in rows))
        config = {
            "task": task, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(local)}},
            "test_split": "test", "fewshot_split": "test", "output_type": "multiple_choice",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}], **TASKS[task],
        }
        lm = HFLM(pretrained=model, device="cpu", dtype="float32", batch_size=batch)
        asked, seconds = 0, 0.0
        answer = lm.loglikelihood

        def timed(requests, *rest, **options):
            nonlocal asked, seconds
            began = time.perf_counter()
            answers = answer(requests, *rest, **options)
            seconds += time.perf_counter() - began
            asked += len(requests)
            return answers

        lm.loglikelihood = timed
        results = lm_eval.simple_evaluate(model=lm, tasks=[config], num_fewshot=shots, limit=limit, log_samples=True, bootstrap_iters=0)
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    answers = [[float(response[0][0]) for response in sample["resps"]] for sample in samples]
    return {"requests_per_second": asked / seconds, "answers": answers}


def main():
    if sys.argv[1] == "model":
        return make(*sys.argv[2:])
    model, task, file, *numbers = sys.argv[2:]
    # The harness talks to people there.
    with contextlib.redirect_stdout(sys.stderr):
        result = ask(model, task, file, *map(int, numbers))
    print(json.dumps(result))


main()
