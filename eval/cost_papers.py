"""The papers' own figures, for eval/cost.py to stand beside: seconds, gigabytes, microseconds, 10^9 multiply-adds."""

from __future__ import annotations

from torch import nn

RANKS = (2, 4, 8, 16, 32, 64, 128, 256)


def _seconds(*times: str) -> list[int]:
    """Seconds of "MM:SS" or "H:MM:SS"."""
    return [sum(int(part) * 60**i for i, part in enumerate(reversed(text.split(":")))) for text in times]


PAPERS = {
    "nb_lora_4": {"autodiff": (*_seconds("23:51"), 69.52), "custom": (*_seconds("22:40"), 67.19)},
    "nb_lora_5": {
        "dora": {"time": _seconds("24:46", "24:33", "24:03", "24:04", "24:05", "24:02", "24:18", "24:53"),
                 "memory": (102.41, 102.44, 102.51, 102.64, 102.90, 103.41, 104.47, 106.53)},
        "pissa": {"time": _seconds("17:44", "17:35", "17:09", "17:10", "17:12", "17:15", "17:32", "18:09"),
                  "memory": (60.92, 60.96, 61.02, 61.15, 61.41, 61.93, 62.96, 65.04)},
        "nb_lora": {"time": _seconds("18:53", "18:55", "18:26", "18:38", "18:51", "19:13", "20:15", "22:40"),
                    "memory": (60.94, 60.99, 61.08, 61.28, 61.67, 62.45, 64.05, 67.19)},
    },
    "nb_lora_6": {"product": (314.1, 311.9, 312.1, 310.7, 288.3, 323.9, 421.9, 792.6),
                  "inverse": (29.2, 30.7, 35.1, 48.3, 72.9, 97.0, 169.7, 361.3)},
    "od_lora_6": {"MetaMathQA": {"lora": (1.61, 128.54), "od_lora": (0.03 + 1.67, 129.16)},
                  "Code-Feedback": {"lora": (1.72, 128.80), "od_lora": (0.03 + 1.80, 129.77)}},
    "lora_sb_5": {"Mistral 7B": _seconds("0:02:01", "3:03:57"), "Gemma-2 9B": _seconds("0:03:46", "4:13:24"),
                  "Llama-3.2 3B": _seconds("0:03:54", "4:54:31")},
    "lora_sb_6": {
        "RoBERTa-large": (("lora", 8, 77.86), ("lora_sb", 16, 78.42), ("lora_sb", 24, 78.97)),
        "Llama-3.2 3B": (("lora", 32, 840), ("lora_sb", 64, 850), ("lora_sb", 96, 860)),
        "Mistral 7B": (("lora", 32, 1840), ("lora_sb", 64, 1860), ("lora_sb", 92, 1880)),
        "Gemma-2 9B": (("lora", 32, 3890), ("lora_sb", 64, 3930), ("lora_sb", 96, 3970)),
    },
}  # fmt: skip


def architecture(model: str) -> tuple[nn.Module, list[str]]:
    """The model that table 6 of LoRA-SB names, random, and the layers that the paper adapts in it."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    seven = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    if model == "RoBERTa-large":
        config = AutoConfig.for_model("roberta", hidden_size=1024, num_hidden_layers=24, num_attention_heads=16,
                                      intermediate_size=4096, vocab_size=50265, max_position_embeddings=514)
        roles = ["attention.self.query", "attention.self.value", "attention.output.dense", "output.dense"]
        return AutoModelForSequenceClassification.from_config(config), roles
    sizes = {
        "Llama-3.2 3B": ("llama", dict(hidden_size=3072, intermediate_size=8192, num_hidden_layers=28,
                                       num_attention_heads=24, num_key_value_heads=8, vocab_size=128256, head_dim=128)),
        "Mistral 7B": ("mistral", dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                                       num_attention_heads=32, num_key_value_heads=8, vocab_size=32000)),
        "Gemma-2 9B": ("gemma2", dict(hidden_size=3584, intermediate_size=14336, num_hidden_layers=42,
                                      num_attention_heads=16, num_key_value_heads=8, vocab_size=256000, head_dim=256)),
    }  # fmt: skip
    kind, words = sizes[model]
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, use_cache=False, **words)), seven
