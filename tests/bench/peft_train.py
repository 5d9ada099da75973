"""The peer of `lorafleet bench train`: the same step with Hugging Face PEFT and torch, on the CPU or a GPU.

Takes the same flags and prints the same keys, one JSON object. Run by `train.py`, which installs what it needs, and by
`tests/gpu`. `--precision-mode 4bit` needs bitsandbytes.
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

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in [
        ("hidden", 512), ("intermediate", 1376), ("layers", 8), ("heads", 8), ("vocab", 4096),
        ("batch", 4), ("seq", 256), ("rank", 16), ("warmup", 2), ("steps", 10), ("seed", 0),
    ]:  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--kv-heads", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision-mode", default="float32", choices=[*DTYPES, "4bit"])
    parser.add_argument("--compute-dtype", default="float32", choices=DTYPES)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    return parser.parse_args()


def in_4_bits(net, dtype, device):
    """Puts bitsandbytes' NF4 with double quantisation in the place of each linear layer but the head."""
    import bitsandbytes

    for name, linear in list(net.named_modules()):
        if not isinstance(linear, torch.nn.Linear) or name.endswith("lm_head"):
            continue
        quantised = bitsandbytes.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=False, compute_dtype=dtype, quant_type="nf4"
        )
        quantised.weight = bitsandbytes.nn.Params4bit(
            linear.weight.data.to("cpu"), requires_grad=False, quant_type="nf4", module=quantised
        )
        parent, _, child = name.rpartition(".")
        setattr(net.get_submodule(parent), child, quantised.to(device))
    net.is_loaded_in_4bit = True


def model(args, dtype):
    """A Llama of random weights, all its linear layers but the head with a LoRA adapter in float32."""
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
    torch.set_default_dtype(dtype)
    with torch.device(args.device):
        net = transformers.LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    if args.precision_mode == "4bit":
        in_4_bits(net, dtype, args.device)
    net = peft.get_peft_model(net, lora)
    if args.gradient_checkpointing:
        net.enable_input_require_grads()
        net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return net


def main():
    args = arguments()
    on_gpu = args.device.startswith("cuda")
    kind = args.compute_dtype if args.precision_mode == "4bit" else args.precision_mode
    dtype = DTYPES[kind]
    torch.manual_seed(args.seed)
    net = model(args, dtype).train()
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.01, fused=on_gpu)
    scaler = torch.amp.GradScaler(enabled=on_gpu and dtype == torch.float16)
    seconds = []
    for step in range(args.warmup + args.steps):
        ids = torch.randint(args.vocab, (args.batch, args.seq)).to(args.device)
        if on_gpu and step == args.warmup:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        with torch.autocast(args.device.split(":")[0], dtype=dtype, enabled=dtype != torch.float32):
            loss = net(input_ids=ids, labels=ids).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if on_gpu:
            torch.cuda.synchronize()
        if step >= args.warmup:
            seconds.append(time.perf_counter() - started)
    median = statistics.median(seconds)
    tokens = args.batch * args.seq
    gpu = {}
    if on_gpu:
        free, total = torch.cuda.mem_get_info()
        gpu = {
            "gpu": torch.cuda.get_device_name(),
            "peak_memory_bytes": torch.cuda.max_memory_allocated(),
            "reserved_memory_bytes": torch.cuda.max_memory_reserved(),
            "device_used_bytes": total - free,
        }
    print(json.dumps({
        "benchmark": "train",
        **{name: value for name, value in vars(args).items() if value is not None},
        "threads": torch.get_num_threads(),
        "step_seconds": {"median": median, "min": min(seconds), "max": max(seconds)},
        "tokens_per_second": tokens / median,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        **gpu,
        "trainable_parameters": sum(p.numel() for p in trained),
        "loss": loss.item(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }))  # fmt: skip


main()
