#!/usr/bin/env python3
"""Makes the models of the engine tests: random weights and a tokenizer of made-up words. Nothing is fetched.

    models.py FOLDER                       all of MODELS, each in a folder of its name
    models.py FOLDER --weights NAME SEED   other weights for one of them, in place: as if a fine-tuned model had been copied there

Random text is noise, so tests look at token ids. The weights are large enough for the attention to matter: with other KV in the
cache a model says something else (`vllm_tests/test_corruption.py` holds it to that).
"""

import argparse
import json
import random
import sys
from pathlib import Path

VOCABULARY = 8192
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rope_theta": 500000.0,
    "attention_bias": False,
    "mlp_bias": False,
}
SHARED = {
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 16384,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
}
MODELS = {
    # 15 million parameters, 8 KiB of KV per token.
    "small": LLAMA
    | SHARED
    | {
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": 64,
    },
    # 253 million parameters, 40 KiB of KV per token: the model of the bars.
    "medium": LLAMA
    | SHARED
    | {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 20,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 64,
    },
    # Two layers that see everything and four that see 256 tokens: three groups of KV for vLLM.
    "window": SHARED
    | {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "query_pre_attn_scalar": 64,
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": 256,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "attention_bias": False,
    },
}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("folder", type=Path)
    arguments.add_argument("--weights", nargs=2, metavar=("NAME", "SEED"))
    a = arguments.parse_args()
    if a.weights:
        name, seed = a.weights
        write_weights(a.folder, MODELS[name], int(seed))
        return
    for seed, (name, config) in enumerate(MODELS.items(), start=1):
        folder = a.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config, indent=1))
        parameters = write_weights(folder, config, seed)
        write_tokenizer(folder, config["max_position_embeddings"])
        print(f"engines: model {name}: {parameters / 1e6:.0f} million parameters", file=sys.stderr)


def write_weights(folder: Path, config: dict, seed: int) -> int:
    """Weights as transformers would lay them out; the number of parameters."""
    import torch
    from safetensors.torch import save_file

    torch.set_num_threads(2)
    random_numbers = torch.Generator().manual_seed(seed)
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    gemma = config["model_type"] == "gemma3_text"

    def matrix(rows: int, columns: int, gain: float = 1.0):
        # Keeps the size of what goes through it; a gain above 1 makes attention choose, and the output depend on what it chose.
        w = torch.randn(rows, columns, generator=random_numbers) * (gain * columns**-0.5)
        return w.to(torch.bfloat16)

    def norm(size: int):
        # Gemma adds 1 to it.
        return (torch.zeros(size) if gemma else torch.ones(size)).to(torch.bfloat16)

    weights = {
        "model.embed_tokens.weight": matrix(config["vocab_size"], hidden, hidden**0.5 * 0.02 if gemma else hidden**0.5),
        "model.norm.weight": norm(hidden),
        "lm_head.weight": matrix(config["vocab_size"], hidden),
    }
    for n in range(config["num_hidden_layers"]):
        layer = f"model.layers.{n}."
        weights |= {
            layer + "self_attn.q_proj.weight": matrix(queries, hidden, 1.5),
            layer + "self_attn.k_proj.weight": matrix(keys, hidden, 1.5),
            layer + "self_attn.v_proj.weight": matrix(keys, hidden, 2.0),
            layer + "self_attn.o_proj.weight": matrix(hidden, queries, 2.0),
            layer + "mlp.gate_proj.weight": matrix(inner, hidden),
            layer + "mlp.up_proj.weight": matrix(inner, hidden),
            layer + "mlp.down_proj.weight": matrix(hidden, inner),
            layer + "input_layernorm.weight": norm(hidden),
            layer + "post_attention_layernorm.weight": norm(hidden),
        }
        if gemma:
            weights |= {
                layer + "pre_feedforward_layernorm.weight": norm(hidden),
                layer + "post_feedforward_layernorm.weight": norm(hidden),
                layer + "self_attn.q_norm.weight": norm(head),
                layer + "self_attn.k_norm.weight": norm(head),
            }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return sum(w.numel() for w in weights.values())


def write_tokenizer(folder: Path, longest: int) -> None:
    """A byte-pair tokenizer of words that nobody speaks."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    rng = random.Random(7)
    syllables = [c + v for c in "bcdfghjklmnpqrstvwxyz" for v in "aeiou"]
    words = ["".join(rng.choice(syllables) for _ in range(rng.randint(1, 4))) for _ in range(6000)]
    lines = [" ".join(rng.choice(words) for _ in range(40)) for _ in range(4000)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        lines,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY - 8,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "model_max_length": longest,
        "chat_template": "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


if __name__ == "__main__":
    main()
