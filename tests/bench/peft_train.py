"""The peer of `lorafleet bench train`: the same step with Hugging Face PEFT and torch on the CPU.

Takes the same flags and prints the same keys, one JSON object. Run by `train.py`, which installs what it needs.
"""

import argparse
import json
import os
import resource
import statistics
import time

os.environ["HF_HUB_OFFLINE"] = "1"

import peft
import torch
import transformers


def arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in [
        ("hidden", 512), ("intermediate", 1376), ("layers", 8), ("heads", 8), ("vocab", 4096),
        ("batch", 4), ("seq", 256), ("rank", 16), ("warmup", 2), ("steps", 10), ("seed", 0),
    ]:  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--kv-heads", type=int)
    return parser.parse_args()


def model(args):
    """A Llama of random weights, all its linear layers but the head with a LoRA adapter."""
    config = transformers.LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads or args.heads,
        vocab_size=args.vocab,
        max_position_embeddings=args.seq,
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="sdpa",
    )
    lora = peft.LoraConfig(
        r=args.rank, lora_alpha=2 * args.rank, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(transformers.LlamaForCausalLM(config), lora)


def main():
    args = arguments()
    torch.manual_seed(args.seed)
    net = model(args).train()
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.01)
    seconds = []
    for step in range(args.warmup + args.steps):
        ids = torch.randint(args.vocab, (args.batch, args.seq))
        started = time.perf_counter()
        loss = net(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step >= args.warmup:
            seconds.append(time.perf_counter() - started)
    median = statistics.median(seconds)
    tokens = args.batch * args.seq
    print(json.dumps({
        "benchmark": "train",
        **{name: value for name, value in vars(args).items() if value is not None},
        "threads": torch.get_num_threads(),
        "step_seconds": {"median": median, "min": min(seconds), "max": max(seconds)},
        "tokens_per_second": tokens / median,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "trainable_parameters": sum(p.numel() for p in trained),
        "loss": loss.item(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }))  # fmt: skip


main()
