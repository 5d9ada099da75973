"""How far PEFT's own losses go from float32's when the base is in bfloat16: the reference run's fifty steps, on a GPU.

Takes the folder of reference figures and a device; prints one JSON object with the furthest, as a share of the loss, for
each way in which torch computes attention. Run by `tests/gpu`.
"""

import json
import os
import pathlib
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

import peft
import torch
import transformers


def furthest(gqa, batches, steps, device, attention):
    base = transformers.AutoModelForCausalLM.from_pretrained(
        gqa / "base", dtype=torch.bfloat16, attn_implementation=attention
    )
    # Adapters are float32, as PEFT casts them.
    net = peft.PeftModel.from_pretrained(base, gqa / "adapter_init", is_trainable=True).to(device).train()
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    most = 0.0
    for batch, want in zip(batches, steps):
        inputs = {name: torch.tensor(batch[name], device=device) for name in ["input_ids", "attention_mask", "labels"]}
        with torch.autocast(device.split(":")[0], dtype=torch.bfloat16):
            loss = net(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = want["lr"]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        most = max(most, abs(loss.item() - want["loss"]) / want["loss"])
    return most


def main():
    shared, device = pathlib.Path(sys.argv[1]), sys.argv[2]
    gqa = shared / "reference/gqa"
    batches = json.loads((shared / "reference/batches.json").read_text())["micro_batches"]
    steps = json.loads((gqa / "lora_full/log.json").read_text())["steps"]
    off = {attention: furthest(gqa, batches, steps, device, attention) for attention in ["sdpa", "eager"]}
    print(json.dumps({"furthest": off, "torch": torch.__version__, "peft": peft.__version__}))


main()
